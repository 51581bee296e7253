"""Adapters: Hugging Face's T5 with torch modules at the same places, mixed batches, and none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.networks import parameters, t5
from prompt_tuning_jax.networks.adapters import Adapters

CONFIG = t5.T5Config(vocab_size=40, emb_dim=8, num_heads=3, num_encoder_layers=1,
                     num_decoder_layers=2, head_dim=5, mlp_dim=17, dropout_rate=0.0)
RNG = np.random.default_rng(0)
PARAMS = param_paths.unflatten({
    path: RNG.normal(size=spec.shape).astype(np.float32) * spec.shape[0] ** -0.5
    for path, spec in parameters.parameter_specs(CONFIG).items()})
INPUTS, TARGETS = (RNG.integers(2, 40, (3, width)).astype(np.int32) for width in (9, 7))
INPUTS[1, 6:] = 0
WIDTH, K = 3, 2


def drawn(sublayers, features=8):
  shapes = {'down': (features, WIDTH), 'down_bias': (WIDTH,), 'up': (WIDTH, features),
            'up_bias': (features,)}
  return {place: {name: RNG.normal(size=(layers, K, *shape)).astype(np.float32)
                  for name, shape in shapes.items()} for place, layers in sublayers.items()}


LEAVES = drawn(CONFIG.sublayers)


@jax.jit
def logits(adapters, inputs=INPUTS, targets=TARGETS):
  return t5.Transformer(CONFIG).apply({'params': PARAMS}, inputs, targets, targets,
                                      enable_dropout=False, adapters=adapters)


def alone(row):
  return Adapters(jax.tree.map(lambda leaf: leaf[:, row:row + 1], LEAVES))


def test_a_batch_that_mixes_adapters_is_each_alone():
  rows = np.array([0, 1, 1], np.int32)
  mixed = logits(Adapters(LEAVES, rows))
  for i, row in enumerate(rows):
    one = logits(alone(row), INPUTS[i:i + 1], TARGETS[i:i + 1])
    np.testing.assert_allclose(mixed[i], one[0], rtol=0, atol=2e-5)
  # Without rows all examples have the first.
  np.testing.assert_allclose(logits(Adapters(LEAVES)), logits(alone(0)), rtol=0, atol=2e-5)
  assert np.abs(logits(alone(0)) - logits(alone(1))).max() > .1


def test_adapters_that_add_nothing_are_the_base_model():
  base = logits(Adapters())
  zeros = {name: np.zeros_like for name in ('up', 'up_bias')}
  nothing = {place: {name: zeros.get(name, np.asarray)(leaf) for name, leaf in leaves.items()}
             for place, leaves in LEAVES.items()}
  np.testing.assert_array_equal(logits(Adapters(nothing)), base)
  # Every place is used: with any of them alone the numbers are others.
  for place in CONFIG.sublayers:
    assert np.abs(logits(Adapters({place: LEAVES[place]})) - base).max() > 1e-2, place


def test_one_adapter_keeps_the_dtype_of_what_it_is_given():
  x = jnp.ones((3, 2, 8), jnp.bfloat16)
  adapters = Adapters(LEAVES, np.array([1, 0, 1], np.int32), activation='relu')
  out = adapters.at('encoder_mlp', 0)(x)
  leaf = {name: leaf[0, 1] for name, leaf in LEAVES['encoder_mlp'].items()}
  hidden = np.maximum(np.ones(8) @ leaf['down'] + leaf['down_bias'], 0)
  np.testing.assert_allclose(np.asarray(out[0, 0], np.float32),
                             1 + hidden @ leaf['up'] + leaf['up_bias'], rtol=0.05, atol=0.05)
  assert out.dtype == jnp.bfloat16


def test_parity_with_torch_modules_behind_hugging_faces_sublayers(tmp_path):
  """Hooks behind the projections back to d_model, which is before the residual addition."""
  torch, transformers = (pytest.importorskip(name) for name in ('torch', 'transformers'))
  config = transformers.T5Config(
      vocab_size=40, d_model=24, num_heads=3, d_kv=5, d_ff=37, num_layers=2, num_decoder_layers=1,
      feed_forward_proj='relu', decoder_start_token_id=0, attn_implementation='eager')
  theirs = transformers.T5ForConditionalGeneration(config).eval()
  for name, parameter in theirs.named_parameters():
    scale = 0.7 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 and 'shared' not in name else 1
    parameter.data = scale * torch.tensor(RNG.normal(size=parameter.shape), dtype=torch.float32)
  theirs.save_pretrained(tmp_path)
  base = base_checkpoint.load_base(tmp_path)
  leaves = drawn(base.config.sublayers, 24)

  def hook(place, layer):
    of = {name: torch.tensor(leaf[layer, 0]) for name, leaf in leaves[place].items()}

    def adapted(module, inputs, output):
      x = output[0] if isinstance(output, tuple) else output
      hidden = torch.nn.functional.gelu(x @ of['down'] + of['down_bias'], approximate='tanh')
      x = x + hidden @ of['up'] + of['up_bias']
      return (x, *output[1:]) if isinstance(output, tuple) else x
    return adapted

  for place, (stack, number, module) in {
      'encoder_attention': ('encoder', 0, 'SelfAttention'),
      'encoder_mlp': ('encoder', 1, 'DenseReluDense'),
      'decoder_attention': ('decoder', 0, 'SelfAttention'),
      'cross_attention': ('decoder', 1, 'EncDecAttention'),
      'decoder_mlp': ('decoder', 2, 'DenseReluDense')}.items():
    for i, block in enumerate(getattr(theirs, stack).block):
      getattr(block.layer[number], module).register_forward_hook(hook(place, i))
  ids = lambda array: torch.tensor(array, dtype=torch.long)
  decoder_inputs = np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1]
  with torch.no_grad():
    expected = theirs(input_ids=ids(INPUTS), attention_mask=ids(INPUTS > 0),
                      decoder_input_ids=ids(decoder_inputs)).logits.numpy()
  with jax.default_matmul_precision('float32'):
    ours = base.config.network().apply({'params': base.params}, INPUTS, decoder_inputs, TARGETS,
                                       enable_dropout=False, adapters=Adapters(leaves))
  assert np.max(np.abs(ours - expected)) <= 1e-4 * np.sqrt(np.mean(expected ** 2))

"""Numbers of Hugging Face's T5 in torch, on weights drawn from wide distributions.

The weights are mapped here, independently of `checkpoints/`.
"""

import copy
import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_paths, prompted_model
from prompt_tuning_jax.networks import t5
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.prefix import DirectPrefix
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

V, D, P = 50, 24, 7
# 150 positions reach the last bucket of the relative positions; mistakes in the decoder's are
# invisible in the first 8 targets.
LENGTHS, TARGET_LENGTHS = (150, 97, 3), (40, 21, 9)
# Heads x head_dim is not d_model in any of them.
GATED = dict(feed_forward_proj='gated-gelu', tie_word_embeddings=False)
KINDS = {
    't5_1_0': ('T5', dict(feed_forward_proj='relu', num_layers=2)),
    't5_1_1': ('T5', dict(GATED, num_layers=2)),
    'mt5': ('MT5', dict(GATED, num_layers=2, num_heads=2, d_kv=16)),
    'byt5': ('T5', dict(GATED, num_layers=3, num_decoder_layers=1)),
    'deep_decoder': ('T5', dict(GATED, num_layers=1, num_decoder_layers=3)),
    'few_buckets': ('T5', dict(feed_forward_proj='relu', num_layers=1,
                               relative_attention_num_buckets=8,
                               relative_attention_max_distance=20)),
}

pytestmark = pytest.mark.usefixtures('exact_products')


def draw_weights(model, seed):
  """Every parameter, norms and relative biases included, far from its usual value."""
  rng = np.random.default_rng(seed)
  for name, parameter in model.named_parameters():
    values = rng.normal(size=parameter.shape)
    if name in ('shared.weight', 'lm_head.weight'):
      values[1] *= 2  # so that some texts end
    if 'layer_norm' in name:
      values = np.sign(values) * np.exp(rng.uniform(-1, 1, parameter.shape))
    elif 'relative_attention_bias' in name:
      values *= 2
    elif parameter.ndim == 2 and 'shared' not in name and 'lm_head' not in name:
      values *= 0.7 * parameter.shape[1] ** -0.5
    parameter.data = torch.tensor(values, dtype=torch.float32)


@functools.cache
def network(kind):
  """(the torch model, our configuration, our parameters)."""
  family, changes = KINDS[kind]
  fields = dict(vocab_size=V, d_model=D, num_heads=3, d_kv=5, d_ff=37, decoder_start_token_id=0,
                attn_implementation='eager') | changes
  config = getattr(transformers, f'{family}Config')(**fields)
  model = getattr(transformers, f'{family}ForConditionalGeneration')(config).eval()
  tied = fields['feed_forward_proj'] == 'relu'
  if not tied:  # transformers 5 ties them whatever the configuration says
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(V, D))
  draw_weights(model, seed=10)
  ours = t5.T5Config(
      V, D, fields['num_heads'], fields['num_layers'],
      fields.get('num_decoder_layers', fields['num_layers']), fields['d_kv'], fields['d_ff'],
      ('relu',) if tied else ('gelu', 'linear'), logits_via_embedding=tied,
      relative_attention_num_buckets=fields.get('relative_attention_num_buckets', 32),
      relative_attention_max_distance=fields.get('relative_attention_max_distance', 128))
  weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
  return model, ours, parameters(weights, tied)


LAYER = {  # Hugging Face's sublayers, and what T5X calls them
    'encoder': {'layer.0.SelfAttention': 'attention', 'layer.0.layer_norm':
                'pre_attention_layer_norm', 'layer.1.DenseReluDense': 'mlp',
                'layer.1.layer_norm': 'pre_mlp_layer_norm'},
    'decoder': {'layer.0.SelfAttention': 'self_attention', 'layer.0.layer_norm':
                'pre_self_attention_layer_norm', 'layer.1.EncDecAttention':
                'encoder_decoder_attention', 'layer.1.layer_norm':
                'pre_cross_attention_layer_norm', 'layer.2.DenseReluDense': 'mlp',
                'layer.2.layer_norm': 'pre_mlp_layer_norm'},
}
PART = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}


def parameters(weights, tied):
  """Torch weights [out, in] by name -> our nested tree of kernels [in, out]."""
  flat = {}
  for name, value in weights.items():
    side, *rest = name.removesuffix('.weight').split('.')
    if name == 'shared.weight':
      flat['token_embedder/embedding'] = value
    elif name == 'lm_head.weight':
      assert not tied
      flat['decoder/logits_dense/kernel'] = value.T
    elif rest[-1] == 'relative_attention_bias':  # in the first layer, for all of them
      assert rest[1] == '0'
      flat[f'{side}/relpos_bias/rel_embedding'] = value.T
    elif rest == ['final_layer_norm']:
      flat[f'{side}/{side}_norm/scale'] = value
    else:
      _, layer, *sublayer = rest
      part = sublayer.pop() if len(sublayer) > 3 or sublayer[-1] != 'layer_norm' else None
      path = f'{side}/layers_{layer}/{LAYER[side][".".join(sublayer)]}'
      if part is None:
        flat[f'{path}/scale'] = value
      else:
        flat[f'{path}/{PART.get(part, part)}/kernel'] = value.T
  return param_paths.unflatten(flat)


def batch(seed=0, lengths=LENGTHS, target_lengths=TARGET_LENGTHS):
  """(inputs [B, T], targets [B, S]) int32, padded with 0."""
  rng = np.random.default_rng(seed)
  made = []
  for sizes in (lengths, target_lengths):
    tokens = np.zeros((len(sizes), max(sizes)), np.int32)
    for i, size in enumerate(sizes):
      tokens[i, :size] = rng.integers(2, V, size)
    made.append(tokens)
  return made


def shifted(targets):
  return np.pad(targets, ((0, 0), (1, 0)))[:, :-1]


def tensor(array):
  return torch.tensor(np.asarray(array)).long()


def close(ours, theirs, tolerance=1e-4):
  """The largest difference, relative to the root mean square of what is expected."""
  theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
  assert ours.shape == theirs.shape
  assert np.max(np.abs(ours - theirs)) <= tolerance * np.sqrt(np.mean(theirs ** 2))


@pytest.mark.parametrize('kind', KINDS)
def test_encoder_states_and_logits(kind):
  model, config, params = network(kind)
  assert {path: leaf.shape for path, leaf in param_paths.flatten(params).items()} == {
      path: spec.shape for path, spec in parameter_specs(config).items()}
  inputs, targets = batch()
  with torch.no_grad():
    theirs = model(input_ids=tensor(inputs), attention_mask=tensor(inputs > 0),
                   decoder_input_ids=tensor(shifted(targets)), use_cache=False)

  @jax.jit
  def run(params):
    apply = functools.partial(t5.Transformer(config).apply, {'params': params},
                              enable_dropout=False)
    encoded = apply(inputs, method='encode')
    return encoded, apply(encoded, inputs, shifted(targets), targets, method='decode')

  encoded, logits = run(params)
  close(encoded[inputs > 0], theirs.encoder_last_hidden_state[tensor(inputs > 0).bool()])
  close(logits[targets > 0], theirs.logits[tensor(targets > 0).bool()])


def prompted(kind, seed=0):
  """(model, its parameters with a prompt of P rows) around the network."""
  _, config, params = network(kind)
  prompt = np.random.default_rng(seed).normal(size=(P, D)).astype(np.float32)
  return (PromptedModel(t5.Transformer(config), SoftPrompt(P, D)),
          {**params, 'prompt': {'embedding': prompt}})


def texts_of(inputs):
  return [row[row > 0] for row in inputs]


def placed(inputs, placement, width):
  """The inputs with the prompt's ids in them: [B, width] int32."""
  virtual = VirtualTokens(V, P, placement)
  return np.stack([np.pad(row, (0, width - len(row)))
                   for row in map(virtual.place, texts_of(inputs))])


def embedded_by_hand(model, prompt, inputs, placement, width):
  """(embeddings [B, width, D], attention mask [B, width]): the prompt's rows among the text's."""
  made = []
  for text in texts_of(inputs):
    words = model.shared(tensor(text))
    at = {'before': 0, 'after_first': 1, 'infix': len(text) // 2, 'end': len(text)}[placement]
    row = torch.cat([words[:at], prompt, words[at:]])
    made.append(torch.nn.functional.pad(row, (0, 0, 0, width - len(row))))
  lengths = tensor([len(text) + P for text in texts_of(inputs)])
  return torch.stack(made), (torch.arange(width)[None] < lengths[:, None]).long()


@functools.cache
def loss_and_gradients(kind):
  """Compiled once for all placements: (params, batch) -> ((loss, metrics), gradients of all)."""
  model, _ = prompted(kind)
  return jax.jit(jax.value_and_grad(
      lambda params, batch: prompted_model.loss(model, params, batch), has_aux=True))


@pytest.mark.parametrize('kind, placement', [
    *[('t5_1_1', placement) for placement in PLACEMENTS], ('t5_1_0', 'before')])
def test_loss_and_gradient_of_a_prompt_are_those_of_inputs_embeds(kind, placement):
  model, _, _ = network(kind)
  _, params = prompted(kind)
  inputs, targets = batch(1, (30, 18, 4), (12, 5, 9))
  prompt = torch.tensor(params['prompt']['embedding'], requires_grad=True)
  model.zero_grad()
  embeddings, mask = embedded_by_hand(model, prompt, inputs, placement, 30 + P)
  labels = tensor(np.where(targets > 0, targets, -100))
  expected = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels, use_cache=False,
                   decoder_input_ids=tensor(shifted(targets))).loss
  expected.backward()
  expected = expected.item()
  (loss, _), gradients = loss_and_gradients(kind)(params, {
      'encoder_input_tokens': placed(inputs, placement, 30 + P),
      'decoder_input_tokens': shifted(targets), 'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets > 0).astype(np.float32)})
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  close(gradients.pop('prompt')['embedding'], prompt.grad)
  # All weights, as model tuning trains them.
  theirs = parameters({name: value.grad.numpy() for name, value in model.named_parameters()},
                      tied=kind == 't5_1_0')
  theirs, ours = param_paths.flatten(theirs), param_paths.flatten(gradients)
  assert theirs.keys() == ours.keys()
  for path in theirs:
    close(ours[path], theirs[path], 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['t5_1_0', 'deep_decoder'])
def test_greedy_decoding(kind):
  """Of a prompted model; some rows end early, some do not."""
  model, _, _ = network(kind)
  ours, params = prompted(kind)
  inputs, _ = batch(2, (30, 18, 4, 9, 11, 25, 6, 30), (1,))
  length = 24
  embeddings, mask = embedded_by_hand(
      model, torch.tensor(params['prompt']['embedding']), inputs, 'before', 30 + P)
  with torch.no_grad():
    theirs = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=length, do_sample=False,
        num_beams=1, use_cache=False, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1).numpy()[:, 1:]
  tokens = jax.jit(functools.partial(prompted_model.predict, ours, max_length=length))(
      params, placed(inputs, 'before', 30 + P))
  expected = np.pad(theirs, ((0, 0), (0, length - theirs.shape[1])))
  np.testing.assert_array_equal(tokens, expected)
  assert 0 < np.sum(np.any(expected == 1, axis=1)) < 8, 'some texts should end, some not'


@flax.struct.dataclass
class LengthPower:
  """transformers' scores, log p / n ** exponent, and when it stops."""

  exponent: float
  early_stopping: bool | str = flax.struct.field(pytree_node=False)

  def score(self, log_likelihood, length):
    return log_likelihood / jnp.asarray(length, jnp.float32) ** self.exponent

  def bound(self, log_likelihood, length, limit):
    """What a continuation's score is taken to be at most."""
    if self.early_stopping is True:  # as soon as there are as many texts as beams
      return jnp.full_like(log_likelihood, -jnp.inf)
    now = self.score(log_likelihood, length)
    never = self.early_stopping == 'never'
    return jnp.maximum(now, self.score(log_likelihood, limit)) if never else now


@pytest.mark.parametrize('exponent, early_stopping', [
    (0.0, 'never'), (1.0, 'never'), (2.0, 'never'), (1.0, False), (1.0, True), (-1.0, False)])
def test_beam_search(exponent, early_stopping):
  """Sequences and scores of four beams of a prompted model, all of them."""
  model, _, _ = network('t5_1_0')
  _, params = prompted('t5_1_0')
  inputs, _ = batch(2, (30, 18, 4, 9, 11, 25), (1,))
  length = 20
  embeddings, mask = embedded_by_hand(
      model, torch.tensor(params['prompt']['embedding']), inputs, 'before', 30 + P)
  with torch.no_grad():
    theirs = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=length, do_sample=False,
        num_beams=4, num_return_sequences=4, length_penalty=exponent,
        early_stopping=early_stopping, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        return_dict_in_generate=True, output_scores=True)
  expected = theirs.sequences.numpy()[:, 1:]
  expected = np.pad(expected, ((0, 0), (0, length - expected.shape[1]))).reshape(6, 4, length)
  before = np.cumsum(expected == 1, axis=-1) - (expected == 1)
  expected = np.where(before, 0, expected)  # Theirs are filled up with more ends.
  tokens, scores = beam_search()(params, placed(inputs, 'before', 30 + P),
                                 penalty=LengthPower(exponent, early_stopping))
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_allclose(scores.ravel(), theirs.sequences_scores, rtol=1e-4)
  assert np.any(expected == 1)


@functools.cache
def beam_search():
  """Compiled once for all exponents."""
  model, _ = prompted('t5_1_0')
  return jax.jit(functools.partial(prompted_model.beam_search, model, max_length=20, num_beams=4))


def test_bfloat16_is_as_close_as_bfloat16_in_torch():
  model, config, params = network('t5_1_1')
  inputs, targets = batch(3, (30, 18, 4), (12, 5, 9))
  call = dict(input_ids=tensor(inputs), attention_mask=tensor(inputs > 0), use_cache=False,
              decoder_input_ids=tensor(shifted(targets)))
  with torch.no_grad():
    exact = model(**call).logits.numpy()[targets > 0]
  rounded = dataclasses.replace(config, dtype='bfloat16')
  ours = jax.jit(functools.partial(t5.Transformer(rounded).apply, enable_dropout=False))(
      {'params': params}, inputs, shifted(targets), targets)
  assert ours.dtype == jnp.float32
  error = np.asarray(ours)[targets > 0] - exact
  assert np.sqrt(np.mean(error ** 2) / np.mean(exact ** 2)) < 0.05


def with_prefix(attention, keys, values):
  """Puts a hand-written attention in the place of a torch T5Attention's: keys, values [P, N, H]."""

  def forward(hidden_states, mask=None, key_value_states=None, position_bias=None, **_):
    states = hidden_states if key_value_states is None else key_value_states
    heads = lambda layer, x: layer(x).view(
        *x.shape[:2], attention.n_heads, attention.key_value_proj_dim).transpose(1, 2)
    query, key, value = (heads(layer, x) for layer, x in (
        (attention.q, hidden_states), (attention.k, states), (attention.v, states)))
    if position_bias is None:
      shape = hidden_states.shape[1], states.shape[1]
      position_bias = (attention.compute_bias(*shape) if attention.has_relative_attention_bias
                       else torch.zeros(1, 1, *shape))
    own = query @ key.transpose(2, 3) + position_bias + (0 if mask is None else mask)
    of_prefix = torch.einsum('bnth,pnh->bntp', query, keys)  # No bias, no mask.
    weights = torch.cat([of_prefix, own], dim=-1).softmax(-1)
    out = torch.einsum('bntp,pnh->bnth', weights[..., :len(keys)], values)
    out = out + weights[..., len(keys):] @ value
    return attention.o(out.transpose(1, 2).flatten(2)), position_bias, weights

  attention.forward = forward


@pytest.mark.parametrize('kind', [
    't5_1_1', 't5_1_0', pytest.param('byt5', marks=pytest.mark.slow)])
def test_a_prefix_in_every_attention_is_that_of_a_patched_torch_t5(kind):
  model, config, params = network(kind)
  model = copy.deepcopy(model)
  prefix = {place: (1.5 * np.random.default_rng(i).normal(
      size=(layers, 2, P, config.num_heads, config.head_dim))).astype(np.float32)
            for i, (place, layers) in enumerate(config.attentions.items())}
  leaves = {place: torch.tensor(array, requires_grad=True) for place, array in prefix.items()}
  for i, block in enumerate(model.encoder.block):
    with_prefix(block.layer[0].SelfAttention, *leaves['encoder'][i])
  for i, block in enumerate(model.decoder.block):
    with_prefix(block.layer[0].SelfAttention, *leaves['decoder'][i])
    with_prefix(block.layer[1].EncDecAttention, *leaves['cross'][i])
  inputs, targets = batch(3, (40, 18, 4), (22, 5, 9))
  expected = model(input_ids=tensor(inputs), attention_mask=tensor(inputs > 0), use_cache=False,
                   decoder_input_ids=tensor(shifted(targets)),
                   labels=tensor(np.where(targets > 0, targets, -100)))
  expected.loss.backward()

  ours = PromptedModel(t5.Transformer(config), prefix=DirectPrefix(
      P, config.attentions, config.num_heads, config.head_dim))
  made = {'encoder_input_tokens': inputs, 'decoder_input_tokens': shifted(targets),
          'decoder_target_tokens': targets,
          'decoder_loss_weights': (targets > 0).astype(np.float32)}
  logits = jax.jit(functools.partial(prompted_model.logits, ours))(
      {**params, 'prefix': prefix}, made)
  close(logits[targets > 0], expected.logits[tensor(targets > 0).bool()].detach())
  gradients = jax.jit(jax.grad(lambda prefix: prompted_model.loss(
      ours, {**params, 'prefix': prefix}, made)[0]))(prefix)
  for place, gradient in gradients.items():
    close(gradient, leaves[place].grad, 5e-4)
    assert all(np.abs(gradient[layer, part]).max() > 0  # every layer, keys and values
               for layer in range(len(gradient)) for part in range(2))

"""Attention on prompts: transformers' weights, and padding that does not matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.analysis import attention_mass
from prompt_tuning_jax.checkpoints import hf_safetensors
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.networks import bert, gpt, t5
from prompt_tuning_jax.networks.attention import Context
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.prefix import DirectPrefix
from prompt_tuning_jax.prompts.soft_prompt import LayeredPrompt, SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

V, P = 50, 5
T5 = t5.T5Config(vocab_size=V, emb_dim=16, num_heads=3, num_encoder_layers=2, num_decoder_layers=1,
                 head_dim=4, mlp_dim=20, dropout_rate=0.0)
GPT = gpt.GPTConfig(vocab_size=V, emb_dim=16, num_heads=2, num_layers=2, head_dim=8, mlp_dim=20,
                    dropout_rate=0.0)
BERT = bert.BertConfig(vocab_size=V, emb_dim=16, num_heads=2, num_encoder_layers=2, head_dim=8,
                       mlp_dim=20, dropout_rate=0.0)
INPUTS = [[7, 8, 9, 11, 1], [5, 6, 1], [12, 13, 14, 15, 16, 17, 18, 1]]
TARGETS = [[20, 21, 1], [22, 1], [23, 24, 25, 26, 1]]

pytestmark = pytest.mark.usefixtures('exact_products')


def parts(config, kind):
  """(a model with the modules of a method, its virtual tokens)."""
  heads = (config.num_heads, config.head_dim)
  if kind == 'prefix':
    return PromptedModel(config.network(), prefix=DirectPrefix(P, config.attentions, *heads)), None
  prompt = (LayeredPrompt(config.prompted_layers, P, config.emb_dim) if kind == 'deep' else
            SoftPrompt(P, config.emb_dim))
  return PromptedModel(config.network(), prompt), VirtualTokens(V, P)


@functools.cache
def made(config, kind):
  """(model, virtual tokens, parameters that are far from even)."""
  model, virtual = parts(config, kind)
  token = jnp.ones((1, 2), jnp.int32)
  params = model.init(jax.random.key(0), token, token, token)['params']
  flat = param_paths.flatten(params)
  drawn = {path: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), leaf.shape)
           * (1 if leaf.ndim < 2 else 2 * leaf.shape[0] ** -0.5)
           for i, (path, leaf) in enumerate(flat.items())}
  return model, virtual, param_paths.unflatten(drawn)


def measured(config, kind, rows=range(3), virtual=None, width=None):
  model, own, params = made(config, kind)
  virtual = virtual or own
  buckets = batches.Buckets((width,), (width,)) if width else None
  batch = batches.batch_of([INPUTS[i] for i in rows], [TARGETS[i] for i in rows], virtual, buckets)
  return program(model, virtual.length if virtual else 0)(params, batch)


def program(model, length):
  return jax.jit(functools.partial(attention_mass.of_batch, model, length))


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_transformers_has_the_same_weights(placement, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  _, _, params = made(T5, 'prompt')
  prompt = params['prompt']['embedding']
  own = {name: leaf for name, leaf in params.items() if name != 'prompt'}
  hf_safetensors.write(tmp_path / 'base', T5, own)
  theirs = transformers.T5ForConditionalGeneration.from_pretrained(
      tmp_path / 'base', attn_implementation='eager').eval()
  table = np.concatenate([own['token_embedder']['embedding'], prompt])
  virtual = VirtualTokens(V, P, placement)
  found = measured(T5, 'prompt', virtual=virtual)
  received = {'input': [], 'target': []}
  for inputs, targets in zip(INPUTS, TARGETS, strict=True):
    ids = virtual.place(np.array(inputs, np.int32))
    is_row = ids >= V
    with torch.no_grad():
      out = theirs(inputs_embeds=torch.tensor(table[ids])[None], output_attentions=True,
                   decoder_input_ids=torch.tensor([[0, *targets[:-1]]]))
    received['input'].append([layer[0][:, ~is_row][:, :, is_row].sum(1).numpy()
                              for layer in out.encoder_attentions])
    received['target'].append([layer[0][:, :, is_row].sum(1).numpy()
                               for layer in out.cross_attentions])
  assert set(found) == {'input', 'target'}
  for name, texts in (('input', INPUTS), ('target', TARGETS)):
    count = sum(map(len, texts))
    expected = np.sum(received[name], axis=0) / count
    means, even = found[name].means()
    assert means.shape == expected.shape and float(found[name].queries) == count
    assert expected.std() > 0.005
    np.testing.assert_allclose(means, expected, atol=1e-5)
    shares = [P / (P + len(row)) for row in INPUTS]
    assert even == pytest.approx(np.average(shares, weights=list(map(len, texts))), abs=1e-6)


@pytest.mark.parametrize('with_context', [False, True])
def test_weights_are_those_that_attention_takes_its_sums_with(with_context):
  from prompt_tuning_jax.networks import attention
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  visible = lambda *shape: jnp.asarray(rng.random(shape) < .7).at[..., 0].set(True)
  query, key, bias = normal(2, 3, 4, 5), normal(2, 3, 5, 6), normal(1, 3, 4, 6)
  mask, context, behind = visible(2, 1, 4, 6), None, 0
  if with_context:
    behind = 7
    context = Context(normal(2, 3, 5, 7), jnp.eye(13)[None, None, 6:] * jnp.ones((2, 3, 1, 1)),
                      normal(1, 3, 4, 7), visible(2, 1, 4, 7))
  found = attention.weights(query, key, bias, mask, context)
  assert found.shape == (2, 3, 4, 6 + behind)
  np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-6)
  # Values that are unit vectors make attention's output the weights themselves.
  values = jnp.eye(6 + behind)[None, None, :6] * jnp.ones((2, 3, 1, 1))
  np.testing.assert_allclose(
      found, attention.attend(query, key, values, bias, mask, context=context), atol=1e-6)


@pytest.mark.parametrize('kind', ['prompt', 'deep', 'prefix'])
@pytest.mark.parametrize('config', [T5, GPT], ids=['t5', 'gpt'])
def test_padding_and_batches_do_not_matter_and_shares_are_shares(config, kind):
  together = measured(config, kind)
  alone = attention_mass.total([measured(config, kind, [i], width=24) for i in range(3)])
  names = {'input', 'target'}
  if kind == 'prefix' and config is T5:
    names.add('target_to_target')
  assert set(together) == set(alone) == names
  for name, mass in together.items():
    (means, even), (again, even_again) = mass.means(), alone[name].means()
    np.testing.assert_allclose(means, again, atol=1e-5)
    assert even == pytest.approx(even_again, abs=1e-6)
    assert means.shape[1:] == (config.num_heads, P)
    assert (means >= 0).all() and (means.sum(axis=2) < 1).all() and 0 < even < 1


@pytest.mark.parametrize('config', [T5, GPT, BERT], ids=['t5', 'gpt', 'bert'])
def test_where_queries_are_zero_attention_is_even(config):
  """Without relative biases and with queries of 0 every key that is seen receives the same."""
  model, virtual, params = made(config, 'prompt')
  flat = {path: 0 * leaf if '/query/' in path or 'relpos' in path else leaf
          for path, leaf in param_paths.flatten(params).items()}
  found = program(model, P)(param_paths.unflatten(flat),
                            batches.batch_of(INPUTS, TARGETS, virtual))
  assert set(found) == ({'input'} if config is BERT else {'input', 'target'})
  for mass in found.values():
    means, even = mass.means()
    np.testing.assert_allclose(means.sum(axis=2), even, atol=1e-6)
    np.testing.assert_allclose(means, np.broadcast_to(means[:, :, :1], means.shape), atol=1e-6)


def test_the_base_alone_has_no_prompt_to_look_at():
  model, _, params = made(T5, 'prompt')
  params = {name: leaf for name, leaf in params.items() if name != 'prompt'}
  assert not program(PromptedModel(model.network), 0)(params, batches.batch_of(INPUTS, TARGETS))
  assert attention_mass.total([]) == {}

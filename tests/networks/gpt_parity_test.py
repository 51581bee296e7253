"""Numbers of Hugging Face's GPT-2, and of its T5 decoder alone, on weights from wide distributions.

The weights are mapped here, independently of `checkpoints/`. Ours splits each text into inputs and
targets; theirs has it whole.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_paths, prompted_model
from prompt_tuning_jax.decoding.beam_search import BrevityPenalty
from prompt_tuning_jax.networks import gpt
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.prefix import DirectPrefix
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

V, D, N, P = 50, 24, 3, 7
EOS = 5
LENGTHS, TARGET_LENGTHS = (30, 18, 4, 1), (12, 5, 9, 2)
GPT2 = gpt.GPTConfig(V, D, N, 2, D // N, 37, ('gelu',), max_positions=64, use_bias=True,
                     scale_queries=True, logits_via_embedding=True, scale_logits=False,
                     has_padding_row=False)
T5_STYLE = {  # heads x head_dim is not d_model
    'gated': gpt.GPTConfig(V, D, N, 2, 5, 37),
    'tied': gpt.GPTConfig(V, D, N, 2, 5, 37, ('relu',), logits_via_embedding=True,
                          relative_attention_num_buckets=8, relative_attention_max_distance=20),
}

pytestmark = pytest.mark.usefixtures('exact_products')


def draw_weights(model, seed):
  """Every parameter, biases, norms and positions included, far from its usual value."""
  rng = np.random.default_rng(seed)
  for name, parameter in model.named_parameters():
    values = rng.normal(size=parameter.shape)
    if name.endswith('.bias'):
      values *= 0.5
    elif 'ln_' in name or 'layer_norm' in name:
      values = np.sign(values) * np.exp(rng.uniform(-1, 1, parameter.shape))
    elif parameter.ndim == 2 and not any(part in name for part in ('wte', 'wpe', 'embed', 'bias')):
      values *= 0.7 * D ** -0.5
    parameter.data = torch.tensor(values, dtype=torch.float32)
  return model.eval()


@functools.cache
def gpt2():
  """(the torch model, our parameters)."""
  config = transformers.GPT2Config(
      vocab_size=V - 1, n_positions=64, n_embd=D, n_layer=2, n_head=N, n_inner=37,
      bos_token_id=EOS - 1, eos_token_id=EOS - 1, attn_implementation='eager')
  model = draw_weights(transformers.GPT2LMHeadModel(config), seed=1)
  model.transformer.wte.weight.data[EOS - 1] *= 1.3  # so that some texts end
  return model, gpt2_parameters({name: value.detach().numpy()
                                 for name, value in model.named_parameters()})


def gpt2_parameters(weights):
  """Torch weights by name -> our nested tree; row 0 of the table is anything, here sevens."""
  weights = {name.removeprefix('transformer.'): value for name, value in weights.items()}
  flat = {'token_embedder/embedding': np.pad(weights['wte.weight'], ((1, 0), (0, 0)),
                                             constant_values=7),
          'position_embedder/embedding': weights['wpe.weight']}
  norms = {'ln_f': 'decoder_norm'}
  for i in range(2):
    theirs, ours = f'h.{i}', f'layers_{i}'
    norms |= {f'{theirs}.ln_1': f'{ours}/pre_self_attention_layer_norm',
              f'{theirs}.ln_2': f'{ours}/pre_mlp_layer_norm'}
    for leaf, name in (('weight', 'kernel'), ('bias', 'bias')):
      parts = np.split(weights[f'{theirs}.attn.c_attn.{leaf}'], 3, axis=-1)
      for part, value in zip(('query', 'key', 'value'), parts, strict=True):
        flat[f'{ours}/self_attention/{part}/{name}'] = value
      for part, where in (('attn.c_proj', 'self_attention/out'), ('mlp.c_fc', 'mlp/wi'),
                          ('mlp.c_proj', 'mlp/wo')):
        flat[f'{ours}/{where}/{name}'] = weights[f'{theirs}.{part}.{leaf}']
  for theirs, ours in norms.items():
    flat[f'{ours}/scale'], flat[f'{ours}/bias'] = (weights[f'{theirs}.{leaf}']
                                                   for leaf in ('weight', 'bias'))
  return param_paths.unflatten({f'decoder/{path}': value for path, value in flat.items()})


@functools.cache
def t5_style(kind):
  """(the torch decoder, our parameters)."""
  config = T5_STYLE[kind]
  gated = len(config.mlp_activations) == 2
  stack = draw_weights(transformers.models.t5.modeling_t5.T5Stack(transformers.T5Config(
      vocab_size=V, d_model=D, num_heads=N, d_kv=5, d_ff=37, num_layers=2, is_decoder=True,
      feed_forward_proj='gated-gelu' if gated else 'relu', use_cache=False,
      relative_attention_num_buckets=config.relative_attention_num_buckets,
      relative_attention_max_distance=config.relative_attention_max_distance)), seed=2)
  weights = {name.removesuffix('.weight'): value.detach().numpy()
             for name, value in stack.named_parameters()}
  flat = {'token_embedder/embedding': weights['embed_tokens'],
          'relpos_bias/rel_embedding':
              weights['block.0.layer.0.SelfAttention.relative_attention_bias'].T,
          'decoder_norm/scale': weights['final_layer_norm']}
  if gated:
    flat['logits_dense/kernel'] = np.random.default_rng(3).normal(size=(D, V)).astype(np.float32)
  for i in range(2):
    block, layer = f'block.{i}.layer', f'layers_{i}'
    flat[f'{layer}/pre_self_attention_layer_norm/scale'] = weights[f'{block}.0.layer_norm']
    flat[f'{layer}/pre_mlp_layer_norm/scale'] = weights[f'{block}.2.layer_norm']
    for theirs, ours in zip('qkvo', ('query', 'key', 'value', 'out'), strict=True):
      flat[f'{layer}/self_attention/{ours}/kernel'] = weights[f'{block}.0.SelfAttention.{theirs}'].T
    for name in ('wi_0', 'wi_1', 'wo') if gated else ('wi', 'wo'):
      flat[f'{layer}/mlp/{name}/kernel'] = weights[f'{block}.2.DenseReluDense.{name}'].T
  return stack, param_paths.unflatten({f'decoder/{path}': value for path, value in flat.items()})


def padded(rows, width=None):
  width = width or max(map(len, rows))
  return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)


def texts(seed, lengths=LENGTHS):
  rng = np.random.default_rng(seed)
  return [rng.integers(1, V, size) for size in lengths]


def batch(inputs, targets):
  made = padded(targets)
  return {'encoder_input_tokens': padded(inputs), 'decoder_target_tokens': made,
          'decoder_input_tokens': np.pad(made, ((0, 0), (1, 0)))[:, :-1],
          'decoder_loss_weights': (made > 0).astype(np.float32)}


def whole(inputs, targets):
  """(token ids, ours, of the whole texts [B, T], which of their positions foretell a target)."""
  rows = padded([np.concatenate(row) for row in zip(inputs, targets, strict=True)])
  foretell = np.zeros(rows.shape, bool)
  for i, (x, y) in enumerate(zip(inputs, targets, strict=True)):
    foretell[i, len(x) - 1:len(x) + len(y) - 1] = True
  return rows, foretell


def tensor(array):
  return torch.tensor(np.asarray(array)).long()


def close(ours, theirs, tolerance=1e-4):
  """The largest difference, relative to the root mean square of what is expected."""
  theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
  assert ours.shape == theirs.shape
  assert np.max(np.abs(ours - theirs)) <= tolerance * np.sqrt(np.mean(theirs ** 2))


def live(logits, made):
  return np.asarray(logits)[made['decoder_target_tokens'] > 0]


@functools.cache
def compiled(config):
  """(params, batch) -> (logits, gradients of the loss), of whatever `params` holds."""
  model = PromptedModel(
      config.network(), SoftPrompt(P, D), DirectPrefix(P, config.attentions, N, config.head_dim))

  def run(params, made):
    return prompted_model.logits(model, params, made), jax.grad(
        lambda params: prompted_model.loss(model, params, made)[0])(params)

  return jax.jit(run)


@functools.cache
def plain(config):
  return jax.jit(functools.partial(prompted_model.logits, PromptedModel(config.network())))


def test_logits_of_gpt2():
  model, params = gpt2()
  assert {path: leaf.shape for path, leaf in param_paths.flatten(params).items()} == {
      path: spec.shape for path, spec in parameter_specs(GPT2).items()}
  inputs, targets = texts(0), texts(1, TARGET_LENGTHS)
  made, (rows, foretell) = batch(inputs, targets), whole(inputs, targets)
  with torch.no_grad():
    theirs = model(tensor(np.maximum(rows - 1, 0)), attention_mask=tensor(rows > 0)).logits
  ours = live(plain(GPT2)(params, made), made)
  close(ours[:, 1:], theirs[tensor(foretell).bool()])
  assert np.all(ours[:, 0] < -1e9)


@pytest.mark.parametrize('kind', T5_STYLE)
def test_logits_of_a_t5_decoder_alone(kind):
  """150 positions reach the last bucket; the logits are made of the states by hand."""
  stack, params = t5_style(kind)
  assert {path: leaf.shape for path, leaf in param_paths.flatten(params).items()} == {
      path: spec.shape for path, spec in parameter_specs(T5_STYLE[kind]).items()}
  inputs, targets = texts(2, (150, 97, 3)), texts(3, (40, 21, 9))
  made, (rows, foretell) = batch(inputs, targets), whole(inputs, targets)
  with torch.no_grad():
    states = stack(input_ids=tensor(rows), attention_mask=tensor(rows > 0)).last_hidden_state
  states = states.numpy()[foretell]
  decoder = params['decoder']
  theirs = (states @ decoder['logits_dense']['kernel'] if kind == 'gated' else
            states * D ** -0.5 @ decoder['token_embedder']['embedding'].T)
  close(live(plain(T5_STYLE[kind])(params, made), made), theirs)


def added(seed=4):
  """(a prompt [P, D], a prefix [L, 2, P, N, H]), float32."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(P, D)).astype(np.float32),
          1.5 * rng.normal(size=(2, 2, P, N, D // N)).astype(np.float32))


def embedded(model, prompt, text, placement='before'):
  """The prompt's rows among the text's: [n + P, D] of ids that are ours."""
  words = model.transformer.wte(tensor(text - 1))
  at = {'before': 0, 'after_first': min(1, len(text)), 'infix': len(text) // 2,
        'end': len(text)}[placement]
  return torch.cat([words[:at], prompt, words[at:]])


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_a_prompt_and_a_prefix_and_all_gradients_are_those_of_torch(placement):
  """inputs_embeds and past_key_values at once; a prefix shifts no position."""
  model, params = gpt2()
  model.zero_grad()
  prompt, prefix = (torch.tensor(array, requires_grad=True) for array in added())
  inputs, targets = texts(5), texts(6, TARGET_LENGTHS)
  rows, foretell = whole([np.pad(text, (0, P), constant_values=9) for text in inputs], targets)
  embeddings = [torch.cat([embedded(model, prompt, x, placement),
                           model.transformer.wte(tensor(y - 1))])
                for x, y in zip(inputs, targets, strict=True)]
  past = transformers.DynamicCache()
  for layer, (keys, values) in enumerate(prefix):
    past.update(*(x.transpose(0, 1)[None].expand(len(rows), -1, -1, -1) for x in (keys, values)),
                layer)
  theirs = model(
      inputs_embeds=torch.nn.utils.rnn.pad_sequence(embeddings, batch_first=True),
      attention_mask=tensor(np.pad(rows > 0, ((0, 0), (P, 0)), constant_values=True)),
      position_ids=torch.arange(rows.shape[1])[None], past_key_values=past).logits
  made = batch(list(map(VirtualTokens(V, P, placement).place, inputs)), targets)
  labels = made['decoder_target_tokens']
  expected = theirs[tensor(foretell).bool()]
  torch.nn.functional.cross_entropy(expected, tensor(labels[labels > 0] - 1)).backward()
  logits, gradients = compiled(GPT2)(
      {**params, 'prompt': {'embedding': prompt.detach().numpy()},
       'prefix': {'decoder': prefix.detach().numpy()}}, made)
  close(live(logits, made)[:, 1:], expected)
  close(gradients.pop('prompt')['embedding'], prompt.grad, 5e-4)
  of_prefix = gradients.pop('prefix')['decoder']
  close(of_prefix, prefix.grad, 5e-4)
  assert np.abs(of_prefix).max((2, 3, 4)).min() > 0  # every layer, keys and values
  all_theirs = param_paths.flatten(gpt2_parameters(
      {name: value.grad.numpy() for name, value in model.named_parameters()}))
  all_ours = param_paths.flatten(gradients)
  assert all_theirs.keys() == all_ours.keys()
  for path, gradient in all_theirs.items():
    skip = 1 if 'token_embedder' in path else 0  # row 0, which torch has not
    if path.endswith('key/bias'):  # Keys of a prefix have no bias, or this would be 0.
      assert np.abs(gradient).max() > 0
    close(all_ours[path][skip:], gradient[skip:], 1e-3)


def test_greedy_decoding_of_a_prompted_gpt2():
  """Some rows end early, some do not; the end-of-sequence id is the network's own."""
  model, params = gpt2()
  prompt, _ = added()
  inputs, length = texts(7, (20, 18, 4, 9, 11, 15, 6, 20)), 16
  expected = []
  with torch.no_grad():
    for text in inputs:
      made = model.generate(
          inputs_embeds=embedded(model, torch.tensor(prompt), text)[None], max_new_tokens=length,
          attention_mask=torch.ones(1, len(text) + P).long(), do_sample=False, num_beams=1,
          pad_token_id=EOS - 1, eos_token_id=EOS - 1)[0].numpy()
      expected.append(made + 1)
  ours = PromptedModel(GPT2.network(), SoftPrompt(P, D))
  predict = jax.jit(functools.partial(prompted_model.predict, ours, max_length=length, eos_id=EOS))
  tokens = predict({**params, 'prompt': {'embedding': prompt}},
                   padded(list(map(VirtualTokens(V, P).place, inputs))))
  np.testing.assert_array_equal(tokens, padded(expected, length))
  assert 0 < sum(EOS in row for row in expected) < 8, 'some texts should end, some not'


@pytest.mark.slow
def test_four_beams_of_a_prompted_gpt2():
  """Theirs one text at a time, since they would need padding before it."""
  model, params = gpt2()
  prompt, _ = added()
  inputs, length = texts(7, (20, 18, 4, 9)), 12
  expected, expected_scores = [], []
  with torch.no_grad():
    for text in inputs:
      made = model.generate(
          inputs_embeds=embedded(model, torch.tensor(prompt), text)[None], max_new_tokens=length,
          attention_mask=torch.ones(1, len(text) + P).long(), do_sample=False, num_beams=4,
          num_return_sequences=4, length_penalty=0.0, early_stopping='never',
          pad_token_id=EOS - 1, eos_token_id=EOS - 1, return_dict_in_generate=True,
          output_scores=True)
      rows = made.sequences.numpy() + 1
      sizes = [list(row).index(EOS) + 1 if EOS in row else len(row) for row in rows]
      expected += [row[:size] for row, size in zip(rows, sizes, strict=True)]
      expected_scores += made.sequences_scores.tolist()
  ours = PromptedModel(GPT2.network(), SoftPrompt(P, D))
  search = jax.jit(functools.partial(prompted_model.beam_search, ours, max_length=length,
                                     num_beams=4, penalty=BrevityPenalty(0.0), eos_id=EOS))
  tokens, scores = search({**params, 'prompt': {'embedding': prompt}},
                          padded(list(map(VirtualTokens(V, P).place, inputs))))
  np.testing.assert_array_equal(tokens.reshape(16, length), padded(expected, length))
  np.testing.assert_allclose(scores.ravel(), expected_scores, rtol=1e-4)
  assert 0 < sum(EOS in row for row in expected)


def test_bfloat16_is_as_close_as_bfloat16_can_be():
  _, params = gpt2()
  made = batch(texts(8), texts(9, TARGET_LENGTHS))
  exact = live(plain(GPT2)(params, made), made)[:, 1:]
  ours = plain(dataclasses.replace(GPT2, dtype='bfloat16'))(params, made)
  assert ours.dtype == jnp.float32
  error = live(ours, made)[:, 1:] - exact
  assert 0 < np.sqrt(np.mean(error ** 2) / np.mean(exact ** 2)) < 0.05

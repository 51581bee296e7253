"""The laws of decoder-only networks: inputs and targets in two arrays are one text."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from prompt_tuning_jax import objectives, param_paths, prompted_model
from prompt_tuning_jax.data import batches, packing
from prompt_tuning_jax.networks import gpt, parameters
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.prefix import DirectPrefix
from prompt_tuning_jax.prompts.soft_prompt import LayeredPrompt, SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

V, D, N, H, L, P = 40, 8, 2, 4, 2, 3
CONFIGS = {
    'learned': gpt.GPTConfig(V, D, N, L, H, 16, ('gelu',), max_positions=24, use_bias=True,
                             scale_queries=True, logits_via_embedding=True, scale_logits=False,
                             has_padding_row=False),
    'relative': gpt.GPTConfig(V, D, N, L, H, 16, dropout_rate=0.2,
                              relative_attention_num_buckets=8,
                              relative_attention_max_distance=16),
}
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(2, V, n) for n in (7, 1, 4)]
LABELS = [RNG.integers(2, V, n) for n in (5, 6, 1)]
PROMPT = RNG.normal(size=(P, D)).astype(np.float32)
ROWS = RNG.normal(size=(L, P, D)).astype(np.float32)

both_kinds = pytest.mark.parametrize('kind', CONFIGS)

pytestmark = pytest.mark.usefixtures('exact_products')


@functools.cache
def base(kind):
  rng = np.random.default_rng(1)
  return param_paths.unflatten({
      path: rng.normal(size=spec.shape).astype(np.float32)
      * (1 if len(spec.shape) == 1 or 'embedding' in path else 0.7 * spec.shape[0] ** -0.5)
      for path, spec in parameters.parameter_specs(CONFIGS[kind]).items()})


def padded(rows, width):
  return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)


def make_batch(texts, labels, width=15, target_width=8):
  targets = padded(labels, target_width)
  return {'encoder_input_tokens': padded(texts, width),
          'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
          'decoder_target_tokens': targets,
          'decoder_loss_weights': (targets > 0).astype(np.float32)}


@functools.cache
def network(kind):
  """Compiled: (params, inputs, decoder inputs, targets, **what is added) -> logits."""
  return jax.jit(functools.partial(CONFIGS[kind].network().apply, enable_dropout=False))


def outputs(kind, texts, labels, width=15, target_width=8, **added):
  """Logits of the live target positions, one array a row."""
  batch = make_batch(texts, labels, width, target_width)
  logits = network(kind)({'params': base(kind)}, batch['encoder_input_tokens'],
                         batch['decoder_input_tokens'], batch['decoder_target_tokens'], **added)
  return [np.asarray(row)[:len(label)] for row, label in zip(logits, labels, strict=True)]


def close(a, b, tolerance=2e-5):
  a, b = np.asarray(a), np.asarray(b)
  assert a.shape == b.shape
  assert np.max(np.abs(a - b)) <= tolerance * np.sqrt(np.mean(b ** 2))


def placed(texts, placement='before', length=P, offset=0):
  return list(map(VirtualTokens(V, length, placement, offset).place, texts))


def some_prefix(rows=None):
  """Two prefixes, of 3 and 2 positions; row r of a batch gets prefix rows[r]."""
  stacked = np.random.default_rng(2).normal(size=(L, 2, 2, 3, N, H)).astype(np.float32)
  return Prefix(decoder=stacked, rows=rows, lengths={'decoder': np.array([3, 2])})


def some_adapters(rows=None):
  rng = np.random.default_rng(3)
  shapes = {'down': (D, 2), 'down_bias': (2,), 'up': (2, D), 'up_bias': (D,)}
  return Adapters({place: {name: rng.normal(size=(layers, 2, *shape)).astype(np.float32)
                           for name, shape in shapes.items()}
                   for place, layers in CONFIGS['learned'].sublayers.items()}, rows)


def everything(rows):
  return {'virtual_embeddings': ROWS, 'prefix': some_prefix(rows), 'adapters': some_adapters(rows)}


ROWS_OF = np.array([1, 0, 1], np.int32)


@both_kinds
@pytest.mark.parametrize('placement', ['before', 'end'])
def test_where_inputs_end_and_targets_begin_does_not_matter(kind, placement):
  """x, y + z and x + y, z foretell z alike, whatever is added to the network."""
  added = everything(ROWS_OF)
  texts = placed(TEXTS, placement)
  whole = outputs(kind, texts, LABELS, **added)
  for cut in (1, 4):
    moved = [(np.concatenate([text, label[:cut]]), label[cut:])
             for text, label in zip(texts, LABELS, strict=True)]
    parts = outputs(kind, *zip(*moved, strict=True), **added)
    for part, expected in zip(parts, whole, strict=True):
      if len(part):
        close(part[:, 1:], expected[cut:, 1:])


@both_kinds
def test_a_mixed_batch_is_each_example_alone_and_padding_does_not_matter(kind):
  texts = [*placed(TEXTS[:1], 'end'), TEXTS[1], *placed(TEXTS[2:], 'infix', 2, offset=1)]
  mixed = outputs(kind, texts, LABELS, **everything(ROWS_OF))
  for i in range(3):
    alone, = outputs(kind, texts[i:i + 1], LABELS[i:i + 1], width=10, target_width=6,
                     **everything(ROWS_OF[i:i + 1]))
    close(alone[:, 1:], mixed[i][:, 1:])
  # Nor does padding before the text.
  batch = make_batch(texts, LABELS)
  batch['encoder_input_tokens'] = np.stack([np.roll(row, np.sum(row == 0))
                                            for row in batch['encoder_input_tokens']])
  logits = network(kind)({'params': base(kind)}, batch['encoder_input_tokens'],
                         batch['decoder_input_tokens'], batch['decoder_target_tokens'],
                         **everything(ROWS_OF))
  for row, expected in zip(np.asarray(logits), mixed, strict=True):
    close(row[:len(expected), 1:], expected[:, 1:])


@both_kinds
def test_a_text_without_inputs_begins_with_row_0(kind):
  """No inputs at all, inputs of padding, and an input that embeds as row 0 are the same."""
  nothing = [TEXTS[0][:0]] * 3
  empty = outputs(kind, nothing, LABELS)
  start = {'virtual_embeddings': base(kind)['decoder']['token_embedder']['embedding'][:1]}
  for same in (outputs(kind, nothing, LABELS, width=0),
               outputs(kind, [np.array([V])] * 3, LABELS, **start)):
    for row, expected in zip(same, empty, strict=True):
      close(row[:, 1:], expected[:, 1:])
  assert all(np.abs(a[:, 1:] - b[:, 1:]).max() > 0.01
             for a, b in zip(outputs(kind, TEXTS, LABELS), empty, strict=True))


def test_nothing_added_changes_nothing():
  plain = outputs('relative', TEXTS, LABELS)
  empty = outputs('relative', TEXTS, LABELS, virtual_embeddings=PROMPT[:0], adapters=Adapters(),
                  prefix=Prefix(decoder=np.zeros((L, 2, 1, 0, N, H), np.float32)))
  for row, expected in zip(empty, plain, strict=True):
    np.testing.assert_array_equal(row, expected)


@functools.cache
def loss_and_gradient(kind):
  """Compiled: ({'prompt', 'prefix'}, batch) -> ((loss, metrics), gradient)."""
  model = PromptedModel(CONFIGS[kind].network(), LayeredPrompt(L, P, D),
                        DirectPrefix(2, CONFIGS[kind].attentions, N, H))
  return jax.jit(jax.value_and_grad(lambda added, batch: prompted_model.loss(
      model, {**base(kind), **added}, batch), has_aux=True))


ADDED = {'prompt': {'deep_embedding': ROWS},
         'prefix': {'decoder': RNG.normal(size=(L, 2, 2, N, H)).astype(np.float32)}}


@both_kinds
@pytest.mark.parametrize('placement', PLACEMENTS)
def test_packed_examples_are_each_what_they_are_alone(kind, placement):
  places = [VirtualTokens(V, 2, placement), VirtualTokens(V, 1, 'end', offset=2)]
  texts = [places[i % 2].place(text) for i, text in enumerate(TEXTS)]
  examples = list(zip(texts, LABELS, strict=True))
  # Rows wider than the network has positions: an example may not be, a row may.
  rows = packing.packed([[examples[2], examples[0]], [examples[1]]], inputs=27, targets=17)
  (packed_loss, _), packed_gradient = loss_and_gradient(kind)(ADDED, rows)
  (loss, _), gradient = loss_and_gradient(kind)(ADDED, make_batch(texts, LABELS))
  close(packed_loss, loss)
  jax.tree.map(functools.partial(close, tolerance=1e-4), packed_gradient, gradient)
  prompt, prefix = gradient['prompt']['deep_embedding'], gradient['prefix']['decoder']
  # Every row of every layer, and keys and values of every layer.
  assert np.abs(prompt).max(-1).min() > 0 and np.abs(prefix).max((2, 3, 4)).min() > 0


@both_kinds
def test_gradients_are_those_of_finite_differences(kind):
  """Of rows of every layer, that of the last input token among them, and of a prefix."""
  batch = make_batch(placed(TEXTS, 'end'), LABELS)
  function = loss_and_gradient(kind)
  _, gradient = function(ADDED, batch)
  flat, unravel = ravel_pytree(ADDED)
  slope_of, _ = ravel_pytree(gradient)
  for seed in range(3):
    direction = np.random.default_rng(seed).normal(size=flat.shape).astype(np.float32)
    direction /= np.linalg.norm(direction)
    step = 0.01
    (above, _), _ = function(unravel(flat + step * direction), batch)
    (below, _), _ = function(unravel(flat - step * direction), batch)
    slope = (float(above) - float(below)) / (2 * step)
    np.testing.assert_allclose(np.vdot(slope_of, direction), slope, rtol=0.02, atol=2e-4)


def prompted(kind):
  return (PromptedModel(CONFIGS[kind].network(), SoftPrompt(P, D)),
          {**base(kind), 'prompt': {'embedding': PROMPT}})


logits_of = jax.jit(prompted_model.logits, static_argnums=0)


@both_kinds
def test_candidates_score_as_each_pair_alone(kind):
  """Together they are longer than the network has positions."""
  model, params = prompted(kind)
  rows = [[RNG.integers(2, V, n) for n in sizes] for sizes in ((3, 1, 8), (8, 2, 2), (5,))]
  packed, texts = batches.side_by_side(rows, 14), placed(TEXTS, 'end')
  scores = jax.jit(functools.partial(prompted_model.candidate_log_likelihoods, model, most=3))(
      params, padded(texts, 15), packed['candidates'], packed['segments'])
  alone = jax.jit(functools.partial(prompted_model.log_likelihood, model))
  for c in range(3):
    expected = alone(params, make_batch(texts, [row[min(c, len(row) - 1)] for row in rows]))
    np.testing.assert_allclose(scores[:, c], np.where([c < len(row) for row in rows], expected,
                                                      -np.inf), rtol=2e-5)


@both_kinds
def test_probabilities_of_all_words_are_1(kind):
  """And padding, where it is no word, has none of it."""
  model, params = prompted(kind)
  batch = make_batch(placed(TEXTS), LABELS)
  logits = logits_of(model, params, batch)
  each = np.exp(np.stack([objectives.token_log_likelihood(logits, np.full((3, 8), word))
                          for word in range(V)]))
  np.testing.assert_allclose(each.sum(0), 1, rtol=1e-5)
  assert np.all(each[0] > 0) if CONFIGS[kind].has_padding_row else not np.any(each[0])


@both_kinds
def test_cached_greedy_decoding_is_the_uncached_argmax(kind):
  """Of prompted texts and of one without any text."""
  model, params = prompted(kind)
  texts = [*placed([RNG.integers(2, V, n) for n in (7, 1, 4, 6, 2)], 'end'), np.array([], int)]
  inputs, length = padded(texts, 11), 9
  predict = jax.jit(lambda eos_id: prompted_model.predict(
      model, params, inputs, length, eos_id=eos_id))
  tokens = np.asarray(predict(V))  # no such id: nothing ends
  best = np.argmax(logits_of(model, params, {
      'encoder_input_tokens': inputs, 'decoder_target_tokens': np.ones_like(tokens),
      'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]}), -1)
  np.testing.assert_array_equal(tokens, best)
  eos = tokens[0, 2]
  ended = np.asarray(predict(eos))
  for row, expected in zip(ended, tokens, strict=True):
    size = list(expected).index(eos) + 1 if eos in expected else length
    np.testing.assert_array_equal(row[:size], expected[:size])
    assert not np.any(row[size:])


@both_kinds
def test_steps_of_any_size_are_one_call_and_beams_share_what_was_encoded(kind):
  """Every array of `encode` and of the cache has the batch first, so that rows can be repeated."""
  model, params = prompted(kind)
  batch = make_batch(placed(TEXTS, 'end'), [np.pad(label, (0, 8 - len(label)), constant_values=5)
                                            for label in LABELS])
  whole = logits_of(model, params, batch)
  twice = lambda tree: jax.tree.map(
      lambda leaf: jnp.repeat(leaf, 2, axis=0) if jnp.ndim(leaf) else leaf, tree)
  inputs, tokens = batch['encoder_input_tokens'], batch['decoder_input_tokens']
  apply = functools.partial(model.apply, enable_dropout=False)
  encoded = jax.jit(functools.partial(apply, method='encode'))({'params': params}, inputs)
  decode = jax.jit(functools.partial(apply, decode=True, max_decode_length=8, mutable=['cache'],
                                     method='decode'))
  step = tokens[:, :1]
  _, state = decode({'params': params}, encoded, inputs, step, step)
  encoded, inputs, tokens, state = map(twice, (encoded, inputs, tokens, state))
  start, pieces = 0, []
  for size in (1, 1, 6):
    step = tokens[:, start:start + size]
    logits, state = decode({'params': params, **state}, encoded, inputs, step, step)
    pieces.append(logits)
    start += size
  close(np.concatenate(pieces, 1)[..., 1:], np.repeat(whole, 2, 0)[..., 1:])


def test_dropout_is_a_function_of_its_key():
  model, params = prompted('relative')
  batch = make_batch(placed(TEXTS), LABELS)
  loss = jax.jit(lambda key: prompted_model.loss(model, params, batch, key)[0])
  losses = [loss(jax.random.key(i)).item() for i in (0, 1, 0)]
  assert losses[0] == losses[2] != losses[1]


def test_positions_that_the_network_has_not_are_nan_but_padding_is_not():
  long = np.ones((1, 25), np.int32)
  short = np.ones((1, 4), np.int32)
  model, params = prompted('learned')
  for size in (21, 22):  # 22 + 4 - 1 is one too many
    logits, = outputs('learned', long[:, :size], short, width=30)
    assert np.all(np.isnan(logits[:, 1:]) if size == 22 else np.isfinite(logits))
  # 15 + 24 - 1 are too many too, but the last are padding: they are not NaN, nor do they spoil.
  wide = logits_of(model, params, make_batch(placed(TEXTS), LABELS, target_width=24))
  assert np.all(np.isfinite(wide))
  batch = make_batch(placed(TEXTS), LABELS)
  live = batch['decoder_target_tokens'] > 0
  close(wide[:, :8][live][:, 1:], logits_of(model, params, batch)[live][:, 1:])


def test_packed_rows_need_all_segments_and_are_not_decoded_step_by_step():
  one = np.ones((1, 3), np.int32)
  with pytest.raises(ValueError, match='need decoder_segment_ids too'):
    network('relative')({'params': base('relative')}, one, one, one, encoder_segment_ids=one)
  with pytest.raises(ValueError, match='cannot be decoded step by step'):
    CONFIGS['relative'].network().apply(
        {'params': base('relative')}, [], one, one, one, decoder_segment_ids=one, decode=True,
        method='decode', mutable=['cache'])


def test_logical_axes_are_known_by_path_alone():
  for kind, config in CONFIGS.items():
    for path, spec in parameters.parameter_specs(config).items():
      assert parameters.logical_axes(path) == spec.axes, (kind, path)
      assert len(spec.axes) == len(spec.shape)
  assert parameters.logical_axes('decoder/layers_7/mlp/wi/bias') == ('mlp',)


def test_what_a_configuration_may_not_be():
  for change, message in ((dict(mlp_activations=['gelu', 'tanh']), 'must be among'),
                          (dict(mlp_activations=()), 'must be among'),
                          (dict(dtype='float16'), "'float32' or 'bfloat16'")):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(CONFIGS['learned'], **change)

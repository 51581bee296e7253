"""The laws of a prompted model: what a prompt is, and what loss, scores and predictions mean."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning

from prompt_tuning_jax import objectives, param_paths, prompted_model
from prompt_tuning_jax.data import batches, packing
from prompt_tuning_jax.networks import parameters, t5
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

V, D, P = 40, 24, 5
CONFIG = t5.T5Config(vocab_size=V, emb_dim=D, num_heads=3, num_encoder_layers=1,
                     num_decoder_layers=1, head_dim=5, mlp_dim=17, dropout_rate=0.3)
RNG = np.random.default_rng(0)

pytestmark = pytest.mark.usefixtures('exact_products')


def random_base(config=CONFIG):
  rng = np.random.default_rng(1)
  base = {path: rng.normal(size=spec.shape).astype(np.float32)
          * (1 if path.endswith(('scale', 'embedding')) else 0.7 * spec.shape[0] ** -0.5)
          for path, spec in parameters.parameter_specs(config).items()}
  base['decoder/logits_dense/kernel'][:, 1] *= 1.5  # so that some texts end
  return param_paths.unflatten(base)


BASE = random_base()
PROMPT = RNG.normal(size=(P, D)).astype(np.float32)
MODEL = PromptedModel(t5.Transformer(CONFIG), SoftPrompt(P, D))
PARAMS = {**BASE, 'prompt': {'embedding': PROMPT}}
TEXTS = [RNG.integers(2, V, n) for n in (16, 9, 3)]
LABELS = [RNG.integers(2, V, n) for n in (8, 1, 6)]
WIDTH, TARGET_WIDTH = 16 + P, 8


def padded(rows, width):
  return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)


def placed(texts=TEXTS, placement='before', length=P, offset=0):
  return list(map(VirtualTokens(V, length, placement, offset).place, texts))


def make_batch(texts, labels=LABELS, width=WIDTH):
  targets = padded(labels, TARGET_WIDTH)
  return {'encoder_input_tokens': padded(texts, width),
          'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
          'decoder_target_tokens': targets,
          'decoder_loss_weights': (targets > 0).astype(np.float32)}


BATCH = make_batch(placed())
jit = functools.partial(jax.jit, static_argnums=0)
logits = jit(prompted_model.logits)
loss = jax.jit(prompted_model.loss, static_argnames=('model', 'z_loss', 'label_smoothing'))
log_likelihood = jit(prompted_model.log_likelihood)
candidate_log_likelihoods = jax.jit(prompted_model.candidate_log_likelihoods,
                                   static_argnums=(0, 5))


@functools.cache
def loss_and_gradient():
  """Compiled once: (prompt, base, batch) -> ((loss, metrics), gradient of the prompt)."""
  return jax.jit(jax.value_and_grad(
      lambda prompt, base, batch: prompted_model.loss(
          MODEL, {**base, 'prompt': {'embedding': prompt}}, batch), has_aux=True))


def live(values, batch=BATCH):
  return np.asarray(values)[batch['decoder_target_tokens'] > 0]


def close(a, b, tolerance=2e-5):
  a, b = np.asarray(a), np.asarray(b)
  assert np.max(np.abs(a - b)) <= tolerance * np.sqrt(np.mean(b ** 2))


def test_the_base_keeps_its_names_and_the_prompt_stands_beside_it():
  token = np.ones((1, 2), np.int32)
  variables = jax.eval_shape(functools.partial(MODEL.init, enable_dropout=False),
                             jax.random.key(0), token, token, token)
  shapes = {path: leaf.shape for path, leaf in param_paths.flatten(variables['params']).items()}
  base = {path: spec.shape for path, spec in parameters.parameter_specs(CONFIG).items()}
  assert shapes == base | {'prompt/embedding': (P, D)}
  axes = param_paths.flatten(partitioning.get_axis_names(variables['params_axes']))
  assert axes.keys() == shapes.keys()
  assert tuple(axes['prompt/embedding']) == ('prompt', 'embed')


def test_an_empty_prompt_is_the_base_model():
  batch = make_batch(TEXTS)
  plain = logits(PromptedModel(t5.Transformer(CONFIG)), BASE, batch)
  empty = PromptedModel(t5.Transformer(CONFIG), SoftPrompt(0, D))
  params = {**BASE, 'prompt': {'embedding': np.zeros((0, D), np.float32)}}
  np.testing.assert_array_equal(logits(empty, params, make_batch(placed(length=0))), plain)
  # Nor does a prompt that no row names change anything.
  np.testing.assert_array_equal(logits(MODEL, PARAMS, batch), plain)


@functools.cache
def larger_base():
  """A base whose vocabulary ends with the prompt's rows as ordinary words."""
  base = jax.tree.map(np.copy, BASE)
  base['token_embedder']['embedding'] = np.concatenate(
      [BASE['token_embedder']['embedding'], PROMPT])
  base['decoder']['logits_dense']['kernel'] = np.pad(
      BASE['decoder']['logits_dense']['kernel'], ((0, 0), (0, P)))
  config = t5.T5Config(**{**vars(CONFIG), 'vocab_size': V + P})
  return PromptedModel(t5.Transformer(config)), base


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_virtual_tokens_are_new_words(placement):
  batch = make_batch(placed(placement=placement))
  close(live(logits(MODEL, PARAMS, batch)), live(logits(*larger_base(), batch))[:, :V], 1e-6)


def test_placements_differ():
  outputs = [live(logits(MODEL, PARAMS, make_batch(placed(placement=placement))))
             for placement in PLACEMENTS]
  for i in range(4):
    for j in range(i):
      assert np.max(np.abs(outputs[i] - outputs[j])) > 0.01


def test_a_mixed_batch_is_each_prompt_alone():
  """Prompts of different lengths and placements, from a bank of rows, in one batch."""
  bank = np.random.default_rng(2).normal(size=(12, D)).astype(np.float32)
  model = PromptedModel(t5.Transformer(CONFIG), SoftPrompt(12, D))
  kinds = [(0, P, 'before'), (P, 3, 'infix'), (P + 3, 4, 'end')]
  texts = [placed([text], placement, length, offset)[0]
           for text, (offset, length, placement) in zip(TEXTS, kinds, strict=True)]
  mixed = logits(model, {**BASE, 'prompt': {'embedding': bank}}, make_batch(texts))
  for i, (offset, length, placement) in enumerate(kinds):
    only = np.full_like(bank, np.nan)  # what is not this prompt would be seen
    only[:length] = bank[offset:offset + length]
    alone = logits(model, {**BASE, 'prompt': {'embedding': only}},
                   make_batch(placed([TEXTS[i]] * 3, placement, length)))
    size = len(LABELS[i])
    close(mixed[i, :size], alone[i, :size], 1e-5)


def pack(rows, width):
  tokens, segments, positions = np.zeros((3, 1, width), np.int32)
  start = 0
  for i, row in enumerate(rows, 1):
    at = slice(start, start + len(row))
    tokens[0, at], segments[0, at], positions[0, at] = row, i, np.arange(len(row))
    start += len(row)
  return tokens, segments, positions


def packed_batch():
  inputs, input_segments, input_positions = pack(placed(), 48)
  targets, target_segments, target_positions = pack(LABELS, 17)
  decoder_inputs, _, _ = pack([np.pad(label, (1, 0))[:-1] for label in LABELS], 17)
  return {'encoder_input_tokens': inputs, 'encoder_segment_ids': input_segments,
          'encoder_positions': input_positions, 'decoder_input_tokens': decoder_inputs,
          'decoder_target_tokens': targets, 'decoder_segment_ids': target_segments,
          'decoder_positions': target_positions,
          'decoder_loss_weights': (targets > 0).astype(np.float32)}


def test_packed_is_unpacked():
  packed = packed_batch()
  (mean, metrics), gradient = loss_and_gradient()(PROMPT, BASE, packed)
  (expected, reported), expected_gradient = loss_and_gradient()(PROMPT, BASE, BATCH)
  np.testing.assert_allclose(mean, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics['accuracy'], reported['accuracy'], rtol=1e-6)
  close(gradient, expected_gradient)


def test_the_gradient_of_a_prompt_is_that_of_finite_differences():
  function = loss_and_gradient()
  _, gradient = function(PROMPT, BASE, BATCH)
  for seed in range(3):
    direction = np.random.default_rng(seed).normal(size=PROMPT.shape).astype(np.float32)
    direction /= np.linalg.norm(direction)
    step = 0.02
    (above, _), _ = function(PROMPT + step * direction, BASE, BATCH)
    (below, _), _ = function(PROMPT - step * direction, BASE, BATCH)
    slope = (float(above) - float(below)) / (2 * step)
    np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=0.02, atol=2e-4)


def test_the_gradient_reaches_the_rows_of_its_own_prompt_alone():
  rows = P  # of which two are named
  texts = [VirtualTokens(V, 2, offset=1).place(text) for text in TEXTS]
  _, gradient = loss_and_gradient()(PROMPT, BASE, make_batch(texts))
  assert [i for i in range(rows) if np.any(gradient[i])] == [1, 2]
  _, gradient = loss_and_gradient()(PROMPT, BASE, make_batch(TEXTS))
  assert not np.any(gradient)


def test_loss_is_the_weighted_mean_over_target_tokens():
  outputs = np.asarray(logits(MODEL, PARAMS, BATCH))
  targets, weights = BATCH['decoder_target_tokens'], BATCH['decoder_loss_weights'].copy()
  weights[0, 2], weights[2] = 0.5, 0
  tokens = objectives.cross_entropy(outputs, targets, 0.01, 0.1)
  mean, metrics = loss(MODEL, PARAMS, {**BATCH, 'decoder_loss_weights': weights}, z_loss=0.01,
                       label_smoothing=0.1)
  np.testing.assert_allclose(mean, np.sum(tokens * weights) / np.sum(weights), rtol=1e-5)
  plain = objectives.cross_entropy(outputs, targets)  # what is reported has no z-loss in it
  np.testing.assert_allclose(metrics['loss'], np.sum(plain * weights) / np.sum(weights), rtol=1e-5)
  np.testing.assert_allclose(metrics['tokens'], np.sum(weights))
  right = np.sum((outputs.argmax(-1) == targets) * weights) / np.sum(weights)
  np.testing.assert_allclose(metrics['accuracy'], right, rtol=1e-6)


def test_a_batch_of_nothing_costs_nothing():
  nothing = {name: np.zeros_like(value) for name, value in BATCH.items()}
  (mean, metrics), gradient = loss_and_gradient()(PROMPT, BASE, nothing)
  assert mean == metrics['accuracy'] == metrics['tokens'] == 0
  assert not np.any(gradient)


def test_dropout_is_a_function_of_its_key_and_drops_features_of_the_prompt_too():
  @jax.jit
  def dropped(key):
    def total(prompt):
      params = {**BASE, 'prompt': {'embedding': prompt}}
      return prompted_model.loss(MODEL, params, BATCH, key)[0]
    return jax.value_and_grad(total)(PROMPT)

  losses, gradients = zip(*[dropped(jax.random.key(i)) for i in range(20)], strict=True)
  assert dropped(jax.random.key(3))[0] == losses[3]
  (without, _), _ = loss_and_gradient()(PROMPT, BASE, BATCH)
  assert len({without.item(), *(loss.item() for loss in losses)}) == 21
  # The prompt joins the embedded text before dropout, and a feature of an example is dropped at
  # all of its positions: of three examples and rate 0.3, one feature in 37 has no gradient.
  dead = np.stack([np.all(gradient == 0, axis=0) for gradient in gradients])
  assert 0 < np.mean(dead) < 0.1


def test_log_likelihood_is_the_loss_summed():
  scores = log_likelihood(MODEL, PARAMS, BATCH)
  assert scores.shape == (3,)
  (mean, metrics), _ = loss_and_gradient()(PROMPT, BASE, BATCH)
  np.testing.assert_allclose(-np.sum(scores), mean * metrics['tokens'], rtol=1e-5)
  probabilities = jax.nn.log_softmax(logits(MODEL, PARAMS, BATCH))
  expected = np.take_along_axis(np.asarray(probabilities),
                                BATCH['decoder_target_tokens'][..., None], -1)[..., 0]
  np.testing.assert_allclose(scores, np.sum(expected * BATCH['decoder_loss_weights'], -1),
                             rtol=1e-5)


def scores_of(rows, width=24, most=3):
  """The candidates of each input, as arrays of ids -> [B, most]."""
  packed = batches.side_by_side(rows, width)
  return candidate_log_likelihoods(MODEL, PARAMS, BATCH['encoder_input_tokens'],
                                   packed['candidates'], packed['segments'], most)


def test_candidates_score_as_each_pair_alone():
  """Candidates of unequal length; where there is none the score is -inf."""
  rows = [[RNG.integers(2, V, n) for n in sizes] for sizes in ((3, 1, 8), (8, 2, 2), (5,))]
  scores = scores_of(rows)
  assert scores.shape == (3, 3) and scores.dtype == jnp.float32
  for c in range(3):
    batch = make_batch(placed(), [row[min(c, len(row) - 1)] for row in rows])
    expected = np.where([c < len(row) for row in rows], log_likelihood(MODEL, PARAMS, batch),
                        -np.inf)
    np.testing.assert_allclose(scores[:, c], expected, rtol=2e-5)


def test_the_order_and_padding_of_candidates_do_not_matter():
  scores = scores_of([LABELS] * 3)
  np.testing.assert_allclose(scores_of([LABELS[::-1]] * 3), scores[:, ::-1], rtol=2e-5)
  more = scores_of([LABELS] * 3, width=31, most=4)
  np.testing.assert_allclose(more[:, :3], scores, rtol=2e-5)
  assert np.all(np.isneginf(more[:, 3]))


def test_the_cross_cache_changes_nothing():
  """Of one decoding step: keys and values of the encoded input, kept or computed again."""
  inputs = BATCH['encoder_input_tokens']
  apply = functools.partial(MODEL.apply, enable_dropout=False)

  @jax.jit
  def step(params):
    encoded = apply({'params': params}, inputs, method='encode')
    decode = functools.partial(apply, decode=True, max_decode_length=4, method='decode')
    tokens = jnp.zeros((3, 1), jnp.int32)
    call = (encoded, inputs, tokens, tokens)
    _, state = decode({'params': params}, *call, mutable=['cache', 'cross_cache'])
    kept, _ = decode({'params': params, **state}, *call, mutable=['cache'])
    fresh, _ = decode({'params': params, 'cache': state['cache']}, *call, mutable=['cache'])
    return kept, fresh

  kept, fresh = step(PARAMS)
  close(kept, fresh, 1e-6)
  close(kept[:, 0], logits(MODEL, PARAMS, BATCH)[:, 0])


def test_bfloat16_is_close_to_float32():
  config = t5.T5Config(**{**vars(CONFIG), 'dtype': 'bfloat16'})
  model = PromptedModel(t5.Transformer(config), SoftPrompt(P, D))
  ((mean, _), _), (rounded, _) = loss_and_gradient()(PROMPT, BASE, BATCH), loss(
      model, PARAMS, BATCH)
  assert rounded.dtype == jnp.float32 and rounded != mean
  np.testing.assert_allclose(rounded, mean, rtol=0.02)


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_packed_examples_are_each_what_they_are_alone(placement):
  """Two prompts of one bank, rows of several examples: losses and the prompt's gradient agree."""
  places = [VirtualTokens(V, 2, placement), VirtualTokens(V, 3, 'before', offset=2)]
  texts = [places[i % 2].place(text) for i, text in enumerate(TEXTS)]
  batch = make_batch(texts)
  examples = list(zip(texts, LABELS, strict=True))
  rows = packing.packed([[examples[2], examples[0]], [examples[1]]], inputs=31, targets=17)
  expected = log_likelihood(MODEL, PARAMS, batch)
  tokens = objectives.token_log_likelihood(logits(MODEL, PARAMS, rows),
                                           rows['decoder_target_tokens'])
  for i, (row, segment) in enumerate(((0, 2), (1, 1), (0, 1))):
    mine = rows['decoder_segment_ids'][row] == segment
    close(np.sum(np.asarray(tokens)[row][mine]), expected[i])
  (packed_loss, _), packed_gradient = loss_and_gradient()(PROMPT, BASE, rows)
  (plain_loss, _), plain_gradient = loss_and_gradient()(PROMPT, BASE, batch)
  close(packed_loss, plain_loss)
  close(packed_gradient, plain_gradient)
  assert np.abs(plain_gradient).min() > 0

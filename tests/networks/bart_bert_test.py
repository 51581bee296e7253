"""Laws of BART and BERT: packing, mixing, caching, candidates; their numbers are torch's elsewhere.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import objectives, param_paths, prompted_model
from prompt_tuning_jax.data import batches, packing
from prompt_tuning_jax.networks import bart, bert, parameters
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import PLACES, Prefix
from prompt_tuning_jax.prompted_model import Added, PromptedModel
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens

V, D, N, H, L, P = 30, 8, 2, 4, 2, 3
END, MASK = 3, 4
CONFIGS = {'bart': bart.BartConfig(V, D, N, L, L, H, 12, max_positions=24, dropout_rate=0.2),
           'bert': bert.BertConfig(V, D, N, L, H, 12, max_positions=24, dropout_rate=0.2,
                                   mask_id=MASK, end_id=END)}
RNG = np.random.default_rng(0)
# As many masks as targets, but for the last: an end that is foretold at a mask.
TEXTS = [np.array([5, MASK, 6, MASK, 7, 8, END, 9]), np.array([MASK]),
         np.array([9, MASK, END, MASK, END])]
LABELS = [np.array([11, 12, END]), np.array([13, END]), np.array([14, END])]
ROWS = RNG.normal(size=(L, 5, D)).astype(np.float32)  # a prompt of 3 and one of 2

both = pytest.mark.parametrize('kind', CONFIGS)
# BART's takes long, and its parts are T5's, where the fast tests have it.
slow_for_bart = pytest.mark.parametrize('kind', [
    pytest.param('bart', marks=pytest.mark.slow), 'bert'])

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


def make_batch(texts, labels, width=15, target_width=6):
  targets = padded(labels, target_width)
  return {'encoder_input_tokens': padded(texts, width),
          'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
          'decoder_target_tokens': targets,
          'decoder_loss_weights': (targets > 0).astype(np.float32)}


def added(kind, slots):
  """Of everything, two: example r has the prefix and the adapters slots[r]."""
  rng, cfg = np.random.default_rng(2), CONFIGS[kind]
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  places = [place for place in PLACES if place in cfg.attentions]
  adapters = {place: {'down': draw(L, 2, D, 2), 'down_bias': draw(L, 2, 2),
                      'up': draw(L, 2, 2, D), 'up_bias': draw(L, 2, D)} for place in cfg.sublayers}
  return Added(ROWS, Prefix(**{place: draw(L, 2, 2, 3, N, H) for place in places}, rows=slots,
                            lengths={place: np.array([3, 2]) for place in places}),
               Adapters(adapters, slots))


SLOTS = np.array([1, 0, 1], np.int32)
PLACED = [VirtualTokens(V, 3, 'after_first').place(TEXTS[0]), TEXTS[1],
          VirtualTokens(V, 2, 'end', 3).place(TEXTS[2])]


@functools.cache
def logits_of(kind):
  return jax.jit(functools.partial(prompted_model.logits, PromptedModel(CONFIGS[kind].network())))


def outputs(kind, texts, labels, slots=SLOTS, **widths):
  """Logits of the live target positions, one array a row; what is masked is left out."""
  made = logits_of(kind)(base(kind), make_batch(texts, labels, **widths), added=added(kind, slots))
  return [np.maximum(row[:len(label)], -1e3)
          for row, label in zip(np.asarray(made), labels, strict=True)]


def close(ours, expected, tolerance=2e-5):
  ours, expected = np.asarray(ours), np.asarray(expected)
  assert ours.shape == expected.shape
  assert np.max(np.abs(ours - expected)) <= tolerance * max(1, np.sqrt(np.mean(expected ** 2)))


@slow_for_bart
def test_a_mixed_batch_is_each_example_alone_and_padding_does_not_matter(kind):
  mixed = outputs(kind, PLACED, LABELS)
  for i in range(3):
    alone, = outputs(kind, PLACED[i:i + 1], LABELS[i:i + 1], SLOTS[i:i + 1], width=12,
                     target_width=4)
    close(alone, mixed[i])
  assert all(np.ptp(row[0]) > 1 for row in mixed)


@slow_for_bart
def test_nothing_added_changes_nothing(kind):
  run, batch, cfg = logits_of(kind), make_batch(TEXTS, LABELS), CONFIGS[kind]
  empty = Added(ROWS[0, :0], Prefix(**{place: np.zeros((L, 2, 1, 0, N, H), np.float32)
                                       for place in cfg.attentions}), Adapters())
  np.testing.assert_array_equal(run(base(kind), batch, added=empty), run(base(kind), batch))


@slow_for_bart
def test_packed_examples_are_each_what_they_are_alone(kind):
  """Loss and gradients of a prompt of every layer and of all prefixes, each of which has one."""
  model, cfg = PromptedModel(CONFIGS[kind].network()), CONFIGS[kind]
  everything = added(kind, None)
  places = list(cfg.attentions)
  trained = {'rows': ROWS, 'prefix': {place: getattr(everything.prefix, place)[:, :, :1]
                                      for place in places}}

  def loss(trained, batch):
    given = Added(trained['rows'], Prefix(**trained['prefix']))
    logits = prompted_model.logits(model, base(kind), batch, added=given)
    each = objectives.cross_entropy(logits, batch['decoder_target_tokens'])
    return jnp.sum(each * batch['decoder_loss_weights'])

  examples = list(zip(PLACED, LABELS, strict=True))
  # Rows wider than the network has positions: an example may not be, a row may.
  rows = packing.packed([[examples[2], examples[0]], [examples[1]]], inputs=27, targets=9)
  value_and_grad = jax.jit(jax.value_and_grad(loss))
  packed, alone = value_and_grad(trained, rows), value_and_grad(trained, make_batch(PLACED, LABELS))
  close(packed[0], alone[0])
  jax.tree.map(functools.partial(close, tolerance=1e-4), packed[1], alone[1])
  assert np.abs(alone[1]['rows']).max(-1).min() > 0
  for place in places:  # every layer, keys and values
    assert np.abs(alone[1]['prefix'][place]).max((2, 3, 4, 5)).min() > 0


@slow_for_bart
def test_candidates_score_as_each_pair_alone(kind):
  model, texts = PromptedModel(CONFIGS[kind].network()), PLACED
  rows = [[np.array([11, 12, END]), np.array([13, END])], [np.array([14, END])] * 2,
          [np.array([15, 16, END])]]
  packed = batches.side_by_side(rows, 8)
  scores = jax.jit(functools.partial(prompted_model.candidate_log_likelihoods, model, most=2))(
      base(kind), padded(texts, 15), packed['candidates'], packed['segments'],
      added=added(kind, SLOTS))
  for c in range(2):
    batch = make_batch(texts, [row[min(c, len(row) - 1)] for row in rows])
    each = objectives.token_log_likelihood(
        logits_of(kind)(base(kind), batch, added=added(kind, SLOTS)),
        batch['decoder_target_tokens'])
    expected = np.sum(each * batch['decoder_loss_weights'], axis=-1)
    np.testing.assert_allclose(scores[:, c], np.where([c < len(row) for row in rows], expected,
                                                      -np.inf), rtol=2e-5)


@slow_for_bart
def test_cached_decoding_is_the_uncached_argmax(kind):
  """Token by token, and BERT's texts end where their masks do."""
  model, inputs, length = PromptedModel(CONFIGS[kind].network()), padded(PLACED, 15), 6
  given = added(kind, SLOTS)
  tokens = np.asarray(jax.jit(lambda given: prompted_model.predict(
      model, base(kind), inputs, length, eos_id=V, added=given))(given))  # nothing ends
  best = np.argmax(logits_of(kind)(base(kind), {
      'encoder_input_tokens': inputs, 'decoder_target_tokens': np.ones_like(tokens),
      'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
      'decoder_loss_weights': np.ones(tokens.shape, np.float32)}, added=given), -1)
  np.testing.assert_array_equal(tokens, best)
  if kind == 'bert':
    masks = np.sum(inputs == MASK, axis=1)
    assert masks.tolist() == [2, 1, 2]
    assert all(np.all(row[n:] == END) for row, n in zip(tokens, masks, strict=True))


def test_berts_texts_have_probabilities_that_sum_to_1():
  """Of a text with two masks, all answers of up to two tokens."""
  logits = np.asarray(logits_of('bert')(base('bert'), make_batch(
      TEXTS[:1], [np.array([1, 1, END])]))[0, :3])
  first, second, third = np.array(jax.nn.softmax(logits, -1), np.float64)
  assert third[END] == 1
  one_token = first[END] + second[END] * (1 - first[END])
  two = (1 - first[END]) * (1 - second[END]) * third[END]
  assert one_token + two == pytest.approx(1)


def test_berts_smoothed_loss_is_a_number():
  """Behind the last mask there is one word, and no other to smooth towards."""
  model = PromptedModel(CONFIGS['bert'].network())
  run = jax.jit(functools.partial(prompted_model.loss, model, base('bert'), label_smoothing=0.1))
  of_masks = run(make_batch(TEXTS[:2], [np.array([11, 12]), np.array([13])]))[0]
  with_ends = run(make_batch(TEXTS[:2], [np.array([11, 12, END]), np.array([13, END])]))[0]
  np.testing.assert_allclose(with_ends, of_masks * 3 / 5, rtol=1e-5)


def test_a_token_of_another_sentence_has_another_type():
  table = np.zeros_like(base('bert')['type_embedder']['embedding'])
  untyped = {**base('bert'), 'type_embedder': {'embedding': table}}
  of = lambda params, text: np.asarray(logits_of('bert')(
      params, make_batch([text], [np.array([9])])))[0, 0]
  pair, one = np.array([5, MASK, END, 6]), np.array([5, MASK, 6, END])
  assert np.abs(of(base('bert'), pair) - of(untyped, pair)).max() > 0.01
  typed = {**base('bert'), 'type_embedder': {'embedding': np.stack([table[0], table[1] + 5])}}
  np.testing.assert_array_equal(of(typed, one), of(untyped, one))  # nothing stands behind its end


@both
def test_positions_that_the_network_has_not_are_nan_but_padding_is_not(kind):
  for size in (24, 25):
    text = np.full(size, MASK)
    out = logits_of(kind)(base(kind), make_batch([text], LABELS[:1], width=30))[0, :3]
    assert np.all(np.isfinite(out)) if size == 24 else np.any(np.isnan(out))


@both
def test_packed_rows_need_all_segments_and_are_not_decoded_step_by_step(kind):
  one, network = np.ones((1, 3), np.int32), CONFIGS[kind].network()
  with pytest.raises(ValueError, match='need decoder_segment_ids too'):
    network.apply({'params': base(kind)}, one, one, one, encoder_segment_ids=one,
                  enable_dropout=False)
  with pytest.raises(ValueError, match='cannot be decoded step by step'):
    network.apply({'params': base(kind)}, np.zeros((1, 3, D)), one, one, one, decode=True,
                  decoder_segment_ids=one, method='decode', mutable=['cache'])


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['bart'])
def test_scanned_layers_are_unrolled_layers(kind):
  from prompt_tuning_jax.networks import layer_stack
  config = dataclasses.replace(CONFIGS[kind], scan_layers=True, remat_policy='minimal')
  scanned = param_paths.unflatten(layer_stack.scanned(param_paths.flatten(base(kind))))
  batch, given = make_batch(PLACED, LABELS), added(kind, SLOTS)
  ours = jax.jit(functools.partial(prompted_model.logits, PromptedModel(config.network())))(
      scanned, batch, added=given)
  live = batch['decoder_target_tokens'] > 0
  close(np.maximum(np.asarray(ours)[live], -1e3), np.concatenate(outputs(kind, PLACED, LABELS)))


@both
def test_logical_axes_are_known_by_path_alone(kind):
  for path, spec in parameters.parameter_specs(CONFIGS[kind]).items():
    assert parameters.logical_axes(path) == spec.axes and len(spec.axes) == len(spec.shape)


def test_what_a_configuration_may_not_be():
  for config in CONFIGS.values():
    for change, message in ((dict(mlp_activations=['tanh']), 'must be among'),
                            (dict(dtype='float16'), "'float32' or 'bfloat16'")):
      with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **change)

"""Batches: laws of the stream (once an epoch, pure in seed and step) and of the arrays."""

import collections
import dataclasses
import functools
import itertools

import numpy as np
import pytest

from prompt_tuning_jax.data.batches import Buckets, TrainBatches, batch_of
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

V = 8192
KEYS = {'encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens',
        'decoder_loss_weights'}


def make_cache(count: int, longest: int = 60, longest_target: int = 7, seed: int = 0,
               shortest: int = 0, vocabulary: str = 'mini') -> TokenCache:
  """A cache whose rows differ: the first target id of row i is 2 + i."""
  rng = np.random.default_rng(seed)
  inputs = [np.append(rng.integers(2, V, n), 1) for n in rng.integers(shortest, longest, count)]
  targets = [np.concatenate([[2 + i], rng.integers(2, V, n), [1]])
             for i, n in enumerate(rng.integers(0, longest_target - 1, count))]
  arrays = []
  for ids in (inputs, targets):
    arrays += [np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)])]
  return TokenCache(None, {'lengths': {'inputs': longest, 'targets': longest_target},
                           'vocabulary': vocabulary}, *arrays)


def _stream(batches: TrainBatches, steps: int, start: int = 0) -> np.ndarray:
  return np.concatenate([batches.rows_at(step) for step in range(start, start + steps)])


def _texts(batch) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
  """(inputs, targets) of every row, without padding."""
  return [(tuple(x[x > 0].tolist()), tuple(y[w > 0].tolist())) for x, y, w in zip(
      batch['encoder_input_tokens'], batch['decoder_target_tokens'],
      batch['decoder_loss_weights'], strict=True)]


@pytest.mark.parametrize(('count', 'size', 'window'), [
    (100, 8, 4), (100, 8, 64), (64, 8, 3), (5, 8, 64), (1, 3, 2), (97, 1, 10), (33, 32, 64)])
def test_the_rows_in_order_are_one_permutation_after_another(count, size, window):
  batches = TrainBatches([make_cache(count)], size, seed=3, window=window)
  rows = _stream(batches, -(-count * 5 // size))[:count * 5].reshape(5, count)
  np.testing.assert_array_equal(np.sort(rows), np.tile(np.arange(count), (5, 1)))
  if count > 30:
    assert len({tuple(epoch) for epoch in rows}) == 5


@pytest.mark.parametrize('rates', [None, (3, 1)])
def test_a_batch_depends_on_seed_and_step_alone(rates):
  caches = [make_cache(70), make_cache(40, seed=1)]
  make = lambda seed: TrainBatches(caches, 8, seed, rates=rates, window=5)
  forward = make(7)
  in_order = [forward.batch_at(step) for step in range(60)]
  for step in (59, 3, 17, 58, 0, 31):  # A resume: any step, from a new object.
    again = make(7).batch_at(step)
    assert set(again) == KEYS
    for key in KEYS:
      np.testing.assert_array_equal(again[key], in_order[step][key])
  assert (make(7).rows_at(0) != make(8).rows_at(0)).any()


def test_a_batch_holds_its_rows_and_what_teacher_forcing_needs():
  cache = make_cache(50)
  batches = TrainBatches([cache], 8, seed=1)
  for step in range(14):
    batch, rows = batches.batch_at(step), batches.rows_at(step)
    assert [array.dtype for array in batch.values()] == [np.int32] * 3 + [np.float32]
    assert _texts(batch) == [(tuple(cache.inputs(i)), tuple(cache.targets(i))) for i in rows]
    assert (batch['decoder_input_tokens'][:, 0] == 0).all()
    np.testing.assert_array_equal(batch['decoder_input_tokens'][:, 1:],
                                  batch['decoder_target_tokens'][:, :-1])
    np.testing.assert_array_equal(batch['decoder_loss_weights'],
                                  batch['decoder_target_tokens'] > 0)


def test_widths_are_the_smallest_buckets_within_the_lengths():
  cache = make_cache(300, longest=90)
  buckets = Buckets(inputs=(8, 16, 32, 64, 128), targets=(4, 64))
  batches = TrainBatches([cache], 4, buckets=buckets)
  seen = set()
  for step in range(150):
    rows = batches.rows_at(step)
    longest = cache.input_lengths[rows].max(), cache.target_lengths[rows].max()
    widths = (min(min(w for w in (8, 16, 32, 64, 128) if w >= longest[0]), 90),
              4 if longest[1] <= 4 else 7)
    batch = batches.batch_at(step)
    assert (batch['encoder_input_tokens'].shape[1],
            batch['decoder_target_tokens'].shape[1]) == widths
    seen.add(widths[0])
  assert seen == {8, 16, 32, 64, 90}
  wide = TrainBatches([cache], 4, buckets=Buckets((), ())).batch_at(0)
  assert wide['encoder_input_tokens'].shape == (4, 90)
  assert wide['decoder_target_tokens'].shape == (4, 7)
  assert Buckets((16,), (4,)) != Buckets() and TrainBatches([cache], 4).buckets == Buckets()


def test_windows_save_padding():
  cache = make_cache(2000, longest=250)

  def padding(window):
    batches = TrainBatches([cache], 16, window=window)
    share = [(batches.batch_at(step)['encoder_input_tokens'] == 0).mean() for step in range(125)]
    return np.mean(share)
  assert padding(64) < .2 < .4 < padding(1)


def test_short_targets_do_not_decide_who_stands_together():
  cache = make_cache(640, longest=10, shortest=9, longest_target=12)
  batches = TrainBatches([cache], 32)
  spread = [np.ptp(cache.target_lengths[batches.rows_at(step)]) for step in range(20)]
  assert min(spread) >= 8


@pytest.mark.parametrize('placement', PLACEMENTS)
@pytest.mark.parametrize('length', [0, 1, 20])
def test_the_prompt_stands_where_place_puts_it(placement, length):
  cache = make_cache(64, shortest=0, longest=40)
  virtual = VirtualTokens(V, length, placement, offset=5)
  plain = TrainBatches([cache], 8)
  prompted = TrainBatches([cache], 8, virtual=virtual)
  for step in range(8):
    tokens = prompted.batch_at(step)['encoder_input_tokens']
    assert tokens.shape[1] == plain.batch_at(step)['encoder_input_tokens'].shape[1] + length
    for row, i in zip(tokens, plain.rows_at(step), strict=True):
      placed = virtual.place(cache.inputs(i))
      np.testing.assert_array_equal(row, np.pad(placed, (0, len(row) - len(placed))))
  for key in KEYS - {'encoder_input_tokens'}:
    np.testing.assert_array_equal(prompted.batch_at(0)[key], plain.batch_at(0)[key])


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_a_text_without_tokens_is_the_prompt(placement):
  virtual = VirtualTokens(V, 3, placement)
  batch = batch_of([[], [9, 1]], [[4, 1], [1]], virtual)
  assert batch['encoder_input_tokens'][0].tolist() == [V, V + 1, V + 2] + 8 * [0]
  assert batch_of([[], []], [[1], [1]])['encoder_input_tokens'].tolist() == [8 * [0]] * 2


@pytest.mark.parametrize('rates', [None, (1, 2)])
def test_each_task_of_a_mixture_has_its_own_prompt(rates):
  caches = [make_cache(30), make_cache(90, seed=1)]
  prompts = [VirtualTokens(V, 3), VirtualTokens(V, 10, 'end', offset=3)]
  batches = TrainBatches(caches, 8, virtual=prompts, rates=rates)
  for step in range(20):
    rows, batch = batches.rows_at(step), batches.batch_at(step)
    expected = []
    for row in rows:
      k, i = (0, row) if row < 30 else (1, row - 30)
      expected.append((tuple(prompts[k].place(caches[k].inputs(i)).tolist()),
                       tuple(caches[k].targets(i).tolist())))
    assert _texts(batch) == expected
  with pytest.raises(ValueError, match='Expected one prompt, or one for each of 2 tasks'):
    TrainBatches(caches, 8, virtual=prompts[:1])


def test_without_rates_a_mixture_is_one_set():
  caches = [make_cache(30), make_cache(1, seed=1), make_cache(50, seed=2)]
  batches = TrainBatches(caches, 8)
  assert batches.num_examples == 81
  assert sorted(_stream(batches, 11)[:81]) == list(range(81))


@pytest.mark.parametrize(('rates', 'size', 'window'), [
    ((1, 1), 8, 4), ((3, 1, .5), 16, 8), ((.001, .999), 32, 2), ((5, 5, 1), 7, 1)])
def test_rates_hold_in_every_window_and_every_task_has_epochs(rates, size, window):
  counts = [20, 300, 77][:len(rates)]
  caches = [make_cache(count, seed=i) for i, count in enumerate(counts)]
  batches = TrainBatches(caches, size, rates=rates, window=window)
  ends = np.cumsum([0, *counts])
  seen = collections.Counter()
  for k in range(1, 13):
    seen.update(_stream(batches, window, start=(k - 1) * window).tolist())
    drawn = k * window * size
    for i in range(len(counts)):
      times = [seen[row] for row in range(ends[i], ends[i + 1])]
      assert max(times) - min(times) <= 1
      assert abs(sum(times) - drawn * rates[i] / sum(rates)) <= 1.5 + drawn / 2000


def test_every_batch_has_its_share_of_each_task():
  caches = [make_cache(300, longest=20), make_cache(300, longest=500, shortest=200, seed=1)]
  batches = TrainBatches(caches, 16, rates=(3, 1))
  for step in range(100):
    assert np.count_nonzero(batches.rows_at(step) >= 300) in (3, 4, 5)


@pytest.mark.parametrize('rates', [None, (1, 1)])
def test_processes_share_a_batch(rates, assert_processes_share):
  caches = [make_cache(100, longest=200), make_cache(50, seed=1)]
  options = {'virtual': VirtualTokens(V, 4), 'rates': rates}
  assert_processes_share(functools.partial(TrainBatches, caches, 12, **options), steps=30)


def test_texts_in_no_cache_make_the_same_batch():
  cache = make_cache(8, longest=60)
  virtual = VirtualTokens(V, 2, 'infix')
  source = TrainBatches([dataclasses.replace(
      cache, meta={'lengths': {'inputs': 999, 'targets': 999}})], 8, virtual=virtual)
  rows, expected = source.rows_at(0), source.batch_at(0)
  batch = batch_of([cache.inputs(i) for i in rows], [cache.targets(i) for i in rows], virtual)
  for key in KEYS:
    np.testing.assert_array_equal(batch[key], expected[key])


@pytest.mark.slow
def test_batches_are_those_of_seqio():
  seqio = pytest.importorskip('seqio')
  tf = pytest.importorskip('tensorflow')
  cache = make_cache(6, longest=20)
  examples = {'inputs': tf.ragged.constant([cache.inputs(i).tolist() for i in range(6)]),
              'targets': tf.ragged.constant([cache.targets(i).tolist() for i in range(6)])}
  converted = seqio.EncDecFeatureConverter(pack=False)(
      tf.data.Dataset.from_tensor_slices(examples), {'inputs': 20, 'targets': 7})
  batch = TrainBatches([cache], 6, buckets=Buckets((), ())).batch_at(0)
  order = [(y[0] - 2) for y in batch['decoder_target_tokens']]
  for key, array in batch.items():
    expected = np.stack([example[key] for example in converted.as_numpy_iterator()])
    np.testing.assert_array_equal(array, expected[order])


def test_wrong_arguments_are_refused():
  caches = [make_cache(5), make_cache(5)]
  for message, arguments in [
      ('multiple of the 3 processes', {'batch_size': 8, 'process_count': 3}),
      ('got 0 in process 0', {'batch_size': 0}),
      ('in process 2', {'batch_size': 8, 'process_index': 2, 'process_count': 2}),
      ('positive rate for each of 2', {'batch_size': 8, 'rates': (1, 0)}),
      ('positive rate for each of 2', {'batch_size': 8, 'rates': (1,)}),
      ('seed >= 0', {'batch_size': 8, 'seed': -1}),
      ('at least one task', {'batch_size': 8, 'caches': []}),
      ('one vocabulary', {'batch_size': 8, 'caches': [caches[0], make_cache(5, vocabulary='b')]})]:
    with pytest.raises(ValueError, match=message):
      TrainBatches(**{'caches': caches, **arguments})
  for widths in itertools.permutations((8, 16, 8)):
    with pytest.raises(ValueError, match='rising widths'):
      Buckets(inputs=widths)

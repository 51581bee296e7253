"""Packed batches: every example once an epoch, whole, with its own prompt; and little padding."""

import itertools

import numpy as np
import pytest

from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.packing import PackedBatches, pack, packed
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

V = 100_000


def make_cache(count, longest=60, longest_target=7, seed=0, shortest=1, task='made'):
  """A cache whose rows differ: the first target id of row i is 2 + i."""
  rng = np.random.default_rng(seed)
  inputs = [np.append(rng.integers(2, V, n - 1), 1)
            for n in rng.integers(shortest, longest, count, endpoint=True)]
  targets = [np.concatenate([[2 + i], rng.integers(2, V, n), [1]])
             for i, n in enumerate(rng.integers(0, longest_target - 1, count))]
  arrays = []
  for ids in (inputs, targets):
    arrays += [np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)])]
  return TokenCache(None, {'task': task, 'vocabulary': 'mini', 'files': {},
                           'lengths': {'inputs': longest, 'targets': longest_target}}, *arrays)


def segments(batch):
  """(inputs, targets, decoder inputs) of every example of a batch, in order."""
  found = []
  for b in range(len(batch['encoder_input_tokens'])):
    ids = batch['encoder_segment_ids'][b], batch['decoder_segment_ids'][b]
    assert set(ids[0]) == set(ids[1]) or set(ids[0]) | {0} == set(ids[1]) | {0}
    for k in range(1, ids[0].max() + 1):
      found.append(tuple(tuple(batch[name][b][mine == k].tolist()) for name, mine in (
          ('encoder_input_tokens', ids[0]), ('decoder_target_tokens', ids[1]),
          ('decoder_input_tokens', ids[1]))))
  return found


@pytest.mark.parametrize(('inputs', 'targets', 'longest'), [
    (64, 16, 60), (200, 40, 60), (96, 12, 90), (40, 64, 8)])
def test_every_example_is_in_one_row_that_has_room_for_it(inputs, targets, longest):
  rng = np.random.default_rng(0)
  n, m = rng.integers(1, longest + 1, 9000), rng.integers(1, 8, 9000)
  members, offsets = pack(n, m, inputs, targets, seed=1)
  assert sorted(members) == list(range(9000))
  assert np.add.reduceat(n[members], offsets[:-1]).max() <= inputs
  assert np.add.reduceat(m[members], offsets[:-1]).max() <= targets
  assert (np.diff(offsets) > 0).all()
  again = pack(n, m, inputs, targets, seed=1)
  np.testing.assert_array_equal(members, again[0])
  assert (pack(n, m, inputs, targets, seed=2)[0] != members).any()
  # No worse than filling row after row in the order that comes, and close to what is possible.
  rows = len(offsets) - 1
  least = max(n.sum() / inputs, m.sum() / targets)
  assert rows <= 1.12 * least


def test_short_examples_fill_up_rows_of_long_ones():
  """60s take the 40s, and no row of 100 has a gap."""
  members, offsets = pack(np.array([40] * 50 + [60] * 50), np.ones(100, int), 100, 10)
  assert len(offsets) - 1 == 50
  assert {tuple(sorted(row >= 50 for row in members[a:b]))
          for a, b in itertools.pairwise(offsets)} == {(False, True)}


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_an_epoch_shows_every_example_whole_with_its_prompt(placement):
  cache = make_cache(300)
  virtual = VirtualTokens(V, 5, placement, offset=2)
  batches = PackedBatches([cache], 4, seed=3, virtual=virtual)
  rows = len(batches._packs[0][1]) - 1
  seen = [example for step in range(-(-rows // 4))
          for example in segments(batches.batch_at(step))]
  expected = {(tuple(virtual.place(cache.inputs(i)).tolist()), tuple(cache.targets(i).tolist()),
               (0, *cache.targets(i)[:-1].tolist())) for i in range(300)}
  assert set(seen) == expected
  assert len(seen) >= 300


def test_the_arrays_of_a_row():
  rows = [[([9, 8, 1], [7, 1]), ([5, 1], [6, 4, 1])], [([3, 1], [2, 1])]]
  batch = packed(rows, inputs=6, targets=6)
  expected = {
      'encoder_input_tokens': [[9, 8, 1, 5, 1, 0], [3, 1, 0, 0, 0, 0]],
      'encoder_segment_ids': [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]],
      'encoder_positions': [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]],
      'decoder_input_tokens': [[0, 7, 0, 6, 4, 0], [0, 2, 0, 0, 0, 0]],
      'decoder_target_tokens': [[7, 1, 6, 4, 1, 0], [2, 1, 0, 0, 0, 0]],
      'decoder_segment_ids': [[1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0]],
      'decoder_positions': [[0, 1, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0]],
      'decoder_loss_weights': [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]}
  assert batch.keys() == expected.keys()
  for name, rows in expected.items():
    np.testing.assert_array_equal(batch[name], rows, name)
    assert batch[name].dtype == (np.float32 if name.endswith('weights') else np.int32)


@pytest.mark.slow
def test_a_row_is_what_seqio_packs():
  seqio = pytest.importorskip('seqio')
  tf = pytest.importorskip('tensorflow')
  cache = make_cache(3, longest=9)
  order = list(range(3))
  data = {'inputs': tf.ragged.constant([cache.inputs(i).tolist() for i in order]),
          'targets': tf.ragged.constant([cache.targets(i).tolist() for i in order])}
  converted = next(seqio.EncDecFeatureConverter(pack=True)(
      tf.data.Dataset.from_tensor_slices(data), {'inputs': 32, 'targets': 24}
  ).as_numpy_iterator())
  batch = packed([[(cache.inputs(i), cache.targets(i)) for i in order]], 32, 24)
  assert batch.keys() == converted.keys()
  for name, array in batch.items():
    np.testing.assert_array_equal(array[0], converted[name], name)


@pytest.mark.parametrize('length', [0, 20, 100])
def test_nearly_all_is_tokens(length):
  cache = make_cache(3000, longest=60)
  virtual = VirtualTokens(V, length)
  batches = PackedBatches([cache], 8, virtual=virtual)
  some = [batches.batch_at(step) for step in range(10)]
  tokens = np.mean([(batch['encoder_input_tokens'] > 0).mean() for batch in some])
  assert tokens > .9
  both = np.mean([np.concatenate([batch['encoder_segment_ids'], batch['decoder_segment_ids']],
                                 axis=1).astype(bool).mean() for batch in some])
  assert both > .9
  counts = [sum(len(members) for _, members in batches.rows_at(step)) for step in range(100)]
  assert batches.examples_per_batch == pytest.approx(np.mean(counts), rel=.05)


def test_a_batch_depends_on_seed_and_step_alone():
  caches = [make_cache(70), make_cache(40, seed=1)]
  make = lambda seed: PackedBatches(caches, 4, seed, rates=(2, 1))
  forward = make(7)
  in_order = [forward.batch_at(step) for step in range(20)]
  for step in (19, 3, 7, 0):
    for key, array in make(7).batch_at(step).items():
      np.testing.assert_array_equal(array, in_order[step][key])
  assert any((make(8).batch_at(0)[key] != array).any() for key, array in in_order[0].items())


def test_each_task_of_a_mixture_has_its_own_prompt_and_its_share_of_examples():
  caches = [make_cache(400, longest=10), make_cache(300, longest=60, shortest=40, seed=1)]
  prompts = [VirtualTokens(V, 3), VirtualTokens(V, 10, 'end', offset=3)]
  batches = PackedBatches(caches, 8, virtual=prompts, rates=(3, 1), inputs=150, targets=60)
  drawn = np.zeros(2)
  for step in range(60):
    rows, found = batches.rows_at(step), segments(batches.batch_at(step))
    expected = [(tuple(prompts[k].place(caches[k].inputs(i)).tolist()),
                 tuple(caches[k].targets(i).tolist())) for k, members in rows for i in members]
    assert [example[:2] for example in found] == expected
    for k, members in rows:
      drawn[k] += len(members)
  assert drawn[0] / drawn.sum() == pytest.approx(.75, abs=.03)


def test_a_task_of_few_rows_has_no_more_than_its_share():
  caches = [make_cache(4, longest=10), make_cache(300, longest=60, shortest=40, seed=1)]
  batches = PackedBatches(caches, 8, rates=(1, 1), inputs=150, targets=60)
  assert len(batches._packs[0][1]) - 1 == 1
  drawn = np.zeros(2)
  for step in range(60):
    for k, members in batches.rows_at(step):
      drawn[k] += len(members)
  assert drawn[0] / drawn.sum() == pytest.approx(.5, abs=.03)


def test_one_long_example_is_one_row():
  batches = PackedBatches([make_cache(1, longest=30, shortest=30)], 2)
  assert batches.examples_per_batch == 2
  assert len(segments(batches.batch_at(0))) == 2


def test_what_cannot_be_packed_is_refused():
  cache = make_cache(20, longest=50, shortest=50)
  for message, arguments in [
      (r'PackedBatches.inputs should be .* 55, the longest example with its prompt, got 54',
       {'inputs': 54, 'virtual': VirtualTokens(V, 5)}),
      ('PackedBatches.targets should be .* the longest example, got 1', {'targets': 1}),
      ('inputs should be a whole number', {'inputs': 'wide'}),
      ('batch_size must be a positive', {'batch_size': 0}),
      ('positive rate', {'rates': (-1,)}),
      ('Expected one prompt', {'virtual': [None, None]})]:
    with pytest.raises(ValueError, match=message):
      PackedBatches([cache], **{'batch_size': 8, **arguments})
  with pytest.raises(ValueError, match='neither inputs nor a prompt'):
    empty = TokenCache(None, {'task': 'lm'}, np.zeros(0, np.int32), np.zeros(3, np.int64),
                       cache.target_tokens, cache.target_offsets[:3])
    PackedBatches([empty], 1)


def test_packed_and_bucketed_batches_describe_what_they_depend_on():
  cache = make_cache(20)
  packs, rows = PackedBatches([cache], 2), TrainBatches([cache], 2)
  assert packs.description == ['packed', *packs.widths, [cache.part], None] != rows.description
  assert packs.num_examples == rows.num_examples == 20
  part = cache.take(np.arange(10))
  other = cache.take(np.arange(1, 11))
  for batching in (PackedBatches, TrainBatches):
    assert batching([part], 2).description != batching([other], 2).description

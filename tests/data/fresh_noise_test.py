"""Batches with fresh noise: the texts of the cache, other spans at every step, pure in the step."""

import functools

import numpy as np
import pytest

from prompt_tuning_jax.data.batches import TrainBatches
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens
from prompt_tuning_jax.tasks import noise

V = 300
LOWEST = 200
FreshNoise = functools.partial(TrainBatches, noise=noise.redrawn_spans)


def make_cache(lengths, seed: int = 0, sentinels: bool = True) -> tuple[TokenCache, list]:
  """A cache of span corruption and its texts; the first token of text i is 2 + i."""
  rng = np.random.default_rng(seed)
  texts = [np.append(2 + i, rng.integers(2, LOWEST, n - 1)).astype(np.int32)
           for i, n in enumerate(lengths)]
  rows = []
  for text in texts:
    mask = noise.span_mask(1, len(text), rng)
    inputs, targets = noise.span_corruption(text[None], mask, V - 1)
    rows.append((inputs[0], targets[0] if sentinels else noise.noise_tokens(text[None], mask)[0]))
  sides = list(zip(*rows, strict=True))
  arrays = [array for ids in sides
            for array in (np.concatenate(ids), np.cumsum([0, *map(len, ids)]))]
  meta = {'task': 'spans', 'vocabulary': {'extra_ids': V - LOWEST}, 'files': {}, 'lengths': {
      side: max(map(len, ids)) for side, ids in zip(('inputs', 'targets'), sides, strict=True)}}
  return TokenCache(None, meta, *arrays), texts


def _sides(batch) -> list[tuple[np.ndarray, np.ndarray]]:
  """Inputs without a prompt, and targets, of every row."""
  return [(x[(x > 0) & (x < V)], y[w > 0]) for x, y, w in zip(
      batch['encoder_input_tokens'], batch['decoder_target_tokens'],
      batch['decoder_loss_weights'], strict=True)]


@pytest.mark.parametrize('virtual', [None, *(VirtualTokens(V, 3, where) for where in PLACEMENTS)])
def test_rows_are_the_texts_of_the_cache_with_as_much_noise(virtual):
  cache, texts = make_cache([60] * 90 + [2, 5, 59, 17, 17])
  plain = TrainBatches([cache], 8, seed=2, virtual=virtual)
  fresh = FreshNoise([cache], 8, seed=2, virtual=virtual)
  same = 0
  for step in range(40):
    one, other = plain.batch_at(step), fresh.batch_at(step)
    for name, array in one.items():
      assert other[name].shape == array.shape and other[name].dtype == array.dtype
    np.testing.assert_array_equal(one['decoder_loss_weights'], other['decoder_loss_weights'])
    assert (other['decoder_input_tokens'][:, 0] == 0).all()
    np.testing.assert_array_equal(other['decoder_input_tokens'][:, 1:],
                                  other['decoder_target_tokens'][:, :-1])
    for i, row, old, (x, y) in zip(plain.rows_at(step), other['encoder_input_tokens'],
                                   _sides(one), _sides(other), strict=True):
      assert (len(x), len(y)) == (cache.input_lengths[i], cache.target_lengths[i])
      np.testing.assert_array_equal(noise.restore_spans(x[None], y[None], LOWEST)[0], texts[i])
      assert np.sum(y >= LOWEST) == noise.noise_counts(len(texts[i]))[1]
      placed = x if virtual is None else virtual.place(x)
      np.testing.assert_array_equal(row[:len(placed)], placed)
      same += np.array_equal(x, old[0])
  assert same < 0.1 * 40 * 8


def test_noise_differs_between_epochs_and_is_a_function_of_seed_and_step():
  cache, _ = make_cache([100] * 32)
  make = lambda seed: FreshNoise([cache], 8, seed)
  source = make(1)
  in_order = [source.batch_at(step) for step in range(12)]
  seen = {}
  for batch in in_order:
    for x, y in _sides(batch):
      first = noise.restore_spans(x[None], y[None], LOWEST)[0, 0]
      seen.setdefault(int(first), []).append(y.tobytes())
  assert len(seen) == 32 and all(len(rows) == len(set(rows)) == 3 for rows in seen.values())
  for step in (11, 0, 7):
    for name, array in make(1).batch_at(step).items():
      np.testing.assert_array_equal(array, in_order[step][name])
  assert (make(2).batch_at(0)['decoder_target_tokens']
          != in_order[0]['decoder_target_tokens']).any()


@pytest.mark.parametrize('rates', [None, (1, 3)])
def test_processes_share_a_batch_of_several_tasks(rates, assert_processes_share):
  caches = [make_cache([40] * 20 + [9, 31])[0], make_cache([70] * 50 + [12], seed=1)[0]]
  options = {'virtual': [VirtualTokens(V, 2), VirtualTokens(V, 5, offset=2)], 'rates': rates}
  assert_processes_share(functools.partial(FreshNoise, caches, 12, **options), steps=20)


def test_a_run_is_not_resumed_with_other_noise():
  cache, _ = make_cache([20] * 9)
  plain, fresh = TrainBatches([cache], 3), FreshNoise([cache], 3)
  assert fresh.description == [*plain.description, 'redrawn_spans']
  assert (fresh.num_examples, fresh.examples_per_batch) == (9, 3)


def test_tasks_without_spans_are_refused_at_once():
  good, other = make_cache([20] * 9)[0], make_cache([20] * 9, sentinels=False)[0]
  for caches in ([other], [good, other]):
    with pytest.raises(ValueError, match='same sentinels, got other rows from spans: take batch'):
      FreshNoise(caches, 3)

"""Span corruption and prefix LM against the paper's numbers, and nothing is lost."""

import zlib

import numpy as np
import pytest

from prompt_tuning_jax.tasks import noise

FIRST_SENTINEL = 32099
META = {'task': 'nli', 'vocabulary': {'extra_ids': 100}}


def spans_of(mask: np.ndarray) -> np.ndarray:
  return (mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]).sum(1)


def test_t5s_own_lengths():
  assert noise.raw_length(512, 114) == 568
  assert noise.raw_length(512, 512) == 568
  assert noise.noise_counts(568) == (85, 28)
  assert noise.raw_length(512, 86, target_sentinels=False) == 568
  assert noise.raw_length(512, 85, target_sentinels=False) < 568


@pytest.mark.parametrize('length', [2, 3, 5, 17, 141, 568])
def test_fifteen_percent_in_spans_of_three(length):
  mask = noise.span_mask(2000, length, np.random.default_rng(0))
  tokens, spans = noise.noise_counts(length)
  assert (mask.sum(1) == tokens).all() and (spans_of(mask) == spans).all()
  if length > 100:
    assert abs(mask.mean() - 0.15) < 0.005
    assert abs(tokens / spans - 3) < 0.2
    # Noise is as likely at every place, but for the edges, which fewer spans can cover.
    assert abs(mask.mean(0)[5:-5] - mask.mean()).max() < 0.04
    assert mask[:, 0].any() and mask[:, -1].any()


def test_span_lengths_are_uniform_over_compositions():
  mask = noise.span_mask(30000, 20, np.random.default_rng(1), 0.2, 2)  # 4 tokens in 2 spans
  first = [len(row.tobytes().lstrip(b'\0').split(b'\0')[0]) for row in mask]
  counts = np.bincount(first)[1:]
  assert abs(counts / 30000 - 1 / 3).max() < 0.02  # 1 + 3, 2 + 2, 3 + 1


@pytest.mark.parametrize('length', [2, 7, 100, 568])
def test_every_token_can_be_restored(length):
  rng = np.random.default_rng(2)
  tokens = rng.integers(2, 32000, size=(50, length), dtype=np.int32)
  mask = noise.span_mask(50, length, rng)
  inputs, targets = noise.span_corruption(tokens, mask, FIRST_SENTINEL)
  num_noise, spans = noise.noise_counts(length)
  assert inputs.shape == (50, length - num_noise + spans + 1)
  assert targets.shape == (50, num_noise + spans + 1)
  assert inputs.dtype == targets.dtype == np.int32
  assert (inputs[:, -1] == 1).all() and (targets[:, -1] == 1).all()
  for row in range(50):
    used = [t for t in targets[row].tolist() if t >= 32000]
    assert used == [FIRST_SENTINEL - k for k in range(spans)]
    assert used == [t for t in inputs[row].tolist() if t >= 32000]
  restored = noise.restore_spans(inputs, targets, lowest_sentinel=32000)
  np.testing.assert_array_equal(restored, tokens)
  assert restored.dtype == np.int32


def test_the_noise_of_caches_stays():
  """A cache that is built again has the rows that it had."""
  mask = noise.span_mask(50, 143, np.random.default_rng(7))
  assert zlib.crc32(np.packbits(mask).tobytes()) == 3982902811


@pytest.mark.parametrize('length', [2, 7, 100, 568])
@pytest.mark.parametrize('density,mean_span', [(0.15, 3), (0.5, 10)])
def test_redrawn_spans_are_of_the_same_texts_and_as_many(length, density, mean_span):
  rng = np.random.default_rng(3)
  tokens = rng.integers(2, 32000, size=(2000, length), dtype=np.int32)
  sides = noise.span_corruption(tokens, noise.span_mask(2000, length, rng, density, mean_span),
                                FIRST_SENTINEL, eos=5)
  dice = rng.random((2000, sum(side.shape[1] for side in sides)))
  redrawn = noise.redrawn_spans(*sides, dice, META)
  for before, after in zip(sides, redrawn, strict=True):
    assert before.shape == after.shape and after.dtype == np.int32 and (after[:, -1] == 5).all()
    assert ((before >= 32000).sum(1) == (after >= 32000).sum(1)).all()
  np.testing.assert_array_equal(noise.restore_spans(*redrawn, 32000), tokens)
  # Noise is where it is in masks that are drawn at once.
  share = [(noise.restore_spans(*_marked(both), 32000) == 2).mean(0) for both in (sides, redrawn)]
  assert abs(share[0] - share[1]).max() < 0.06
  again = noise.redrawn_spans(*redrawn, dice, META)  # Which noise there was does not matter.
  for one, other in zip(redrawn, again, strict=True):
    np.testing.assert_array_equal(one, other)


def _marked(sides: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
  """The same spans of a text that is 2 where there is noise, and else 3."""
  return [np.where(side >= 32000, side, text) for side, text in zip(sides, (3, 2), strict=True)]


def test_rows_of_another_objective_are_not_redrawn():
  a, b = FIRST_SENTINEL, FIRST_SENTINEL - 1
  dice = np.zeros((1, 20))
  for inputs, targets in (
      ([7, a, 8, 1], [9, 1]),  # no sentinels in targets
      ([7, 8, 1], [a, 9, 1]), ([1], [a, 9, 1]), ([7, a, 1], [1]), ([7, 1], [8, 1]),
      ([7, a, 8, b, 1], [a, 9, 1]), ([7, a, 1], [a, 9, b, 6, 1]), ([7, b, 1], [b, a, 1]),
      ([7, b, 8, a, 1], [a, 6, b, 5, 1]), ([7, a, 8, b, 1], [9, a, 6, b, 1])):
    with pytest.raises(ValueError, match='same sentinels, got other rows from nli: take batching/'):
      noise.redrawn_spans(np.array([inputs]), np.array([targets]), dice, META)
  rows = [np.array([[7, a, 8, 1], row]) for row in ([7, 8, 9, 1], [7, b, 8, 1])]
  for inputs in rows:  # One row of many.
    with pytest.raises(ValueError, match='other rows'):
      noise.redrawn_spans(inputs, np.array([[a, 9, 1]] * 2), np.zeros((2, 20)), META)


def test_corruption_by_hand():
  tokens = np.array([[11, 12, 13, 14, 15, 16]], np.int32)
  mask = np.array([[0, 1, 1, 0, 0, 1]], bool)
  inputs, targets = noise.span_corruption(tokens, mask, 99)
  assert inputs.tolist() == [[11, 99, 14, 15, 98, 1]]
  assert targets.tolist() == [[99, 12, 13, 98, 16, 1]]
  assert noise.noise_tokens(tokens, mask).tolist() == [[12, 13, 16, 1]]
  assert noise.with_eos(tokens).tolist() == [[11, 12, 13, 14, 15, 16, 1]]


def test_targets_without_sentinels_are_the_same_tokens():
  rng = np.random.default_rng(4)
  tokens = rng.integers(2, 32000, size=(50, 100), dtype=np.int32)
  mask = noise.span_mask(50, 100, rng)
  _, targets = noise.span_corruption(tokens, mask, FIRST_SENTINEL)
  bare = noise.noise_tokens(tokens, mask)
  assert bare.shape == (50, 16) and bare.dtype == np.int32
  for row in range(50):
    assert bare[row].tolist() == [t for t in targets[row].tolist() if t < 32000]


@pytest.mark.parametrize('sentinels', [True, False])
@pytest.mark.parametrize('inputs,targets', [(64, 64), (128, 40), (512, 20), (3, 3), (40, 128)])
def test_raw_length_fills_and_fits(inputs, targets, sentinels):
  def sides(length):
    num_noise, spans = noise.noise_counts(length)
    return length - num_noise + spans + 1, num_noise + spans * sentinels + 1

  length = noise.raw_length(inputs, targets, target_sentinels=sentinels)
  assert sides(length)[0] <= inputs and sides(length)[1] <= targets
  longer = sides(length + 1)
  assert longer[0] > inputs or longer[1] > targets


def test_the_seed_decides():
  masks = [noise.span_mask(4, 60, np.random.default_rng(seed)) for seed in (3, 3, 4)]
  assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


@pytest.mark.parametrize('inputs,targets', [(64, 64), (512, 128), (32, 100), (2, 2), (3, 2)])
def test_prefixes_fit_and_reach_every_split(inputs, targets):
  length = noise.prefix_raw_length(inputs, targets)
  points = noise.prefix_split_points(5000, length, inputs, targets, np.random.default_rng(0))
  assert points.min() >= 1 and points.max() <= min(length, inputs) - 1
  assert (length - points).min() >= 1 and (length - points).max() <= targets - 1
  room = min(length - 1, inputs - 1) - max(1, length - targets + 1) + 1
  assert len(np.unique(points)) == room


def test_split_loses_nothing():
  tokens = np.arange(2, 50, dtype=np.int32).reshape(4, 12)
  inputs, targets = noise.split_at(tokens, np.array([1, 11, 5, 6]))
  for row in range(4):
    sides = [side[row][side[row] != 0].tolist() for side in (inputs, targets)]
    assert sides[0][-1] == sides[1][-1] == 1
    assert sides[0][:-1] + sides[1][:-1] == tokens[row].tolist()


def test_blocks_by_hand():
  def cut(*args):
    return [side.tolist() for side in noise.blocks(*args)]

  assert cut([23], 5) == [[0, 5, 10, 15, 20], [5, 5, 5, 5, 3]]
  assert cut([21], 5) == [[0, 5, 10, 15], [5] * 4]
  assert cut([21], 5, 1) == [[0, 5, 10, 15, 20], [5, 5, 5, 5, 1]]
  assert cut([0, 7, 7, 8, 12], 5) == [[0, 5, 8], [5, 2, 4]]  # Streams of 0, 7, 0, 1 and 4 tokens.
  assert cut([0], 5) == cut([0, 1], 5) == [[], []]


def test_no_block_has_two_streams_and_nothing_is_lost():
  ends = np.cumsum(np.random.default_rng(5).integers(0, 40, 200))
  stream = np.repeat(np.arange(200), np.diff(ends, prepend=0))
  begins, sizes = noise.blocks(ends, 7, 1)
  assert sizes.max() == 7 and (np.diff(begins) == sizes[:-1]).all() and sizes.sum() == ends[-1]
  assert (stream[begins] == stream[begins + sizes - 1]).all()
  assert len(begins) == sum(-(-size // 7) for size in np.bincount(stream, minlength=200).tolist())


def test_errors():
  with pytest.raises(ValueError, match='at least 3 inputs'):
    noise.raw_length(2, 50)
  with pytest.raises(ValueError, match='and 2 targets'):
    noise.raw_length(50, 1, target_sentinels=False)
  with pytest.raises(ValueError, match='at least 2 inputs'):
    noise.prefix_raw_length(1, 50)
  with pytest.raises(ValueError, match='at least 2 tokens'):
    noise.noise_counts(1)

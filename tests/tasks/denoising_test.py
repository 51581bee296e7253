"""BERT's and BART's noise against the papers' numbers, and nothing is lost."""

import math
from collections import Counter

import numpy as np
import pytest

from prompt_tuning_jax.tasks import denoising

MASK = 32099
PIECES = (3, 32000)


def rows_of_places(rows: int, length: int) -> np.ndarray:
  """Tokens that say where they stand, so that what happened to each can be seen."""
  return np.tile(np.arange(100, 100 + length, dtype=np.int32), (rows, 1))


def test_fifteen_percent_of_which_eighty_ten_ten():
  tokens = np.full((400, 512), 7, np.int32)
  noisy = denoising.masked_tokens(tokens, np.random.default_rng(0), MASK, PIECES)
  assert noisy.dtype == np.int32 and noisy.shape == tokens.shape
  chosen = 400 * round(0.15 * 512)
  masked, changed = (noisy == MASK).sum(), (noisy != 7).sum()
  assert abs(masked / chosen - 0.8) < 0.01
  assert abs((changed - masked) / chosen - 0.1) < 0.01  # The last tenth stays as it is.
  random = noisy[(noisy != 7) & (noisy != MASK)]
  assert random.min() >= 3 and random.max() < 32000
  assert abs(np.mean(random) / 16000 - 1) < 0.05
  assert (noisy != 7).mean(0).max() < 0.3 and (noisy != 7).mean(0).min() > 0.03  # Everywhere.
  assert ((noisy != 7).sum(1) <= 77).all()


def test_masked_rows_differ_and_the_seed_decides():
  tokens = rows_of_places(3, 64)
  same, again, other = (
      denoising.masked_tokens(tokens, np.random.default_rng(seed), MASK, PIECES)
      for seed in (3, 3, 4))
  assert (same == again).all() and (same != other).any()
  assert ((same[0] == MASK) != (same[1] == MASK)).any()


@pytest.mark.parametrize('length', [1, 2, 3, 7, 100, 511])
def test_span_lengths_are_poissons(length):
  noise = min(max(round(0.3 * length), 1), length)
  lengths = denoising.infilling_lengths(3000, noise, np.random.default_rng(0))
  used = lengths >= 0
  assert (np.where(used, lengths, 0).sum(1) == noise).all()  # 30 % exactly.
  assert (np.diff(used.astype(int), axis=1) <= 0).all()
  if length < 511:
    return
  assert abs(noise / used.sum(1).mean() - 3) < 0.05
  last = used.sum(1)[:, None] - 1  # Cut, and likely to be a long one.
  drawn = Counter(lengths[used & (np.arange(noise) != last)].tolist())
  for k in range(9):
    share = math.exp(-3) * 3**k / math.factorial(k)
    assert abs(drawn[k] / drawn.total() - share) < 0.005


@pytest.mark.parametrize('length', [1, 2, 3, 10, 127, 511])
def test_each_span_is_one_mask(length):
  tokens = rows_of_places(200, length)
  inputs = denoising.text_infilling(tokens, np.random.default_rng(5), MASK)
  noise = min(max(round(0.3 * length), 1), length)
  lengths = denoising.infilling_lengths(200, noise, np.random.default_rng(5))  # Drawn first.
  assert inputs.dtype == np.int32 and inputs.shape[1] <= length + 1
  for row, spans in zip(inputs.tolist(), lengths.tolist(), strict=True):
    end = row.index(1)
    assert row[end:] == [1] + [0] * (len(row) - end - 1)
    spans = [span for span in spans if span >= 0]
    assert row.count(MASK) == len(spans)
    kept = [token for token in row[:end] if token != MASK]
    assert len(kept) == length - noise and kept == sorted(kept)
    # Between two kept tokens there are as many masks as spans, which cover what is not there.
    runs, covered = 0, []
    edges = [99, *kept, 100 + length]
    for left, right in zip(edges, edges[1:], strict=False):
      between = row[(row.index(left) + 1 if left > 99 else 0):
                    (row.index(right) if right < 100 + length else end)]
      assert set(between) <= {MASK} and (right - left == 1 or between)
      runs += len(between)
      if len(between) == 1:
        covered.append(right - left - 1)
    assert runs == len(spans) and not Counter(covered) - Counter(spans)


def test_infilling_is_as_likely_everywhere():
  tokens = rows_of_places(3000, 60)
  inputs = denoising.text_infilling(tokens, np.random.default_rng(6), MASK)
  kept = np.array([(inputs == place).sum() for place in tokens[0]]) / 3000
  assert abs(kept[3:-3] - 0.7).max() < 0.04  # The edges are covered by fewer spans.
  assert abs(kept.mean() - 0.7) < 1e-9
  inserted = (inputs[:, :1] == MASK) & (inputs[:, 1:2] == 100)  # A span of length 0 comes first.
  assert 0.002 < inserted.mean() < 0.02


def test_sentences_by_hand():
  text = 'He came.  "Why not?" she said!\nMr. X went… (So it is.) No end'
  assert denoising.sentences(text) == [
      'He came.', '  "Why not?"', ' she said!', '\nMr.', ' X went…', ' (So it is.)', ' No end']
  assert denoising.sentences('') == []
  assert denoising.sentences('3.5 of it.\n ') == ['3.5 of it.\n ']


def test_permutation_keeps_sentences_whole():
  rng = np.random.default_rng(7)
  tokens = rows_of_places(500, 40)
  starts = rng.random((500, 40)) < 0.2
  shuffled = denoising.permute_sentences(tokens, starts.astype(np.int32), rng)
  assert (np.sort(shuffled, axis=1) == tokens).all()  # Restored: no token is lost or new.
  assert (shuffled != tokens).any(axis=1).mean() > 0.9
  for row, begins in zip(shuffled, starts, strict=True):
    begins = begins.copy()
    begins[0] = True
    follows = np.flatnonzero(np.diff(row, prepend=0) != 1)  # Where another sentence begins.
    assert begins[row[follows] - 100].all()
    inside = np.setdiff1d(np.arange(40), follows)
    assert (row[inside] == row[inside - 1] + 1).all()


def test_every_order_of_sentences_is_as_likely():
  tokens = np.tile(np.arange(5, dtype=np.int32), (6000, 1))  # Sentences 0 1, 2, 3 4.
  starts = np.tile(np.array([1, 0, 1, 1, 0], np.int32), (6000, 1))
  shuffled = denoising.permute_sentences(tokens, starts, np.random.default_rng(8))
  orders = Counter(map(tuple, shuffled.tolist()))
  assert len(orders) == 6 and max(abs(n / 6000 - 1 / 6) for n in orders.values()) < 0.02
  assert (2, 0, 1, 3, 4) in orders


def test_the_seed_decides():
  tokens, starts = rows_of_places(4, 50), np.ones((4, 50), np.int32)
  for noise in (lambda rng: denoising.text_infilling(tokens, rng, MASK),
                lambda rng: denoising.permute_sentences(tokens, starts, rng)):
    same, again, other = (noise(np.random.default_rng(seed)).tolist() for seed in (1, 1, 2))
    assert same == again != other

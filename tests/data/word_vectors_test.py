"""Word vectors against their definition, computed word by word."""

import collections
import math

import numpy as np
import pytest

from prompt_tuning_jax.data import word_vectors as made
from prompt_tuning_jax.data.word_vectors import word_vectors

SIZE, WIDTH = 40, 6


@pytest.fixture(scope='module')
def texts():
  """Texts of one of two halves of the words each."""
  rng = np.random.default_rng(0)
  return [rng.integers(0, SIZE // 2, 30) + SIZE // 2 * (n % 2) for n in range(200)]


def by_definition(texts, rarest):
  """The information of words and their followers, and all sides, pair by pair."""
  frequency = collections.Counter(int(word) for text in texts for word in text)
  sides = []
  for weights, keys in ((made.BESIDE, lambda a, b: [(a, b)]), (made.BESIDE, lambda a, b: [(b, a)]),
                        (made.AROUND, lambda a, b: [(a, b), (b, a)])):
    counts = np.zeros((SIZE, SIZE))
    for text in texts:
      for distance, weight in weights.items():
        for first, second in zip(text, text[distance:], strict=False):
          if min(frequency[int(first)], frequency[int(second)]) >= rarest:
            for key in keys(first, second):
              counts[key] += weight
    neighbours = counts.sum(0) ** 0.75
    neighbours /= neighbours.sum()
    sides.append([[max(0.0, math.log(counts[a, b] / counts[a].sum() / neighbours[b]))
                   if counts[a, b] else 0.0 for b in range(SIZE)] for a in range(SIZE)])
  return np.array(sides)


def test_vectors_are_those_of_the_definition(texts):
  texts = [*texts, np.array([3, 3, SIZE - 1, 5, 7, 5])]  # counts are not all alike
  got = word_vectors(texts, SIZE, WIDTH, rarest=1)
  sides = by_definition(texts, 1)
  left, strength, right = np.linalg.svd(np.concatenate(sides, axis=1), full_matrices=False)
  cut = lambda rows: (rows[:, :WIDTH] * strength[:WIDTH])
  np.testing.assert_allclose(got.words @ got.words.T, cut(left) @ left[:, :WIDTH].T, atol=2e-2)
  np.testing.assert_allclose(got.words @ got.followers.T,
                             cut(left) @ right[:WIDTH, :SIZE], atol=2e-2)
  shares = np.bincount(np.concatenate(texts), minlength=SIZE) / sum(map(len, texts))
  np.testing.assert_allclose(np.exp(got.log_frequency), shares, rtol=1e-5)
  assert got.known.all()


def test_many_numbers_give_nearly_the_information_itself(texts):
  full = word_vectors(texts, SIZE, SIZE // 2 - 1)
  information = by_definition(texts, 50)[0]
  given = full.words @ full.followers.T
  assert np.corrcoef(given.ravel(), information.ravel())[0, 1] > 0.95


def test_words_of_a_kind_are_alike_and_rare_ones_have_no_vector(texts):
  texts = [np.where((text == 7) | (text == 8), 6, text) for text in texts]
  texts += [np.array([7, 1, 8, 2])] * 49 + [np.array([8, 3])]  # 49 and 50 times
  got = word_vectors(texts, SIZE, WIDTH)
  assert list(np.flatnonzero(~got.known)) == [7]
  sides = by_definition(texts, 50)
  left, strength, right = np.linalg.svd(np.concatenate(sides, axis=1), full_matrices=False)
  np.testing.assert_allclose(
      got.words @ got.followers.T,
      left[:, :WIDTH] * strength[:WIDTH] @ right[:WIDTH, :SIZE], atol=2e-2)
  assert np.abs(got.words[7]).max() < 1e-5 > np.abs(got.followers[7]).max()
  alike = np.corrcoef(got.words[got.known])
  half = np.arange(SIZE)[got.known] < SIZE // 2
  assert alike[half[:, None] == half].mean() > 0.3 + alike[half[:, None] != half].mean()


def test_words_of_two_texts_are_no_neighbours_and_portions_change_nothing(texts, monkeypatch):
  expected = word_vectors(texts, SIZE, WIDTH)
  monkeypatch.setattr(made, 'TOKENS_AT_ONCE', 100)
  again = word_vectors(iter(texts), SIZE, WIDTH)
  np.testing.assert_allclose(again.words, expected.words, atol=1e-3)  # signs and all
  joined = word_vectors([np.concatenate(texts)], SIZE, WIDTH)
  same = lambda vectors: vectors.words @ vectors.followers.T
  np.testing.assert_allclose(same(again), same(expected), atol=1e-3)
  assert np.abs(same(joined) - same(expected)).max() > 0.1


@pytest.mark.parametrize('texts, width, told', [
    ([np.arange(SIZE)], WIDTH, 'need 12 words that stand at least 50 times each, got 0'),
    ([], WIDTH, 'got 0'),
    ([np.array([n]) for n in range(SIZE)] * 50, WIDTH, 'Hardly any words stand together'),
    ([np.arange(2)] * 50, 0, '1 to 20 numbers, got 0'),
    ([np.arange(2)] * 50, SIZE, 'a larger vocabulary'),
])
def test_what_has_no_vectors_is_told(texts, width, told):
  with pytest.raises(ValueError, match=told):
    word_vectors(texts, SIZE, width)

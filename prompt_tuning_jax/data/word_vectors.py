"""Word vectors of a text: what its words stand beside, in a few hundred numbers a word.

Positive pointwise mutual information of words and their neighbours, cut to its largest singular
vectors: as good as word2vec (Levy, Goldberg & Dagan 2015), and some minutes instead of a night.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

BESIDE = {1: 1.0, 2: 0.5}  # distance in tokens and weight; before and after are told apart
AROUND = {distance: 1.0 for distance in range(3, 11)}  # both sides alike
SMOOTHING = 0.75  # of the neighbours' frequencies (Levy, Goldberg & Dagan 2015, section 3.2)
TOKENS_AT_ONCE = 4_000_000


@dataclasses.dataclass(frozen=True)
class WordVectors:
  """What a text says of each of V words.

  Attributes:
    words, followers: [V, D] float32; words @ followers.T is about the mutual information, in nats,
      of a word and one that stands after it (BESIDE), and 0 where that is negative.
    log_frequency: [V] float32, of the word's share of the text, nats.
    known: [V] bool, whether a word has vectors; the others' are 0.
  """

  words: np.ndarray
  followers: np.ndarray
  log_frequency: np.ndarray
  known: np.ndarray


def word_vectors(texts: Iterable[np.ndarray], size: int, width: int,
                 rarest: int = 50) -> WordVectors:
  """Vectors of `width` numbers of `size` words, from `texts`, each the ids of a text: [n] integers.

  Ids are below `size`. Words are neighbours within a text only; one that stands fewer than `rarest`
  times has no vector. All pairs that stand together are held in memory. Raises ValueError where
  fewer than 2 * width words have vectors, or none stand together.
  """
  if not 1 <= width <= size // 2:
    raise ValueError(f'{size} words can have vectors of 1 to {size // 2} numbers, got {width}: a '
                     'network this wide needs a larger vocabulary.')
  beside = around = sparse.csr_matrix((size, size), dtype=np.float32)
  frequency = np.zeros(size, np.int64)
  for ids, text in _portions(texts):
    frequency += np.bincount(ids, minlength=size)
    beside = beside + _pairs(ids, text, BESIDE, size)
    around = around + _pairs(ids, text, AROUND, size)
  known = frequency >= rarest
  if known.sum() < 2 * width:
    raise ValueError(f'Vectors of {width} numbers need {2 * width} words that stand at least '
                     f'{rarest} times each, got {known.sum()}: take more text.')
  picked = sparse.diags_array(known.astype(np.float32))
  sides = [_information(picked @ counts @ picked)
           for counts in (beside, beside.T, around + around.T)]
  del beside, around
  if not all(side.nnz for side in sides):
    raise ValueError('Hardly any words stand together: word vectors need lines of whole sentences.')
  start = np.random.default_rng(0).standard_normal(size)  # the same vectors each time
  left, strength, right = linalg.svds(sparse.hstack(sides).tocsr(), k=width, v0=start, tol=1e-3)
  scale = np.sqrt(strength)  # section 3.3 there, p = 1/2
  scale *= np.sign(left[np.abs(left).argmax(0), np.arange(width)])
  log_frequency = np.log(np.maximum(frequency, 1) / max(frequency.sum(), 1))
  return WordVectors((left * scale).astype(np.float32), (right[:, :size].T * scale).astype(
      np.float32), log_frequency.astype(np.float32), known)


def _portions(texts: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Texts end to end, some million tokens at once: ids [n], and the number of each one's text."""
  kept, length = [], 0
  for text in texts:
    kept.append(np.asarray(text, np.int64))
    length += len(text)
    if length >= TOKENS_AT_ONCE:
      yield _joined(kept)
      kept, length = [], 0
  if length:
    yield _joined(kept)


def _joined(texts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
  return np.concatenate(texts), np.repeat(np.arange(len(texts)), [len(text) for text in texts])


def _pairs(ids: np.ndarray, text: np.ndarray, weights: dict[int, float],
           size: int) -> sparse.csr_matrix:
  """[word, word that follows it] float32: how often, by distance and weight."""
  total = sparse.csr_matrix((size, size), dtype=np.float32)
  for distance, weight in weights.items():
    same = text[:-distance] == text[distance:]
    first, second = ids[:-distance][same], ids[distance:][same]
    total = total + sparse.coo_matrix(
        (np.full(len(first), weight, np.float32), (first, second)), (size, size)).tocsr()
  return total


def _information(counts: sparse.csr_matrix) -> sparse.csr_matrix:
  """Positive pointwise mutual information, log p(word, neighbour) / p(word) p(neighbour), nats."""
  if not counts.nnz:
    return counts
  pairs = counts.tocoo()
  words = np.asarray(counts.sum(axis=1)).ravel()
  neighbours = np.asarray(counts.sum(axis=0)).ravel() ** SMOOTHING
  neighbours /= neighbours.sum()
  information = np.log(pairs.data / (words[pairs.row] * neighbours[pairs.col]))
  return sparse.csr_matrix((np.maximum(information, 0.0).astype(np.float32),
                            (pairs.row, pairs.col)), counts.shape)

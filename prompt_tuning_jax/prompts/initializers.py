"""What a prompt starts from (Lester et al. 2021, section 3.2).

An initializer is a frozen dataclass called with a key, the prompt's length, the base's embedding
table [V, D] and its vocabulary; it returns [P, D] float32.
"""

import dataclasses
from collections.abc import Set
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.types import Array


class Vocabulary(Protocol):
  """What an initializer needs of a vocabulary."""

  untrained: Set[int]  # ids that no text has, whose rows of the table say nothing

  def encode(self, text: str) -> list[int]:
    """Token ids without the end-of-sequence id."""


@dataclasses.dataclass(frozen=True)
class Uniform:
  """Independent uniform numbers in [-scale, scale); the paper's random baseline has 0.5."""

  scale: float = 0.5

  def __call__(self, key, length: int, table: Array, vocabulary: Vocabulary | None) -> Array:
    shape = (length, table.shape[1])
    return jax.random.uniform(key, shape, jnp.float32, -self.scale, self.scale)


@dataclasses.dataclass(frozen=True)
class SampledVocabulary:
  """Embeddings of `first_n` most frequent words, drawn without replacement while they last.

  Vocabularies number their pieces by frequency, so these are the first rows of the table, but for
  those that no text has trained.
  """

  first_n: int = 5000

  def __call__(self, key, length: int, table: Array, vocabulary: Vocabulary | None) -> Array:
    if self.first_n < 1:
      raise ValueError(f'first_n must be at least 1, got {self.first_n}.')
    untrained = [] if vocabulary is None else [*vocabulary.untrained]
    words = np.setdiff1d(np.arange(table.shape[0]), untrained)[:self.first_n]
    drawn = jax.random.choice(key, len(words), (length,), replace=length > len(words))
    return table[jnp.asarray(words)[drawn]].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class ClassLabels:
  """The embeddings of the labels' texts, a label of several pieces by their mean.

  The rows that remain, if any, come from `fallback`. A prompt with fewer rows than there are
  labels takes the first ones.
  """

  labels: tuple[str, ...]
  fallback: SampledVocabulary = SampledVocabulary()

  def __call__(self, key, length: int, table: Array, vocabulary: Vocabulary | None) -> Array:
    if not isinstance(self.labels, list | tuple) or not self.labels:
      raise ValueError("CLASS_LABELS should be a list of texts such as ('negative', 'positive'), "
                       f'got {self.labels!r}.')
    rows = []
    for label in self.labels[:length]:
      pieces = _encode(vocabulary, label, table)
      rows.append(jnp.mean(table[np.asarray(pieces)].astype(jnp.float32), axis=0))
    rest = self.fallback(key, length - len(rows), table, vocabulary)
    return jnp.concatenate([jnp.stack(rows), rest]) if rows else rest


@dataclasses.dataclass(frozen=True)
class Text:
  """The embeddings of a text's tokens, over and over until the prompt is full."""

  text: str

  def __call__(self, key, length: int, table: Array, vocabulary: Vocabulary | None) -> Array:
    pieces = np.resize(_encode(vocabulary, self.text, table), length)
    return table[pieces].astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class FromArray:
  """Given numbers [P, D], such as the prompt of a source task (SPoT, Vu et al. 2022)."""

  embedding: Array

  def __call__(self, key, length: int, table: Array, vocabulary: Vocabulary | None) -> Array:
    expected = (length, table.shape[1])
    if tuple(self.embedding.shape) != expected:
      raise ValueError(f'The initial prompt must have shape {expected} (PROMPT_LENGTH, d_model), '
                       f'got {tuple(self.embedding.shape)}.')
    return jnp.asarray(self.embedding, jnp.float32)


def _encode(vocabulary: Vocabulary | None, text: str, table: Array) -> list[int]:
  if not isinstance(text, str):
    raise ValueError(f'A prompt starts from labels or text, expected a text, got {text!r}: put it '
                     'in quotes.')
  if vocabulary is None:
    raise ValueError(f'To start a prompt from {text!r} the vocabulary of the base is needed: '
                     'give its SentencePiece file with VOCABULARY.')
  pieces = vocabulary.encode(text)
  if not pieces:
    raise ValueError(f'The text {text!r} has no tokens in this vocabulary.')
  if max(pieces) >= table.shape[0]:
    raise ValueError(f'{text!r} has id {max(pieces)}, but the embedding table has '
                     f'{table.shape[0]} rows: the vocabulary is not that of this base.')
  return pieces

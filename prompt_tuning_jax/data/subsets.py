"""Parts of a split: k examples of each class, a small sample (same seed, same examples), or the
examples whose inputs are long.
"""

import collections
import dataclasses

import numpy as np

from prompt_tuning_jax.data.token_cache import TokenCache


@dataclasses.dataclass(frozen=True)
class FewShot:
  """`per_class` examples of each label of a classification task.

  Raises (when called):
    ValueError: the task's targets are not labels, or a label has fewer examples.
  """

  per_class: int = 16
  seed: int = 0

  def __post_init__(self):
    _check(self.per_class, self.seed)

  def __call__(self, cache: TokenCache) -> TokenCache:
    if not cache.rows or not all(row.get('choices') for row in cache.rows):
      raise ValueError(f'{cache.meta["task"]} has no labels to draw {self.per_class} examples of: '
                       'take a number of examples (LowData) instead.')
    rows_of = collections.defaultdict(list)
    for i, row in enumerate(cache.rows):
      rows_of[row['targets']].append(i)
    labels = sorted({label for row in cache.rows for label in row['choices']})
    few = [f'{label} ({len(rows_of[label])})' for label in labels
           if len(rows_of[label]) < self.per_class]
    if few:
      more = f' and {len(few) - 5} others' if len(few) > 5 else ''
      raise ValueError(f'{cache.meta["task"]}, {cache.meta["split"]}, has fewer than '
                       f'{self.per_class} examples of: {", ".join(few[:5])}{more}.')
    rng = np.random.default_rng(self.seed)
    drawn = [rng.permutation(rows)[:self.per_class] for _, rows in sorted(rows_of.items())]
    return cache.take(np.sort(np.concatenate(drawn)))


@dataclasses.dataclass(frozen=True)
class LowData:
  """A sample of `size` examples (Li & Liang 2021, section 6.3: 50 to 500, five seeds each)."""

  size: int = 100
  seed: int = 0

  def __post_init__(self):
    _check(self.size, self.seed)

  def __call__(self, cache: TokenCache) -> TokenCache:
    if cache.num_examples < self.size:
      raise ValueError(f'{cache.meta["task"]}, {cache.meta["split"]}, has {cache.num_examples} '
                       f'examples, fewer than {self.size}.')
    rng = np.random.default_rng(self.seed)
    return cache.take(np.sort(rng.permutation(cache.num_examples)[:self.size]))


@dataclasses.dataclass(frozen=True)
class LongInputs:
  """The examples whose inputs have at least `tokens` tokens, the end included.

  SST-2 trains on phrases and evaluates on sentences, say: these are the ones nearest to sentences.
  """

  tokens: int

  def __post_init__(self):
    _check(self.tokens, 0, 'tokens')

  def __call__(self, cache: TokenCache) -> TokenCache:
    long = np.flatnonzero(cache.input_lengths >= self.tokens)
    if not len(long):
      raise ValueError(f'{cache.meta["task"]}, {cache.meta["split"]}, has no inputs of '
                       f'{self.tokens} tokens or more: the longest has '
                       f'{cache.input_lengths.max()}.')
    return cache.take(long)


def _check(size: int, seed: int, of: str = 'examples') -> None:
  if type(size) is not int or size < 1 or type(seed) is not int or seed < 0:
    raise ValueError(f'Expected a whole number of {of} from 1 and a seed from 0, got {size!r} '
                     f'and {seed!r}.')

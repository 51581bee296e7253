"""The endless order in which items of one or more sources are drawn, as a function of seed.

Nothing here has state: what stands at a position of the stream is computed from the position.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

SLOTS = 1 << 12  # Rates are kept to about 1 / SLOTS.


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Every item once, shuffled, then every item once again, shuffled anew, and so on.

  Args:
    sizes: how many items each source has; items are numbered through all sources.
    seed: decides all orders.
    rates: a positive number for each source: their shares of the stream, evenly spread; every
      source then has epochs of its own. Without it the sources are one set of items.
  """

  sizes: Sequence[int]
  seed: int = 0
  rates: Sequence[float] | None = None

  def __post_init__(self):
    if self.seed < 0:
      raise ValueError(f'Expected seed >= 0, got {self.seed}.')
    if self.rates is not None and (len(self.rates) != len(self.sizes) or min(self.rates) <= 0):
      raise ValueError(f'Give a positive rate for each of {len(self.sizes)} tasks, got '
                       f'{self.rates}.')
    # Two epochs of every source are all that a batch near an epoch's end looks at.
    object.__setattr__(self, '_permutation',
                       functools.lru_cache(2 * len(self.sizes))(self._make_permutation))

  @property
  def num_items(self) -> int:
    return int(sum(self.sizes))

  @property
  def epoch(self) -> int | None:
    """Items in an epoch; None where every source has epochs of its own."""
    return self.num_items if len(self._sources) == 1 else None

  @functools.cached_property
  def firsts(self) -> np.ndarray:
    """[sources + 1] int64: where each source's items begin."""
    return np.cumsum([0, *self.sizes])

  def source_of(self, items: np.ndarray) -> np.ndarray:
    """[m] int64 items -> [m] int64, the source of each."""
    return np.searchsorted(self.firsts, items, 'right') - 1

  def draw(self, positions: np.ndarray) -> np.ndarray:
    """What stands at these positions of the stream: [m] int64 -> [m] int64 items."""
    pattern, rank, counts = self._pattern
    turn, slot = np.divmod(positions, len(pattern))
    source = pattern[slot]
    epoch, at = np.divmod(turn * counts[source] + rank[slot], self._sizes[source])
    items = np.empty(len(positions), np.int64)
    for i, e in np.unique(np.stack([source, epoch]), axis=1).T:
      here = (source == i) & (epoch == e)
      items[here] = self._sources[i][0] + self._permutation(int(i), int(e))[at[here]]
    return items

  def _make_permutation(self, source: int, epoch: int) -> np.ndarray:
    size = self._sources[source][1]
    order = np.arange(size, dtype=np.int32 if size < 1 << 31 else np.int64)
    np.random.default_rng([self.seed, 0, source, epoch]).shuffle(order)
    return order

  @functools.cached_property
  def _sources(self) -> list[tuple[int, int]]:
    """(first item, number of items) of what has epochs of its own."""
    firsts = self.firsts.tolist()
    if self.rates is None or len(self.sizes) == 1:
      return [(0, firsts[-1])]
    return [(first, end - first) for first, end in zip(firsts, firsts[1:], strict=False)]

  @functools.cached_property
  def _sizes(self) -> np.ndarray:
    return np.array([size for _, size in self._sources])

  @functools.cached_property
  def _pattern(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whose turn it is, evenly spread: sources [n], rank among its source's own [n], counts."""
    rates = np.ones(1) if len(self._sources) == 1 else np.asarray(self.rates, np.float64)
    counts = np.maximum(1, np.rint(SLOTS * rates / rates.sum())).astype(np.int64)
    rank = np.concatenate([np.arange(n) for n in counts])
    source = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort((rank + .5) / counts[source], kind='stable')
    return source[order], rank[order], counts

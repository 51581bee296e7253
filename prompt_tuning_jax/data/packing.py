"""Several examples a row, each with its own prompt, so that next to nothing is padding.

A packed batch is that of `batches.py`, all rows of one width, with four arrays more (int32):
  encoder_segment_ids, encoder_positions  [B, T]
  decoder_segment_ids, decoder_positions  [B, S]
A row's examples are its segments 1, 2, …; padding is segment 0. Attention stays within a segment
and positions start again in each, so the loss of an example is what it is alone in a row.

Which examples share a row is decided once, from the lengths and the seed: those of a chunk of the
shuffled examples that fill it best. Rows are then drawn as examples are: every row once,
shuffled, then every row once again. Nothing has state: a resume is a step.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.data.batches import check_batch_size, check_caches, one_each
from prompt_tuning_jax.data.stream import Stream
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens

CHUNK = 1024  # Examples that are fitted together; each chunk leaves a row half full.
WIDTH_STEP = 32
WIDEST = 4  # The narrowest good row is looked for up to so many times the longest example.
FULL = 0.91  # A width is good where so much of it is tokens; wider rows cost more attention.


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatches:
  """Batches of one task or of a mixture, packed. `batch_size` counts rows, as in T5X.

  Args:
    caches, seed, virtual, rates: as of `TrainBatches`; `rates` are shares of examples, and the
      examples of a row are of one task.
    inputs, targets: the widths of rows, the inputs' with prompts. Default: the narrowest in which
      91 % are tokens (up to four times the longest example), and as many targets as go with it.

  Raises:
    ValueError: an example is longer than a row.
  """

  caches: Sequence[TokenCache]
  batch_size: int
  seed: int = 0
  virtual: VirtualTokens | Sequence[VirtualTokens | None] | None = None
  inputs: int | None = None
  targets: int | None = None
  rates: Sequence[float] | None = None

  def __post_init__(self):
    put = functools.partial(object.__setattr__, self)
    put('caches', check_caches(self.caches))
    put('virtual', one_each(self.virtual, len(self.caches)))
    check_batch_size(self.batch_size)
    lengths = [(cache.input_lengths + (virtual.length if virtual else 0), cache.target_lengths)
               for cache, virtual in zip(self.caches, self.virtual, strict=True)]
    _check_lengths(self.caches, lengths)
    put('widths', _widths(lengths, self.inputs, self.targets, self.seed))
    put('_packs', [pack(*each, *self.widths, self.seed) for each in lengths])
    rates = self.rates and [rate * (len(offsets) - 1) / len(members) for rate, (members, offsets)
                            in zip(self.rates, self._packs, strict=True)]
    put('_stream', Stream([len(offsets) - 1 for _, offsets in self._packs], self.seed, rates))

  @property
  def num_examples(self) -> int:
    return sum(cache.num_examples for cache in self.caches)

  @property
  def examples_per_batch(self) -> float:
    """The mean over an epoch, or over one of each task at its rate."""
    per_row = [len(members) / (len(offsets) - 1) for members, offsets in self._packs]
    weights = self._stream.rates or self._stream.sizes
    return float(self.batch_size * np.average(per_row, weights=weights))

  @property
  def description(self) -> list:
    """What decides the batches besides seed and size: a resumed run must have the same."""
    return ['packed', *self.widths, [cache.part for cache in self.caches],
            self.rates and list(self.rates)]

  def rows_at(self, step: int) -> list[tuple[int, np.ndarray]]:
    """(cache, its examples [m] int64) of every row of batch `step`."""
    items = self._stream.draw(np.arange(self.batch_size) + step * self.batch_size)
    sources = self._stream.source_of(items)
    rows = []
    for source, item in zip(sources.tolist(), items.tolist(), strict=True):
      members, offsets = self._packs[source]
      k = item - self._stream.firsts[source]
      rows.append((source, members[offsets[k]:offsets[k + 1]]))
    return rows

  def batch_at(self, step: int) -> dict[str, np.ndarray]:
    """Batch `step` (from 0)."""
    return packed([[self._example(source, i) for i in members]
                   for source, members in self.rows_at(step)], *self.widths)

  def _example(self, source: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    """One example's inputs, prompt included, and targets."""
    cache, virtual = self.caches[source], self.virtual[source]
    inputs = cache.inputs(i)
    return inputs if virtual is None else virtual.place(inputs), cache.targets(i)


def packed(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], inputs: int,
           targets: int) -> dict[str, np.ndarray]:
  """The batch whose row b holds the examples rows[b], each (inputs [n], targets [m]) with EOS."""
  ints = {f'{side}_{name}': np.zeros((len(rows), width), np.int32)
          for side, width, names in (
              ('encoder', inputs, ('input_tokens', 'segment_ids', 'positions')),
              ('decoder', targets, ('input_tokens', 'target_tokens', 'segment_ids', 'positions')))
          for name in names}
  for b, examples in enumerate(rows):
    for side, ends in (('encoder', [len(x) for x, _ in examples]),
                       ('decoder', [len(y) for _, y in examples])):
      total = sum(ends)
      ints[f'{side}_segment_ids'][b, :total] = np.repeat(np.arange(1, len(ends) + 1), ends)
      ints[f'{side}_positions'][b, :total] = np.concatenate([np.arange(n) for n in ends])
    text = np.concatenate([x for x, _ in examples])
    ints['encoder_input_tokens'][b, :len(text)] = text
    told = np.concatenate([y for _, y in examples])
    ints['decoder_target_tokens'][b, :len(told)] = told
    # Targets one position later; an example begins with 0, whatever the one before it ended with.
    ints['decoder_input_tokens'][b, 1:len(told)] = told[:-1]
  ints['decoder_input_tokens'][ints['decoder_positions'] == 0] = 0
  return {**ints, 'decoder_loss_weights': (ints['decoder_segment_ids'] > 0).astype(np.float32)}


def pack(input_lengths: np.ndarray, target_lengths: np.ndarray, inputs: int, targets: int,
         seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """Which examples share a row: lengths [n], [n] -> (examples [n] int64, row offsets [rows + 1]).

  The examples of row k are `examples[offsets[k]:offsets[k + 1]]`.
  """
  order = np.random.default_rng([seed, 2]).permutation(len(input_lengths))
  rows = []
  for start in range(0, len(order), CHUNK):
    chunk = order[start:start + CHUNK]
    rows += [chunk[row] for row in _filled_rows(input_lengths[chunk], target_lengths[chunk], inputs,
                                                targets)]
  return np.concatenate(rows).astype(np.int64), np.cumsum([0, *map(len, rows)])


def _filled_rows(input_lengths: np.ndarray, target_lengths: np.ndarray, inputs: int,
                 targets: int) -> list[np.ndarray]:
  """Row after row, each filled with the examples that best match the room that is left in it.

  A match is the product of room and lengths, inputs' and targets', the scarcer of the two counting
  for more (Panigrahy et al. 2011, "Heuristics for vector bin packing").
  """
  waiting = np.arange(len(input_lengths))
  sizes = np.stack([input_lengths / inputs, target_lengths / targets])
  sizes_that_count = sizes * sizes.mean(axis=1, keepdims=True)
  rows = []
  while len(waiting):
    room, row = np.ones(2), []
    while True:
      fits = (sizes <= room[:, None] + 1e-9).all(axis=0)
      if not fits.any():
        break
      chosen = int(np.argmax(np.where(fits, room @ sizes_that_count, -1.0)))
      row.append(waiting[chosen])
      room = room - sizes[:, chosen]
      sizes[:, chosen] = 2.0  # Taken: fits nowhere.
    kept = sizes[0] < 2.0
    waiting, sizes, sizes_that_count = waiting[kept], sizes[:, kept], sizes_that_count[:, kept]
    rows.append(np.array(row))
  return rows


def _widths(lengths: Sequence[tuple[np.ndarray, np.ndarray]], inputs: int | None,
            targets: int | None, seed: int) -> tuple[int, int]:
  """The widths that are given, or those of which most is tokens (of a chunk of each task)."""
  rng = np.random.default_rng([seed, 3])
  longest = [int(max(each[side].max() for each in lengths)) for side in (0, 1)]
  for side, (name, given) in enumerate((('inputs', inputs), ('targets', targets))):
    if given is not None and (type(given) is not int or given < longest[side]):
      prompt = ' with its prompt' if name == 'inputs' else ''
      raise ValueError(f'PackedBatches.{name} should be a whole number of at least '
                       f'{longest[side]}, the longest example{prompt}, got {given!r}: raise it, '
                       'or lower the task feature lengths.')
  some = [tuple(each[side][picked] for side in (0, 1)) for each in lengths
          for picked in [rng.permutation(len(each[0]))[:CHUNK]]]
  mean_share = np.mean([target.mean() / source.mean() for source, target in some])
  first, found = _round_up(longest[0]), []
  for width in [inputs] if inputs else range(first, WIDEST * first + 1, WIDTH_STEP):
    narrowest = max(longest[1], int(mean_share * width))
    found += [(_fullness(some, width, target_width), (width, target_width))
              for target_width in ([targets] if targets else sorted(
                  {_round_up(factor * narrowest, 8) for factor in (1.0, 1.1, 1.25, 1.5)}))]
    if max(found)[0] >= FULL:
      break
  return max(found)[1]


def _fullness(lengths: Sequence[tuple[np.ndarray, np.ndarray]], inputs: int, targets: int) -> float:
  """Share of a batch's positions, encoder's and decoder's together, that are tokens."""
  tokens = positions = 0
  for input_lengths, target_lengths in lengths:
    _, offsets = pack(input_lengths, target_lengths, inputs, targets)
    tokens += int(input_lengths.sum() + target_lengths.sum())
    positions += (len(offsets) - 1) * (inputs + targets)
  return tokens / positions


def _round_up(length: float, step: int = WIDTH_STEP) -> int:
  return -(-int(np.ceil(length)) // step) * step


def _check_lengths(caches: Sequence[TokenCache],
                   lengths: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
  """An example without inputs has nothing to attend to: alone in a row it would see padding."""
  for cache, (input_lengths, _) in zip(caches, lengths, strict=True):
    if not input_lengths.all():
      raise ValueError(f'Example {int(np.argmin(input_lengths))} of {cache.meta.get("task")} has '
                       'neither inputs nor a prompt, so it cannot share a row: do not pack it.')

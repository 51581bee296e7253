"""Several examples a row, each with its own prompt, so that next to nothing is padding.

A packed batch is that of `batches.py`, all rows of one width, with four arrays more (int32):
  encoder_segment_ids, encoder_positions  [B, T]
  decoder_segment_ids, decoder_positions  [B, S]
A row's examples are its segments 1, 2, …; padding is segment 0. Attention stays within a segment
and positions start again in each, so the loss of an example is what it is alone in a row.

Which examples share a row is decided once, from the lengths and the seed: best fit, longest first,
within chunks of the shuffled examples. Rows are then drawn as examples are: every row once,
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

CHUNK = 4096  # Examples that are fitted together; each chunk leaves a few rows half full.
TRIES = 8  # Rows looked at for an example whose targets do not fit the fullest one.
WIDTH_STEP = 32
WIDEST = 4  # The narrowest good row is looked for up to so many times the longest example.
FULL = 0.95  # A width is good where so much of it is tokens.


@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatches:
  """Batches of one task or of a mixture, packed. `batch_size` counts rows, as in T5X.

  Args:
    caches, seed, virtual, rates, process_index, process_count: as of `TrainBatches`; `rates` are
      shares of examples, and the examples of a row are of one task.
    inputs, targets: the widths of rows, the inputs' with prompts. Default: the narrowest in which
      95 % are tokens (up to four times the longest example), and as many targets as go with it.

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
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self):
    put = functools.partial(object.__setattr__, self)
    put('caches', check_caches(self.caches))
    put('virtual', one_each(self.virtual, len(self.caches)))
    check_batch_size(self.batch_size, self.process_index, self.process_count)
    lengths = [(cache.input_lengths + (virtual.length if virtual else 0), cache.target_lengths)
               for cache, virtual in zip(self.caches, self.virtual, strict=True)]
    _check_lengths(self.caches, lengths)
    put('widths', _widths(lengths, self.inputs, self.targets, self.seed))
    put('_packs', [pack(*each, *self.widths, self.seed) for each in lengths])
    rates = self.rates and [rate * len(offsets) / len(members) for rate, (members, offsets)
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
    return ['packed', *self.widths, self.num_examples, self.rates]

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
    """This process's rows of batch `step` (from 0)."""
    local = self.batch_size // self.process_count
    rows = self.rows_at(step)[local * self.process_index:][:local]
    return packed([[self._example(source, i) for i in members] for source, members in rows],
                  *self.widths)

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
  rows: list[list[int]] = []
  for start in range(0, len(order), CHUNK):
    chunk = order[start:start + CHUNK]
    fill = np.maximum(input_lengths[chunk] / inputs, target_lengths[chunk] / targets)
    chunk = chunk[np.argsort(-fill, kind='stable')]
    rows += _best_fit(chunk.tolist(), input_lengths[chunk].tolist(),
                      target_lengths[chunk].tolist(), inputs, targets)
  return (np.array([i for row in rows for i in row], np.int64),
          np.cumsum([0, *map(len, rows)]))


def _best_fit(examples: list[int], input_lengths: list[int], target_lengths: list[int],
              inputs: int, targets: int) -> list[list[int]]:
  """Each example, in this order, into the fullest row that has room for it."""
  rows: list[list[int]] = []
  room: list[int] = []  # Of each row, for targets.
  open_rows: list[list[int]] = [[] for _ in range(inputs + 1)]  # By room for inputs.
  some_open = 0  # Bit r is set where open_rows[r] has a row: the next one is found at once.
  shortest = min(input_lengths), min(target_lengths)
  for example, n, m in zip(examples, input_lengths, target_lengths, strict=True):
    left, at = _fitting(some_open, n, m, open_rows, room)
    if left is None:
      row, left = len(rows), inputs
      rows.append([])
      room.append(targets)
    else:
      row = open_rows[left].pop(at)
      if not open_rows[left]:
        some_open &= ~(1 << left)
    rows[row].append(example)
    room[row] -= m
    if left - n >= shortest[0] and room[row] >= shortest[1]:
      open_rows[left - n].append(row)
      some_open |= 1 << (left - n)
  return rows


def _fitting(some_open: int, n: int, m: int, open_rows: list[list[int]],
             room: list[int]) -> tuple[int | None, int]:
  """(room for inputs, place among the rows with it) of a row with room for n inputs, m targets."""
  some_open >>= n
  for turn in range(TRIES):
    if not some_open:
      break
    # The fullest rows first; if their targets leave no room, the emptiest.
    bit = (some_open & -some_open if turn < TRIES - 1 else some_open).bit_length() - 1
    rows = open_rows[n + bit]
    for at in range(len(rows) - 1, max(-1, len(rows) - 1 - TRIES), -1):
      if room[rows[at]] >= m:
        return n + bit, at
    some_open &= some_open - 1
  return None, 0


def _widths(lengths: Sequence[tuple[np.ndarray, np.ndarray]], inputs: int | None,
            targets: int | None, seed: int) -> tuple[int, int]:
  """The widths that are given, or those of which most is tokens (of a chunk of each task)."""
  rng = np.random.default_rng([seed, 3])
  longest = [int(max(each[side].max() for each in lengths)) for side in (0, 1)]
  for side, (name, given) in enumerate((('inputs', inputs), ('targets', targets))):
    if given is not None and given < longest[side]:
      raise ValueError(f'Packed rows of {given} {name} are shorter than the longest example '
                       f'({longest[side]} with its prompt): raise PackedBatches.{name}, or lower '
                       'the task feature lengths.')
  some = [tuple(each[side][picked] for side in (0, 1)) for each in lengths
          for picked in [rng.permutation(len(each[0]))[:CHUNK]]]
  mean_share = np.mean([target.mean() / source.mean() for source, target in some])
  best = None
  first = _round_up(longest[0])
  for width in [inputs] if inputs else range(first, WIDEST * first + 1, WIDTH_STEP):
    narrowest = max(longest[1], int(mean_share * width))
    for target_width in [targets] if targets else sorted(
        {_round_up(factor * narrowest, 8) for factor in (1.0, 1.1, 1.25, 1.5)}):
      full = _fullness(some, width, target_width)
      if best is None or full > best[0] + 1e-3:
        best = full, (width, target_width)
    if best[0] >= FULL:
      break
  return best[1]


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

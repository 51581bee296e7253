"""Which examples stand in which batch, and their arrays, as pure functions of (seed, step).

A batch is four arrays, virtual tokens already among the text's ids (int32, 0 is padding):
  encoder_input_tokens   [B, T]
  decoder_input_tokens   [B, S]  the targets one position later, 0 first
  decoder_target_tokens  [B, S]
  decoder_loss_weights   [B, S]  float32, 1 where there is a target

Examples are drawn from an endless stream (`stream.py`): every example once, shuffled, then every
example once again. A batch is a piece of that stream; the one that begins an epoch's end holds the
next epoch's beginning too, so nothing is dropped. Inside an epoch, windows of some batches are
sorted by width and their batches shuffled, so that little is padding. Nothing here has state: a
resume is a step.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from prompt_tuning_jax.data.stream import Stream
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens

# Batches are not sorted by shorter targets: a label's length would tell the labels apart.
SHORT_TARGET = 32
# A cache's rows that are tried with `noise` before training.
TRIED = 64


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Widths that texts (without a prompt) and targets are rounded up to: few shapes, little padding.

  No batch is wider than the task's lengths; () makes every batch that wide.
  """

  inputs: Sequence[int] = (
      8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
  targets: Sequence[int] = (
      2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)

  def __post_init__(self):
    for widths in (self.inputs, self.targets):
      if list(widths) != sorted(set(widths)) or min(widths, default=1) < 1:
        raise ValueError(f'Buckets must be rising widths from 1, got {widths}.')


@dataclasses.dataclass(frozen=True, eq=False)
class TrainBatches:
  """Batches of one task or of a mixture, one example a row.

  Args:
    caches: the tasks' token caches.
    batch_size: B, of all processes together.
    seed: decides all orders.
    virtual: a prompt, or one for each cache.
    rates: a positive number for each cache: their shares of a batch; every cache then has epochs
      of its own. Without it the caches are one set of examples.
    process_index, process_count: this process gets rows [i B / n, (i + 1) B / n) of each batch.
    window: in how many batches rows of similar width are brought together.
    noise: a function with a name that changes rows of one length, anew at every step: (inputs
      [N, T], targets [N, S], uniform numbers [N, >= T + S], the cache's meta) -> both, as long as
      before; as `tasks.noise.redrawn_spans` does. By default rows are what the cache has.

  Raises:
    ValueError: the arguments do not fit, or `noise` does not know what to do with a cache's rows.
  """

  caches: Sequence[TokenCache]
  batch_size: int
  seed: int = 0
  virtual: VirtualTokens | Sequence[VirtualTokens | None] | None = None
  buckets: Buckets | None = None
  rates: Sequence[float] | None = None
  process_index: int = 0
  process_count: int = 1
  window: int = 64
  noise: Callable | None = None

  def __post_init__(self):
    put = functools.partial(object.__setattr__, self)
    put('caches', check_caches(self.caches))
    put('virtual', one_each(self.virtual, len(self.caches)))
    put('buckets', self.buckets or Buckets())
    put('_window_rows', functools.lru_cache(2)(self._make_window_rows))
    check_batch_size(self.batch_size, self.process_index, self.process_count)
    if self.window < 1:
      raise ValueError(f'Expected window >= 1, got {self.window}.')
    put('_stream', Stream([cache.num_examples for cache in self.caches], self.seed, self.rates))
    for i, cache in enumerate(self.caches if self.noise else ()):
      widths = [cache.meta['lengths'][side] for side in ('inputs', 'targets')]
      some = np.arange(min(TRIED, cache.num_examples))
      self._rows_of(i, some, widths, np.random.default_rng(0).random((len(some), sum(widths))))

  @property
  def num_examples(self) -> int:
    return self._stream.num_items

  @property
  def examples_per_batch(self) -> float:
    return self.batch_size

  @property
  def description(self) -> list:
    """What decides the batches besides seed and size: a resumed run must have the same."""
    return ['buckets', *map(list, dataclasses.astuple(self.buckets)), self.window,
            [cache.part for cache in self.caches], self.rates and list(self.rates),
            *([self.noise.__name__] if self.noise else ())]

  def batch_at(self, step: int) -> dict[str, np.ndarray]:
    """This process's rows of batch `step` (from 0)."""
    rows = self.rows_at(step)
    widths = _widths(self._input_lengths[rows].max(), self._target_lengths[rows].max(),
                     self.caches, self.buckets)
    local = self.batch_size // self.process_count
    own = slice(local * self.process_index, local * (self.process_index + 1))
    # Every process draws for all rows: a row's noise does not depend on who has it.
    dice = self.noise and np.random.default_rng([self.seed, 4, step]).random(
        (self.batch_size, sum(widths)))[own]
    rows = rows[own]
    cache_of = self._stream.source_of(rows)
    longest_prompt = max(v.length if v else 0 for v in self.virtual)
    batch = _empty_batch(local, widths[0] + longest_prompt, widths[1])
    for i in np.unique(cache_of):
      here = np.flatnonzero(cache_of == i)
      part = self._rows_of(i, rows[here] - self._stream.firsts[i], widths,
                           None if dice is None else dice[here])
      for name, array in part.items():
        batch[name][here, :array.shape[1]] = array
    return batch

  def _rows_of(self, i: int, rows: np.ndarray, widths: Sequence[int],
               dice: np.ndarray | None) -> dict[str, np.ndarray]:
    """The arrays of some rows of cache i, with the noise that `dice` [m, >= T + S] decide."""
    cache = self.caches[i]
    cache.check(rows)
    noise = self.noise and (lambda inputs, targets, same: self.noise(
        inputs, targets, dice[same], cache.meta))
    return _assemble(cache.input_tokens, cache.input_offsets, cache.target_tokens,
                     cache.target_offsets, rows, widths, self.virtual[i], noise)

  def rows_at(self, step: int) -> np.ndarray:
    """[B] int64: the examples of batch `step`, numbered through all caches one after another."""
    first, last = self._window(step)
    return self._window_rows(first, last)[step - first]

  def _window(self, step: int) -> tuple[int, int]:
    """The batches [first, last) that `step` is sorted with: all of one epoch, or alone."""
    size, epoch = self.batch_size, self._stream.epoch
    if epoch is None:
      first = step // self.window * self.window
      return first, first + self.window
    begins = step * size // epoch * epoch  # The epoch of the batch's first row.
    if step * size + size > begins + epoch:
      return step, step + 1  # It holds an epoch's end.
    first_whole = -(-begins // size)
    first = first_whole + (step - first_whole) // self.window * self.window
    return first, min(first + self.window, (begins + epoch) // size)

  def _make_window_rows(self, first: int, last: int) -> np.ndarray:
    """[last - first, B] int64."""
    rows = self._stream.draw(np.arange(first * self.batch_size, last * self.batch_size))
    if last - first == 1:
      return rows[None]
    if self._stream.epoch is None:  # Every batch keeps its share of each task.
      sources = self._stream.source_of(rows)
      for source in np.unique(sources):
        rows[sources == source] = self._by_width(rows[sources == source])
    else:
      rows = self._by_width(rows)
    rows = rows.reshape(-1, self.batch_size)
    return rows[np.random.default_rng([self.seed, 1, first]).permutation(len(rows))]

  def _by_width(self, rows: np.ndarray) -> np.ndarray:
    """[m] int64, the examples of similar widths side by side."""
    widths = np.searchsorted(self.buckets.inputs, self._input_lengths[rows])
    target_widths = np.searchsorted(self.buckets.targets,
                                    np.maximum(self._target_lengths[rows], SHORT_TARGET))
    return rows[np.lexsort((target_widths, widths))]

  @functools.cached_property
  def _input_lengths(self) -> np.ndarray:
    return np.concatenate([cache.input_lengths for cache in self.caches])

  @functools.cached_property
  def _target_lengths(self) -> np.ndarray:
    return np.concatenate([cache.target_lengths for cache in self.caches])


def batch_of(inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]],
             virtual: VirtualTokens | Sequence[VirtualTokens | None] | None = None,
             buckets: Buckets | None = None) -> dict[str, np.ndarray]:
  """The batch of texts that are in no cache: ids with EOS, not padded; one prompt, or one each."""
  buckets, prompts = buckets or Buckets(), one_each(virtual, len(inputs))
  placed = [ids if prompt is None else prompt.place(np.asarray(ids, np.int32))
            for ids, prompt in zip(inputs, prompts, strict=True)]
  longest_prompt = max(prompt.length if prompt else 0 for prompt in prompts)
  arrays, widths = [], []
  for lists, texts, wide in ((placed, inputs, buckets.inputs), (targets, targets, buckets.targets)):
    arrays += [np.concatenate([np.asarray(ids, np.int32) for ids in lists]),
               np.cumsum([0, *map(len, lists)])]
    widths.append(round_up(max(map(len, texts)), wide))
  return _assemble(*arrays, np.arange(len(inputs)), (widths[0] + longest_prompt, widths[1]), None)


def side_by_side(candidates: Sequence[Sequence[Sequence[int]]], width: int,
                 ) -> dict[str, np.ndarray]:
  """The candidates of each input in one row: ids with EOS -> `candidates`, `segments` [B, width].

  A segment is the number of a candidate among its input's, from 1; 0 is padding.
  """
  batch = {name: np.zeros((len(candidates), width), np.int32)
           for name in ('candidates', 'segments')}
  for i, row in enumerate(candidates):
    ids = [token for tokens in row for token in tokens]
    batch['candidates'][i, :len(ids)] = ids
    batch['segments'][i, :len(ids)] = np.repeat(np.arange(1, len(row) + 1), list(map(len, row)))
  return batch


def _assemble(input_tokens, input_offsets, target_tokens, target_offsets, rows: np.ndarray,
              widths: Sequence[int], virtual: VirtualTokens | None,
              noise: Callable | None = None) -> dict[str, np.ndarray]:
  """The arrays of some rows of one cache, `widths` being those of text and targets.

  `noise` takes inputs, targets and the places of rows that are of one length.
  """
  encoder = _padded(input_tokens, input_offsets, rows, widths[0])
  targets = _padded(target_tokens, target_offsets, rows, widths[1])
  input_lengths = input_offsets[rows + 1] - input_offsets[rows]
  lengths = target_offsets[rows + 1] - target_offsets[rows]
  if noise is not None:
    both = input_lengths * (widths[1] + 1) + lengths
    for pair in np.unique(both):
      same, (n, m) = np.flatnonzero(both == pair), divmod(int(pair), widths[1] + 1)
      encoder[same, :n], targets[same, :m] = noise(encoder[same, :n], targets[same, :m], same)
  if virtual is not None and virtual.length:
    encoder = _with_prompt(encoder, input_lengths, virtual)
  shifted = np.zeros_like(targets)
  shifted[:, 1:] = targets[:, :-1]
  return {'encoder_input_tokens': encoder, 'decoder_input_tokens': shifted,
          'decoder_target_tokens': targets,
          'decoder_loss_weights': (np.arange(widths[1]) < lengths[:, None]).astype(np.float32)}


def _empty_batch(rows: int, encoder_width: int, decoder_width: int) -> dict[str, np.ndarray]:
  return {'encoder_input_tokens': np.zeros((rows, encoder_width), np.int32),
          'decoder_input_tokens': np.zeros((rows, decoder_width), np.int32),
          'decoder_target_tokens': np.zeros((rows, decoder_width), np.int32),
          'decoder_loss_weights': np.zeros((rows, decoder_width), np.float32)}


def _padded(tokens: np.ndarray, offsets: np.ndarray, rows: np.ndarray, width: int) -> np.ndarray:
  """Rows of a ragged array: [total], [n + 1], [B] -> [B, width] int32, 0 behind each row."""
  starts = offsets[rows][:, None]
  columns = np.arange(width)
  inside = columns < offsets[rows + 1][:, None] - starts
  padded = np.zeros(inside.shape, np.int32)
  padded[inside] = tokens[(starts + columns)[inside]]
  return padded


def _with_prompt(text: np.ndarray, lengths: np.ndarray, virtual: VirtualTokens) -> np.ndarray:
  """`virtual.place` of every row at once: [B, T], [B] -> [B, T + P]."""
  begins = np.array([_prompt_begins(virtual, n) for n in lengths.tolist()])[:, None]
  columns = np.arange(text.shape[1] + virtual.length)
  behind = columns - begins  # Distance from the prompt's first position.
  source = np.where(behind < 0, columns, np.maximum(columns - virtual.length, 0))
  placed = np.take_along_axis(text, source, axis=1)
  in_prompt = (behind >= 0) & (behind < virtual.length)
  placed[in_prompt] = virtual.ids[behind[in_prompt]]
  return placed


@functools.lru_cache(1 << 14)
def _prompt_begins(virtual: VirtualTokens, length: int) -> int:
  """Where `place` puts the prompt's first id; it looks only at the text's length."""
  return int(np.argmax(virtual.place(np.zeros(length, np.int32)) > 0))


def _widths(longest_input: int, longest_target: int, caches: Sequence[TokenCache],
            buckets: Buckets) -> tuple[int, int]:
  limits = [cache.meta['lengths'] for cache in caches]
  return (round_up(longest_input, buckets.inputs, max(n['inputs'] for n in limits)),
          round_up(longest_target, buckets.targets, max(n['targets'] for n in limits)))


def round_up(longest: int, buckets: Sequence[int], limit: int | None = None) -> int:
  """The narrowest of `buckets` that is wide enough, but no more than `limit`."""
  wide_enough = [width for width in buckets if width >= longest]
  if wide_enough:
    return min(wide_enough[0], limit or wide_enough[0])
  return int(limit or max(1, longest))


def one_each(virtual, count: int) -> tuple[VirtualTokens | None, ...]:
  """One prompt for all caches, or one for each -> one for each."""
  if virtual is None or isinstance(virtual, VirtualTokens):
    return (virtual,) * count
  if len(virtual) != count:
    raise ValueError(f'Expected one prompt, or one for each of {count} tasks, got {len(virtual)}.')
  return tuple(virtual)


def check_caches(caches: TokenCache | Sequence[TokenCache]) -> tuple[TokenCache, ...]:
  """At least one cache, all with one vocabulary."""
  caches = (caches,) if isinstance(caches, TokenCache) else tuple(caches)
  if not caches:
    raise ValueError('Training needs at least one task, got none.')
  if len({str(cache.meta.get('vocabulary')) for cache in caches}) > 1:
    raise ValueError('The tasks of a mixture must have one vocabulary.')
  return caches


def check_batch_size(batch_size: int, process_index: int = 0, process_count: int = 1) -> None:
  """Raises ValueError unless the processes can share a batch."""
  if batch_size < 1 or batch_size % process_count or not 0 <= process_index < process_count:
    raise ValueError(f'batch_size must be a positive multiple of the {process_count} processes, '
                     f'got {batch_size} in process {process_index}.')

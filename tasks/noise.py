"""T5's self-supervised objectives on arrays of tokens: span corruption and prefix LM.

Pure functions of tokens and a NumPy generator (Raffel et al. 2020, sections 3.1.4 and 3.3.4;
Lester et al. 2021, section 2.2). Rows of one length are corrupted together. Needs neither SeqIO
nor TensorFlow.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EOS = 1  # T5's id of the end of a text; other vocabularies have others
NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0


def noise_counts(length: int, noise_density: float = NOISE_DENSITY,
                 mean_span_length: float = MEAN_SPAN_LENGTH) -> tuple[int, int]:
  """(noise tokens, spans) of a text of `length` tokens, at least 2 and at least one kept."""
  if length < 2:
    raise ValueError(f'Span corruption needs at least 2 tokens, got {length}.')
  if not 0 < noise_density < 1 or mean_span_length < 1:
    raise ValueError('Expected 0 < noise_density < 1 and mean_span_length >= 1, got '
                     f'{noise_density} and {mean_span_length}.')
  noise = min(max(round(length * noise_density), 1), length - 1)
  # Two spans need a kept token between them, hence no more spans than kept tokens and one.
  spans = min(max(round(noise / mean_span_length), 1), length - noise + 1)
  return noise, spans


def raw_length(inputs_length: int, targets_length: int, noise_density: float = NOISE_DENSITY,
               mean_span_length: float = MEAN_SPAN_LENGTH, target_sentinels: bool = True) -> int:
  """The longest text whose corrupted inputs and targets, with EOS, fit the two lengths.

  T5's 512 and 114 tokens come from 568; without sentinels those targets are 86 tokens.
  """
  fits = 0
  for length in range(2, 2 * (inputs_length + targets_length)):
    noise, spans = noise_counts(length, noise_density, mean_span_length)
    targets = noise + spans * target_sentinels + 1
    if length - noise + spans + 1 > inputs_length or targets > targets_length:
      break
    fits = length
  if not fits:
    raise ValueError(f'Span corruption needs lengths of at least 3 inputs and '
                     f'{2 + target_sentinels} targets, got {inputs_length} and {targets_length}: '
                     'raise the task feature lengths.')
  return fits


def span_mask(rows: int, length: int, rng: np.random.Generator,
              noise_density: float = NOISE_DENSITY,
              mean_span_length: float = MEAN_SPAN_LENGTH) -> np.ndarray:
  """Which tokens are noise: [rows, length] bool.

  Every row has the same number of noise tokens and of spans; their lengths are uniform over all
  ways to share the tokens out, with at least one kept token between two spans.
  """
  noise, spans = noise_counts(length, noise_density, mean_span_length)
  dice = [rng.random((rows, count)) for count in (noise - 1, length - noise + 1)]
  return _mask_of_dice(np.concatenate(dice, axis=1), noise, spans)


def span_corruption(tokens: np.ndarray, mask: np.ndarray,
                    first_sentinel: int, eos: int = EOS) -> tuple[np.ndarray, np.ndarray]:
  """Inputs with a sentinel for each span, targets with each sentinel and its span; EOS ends both.

  Args:
    tokens: [N, L] int32.
    mask: [N, L] bool, with as many noise tokens and spans in every row.
    first_sentinel: id of <extra_id_0>; later spans count down from it.

  Returns:
    inputs [N, L - noise + spans + 1] and targets [N, noise + spans + 1], int32.
  """
  rows = len(tokens)
  starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
  sentinels = (first_sentinel + 1 - np.cumsum(starts, axis=1)).astype(np.int32)
  inputs = np.where(starts, sentinels, tokens)[starts | ~mask]
  # A span's first token writes two targets, its sentinel and itself.
  targets = np.stack([sentinels, tokens], axis=-1)[np.stack([starts, mask], axis=-1)]
  return with_eos(inputs.reshape(rows, -1), eos), with_eos(targets.reshape(rows, -1), eos)


def noise_tokens(tokens: np.ndarray, mask: np.ndarray, eos: int = EOS) -> np.ndarray:
  """Targets without sentinels: the spans end to end, then EOS; see `span_corruption`.

  Returns:
    [N, noise + 1] int32.
  """
  return with_eos(tokens[mask].reshape(len(tokens), -1), eos)


def with_eos(tokens: np.ndarray, eos: int = EOS) -> np.ndarray:
  """[N, L] -> [N, L + 1] int32, the id of the end last."""
  return np.pad(tokens, ((0, 0), (0, 1)), constant_values=eos).astype(np.int32)


def restore_spans(inputs: np.ndarray, targets: np.ndarray, lowest_sentinel: int) -> np.ndarray:
  """The texts that `span_corruption` made inputs and targets of: [N, T], [N, S] -> [N, L] int32.

  Raises ValueError unless both sides have the same sentinels, in order, as many in every row.
  """
  inputs, targets = inputs[:, :-1], targets[:, :-1]  # without EOS
  marked, begins = inputs >= lowest_sentinel, targets >= lowest_sentinel
  spans = int(np.count_nonzero(marked[:1]))
  expected = targets[:1, :1] - np.arange(spans)
  if not spans or any((mark.sum(1) != spans).any() or
                      (side[mark].reshape(-1, spans) != expected).any()
                      for side, mark in ((inputs, marked), (targets, begins))):
    raise ValueError('Inputs and targets do not have the same sentinels, in order.')
  places, starts = (np.nonzero(mark)[1].reshape(-1, spans) for mark in (marked, begins))
  mask = _mask_of_runs(np.diff(places, prepend=-1, append=inputs.shape[1]) - 1,
                       np.diff(starts, append=targets.shape[1]) - 1)
  tokens = np.empty(mask.shape, np.int32)
  tokens[~mask], tokens[mask] = inputs[~marked], targets[~begins]
  return tokens


def redrawn_spans(inputs: np.ndarray, targets: np.ndarray, dice: np.ndarray,
                  meta: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Rows of span corruption with other spans, as many and as much noise as before.

  T5 draws its spans anew in every epoch. A `noise` of `data.batches.TrainBatches`.

  Args:
    inputs, targets: [N, T] and [N, S] int32, EOS last, no padding.
    dice: [N, at least T + S] float, uniform: all that decides a row's spans.
    meta: the token cache's, which tells how many sentinels there are.

  Returns:
    inputs [N, T] and targets [N, S], int32. Raises ValueError for rows of another objective.
  """
  # The first target of a row is the first sentinel, and no other id is as high.
  first, eos = int(targets[0, 0]), int(targets[0, -1])
  try:
    tokens = restore_spans(inputs, targets, first + 1 - meta['vocabulary']['extra_ids'])
  except ValueError:
    raise ValueError(
        'Fresh noise is for span_corruption_… tasks, whose inputs and targets have the same '
        f'sentinels, got other rows from {meta["task"]}: take batching/buckets.gin.') from None
  length = tokens.shape[1]
  spans = (inputs.shape[1] + targets.shape[1] - 2 - length) // 2
  mask = _mask_of_dice(dice[:, :length], targets.shape[1] - 1 - spans, spans)
  return span_corruption(tokens, mask, first, eos)


def prefix_raw_length(inputs_length: int, targets_length: int) -> int:
  """Length of a prefix-LM text: the longer side full, so that the split has room on both."""
  if min(inputs_length, targets_length) < 2:
    raise ValueError('Prefix LM needs lengths of at least 2 inputs and 2 targets, got '
                     f'{inputs_length} and {targets_length}: raise the task feature lengths.')
  return max(inputs_length, targets_length, 3) - 1


def prefix_split_points(rows: int, length: int, inputs_length: int, targets_length: int,
                        rng: np.random.Generator) -> np.ndarray:
  """How many tokens of each row are input: [rows] int, uniform where both sides with EOS fit."""
  lowest = max(1, length - (targets_length - 1))
  highest = min(length - 1, inputs_length - 1)
  if lowest > highest:
    raise ValueError(f'A text of {length} tokens cannot be split into {inputs_length} inputs and '
                     f'{targets_length} targets with EOS: shorten the text.')
  return rng.integers(lowest, highest, size=rows, endpoint=True)


def split_at(tokens: np.ndarray, points: np.ndarray,
             eos: int = EOS) -> tuple[np.ndarray, np.ndarray]:
  """Splits rows at `points` and ends both sides with EOS, padded with 0 behind it.

  Args:
    tokens: [N, L] int32.
    points: [N] int, tokens that go to the inputs.

  Returns:
    inputs [N, longest prefix + 1] and targets [N, longest rest + 1], int32.
  """
  rests = tokens.shape[1] - points
  sides = []
  for starts, counts in ((np.zeros_like(points), points), (points, rests)):
    places = np.arange(counts.max() + 1)
    source = np.minimum(starts[:, None] + places, tokens.shape[1] - 1)
    taken = np.take_along_axis(tokens, source, axis=1)
    side = np.where(places < counts[:, None], taken, np.where(places == counts[:, None], eos, 0))
    sides.append(side.astype(np.int32))
  return tuple(sides)


def blocks(ends: Sequence[int] | np.ndarray, length: int,
           shortest: int = 2) -> tuple[np.ndarray, np.ndarray]:
  """Cuts streams of tokens, which stand end to end, into blocks of one stream each.

  Args:
    ends: where each stream ends; the first begins at 0, another at the one's end before it.
    length: of all blocks of a stream but its last, its rest.
    shortest: shorter rests are no blocks.

  Returns:
    Where blocks begin and how long they are: [N] and [N] int64, in order.
  """
  ends = np.asarray(ends, np.int64)
  sizes = np.diff(ends, prepend=0)
  counts = -(-sizes // length)
  number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
  begins = np.repeat(ends - sizes, counts) + number * length
  kept = np.minimum(np.repeat(ends, counts) - begins, length)
  return begins[kept >= shortest], kept[kept >= shortest]


def _mask_of_dice(dice: np.ndarray, noise: int, spans: int) -> np.ndarray:
  """What `span_mask` says, of uniform numbers: [N, L] float -> [N, L] bool."""
  span_lengths = _compositions(dice[:, :noise - 1], spans)
  # The gaps before the first and after the last span may be empty: composed one longer, each.
  gap_lengths = _compositions(dice[:, noise - 1:], spans + 1)
  gap_lengths[:, [0, -1]] -= 1
  return _mask_of_runs(gap_lengths, span_lengths)


def _mask_of_runs(gap_lengths: np.ndarray, span_lengths: np.ndarray) -> np.ndarray:
  """Kept and noise tokens taking turns: [N, spans + 1], [N, spans] -> [N, L] bool."""
  rows, spans = span_lengths.shape
  run_lengths = np.empty((rows, 2 * spans + 1), np.int64)
  run_lengths[:, 0::2], run_lengths[:, 1::2] = gap_lengths, span_lengths
  is_noise = np.tile(np.arange(2 * spans + 1) % 2 == 1, rows)
  return np.repeat(is_noise, run_lengths.ravel()).reshape(rows, -1)


def _compositions(order: np.ndarray, parts: int) -> np.ndarray:
  """Ways to write `total` as `parts` numbers >= 1: [N, total - 1] float -> [N, parts] int64.

  Where `order` is uniform, each row is uniform among these ways.
  """
  cuts = np.argpartition(order, parts - 2, axis=1)[:, :parts - 1] if parts > 1 else (
      np.empty((len(order), 0), np.int64))
  edges = np.pad(np.sort(cuts, axis=1) + 1, ((0, 0), (1, 1)))
  edges[:, -1] = order.shape[1] + 1
  return np.diff(edges, axis=1)

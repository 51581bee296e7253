"""T5's self-supervised objectives on arrays of tokens: span corruption and prefix LM.

Pure functions of tokens and a NumPy generator (Raffel et al. 2020, sections 3.1.4 and 3.3.4;
Lester et al. 2021, section 2.2). Rows of one length are corrupted together. Needs neither SeqIO
nor TensorFlow.
"""

from collections.abc import Sequence

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
  span_lengths = _compositions(rng, rows, noise, spans)
  # The gaps before the first and after the last span may be empty: composed one longer, each.
  gap_lengths = _compositions(rng, rows, length - noise + 2, spans + 1)
  gap_lengths[:, [0, -1]] -= 1
  run_lengths = np.empty((rows, 2 * spans + 1), np.int64)
  run_lengths[:, 0::2], run_lengths[:, 1::2] = gap_lengths, span_lengths
  is_noise = np.tile(np.arange(2 * spans + 1) % 2 == 1, rows)
  return np.repeat(is_noise, run_lengths.ravel()).reshape(rows, length)


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
  """The tokens [L] that `span_corruption` made one row's inputs and targets of."""
  spans, sentinel = {}, None
  for token in targets[:-1].tolist():
    if token >= lowest_sentinel:
      sentinel = token
      spans[sentinel] = []
    else:
      spans[sentinel].append(token)
  restored = [token for piece in inputs[:-1].tolist() for token in spans.get(piece, [piece])]
  return np.array(restored, np.int32)


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


def _compositions(rng: np.random.Generator, rows: int, total: int, parts: int) -> np.ndarray:
  """[rows, parts] int64, each row uniform among the ways to write `total` as `parts` >= 1."""
  order = rng.random((rows, total - 1))
  cuts = np.argpartition(order, parts - 2, axis=1)[:, :parts - 1] if parts > 1 else (
      np.empty((rows, 0), np.int64))
  edges = np.pad(np.sort(cuts, axis=1) + 1, ((0, 0), (1, 1)))
  edges[:, -1] = total
  return np.diff(edges, axis=1)

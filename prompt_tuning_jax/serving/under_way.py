"""Batches on the device: texts that grow some tokens at a time, and labels that are scored."""

from collections.abc import Callable, Sequence

import numpy as np

from prompt_tuning_jax.data import batches
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.serving.batching import Row, padded
from prompt_tuning_jax.serving.programs import sampling, stop_strings_of
from prompt_tuning_jax.serving.requests import Finished, Text
from prompt_tuning_jax.serving.text_stream import TextStream

Emit = Callable[[Row, list[Text | Finished]], None]


class Texts:
  """A batch that is being decoded. It keeps the bank that it started with."""

  def __init__(self, rows: Sequence[Row], vocabulary: Vocabulary):
    self.rows, self._eos_id = list(rows), vocabulary.eos_id
    self._programs = rows[0].served.programs
    tokens, slots = padded(rows, self._programs.shapes)
    spare = len(tokens) - len(rows)
    self._added = rows[0].served.bank.added(slots)
    self._choose = sampling([row.choice for row in rows] + [(0.0, 0, 1.0, 0)] * spare)
    self._limits = np.array([row.limit for row in rows] + [0] * spare, np.int32)
    self._streams = [TextStream(vocabulary, row.stops) for row in rows]
    self._live = set(range(len(rows)))
    stops = stop_strings_of([row.stops for row in rows] + [()] * spare,
                            self._programs.bytes_of_ids, vocabulary.leading_spaces)
    self._decoding = self._programs.start(tokens, self._added, stops)

  @property
  def live(self) -> list[Row]:
    """The rows that are not finished."""
    return [self.rows[i] for i in sorted(self._live)]

  def drop(self, closed: Callable[[Row], bool]) -> None:
    """Decodes no more what nobody waits for."""
    for i in [i for i in self._live if closed(self.rows[i])]:
      self._live.remove(i)
      self._limits[i] = 0

  def go_on(self, steps: int, emit: Emit) -> int:
    """Decodes up to `steps` tokens more of each row; how many there are of all that are new."""
    before = int(np.asarray(self._decoding.state.position))
    self._decoding = self._programs.go_on(self._decoding, self._added, self._choose, self._limits,
                                          steps)
    state = self._decoding.state  # Copied: the next call gives the arrays away.
    position, tokens, ended, scores = (np.array(x) for x in (
        state.position, state.tokens, state.ended, state.log_likelihood))
    new = 0
    for i in sorted(self._live):
      row, limit = self.rows[i], min(int(position), self.rows[i].limit)
      text, stopped = self._streams[i].piece(tokens[i, :limit], bool(ended[i]))
      events = [Text(row.index, text)] if text else []
      count = limit
      if ended[i]:
        count, reason = self._end(tokens[i, :limit], row.limit, stopped)
        events.append(Finished(row.index, reason, count, float(scores[i])))
        self._live.remove(i)
      new += count - before
      if events:
        emit(row, events)
    return new

  def _end(self, tokens: np.ndarray, limit: int, stopped: bool) -> tuple[int, str]:
    """(how many tokens a text has that has ended, why it ended)."""
    if self._eos_id in tokens:
      return int(np.argmax(tokens == self._eos_id)) + 1, 'stop'
    written = int(np.max(np.nonzero(tokens)[0], initial=-1)) + 1
    if stopped:
      return written, 'stop'
    # Zeros before the limit are padding behind a stop string, or tokens that were chosen.
    return (written, 'stop') if len(tokens) < limit else (limit, 'length')


def label_scores(rows: Sequence[Row]) -> list[np.ndarray]:
  """log p in nats of the labels of each row: one [C] float32 array a row."""
  programs = rows[0].served.programs
  tokens, slots = padded(rows, programs.shapes)
  labels = [row.labels for row in rows] + [()] * (len(tokens) - len(rows))
  beside = batches.side_by_side(labels, rows[0].kind)
  scores = np.asarray(programs.rank(tokens, beside['candidates'], beside['segments'],
                                    rows[0].served.bank.added(slots)))
  return [of[:len(row.labels)] for of, row in zip(scores, rows, strict=False)]

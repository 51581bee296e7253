"""Stop strings, found where they end, across tokens or within one, inside a compiled loop.

Ids are bytes there: whatever the pieces are, a text is its UTF-8 bytes one after another.
"""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.types import Array

_NOTHING = -1  # no byte


@flax.struct.dataclass
class Stops:
  """The stop strings of each row, and the last bytes of what it has.

  Attributes:
    table: [V, M] uint8, the bytes that each id appends to a text; ids beyond append none.
    lengths: [V] int32, how many of the M they are.
    strings: [B, S, W] int16, the stop strings' bytes, at the right of the W; before them -1.
    window: [B, W + M - 1] int16, the last bytes so far, at the right; before them -1.
    droppable: [B] int32, of how many pieces more a leading space is left out of the text.
  """

  table: Array
  lengths: Array
  strings: Array
  window: Array
  droppable: Array

  def append(self, tokens: Array) -> tuple['Stops', Array]:
    """tokens: [B] int32 -> with their bytes, and in which rows a stop string is now: [B] bool."""
    of_tokens = lambda table: jnp.take(table, tokens, axis=0, mode='fill', fill_value=0)
    pieces, lengths = of_tokens(self.table).astype(self.window.dtype), of_tokens(self.lengths)
    # A text does not begin with the space that the first word's piece has.
    drop = (self.droppable > 0) & (lengths > 0) & (pieces[:, 0] == ord(' '))
    pieces = jnp.where(drop[:, None], jnp.roll(pieces, -1, axis=1), pieces)
    lengths = lengths - drop
    droppable = jnp.where(lengths > 0, 0, self.droppable - drop)
    size, longest = self.window.shape[1], self.table.shape[1]
    joined = jnp.concatenate([self.window, pieces], axis=1)
    window = jnp.take_along_axis(joined, jnp.arange(size) + lengths[:, None], axis=1)
    width = self.strings.shape[2]
    # A string may end at any byte of the piece: [B, 1, M, W] against [B, S, 1, W].
    places = size - width - jnp.arange(longest)[:, None] + jnp.arange(width)
    strings = self.strings[:, :, None]
    equal = jnp.all((window[:, None, places] == strings) | (strings == _NOTHING), axis=-1)
    found = jnp.any(equal & (strings[..., -1] != _NOTHING), axis=(1, 2))
    return self.replace(window=window, droppable=droppable), found


def of_rows(texts: Sequence[Sequence[str]], table: Array, lengths: Array, leading_spaces: int = 0,
            most: int | None = None, width: int | None = None) -> Stops:
  """The stop strings of each row of a batch, before its first token.

  Args:
    texts: those of each row; a row may have none.
    table, lengths, leading_spaces: `Vocabulary.bytes_of_ids` and `Vocabulary.leading_spaces`.
    most, width: S and W of `Stops.strings`, by default as needed. Programs are compiled for each.

  Raises:
    ValueError: a stop string is empty, or there are more, or longer ones, than `most` and `width`.
  """
  rows = [[text.encode('utf-8') for text in row] for row in texts]
  if not all(map(all, rows)):
    raise ValueError('A stop string is empty: it would stop every text before its first token.')
  longest = max((len(text) for row in rows for text in row), default=1)
  wanted = max((len(row) for row in rows), default=1)
  most, width = most or max(wanted, 1), width or longest
  if wanted > most or longest > width:
    raise ValueError(f'There may be {most} stop strings of {width} bytes in UTF-8, got {wanted} of '
                     f'up to {longest} bytes: give fewer or shorter ones.')
  strings = np.full((len(rows), most, width), _NOTHING, np.int16)
  for i, row in enumerate(rows):
    for j, text in enumerate(row):
      strings[i, j, width - len(text):] = np.frombuffer(text, np.uint8)
  window = np.full((len(rows), width + table.shape[1] - 1), _NOTHING, np.int16)
  return Stops(table, lengths, strings, window,
               np.full(len(rows), leading_spaces, np.int32))


def repeated(stops: Stops | None, times: int) -> Stops | None:
  """For a batch in which each example stands `times` times in a row."""
  if stops is None:
    return None
  again = lambda leaf: jnp.repeat(leaf, times, axis=0)
  return stops.replace(strings=again(stops.strings), window=again(stops.window),
                       droppable=again(stops.droppable))


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
  """(the text before the first stop string in it, that string; of several at one place, the
  longest); (the text, None) if none is in it."""
  places = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
  if not places:
    return text, None
  start, _, found = min(places)
  return text[:start], found

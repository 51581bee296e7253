"""A text that grows token by token, sent in pieces that are never taken back."""

from collections.abc import Sequence

from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.decoding import stop_strings

_INCOMPLETE = '\ufffd'  # what bytes decode to that are no character, or not yet


class TextStream:
  """The pieces, one after another, are the text up to its first stop string.

  What may still change waits: the bytes of a character that is not complete, and what may be the
  beginning of a stop string.
  """

  def __init__(self, vocabulary: Vocabulary, stops: Sequence[str] = ()):
    self._vocabulary, self._stops, self._sent = vocabulary, tuple(stops), ''

  def piece(self, tokens: Sequence[int], ended: bool) -> tuple[str, bool]:
    """(what is new now that there are these tokens, whether a stop string is in the text)."""
    text, stop = stop_strings.cut(self._vocabulary.decode(tokens), self._stops)
    if stop is None and not ended:
      text = text.rstrip(_INCOMPLETE)
      text = text[:len(text) - held_back(text, self._stops)]
    piece = text[len(self._sent):]
    self._sent += piece
    return piece, stop is not None


def held_back(text: str, stops: Sequence[str]) -> int:
  """How many characters at the end of a text may be the beginning of a stop string."""
  longest = max(map(len, stops), default=1) - 1
  return next((size for size in range(min(longest, len(text)), 0, -1)
               if any(stop.startswith(text[-size:]) for stop in stops)), 0)

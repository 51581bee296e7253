"""Where a prompt stands in an input: token ids V, V + 1, … written among the text's ids."""

import dataclasses

import numpy as np

PLACEMENTS = ('before', 'after_first', 'infix', 'end')


@dataclasses.dataclass(frozen=True)
class VirtualTokens:
  """The ids of one prompt and where they go.

  `num_embeddings` is V, the rows of the base's embedding table; `offset` the rows of the prompts
  that stand before this one in a bank. `placement` is one of
    before       prompt, text
    after_first  first token, prompt, rest of the text (after [CLS], say)
    infix        first half of the text, prompt, second half
    end          text with its end-of-sequence token, prompt

  Li & Liang (2021, section 7.3) call infix what stands between an input and its target. With an
  encoder for the input that is `end`.
  """

  num_embeddings: int
  length: int
  placement: str = 'before'
  offset: int = 0

  def __post_init__(self):
    if self.placement not in PLACEMENTS:
      raise ValueError(f'placement must be one of {PLACEMENTS}, got {self.placement!r}.')
    for name, number in (('length', self.length), ('offset', self.offset)):
      if not isinstance(number, int | np.integer) or number < 0:
        raise ValueError(f"A prompt's {name} must be a whole number of at least 0, got {number!r}.")

  @property
  def ids(self) -> np.ndarray:
    """[P] int32."""
    first = self.num_embeddings + self.offset
    return np.arange(first, first + self.length, dtype=np.int32)

  def place(self, tokens: np.ndarray) -> np.ndarray:
    """One unpadded text with the prompt in it: [n] int -> [n + P] int32."""
    at = {'before': 0, 'after_first': min(1, len(tokens)), 'infix': len(tokens) // 2,
          'end': len(tokens)}[self.placement]
    return np.concatenate([tokens[:at], self.ids, tokens[at:]]).astype(np.int32)

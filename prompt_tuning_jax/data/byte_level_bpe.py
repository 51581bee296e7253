"""GPT-2's and BART's byte-level BPE (Radford et al. 2019, section 2.2), by the tokenizers library.

' word' and 'word' are different tokens there. GPT-2's texts are encoded with one space before
them, unless they begin with one (`add_prefix_space`), and decoded without it: so inputs, targets
and choices are words in the middle of a text, as nearly all words were that GPT-2 has read.
BART's texts are whole, and get no space. Ids are the tokenizer's + 1, since 0 is padding in this
package.
"""

import functools
from collections.abc import Sequence

from prompt_tuning_jax.data.tokenizer import TokenizerVocabulary, file_of, loaded
from prompt_tuning_jax.tokenizer_file import SHIFT

PAD = 0


class ByteLevelBPE(TokenizerVocabulary):
  """Of a tokenizer.json, or of a vocab.json with merges.txt."""

  @property
  def unk_id(self) -> int:
    """The end of text, as in Hugging Face: bytes leave nothing unknown."""
    return self.eos_id

  def decode(self, ids: Sequence[int]) -> str:
    """ids: without the end of text. Padding and ids beyond the vocabulary are left out."""
    known = [i - SHIFT for i in ids if SHIFT <= i < self.size]
    text = loaded(self.file).decode(known, skip_special_tokens=True)
    return text.removeprefix(' ') if self.leading_spaces else text

  def piece(self, token: int) -> str:
    """The token as the file writes it, 'Ġ' being a space: 'Ġthe'."""
    return '<pad>' if token == PAD else loaded(self.file).id_to_token(token - SHIFT) or ''

  @property
  def leading_spaces(self) -> int:
    return int(file_of(self.file).has_space)

  def appended(self, token: int) -> bytes:
    """The bytes that an id appends to a decoded text."""
    added = _added(self.file).get(token - SHIFT)
    written = self.piece(token)
    if token == PAD or (added and added.special):
      return b''
    byte_of = _byte_of_characters()
    if all(character in byte_of for character in written):
      return bytes(byte_of[character] for character in written)
    return written.encode('utf-8')  # an added word, which is written as it is


@functools.cache
def _byte_of_characters() -> dict[str, int]:
  """How GPT-2 writes bytes: those that print as they are, the others from U+0100 on."""
  prints = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1),
            *range(ord('®'), ord('ÿ') + 1)]
  others = [byte for byte in range(256) if byte not in prints]
  return {chr(byte): byte for byte in prints} | {
      chr(256 + i): byte for i, byte in enumerate(others)}


@functools.lru_cache(maxsize=8)
def _added(file: str) -> dict:
  return loaded(file).get_added_tokens_decoder()

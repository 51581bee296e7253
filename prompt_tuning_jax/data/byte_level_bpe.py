"""GPT-2's vocabulary: byte-level BPE (Radford et al. 2019, section 2.2), by the tokenizers library.

' word' and 'word' are different tokens there. A text is encoded with one space before it, unless
it begins with one (`add_prefix_space`), and decoded without it: so inputs, targets and choices are
words in the middle of a text, as nearly all words were that GPT-2 has read. Ids are the
tokenizer's + 1, since 0 is padding in this package.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Sequence

from prompt_tuning_jax.tokenizer_file import SHIFT, TokenizerFile

PAD = 0


@dataclasses.dataclass(frozen=True)
class ByteLevelBPE:
  """A vocabulary (`data.vocabulary`) of a tokenizer.json, or of a vocab.json with merges.txt.

  Raises ValueError, when first used, where a file is missing or of another kind, and where the
  tokenizers library is not installed.
  """

  file: str

  @property
  def eos_id(self) -> int:
    return _file(self.file).end_id

  @property
  def unk_id(self) -> int:
    """The end of text, as in Hugging Face: bytes leave nothing unknown."""
    return self.eos_id

  @property
  def size(self) -> int:
    return _file(self.file).size

  @property
  def sha256(self) -> str:
    return _file(self.file).sha256

  def encode(self, text: str) -> list[int]:
    return self.encode_many([text])[0]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    encodings = _load(self.file).encode_batch_fast(list(texts), add_special_tokens=False)
    return [[i + SHIFT for i in encoding.ids] for encoding in encodings]

  def decode(self, ids: Sequence[int]) -> str:
    """ids: without the end of text. Padding and ids beyond the vocabulary are left out."""
    known = [i - SHIFT for i in ids if SHIFT <= i < self.size]
    return _load(self.file).decode(known, skip_special_tokens=True).removeprefix(' ')

  def piece(self, token: int) -> str:
    """The token as the file writes it, 'Ġ' being a space: 'Ġthe'."""
    return '<pad>' if token == PAD else _load(self.file).id_to_token(token - SHIFT) or ''

  leading_spaces = 1

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
  return _load(file).get_added_tokens_decoder()


@functools.lru_cache(maxsize=8)
def _file(file: str) -> TokenizerFile:
  return TokenizerFile(file)


@functools.lru_cache(maxsize=8)
def _load(file: str):
  """The library's tokenizer, with a space before every text."""
  try:
    tokenizers = importlib.import_module('tokenizers')
  except ImportError as error:
    raise ValueError(f'{file} is read by the tokenizers library: '
                     "pip install 'prompt_tuning_jax[tokenizers]'.") from error
  value = _file(file).json
  splitter = value.get('pre_tokenizer') or {}
  if splitter.get('type') != 'ByteLevel' or value['model'].get('type', 'BPE') != 'BPE':
    raise ValueError(f'{file}: expected the byte-level BPE of GPT-2, got a tokenizer whose model '
                     f'is {value["model"].get("type")!r} and whose pre_tokenizer is '
                     f'{splitter.get("type")!r}.')
  value = {**value, 'pre_tokenizer': {**splitter, 'add_prefix_space': True},
           'truncation': None, 'padding': None}
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(value))
  except Exception as error:  # Its errors have no class of their own.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f'{file} is no tokenizer: {reason}.') from None

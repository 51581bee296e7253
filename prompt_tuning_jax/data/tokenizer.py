"""Tokenizers of Hugging Face folders, run by the tokenizers library.

What a text is to GPT-2 and BART is in `data.byte_level_bpe`, to BERT in `data.word_piece`.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Sequence

from prompt_tuning_jax.tokenizer_file import TokenizerFile


@functools.lru_cache(maxsize=8)
def file_of(file: str) -> TokenizerFile:
  return TokenizerFile(file)


def library(what: str):
  """The tokenizers library; raises ValueError saying what is done by it where it is not installed.
  """
  try:
    return importlib.import_module('tokenizers')
  except ImportError as error:
    raise ValueError(f'{what} by the tokenizers library: '
                     "pip install 'prompt_tuning_jax[tokenizers]'.") from error


@functools.lru_cache(maxsize=8)
def loaded(file: str):
  """The library's tokenizer, which adds no special tokens; ValueError for a file of another kind.
  """
  tokenizers = library(f'{file} is read')
  value = {**file_of(file).json, 'truncation': None, 'padding': None, 'post_processor': None}
  if not file_of(file).is_word_piece:
    splitter = value.get('pre_tokenizer') or {}
    if splitter.get('type') != 'ByteLevel' or value['model'].get('type', 'BPE') != 'BPE':
      raise ValueError(f'{file}: expected the byte-level BPE of GPT-2 or BART, got a tokenizer '
                       f'whose model is {value["model"].get("type")!r} and whose pre_tokenizer is '
                       f'{splitter.get("type")!r}.')
    value['pre_tokenizer'] = {**splitter, 'add_prefix_space': file_of(file).has_space}
  try:
    return tokenizers.Tokenizer.from_str(json.dumps(value))
  except Exception as error:  # Its errors have no class of their own.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f'{file} is no tokenizer: {reason}.') from None


@dataclasses.dataclass(frozen=True)
class TokenizerVocabulary:
  """What the vocabularies (`data.vocabulary`) of such files share.

  Raises ValueError, when first used, where the file is missing or of another kind, and where the
  tokenizers library is not installed.
  """

  file: str

  @property
  def eos_id(self) -> int:
    return file_of(self.file).end_id

  @property
  def mask_id(self) -> int | None:
    return file_of(self.file).mask_id

  @property
  def begins(self) -> dict[str, tuple[int, ...]]:
    return file_of(self.file).begins

  @property
  def untrained(self) -> frozenset[int]:
    return file_of(self.file).untrained

  @property
  def size(self) -> int:
    return file_of(self.file).size

  @property
  def sha256(self) -> str:
    return file_of(self.file).sha256

  def encode(self, text: str) -> list[int]:
    return self.encode_many([text])[0]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids, in this package, of each text alone, without what texts begin and end with."""
    shift = file_of(self.file).shift
    encodings = loaded(self.file).encode_batch_fast(list(texts), add_special_tokens=False)
    return [[i + shift for i in encoding.ids] for encoding in encodings]

"""What lies beside the weights in a Hugging Face folder: JSON files and the vocabulary."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import sentencepiece

from prompt_tuning_jax import tokenizer_file
from prompt_tuning_jax.tokenizer_file import TokenizerFile

BYTES = 'bytes'  # in place of a vocabulary file: ByT5's vocabulary of bytes
END_ID = 1  # T5's
BYTE_IDS = 3 + 256  # padding, end and unknown, then the bytes
SENTENCEPIECE = 'spiece.model'


@dataclasses.dataclass(frozen=True)
class VocabularyFile:
  """A vocabulary's file and its number of extra ids.

  `file` is a SentencePiece model, 'bytes' (ByT5's vocabulary), or a tokenizer's
  (`tokenizer_file`), which has no extra ids.
  """

  file: str
  extra_ids: int = 100

  @functools.cached_property
  def content(self) -> bytes:
    """The SentencePiece file's bytes, read once; b'' for the byte vocabulary."""
    if self.file == BYTES:
      return b''
    return tokenizer_file.read_bytes(self.file)

  @functools.cached_property
  def sha256(self) -> str:
    """Of the file's content; 'bytes' for the byte vocabulary."""
    if self._tokenizer:
      return self._tokenizer.sha256
    return BYTES if self.file == BYTES else hashlib.sha256(self.content).hexdigest()

  @property
  def size(self) -> int | None:
    """Number of ids, extra ids included; None if the file is no SentencePiece model."""
    if self._tokenizer:
      return self._tokenizer.size
    if self.file == BYTES:
      return BYTE_IDS + self.extra_ids
    return self._pieces and self._pieces.get_piece_size() + self.extra_ids

  @property
  def end_id(self) -> int:
    """The id that ends a text."""
    return self._tokenizer.end_id if self._tokenizer else END_ID

  @property
  def mask_id(self) -> int | None:
    """The id that stands for text to be filled in, of a tokenizer that has a mask."""
    return self._tokenizer and self._tokenizer.mask_id

  @property
  def has_sentinels(self) -> bool:
    """Whether the model's own pieces hold <extra_id_0>, as mT5's do: then it needs no extra ids.
    """
    model = self._pieces
    return model is not None and any(model.piece_to_id(f'{space}<extra_id_0>') != model.unk_id()
                                     for space in ('', '▁'))

  def write(self, folder: pathlib.Path):
    """Copies the file into a folder, and writes the tokenizer_config.json beside it."""
    settings = {'tokenizer_class': 'ByT5Tokenizer' if self.file == BYTES else 'T5Tokenizer',
                'extra_ids': self.extra_ids, 'eos_token': '</s>', 'pad_token': '<pad>',
                'unk_token': '<unk>'}
    files = {} if self.file == BYTES else {SENTENCEPIECE: self.content}
    if self._tokenizer:
      files, settings = self._tokenizer.contents, self._tokenizer.settings
    for name, content in files.items():
      (folder / name).write_bytes(content)
    write_json(folder / tokenizer_file.SETTINGS, settings)

  @functools.cached_property
  def _tokenizer(self) -> TokenizerFile | None:
    return TokenizerFile(self.file) if tokenizer_file.is_tokenizer(self.file) else None

  @functools.cached_property
  def _pieces(self) -> sentencepiece.SentencePieceProcessor | None:
    if self._tokenizer:
      return None
    model = sentencepiece.SentencePieceProcessor()
    try:
      return model if self.content and model.LoadFromSerializedProto(self.content) else None
    except RuntimeError:
      return None  # `data.vocabulary` says so when it is used.


def vocabulary_named(file: str) -> VocabularyFile:
  """The vocabulary of a file, or of 'bytes', with the usual number of extra ids of its kind."""
  is_tokenizer = tokenizer_file.is_tokenizer(file)
  return VocabularyFile(file, 0 if is_tokenizer else 125 if file == BYTES else 100)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; raises a one-line ValueError for anything else."""
  if path.exists() and not path.is_file():
    raise ValueError(f'Cannot read {path}: it is no file.')
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ValueError(f'Cannot read {path}: {error.strerror}.') from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON: {str(error).splitlines()[0]}.') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} should hold a JSON object, not a {type(value).__name__}.')
  return value


def find_vocabulary(folder: pathlib.Path, names: Sequence[str],
                    usual: int) -> VocabularyFile | None:
  """The vocabulary that lies in a folder under the first of `names` that is there, or None.

  The number of extra ids is tokenizer_config.json's, else the `usual` one.
  """
  path = folder / tokenizer_file.SETTINGS
  settings = read_json(path) if path.exists() else {}
  is_bytes = str(settings.get('tokenizer_class', '')).startswith('ByT5')
  extra_ids = settings.get('extra_ids', 125 if is_bytes else usual)
  if type(extra_ids) is not int or extra_ids < 0:
    raise ValueError(f'{path}: extra_ids should be a whole number, got {extra_ids!r}.')
  if is_bytes:
    return VocabularyFile(BYTES, extra_ids)
  for name in names:
    if (folder / name).is_file():
      return without_double_sentinels(VocabularyFile(os.fspath(folder / name), extra_ids))
  return None


def without_double_sentinels(vocabulary: VocabularyFile) -> VocabularyFile:
  """The vocabulary, with no extra ids where the model's own pieces hold the sentinels."""
  return dataclasses.replace(vocabulary, extra_ids=0) if vocabulary.has_sentinels else vocabulary


def write_json(path: pathlib.Path, value: dict[str, Any]):
  """Writes it as Hugging Face does, over several lines."""
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')

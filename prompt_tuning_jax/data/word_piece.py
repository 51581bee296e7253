"""BERT's vocabulary: word pieces (Devlin et al. 2019), by the tokenizers library.

Ids are the tokenizer's: [PAD] is 0. A text may hold special tokens, '[MASK]' and '[SEP]' say, which
stand for themselves. Every input begins with [CLS], and every text ends with [SEP].
"""

import functools
from collections.abc import Sequence

from prompt_tuning_jax import tokenizer_file
from prompt_tuning_jax.data.tokenizer import TokenizerVocabulary, file_of, loaded


class WordPiece(TokenizerVocabulary):
  """Of a tokenizer.json or a vocab.txt."""

  @property
  def unk_id(self) -> int:
    return file_of(self.file).ids[tokenizer_file.BERT['unk_token']]

  def decode(self, ids: Sequence[int]) -> str:
    """Words with a space between them, but none before '.' and the like; no special tokens."""
    return b''.join(map(self.appended, ids)).decode('utf-8').removeprefix(' ')

  def piece(self, token: int) -> str:
    """The token as the file writes it, a piece within a word with '##'."""
    return loaded(self.file).id_to_token(token) or ''

  leading_spaces = 1

  def appended(self, token: int) -> bytes:
    """The bytes that an id appends to a decoded text."""
    return _appended(self.file, token)


@functools.lru_cache(maxsize=1 << 17)
def _appended(file: str, token: int) -> bytes:
  words = loaded(file)
  added, written = words.get_added_tokens_decoder().get(token), words.id_to_token(token)
  if written is None or (added and added.special):
    return b''
  return words.decoder.decode(['a', written])[1:].encode('utf-8')

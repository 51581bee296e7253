"""GPT-2's tokenizer as it lies in a Hugging Face folder: tokenizer.json, or vocab.json and merges.

Only JSON is read here; what encodes with it is `data.byte_level_bpe`.
"""

import dataclasses
import functools
import hashlib
import json
import os
from typing import Any

from etils import epath

SUFFIX = '.json'
NAMES = ('tokenizer.json', 'vocab.json')  # how it is called in a folder; the first found is taken
MERGES = 'merges.txt'
SETTINGS = 'tokenizer_config.json'
END = '<|endoftext|>'
# GPT-2 has no padding id, and 0 is padding here: its ids stand one higher.
SHIFT = 1


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
  """A tokenizer.json, or a vocab.json with its merges.txt beside it.

  The token that ends a text is eos_token of the tokenizer_config.json beside the file, else the
  one that eos_token_id of the config.json there names, else '<|endoftext|>'. Every property
  raises ValueError, in one line, for files that cannot be read or are of another kind.
  """

  file: str

  @functools.cached_property
  def contents(self) -> dict[str, bytes]:
    """The file's bytes, or both files', under the names that they have in a folder."""
    content = read_bytes(self.file)
    value = _parsed(self.file, content)
    if isinstance(value.get('model'), dict):
      return {NAMES[0]: content}
    if not value or not all(type(number) is int for number in value.values()):
      raise ValueError(f'{self.file} is neither a tokenizer.json nor a vocab.json, which maps '
                       'tokens to ids: give the file that is beside the weights of the base.')
    return {NAMES[1]: content, MERGES: read_bytes(self._beside(MERGES))}

  @functools.cached_property
  def sha256(self) -> str:
    """Of the content, and of the end-of-text token if that is not GPT-2's."""
    end = '' if self.end == END else self.end
    return hashlib.sha256(b''.join([*self.contents.values(), end.encode()])).hexdigest()

  @functools.cached_property
  def json(self) -> dict[str, Any]:
    """What tokenizer.json holds, or would hold."""
    name, content = next(iter(self.contents.items()))
    value = _parsed(self.file, content)
    if name == NAMES[0]:
      return value
    try:
      lines = self.contents[MERGES].decode('utf-8').split('\n')
    except UnicodeDecodeError as error:
      raise ValueError(f'{self._beside(MERGES)} is not UTF-8: {error.reason} at byte '
                       f'{error.start}.') from None
    merges = [line.rstrip('\r').split(' ') for line in lines if not line.startswith('#version')]
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True,
                  'use_regex': True}
    flags = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    special = [{'id': value[END], 'content': END, **flags, 'special': True}] if END in value else []
    return {'version': '1.0', 'added_tokens': special, 'normalizer': None,
            'pre_tokenizer': byte_level, 'post_processor': None, 'decoder': byte_level,
            'model': {'type': 'BPE', 'vocab': value,
                      'merges': [pair for pair in merges if len(pair) == 2]}}

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    """{token: id}, the tokenizer's own ids, which begin at 0."""
    vocabulary, added = self.json['model'].get('vocab'), self.json.get('added_tokens') or []
    if not isinstance(vocabulary, dict):
      raise ValueError(f'{self.file}: expected the byte-level BPE of GPT-2, which maps tokens to '
                       'ids; this tokenizer does not.')
    return {**vocabulary, **{token['content']: token['id'] for token in added}}

  @functools.cached_property
  def size(self) -> int:
    """The number of ids in this package: one more than the tokenizer's, 0 being padding."""
    return max(self.ids.values()) + 1 + SHIFT

  @functools.cached_property
  def end(self) -> str:
    """The token that ends a text."""
    given = self._setting(SETTINGS, 'eos_token')
    given = given.get('content') if isinstance(given, dict) else given
    if given is None and (number := self._setting('config.json', 'eos_token_id')) is not None:
      given = next((token for token, i in self.ids.items() if i == number), None)
    end = given or END
    if not isinstance(end, str) or end not in self.ids:
      raise ValueError(f'{self.file} has no token {end!r} to end a text with: name its own as '
                       f'"eos_token" in a {SETTINGS} beside it.')
    return end

  @property
  def end_id(self) -> int:
    """The id, in this package, that ends a text."""
    return self.ids[self.end] + SHIFT

  def _beside(self, name: str) -> str:
    return os.path.join(os.path.dirname(self.file), name)

  def _setting(self, name: str, key: str) -> Any:
    path = self._beside(name)
    return _parsed(path, read_bytes(path)).get(key) if epath.Path(path).exists() else None


def is_tokenizer(file: str) -> bool:
  """Whether a vocabulary's file is of this kind, by its name."""
  return file.endswith(SUFFIX)


def read_bytes(path: str) -> bytes:
  """All of a vocabulary's file; ValueError for one that cannot be read, or is a pipe or device."""
  if os.path.exists(path) and not os.path.isfile(path):
    raise ValueError(f'Cannot read the vocabulary {path}: it is no file.')
  try:
    return epath.Path(path).read_bytes()
  except (OSError, NotImplementedError, ImportError) as error:
    raise ValueError(f'Cannot read the vocabulary {path}: {error}.') from error


def _parsed(path: str, content: bytes) -> dict[str, Any]:
  try:
    value = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON: {str(error).splitlines()[0]}.') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} should hold a JSON object, not a {type(value).__name__}.')
  return value

"""Tokenizers as they lie in a Hugging Face folder: those of GPT-2, BART and BERT.

A tokenizer.json, or what is older: vocab.json with merges.txt (byte-level BPE, GPT-2 and BART), or
vocab.txt (WordPiece, BERT). Only the files are read here; what encodes with them is
`data.tokenizer`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

SUFFIXES = ('.json', '.txt')
NAMES = ('tokenizer.json', 'vocab.json')  # how it is called in a folder; the first found is taken
MERGES, WORDS = 'merges.txt', 'vocab.txt'
SETTINGS = 'tokenizer_config.json'
END = '<|endoftext|>'
# 0 is padding here. GPT-2 has no padding id, and BART's is 1: their ids stand one higher.
SHIFT = 1
BART = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>',
        'mask_token': '<mask>'}
BERT = {'cls_token': '[CLS]', 'sep_token': '[SEP]', 'pad_token': '[PAD]', 'unk_token': '[UNK]',
        'mask_token': '[MASK]'}
UNTRAINED = re.compile(r'<pad>|\[unused\d+\]|madeupword\d+')  # of BART and BERT


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
  """A tokenizer.json, a vocab.json with its merges.txt beside it, or a vocab.txt.

  The token that ends a text is [SEP] of word pieces, else eos_token of the tokenizer_config.json
  beside the file, else the one that eos_token_id of the config.json there names, else '</s>' where
  there is a '<s>' too (BART), else '<|endoftext|>'. Every property raises ValueError, in one line,
  for files that cannot be read or are of another kind.
  """

  file: str

  @functools.cached_property
  def contents(self) -> dict[str, bytes]:
    """The file's bytes, or both files', under the names that they have in a folder."""
    content = read_bytes(self.file)
    if self.file.endswith(SUFFIXES[1]):
      return {WORDS: content}
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
    if name == WORDS:
      return self._of_words(_text(self.file, content))
    value = _parsed(self.file, content)
    if name == NAMES[0]:
      return value
    lines = _text(self._beside(MERGES), self.contents[MERGES]).split('\n')
    merges = [line.rstrip('\r').split(' ') for line in lines if not line.startswith('#version')]
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': not _is_bart(value),
                  'trim_offsets': True, 'use_regex': True}
    special = BART.values() if _is_bart(value) else (END,)
    return {'version': '1.0', 'added_tokens': _special_tokens(value, special), 'normalizer': None,
            'pre_tokenizer': byte_level, 'post_processor': None, 'decoder': byte_level,
            'model': {'type': 'BPE', 'vocab': value,
                      'merges': [pair for pair in merges if len(pair) == 2]}}

  def _of_words(self, text: str) -> dict[str, Any]:
    """The tokenizer of a vocab.txt, a piece a line."""
    ids = {line.rstrip('\r'): i for i, line in enumerate(text.removesuffix('\n').split('\n'))}
    lower = self._setting(SETTINGS, 'do_lower_case')
    return {'version': '1.0', 'added_tokens': _special_tokens(ids, BERT.values()),
            'normalizer': {'type': 'BertNormalizer', 'clean_text': True,
                           'handle_chinese_chars': True, 'strip_accents': None,
                           'lowercase': lower is not False},
            'pre_tokenizer': {'type': 'BertPreTokenizer'}, 'post_processor': None,
            'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
            'model': {'type': 'WordPiece', 'unk_token': BERT['unk_token'], 'vocab': ids,
                      'continuing_subword_prefix': '##', 'max_input_chars_per_word': 100}}

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    """{token: id}, the tokenizer's own ids, which begin at 0."""
    vocabulary, added = self.json['model'].get('vocab'), self.json.get('added_tokens') or []
    if not isinstance(vocabulary, dict):
      raise ValueError(f'{self.file}: expected the byte-level BPE of GPT-2 or BART, or the word '
                       'pieces of BERT, which map tokens to ids; this tokenizer does not.')
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get('content'), str)
        and type(token.get('id')) is int for token in added):
      raise ValueError(f'{self.file}: added_tokens should be a list of tokens, each with its '
                       '"content" and its "id".')
    return {**vocabulary, **{token['content']: token['id'] for token in added}}

  @functools.cached_property
  def is_word_piece(self) -> bool:
    """Whether it is of BERT's kind; ValueError where it is, but lacks its special tokens."""
    if self.json['model'].get('type') != 'WordPiece':
      return False
    if lacking := [token for token in BERT.values() if token not in self.ids]:
      raise ValueError(f'{self.file} lacks {", ".join(lacking)}, which BERT has.')
    if self.ids[BERT['pad_token']]:
      raise ValueError(f'{self.file}: {BERT["pad_token"]} should have id 0, has '
                       f'{self.ids[BERT["pad_token"]]}.')
    return True

  @property
  def shift(self) -> int:
    """What an id here is more than the tokenizer's."""
    return 0 if self.is_word_piece else SHIFT

  @functools.cached_property
  def size(self) -> int:
    """The number of ids in this package: 0 is padding, whether the tokenizer has it or not."""
    return max(self.ids.values()) + 1 + self.shift

  @functools.cached_property
  def untrained(self) -> frozenset[int]:
    """The ids, in this package, that no text has: padding, and room for words to come."""
    return frozenset({0} | {i + self.shift for token, i in self.ids.items()
                            if UNTRAINED.fullmatch(token)})

  @property
  def begins(self) -> dict[str, tuple[int, ...]]:
    """{'inputs' or 'targets': the ids, in this package, that such a text begins with}.

    All of BART's begin with <s>; BERT's inputs with [CLS], and its targets stand under masks.
    """
    if self.is_word_piece:
      return {'inputs': (self.ids[BERT['cls_token']],)}
    if not _is_bart(self.ids) or self.end != BART['eos_token']:
      return {}
    return dict.fromkeys(('inputs', 'targets'), (self.ids[BART['bos_token']] + SHIFT,))

  @property
  def has_space(self) -> bool:
    """Whether a text gets a space before it: of BART's, where the file says so."""
    splitter = self.json.get('pre_tokenizer') or {}
    return not self.begins or bool(splitter.get('add_prefix_space'))

  @property
  def mask_id(self) -> int | None:
    """The id, in this package, that stands for text to be filled in; None if there is none."""
    mask = self.ids.get((BERT if self.is_word_piece else BART)['mask_token'])
    return None if mask is None else mask + self.shift

  @property
  def settings(self) -> dict[str, Any]:
    """What the tokenizer_config.json beside it should say."""
    if self.is_word_piece:
      normalizer = self.json.get('normalizer') or {}
      return {'tokenizer_class': 'BertTokenizer', **BERT,
              'do_lower_case': bool(normalizer.get('lowercase', True))}
    if self.begins:
      special = {name: token for name, token in BART.items() if token in self.ids}
      if 'mask_token' in special:
        mask, = _special_tokens(self.ids, [special['mask_token']])
        special['mask_token'] = {'__type': 'AddedToken', **mask}
      return {'tokenizer_class': 'BartTokenizer', 'add_prefix_space': False, **special,
              'cls_token': BART['bos_token'], 'sep_token': BART['eos_token']}
    return {'tokenizer_class': 'GPT2Tokenizer', 'add_prefix_space': True,
            **dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), self.end)}

  @functools.cached_property
  def end(self) -> str:
    """The token that ends a text."""
    if self.is_word_piece:
      return BERT['sep_token']
    given = self._setting(SETTINGS, 'eos_token')
    given = given.get('content') if isinstance(given, dict) else given
    if given is None and (number := self._setting('config.json', 'eos_token_id')) is not None:
      given = next((token for token, i in self.ids.items() if i == number), None)
    end = given or (BART['eos_token'] if _is_bart(self.ids) else END)
    if not isinstance(end, str) or end not in self.ids:
      raise ValueError(f'{self.file} has no token {end!r} to end a text with: name its own as '
                       f'"eos_token" in a {SETTINGS} beside it.')
    return end

  @property
  def end_id(self) -> int:
    """The id, in this package, that ends a text."""
    return self.ids[self.end] + self.shift

  def _beside(self, name: str) -> str:
    return os.path.join(os.path.dirname(self.file), name)

  def _setting(self, name: str, key: str) -> Any:
    path = self._beside(name)
    return _parsed(path, read_bytes(path)).get(key) if epath.Path(path).exists() else None


def is_tokenizer(file: str) -> bool:
  """Whether a vocabulary's file is of this kind, by its name."""
  return file.endswith(SUFFIXES)


def _is_bart(ids: Mapping[str, int]) -> bool:
  return BART['bos_token'] in ids and BART['eos_token'] in ids


def _special_tokens(ids: Mapping[str, int], tokens: Iterable[str]) -> list[dict[str, Any]]:
  """Those of the tokens that there are, which stand in a text for themselves, as tokenizer.json has
  them; BART's mask takes the space before it."""
  flags = dict.fromkeys(('single_word', 'rstrip', 'normalized'), False)
  return [{'id': ids[token], 'content': token, 'lstrip': token == BART['mask_token'], **flags,
           'special': True} for token in tokens if token in ids]


def _text(path: str, content: bytes) -> str:
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path} is not UTF-8: {error.reason} at byte {error.start}.') from None


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

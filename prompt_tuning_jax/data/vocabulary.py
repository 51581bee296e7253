"""Vocabularies without TensorFlow: SentencePiece with sentinels, bytes, BPE, word pieces.

Ids of the first two are those of `seqio.SentencePieceVocabulary` and `seqio.ByteVocabulary`: 0
pads, 1 ends a sequence, 2 is unknown, and the sentinels stand behind the pieces in falling order,
so that `<extra_id_0>` is the last id. Those of GPT-2 and BART are in `data.byte_level_bpe`, BERT's
in `data.word_piece`.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import pathlib
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece

from prompt_tuning_jax import tokenizer_file
from prompt_tuning_jax.data.byte_level_bpe import ByteLevelBPE
from prompt_tuning_jax.data.tokenizer import file_of
from prompt_tuning_jax.data.word_piece import WordPiece

BYTES = 'bytes'
PAD, EOS, UNK = 0, 1, 2
EXTRA_IDS = 100  # T5's sentinels.
_NUM_SPECIAL = 3  # PAD, EOS, UNK: byte b has id b + 3.
_NUM_BYTES = 256
_SPACE = '▁'  # how SentencePiece writes a space
_ALL = 2 ** 30
_USER_DEFINED = 4  # SentencePiece's type of a piece that is never split.
_loading = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Text to ids and back.

  Args:
    file: a SentencePiece model file, 'bytes' for UTF-8 bytes (ByT5), or the tokenizer.json of
      GPT-2, BART or BERT (or vocab.json, merges.txt beside it; or BERT's vocab.txt).
    extra_ids: how many sentinels `<extra_id_0>`, `<extra_id_1>`, … follow the pieces; by default
      100, and 0 of a tokenizer.json, which has none.

  Raises:
    ValueError: the file is missing or of none of these kinds (when first used).
  """

  file: str
  extra_ids: int | None = None
  pad_id = PAD

  def __post_init__(self):
    if not self.file:
      raise ValueError("A vocabulary needs a SentencePiece model file or the word 'bytes', got "
                       f'{self.file!r}: name one with --vocabulary=FILE.')
    object.__setattr__(self, 'file', str(self.file))  # A path object is as good.
    can_have = not tokenizer_file.is_tokenizer(self.file)
    if self.extra_ids is None:
      object.__setattr__(self, 'extra_ids', EXTRA_IDS if can_have else 0)
    if self.extra_ids < 0:
      raise ValueError(f'extra_ids must be 0 or more, got {self.extra_ids}.')
    if self.extra_ids and not can_have:
      raise ValueError(f'{self.file} has no sentinels: extra_ids must be 0, got {self.extra_ids}.')

  @classmethod
  def of_base(cls, base: Any, flag: str = '--vocabulary') -> 'Vocabulary':
    """The vocabulary that a `Base` brings; ValueError, saying which flag gives one, without."""
    if base.vocabulary is None:
      raise ValueError(f'The base {base.name!r} brings no vocabulary: give its file with {flag}.')
    return cls(base.vocabulary.file, base.vocabulary.extra_ids)

  @property
  def eos_id(self) -> int:
    return self._kind.eos_id

  @property
  def unk_id(self) -> int:
    return self._kind.unk_id

  @property
  def mask_id(self) -> int:
    """What stands for text to be filled in: a mask, or `<extra_id_0>`; ValueError for neither."""
    mask_id = getattr(self._kind, 'mask_id', None)
    if mask_id is None and not self.extra_ids:
      raise ValueError(f'{self.file} has no mask, and no sentinels: extra_ids must be 1 or more.')
    return self.sentinel(0) if mask_id is None else mask_id

  def begins(self, feature: str) -> tuple[int, ...]:
    """The ids that every text of a feature, 'inputs' or 'targets', begins with."""
    return getattr(self._kind, 'begins', {}).get(feature, ())

  def framed(self, ids: Sequence[int], feature: str, most: int | None = None) -> list[int]:
    """A text's ids with those that such texts begin and end with, cut to be at most so many."""
    begins = self.begins(feature)
    return [*begins, *ids[:None if most is None else max(0, most - len(begins) - 1)], self.eos_id]

  @property
  def untrained(self) -> frozenset[int]:
    """Ids that no text has, BERT's [unused7] say. T5 has read all: its decoder starts from 0."""
    return getattr(self._kind, 'untrained', frozenset())

  @property
  def size(self) -> int:
    """Number of ids: pieces (or special ids and bytes) and sentinels."""
    return self._kind.size

  @property
  def sha256(self) -> str:
    """SHA-256 of the file's content; 'bytes' for bytes."""
    return self._kind.sha256

  def sentinel(self, k: int) -> int:
    """The id of `<extra_id_k>`."""
    if not 0 <= k < self.extra_ids:
      raise ValueError(f'The vocabulary has {self.extra_ids} sentinels, so there is no '
                       f'<extra_id_{k}>: raise extra_ids or shorten the input.')
    return self.size - 1 - k

  def encode(self, text: str) -> list[int]:
    """The ids of a text alone, without those of `framed`."""
    return self._kind.encode(text)

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    """`encode` of every text, faster."""
    return self._kind.encode_many(texts)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids up to the first EOS; ids beyond the vocabulary are unknown, or nothing."""
    ids = [int(i) for i in ids]
    if self.eos_id in ids:
      ids = ids[:ids.index(self.eos_id)]
    return self._kind.decode(ids)

  def piece(self, token: int) -> str:
    """How one id is written: '▁the' (GPT-2: 'Ġthe'), '<extra_id_0>', '</s>', or a byte such as 'a'
    or '<0xE2>'."""
    if not 0 <= token < self.size:
      raise ValueError(f'The vocabulary has ids 0 to {self.size - 1}, got {token}.')
    if token >= self.size - self.extra_ids:
      return f'<extra_id_{self.size - 1 - token}>'
    return self._kind.piece(int(token))

  def bytes_of_ids(self, rows: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What each id appends to a decoded text: (bytes [V, M] uint8, how many of the M [V] int32).

    The bytes of ids, one after another, are what `decode` makes of them (without the first
    `leading_spaces` spaces, and as far as they are UTF-8). V is the vocabulary's size, or `rows` if
    that is more, for a network that has ids beyond it.
    """
    return _bytes_of_ids(self, max(rows, self.size))

  @property
  def leading_spaces(self) -> int:
    """How many of the spaces that a text's first pieces begin with `decode` leaves out."""
    return self._kind.leading_spaces

  def as_seqio(self):
    """The same vocabulary for SeqIO. Imports TensorFlow: for the process that builds caches."""
    import seqio

    if isinstance(self._kind, _Bytes):
      return seqio.ByteVocabulary(self.extra_ids)
    if isinstance(self._kind, ByteLevelBPE | WordPiece):
      return _seqio_of(self)
    _load(self.file, self.extra_ids)  # So that a bad file gives our error.
    return seqio.SentencePieceVocabulary(self.file, self.extra_ids)

  @property
  def _kind(self) -> '_Bytes | _SentencePiece | ByteLevelBPE | WordPiece':
    if self.file == BYTES:
      return _Bytes(self.extra_ids)
    if tokenizer_file.is_tokenizer(self.file):
      return (WordPiece if file_of(self.file).is_word_piece else ByteLevelBPE)(self.file)
    return _SentencePiece(self.file, self.extra_ids)


@dataclasses.dataclass(frozen=True)
class _Bytes:
  """ByT5's vocabulary (Xue et al. 2021): byte b has id b + 3."""

  extra_ids: int
  eos_id = EOS
  unk_id = UNK
  sha256 = BYTES

  @property
  def size(self) -> int:
    return _NUM_SPECIAL + _NUM_BYTES + self.extra_ids

  def encode(self, text: str) -> list[int]:
    return [byte + _NUM_SPECIAL for byte in text.encode('utf-8')]

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    values = (i - _NUM_SPECIAL for i in ids)
    return bytes(v for v in values if 0 <= v < _NUM_BYTES).decode('utf-8', errors='ignore')

  def piece(self, token: int) -> str:
    if token < _NUM_SPECIAL:
      return ('<pad>', '</s>', '<unk>')[token]
    byte = token - _NUM_SPECIAL
    return chr(byte) if 32 <= byte < 127 else f'<0x{byte:02X}>'

  leading_spaces = 0

  def appended(self, token: int) -> bytes:
    byte = token - _NUM_SPECIAL
    return bytes([byte]) if 0 <= byte < _NUM_BYTES else b''


@dataclasses.dataclass(frozen=True)
class _SentencePiece:
  """T5's vocabulary: the pieces of a model file, then the sentinels."""

  file: str
  extra_ids: int
  eos_id = EOS

  @property
  def unk_id(self) -> int:
    return self._processor.unk_id()

  @property
  def size(self) -> int:
    return self._processor.get_piece_size()

  @property
  def sha256(self) -> str:
    return _sha256(self.file)

  def encode(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
    return self._processor.encode(list(texts))

  def decode(self, ids: Sequence[int]) -> str:
    processor = self._processor
    size = processor.get_piece_size()
    return processor.decode([i if 0 <= i < size else processor.unk_id() for i in ids])

  def piece(self, token: int) -> str:
    return self._processor.id_to_piece(token)

  @property
  def leading_spaces(self) -> int:
    processor, space = self._processor, self._processor.piece_to_id(_SPACE)
    word = next((i for i in range(self.size) if processor.id_to_piece(i).startswith(_SPACE)
                 and i != space), None)
    if word is None or processor.decode([word]).startswith(' '):
      return 0
    # A model that takes runs of spaces for one leaves out all that begin a text.
    return 1 if processor.decode([space, word]).startswith(' ') else _ALL

  def appended(self, token: int) -> bytes:
    processor = self._processor
    if token >= self.size or processor.is_unknown(token):
      return processor.decode([processor.unk_id()]).encode('utf-8')
    if processor.is_control(token):
      return b''
    piece = processor.id_to_piece(token)
    if processor.is_byte(token):  # '<0x0A>'
      return bytes.fromhex(piece[3:5])
    return piece.replace(_SPACE, ' ').encode('utf-8')

  @property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    return _load(self.file, self.extra_ids)


@functools.lru_cache(maxsize=8)
def _bytes_of_ids(vocabulary: Vocabulary, rows: int) -> tuple[np.ndarray, np.ndarray]:
  pieces = list(map(vocabulary._kind.appended, range(rows)))
  lengths = np.array(list(map(len, pieces)), np.int32)
  table = np.zeros((rows, max(1, lengths.max())), np.uint8)
  for row, piece in zip(table, pieces, strict=True):
    row[:len(piece)] = np.frombuffer(piece, np.uint8)
  table.flags.writeable = lengths.flags.writeable = False  # They are kept, and given again.
  return table, lengths


def _seqio_of(vocabulary: Vocabulary):
  """A vocabulary without sentinels as SeqIO's interface has it, TensorFlow calling Python."""
  import seqio
  import tensorflow as tf

  def ids_of(text: bytes | np.ndarray) -> np.ndarray:
    text = text.item() if isinstance(text, np.ndarray) else text
    return np.asarray(vocabulary.encode(text.decode('utf-8', 'replace')), np.int32)

  class Wrapped(seqio.Vocabulary):  # SeqIO checks for its own class.
    bos_id = None
    eos_id = property(lambda self: vocabulary.eos_id)
    unk_id = property(lambda self: vocabulary.unk_id)
    _base_vocab_size = property(lambda self: vocabulary.size)

    def _encode(self, s):
      return vocabulary.encode(s)

    def _decode(self, ids):
      return vocabulary.decode(ids)

    def _encode_tf(self, s):
      s = tf.convert_to_tensor(s)
      if s.shape.rank:  # A list of texts, such as choices.
        return tf.map_fn(self._encode_tf, s,
                         fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, 0))
      return tf.ensure_shape(tf.numpy_function(ids_of, [s], tf.int32), [None])

    def _decode_tf(self, ids):
      return tf.ensure_shape(tf.numpy_function(
          lambda row: vocabulary.decode(row).encode('utf-8'), [ids], tf.string), [])

    def __eq__(self, other):
      return isinstance(other, seqio.Vocabulary) and getattr(other, 'sha256', None) == self.sha256

    sha256 = property(lambda self: vocabulary.sha256)
    mask_id = property(lambda self: vocabulary.mask_id)

  return Wrapped()


def train_vocabulary(texts: Iterable[str], path: str | pathlib.Path, pieces: int = 8000, *,
                     character_coverage: float = 0.9995) -> Vocabulary:
  """Trains a unigram vocabulary with T5's special ids and writes it to `path`.

  Args:
    texts: sentences or lines; SentencePiece reads at most 4,192 bytes of each.
    pieces: its size without sentinels; fewer if the texts do not have so many.

  Raises:
    ValueError: there is no text.
  """
  texts = iter(texts)
  first = next(texts, None)
  if first is None:
    raise ValueError('A vocabulary needs texts to be trained on, got none.')
  model = io.BytesIO()  # A file that exists stays as it is until the training has succeeded.
  try:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain([first], texts), model_writer=model, vocab_size=pieces,
        model_type='unigram', pad_id=PAD, eos_id=EOS, unk_id=UNK, bos_id=-1,
        character_coverage=character_coverage, hard_vocab_limit=False, minloglevel=2)
  except RuntimeError as error:
    raise ValueError(f'SentencePiece cannot train {pieces} pieces on these texts: {error}. '
                     'Ask for other pieces or give more text.') from error
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(model.getvalue())
  return Vocabulary(str(path))


@functools.lru_cache(maxsize=8)
def _read(file: str) -> bytes:
  return tokenizer_file.read_bytes(file)


@functools.lru_cache(maxsize=8)
def _sha256(file: str) -> str:
  return hashlib.sha256(_read(file)).hexdigest()


def _load(file: str, extra_ids: int) -> sentencepiece.SentencePieceProcessor:
  with _loading:  # Loading a model is not thread-safe in SentencePiece.
    return _load_once(file, extra_ids)


@functools.lru_cache(maxsize=8)
def _load_once(file: str, extra_ids: int) -> sentencepiece.SentencePieceProcessor:
  """A model with sentinels: protobuf messages concatenate, so pieces are appended to the bytes."""
  model = _read(file)
  processor = sentencepiece.SentencePieceProcessor()
  sentinels = b''.join(_piece_message(f'▁<extra_id_{k}>') for k in reversed(range(extra_ids)))
  try:
    if not model:
      raise RuntimeError('the file is empty')
    processor.LoadFromSerializedProto(model + sentinels)
    special = processor.pad_id(), processor.eos_id()
  except RuntimeError as error:
    raise ValueError(f'{file} is not a SentencePiece model ({error}): give the spiece.model of '
                     'the base.') from error
  if special != (PAD, EOS):
    raise ValueError(f"{file} has padding id {special[0]} and EOS id {special[1]}, expected T5's 0 "
                     'and 1: train it with `train_vocabulary`.')
  return processor


def _piece_message(piece: str) -> bytes:
  """ModelProto.pieces (field 1) with one SentencePiece {1: text, 2: score, 3: type}."""
  text = piece.encode('utf-8')
  body = (b'\x0a' + bytes([len(text)]) + text + b'\x15' + struct.pack('<f', 0.0)
          + b'\x18' + bytes([_USER_DEFINED]))
  return b'\x0a' + bytes([len(body)]) + body

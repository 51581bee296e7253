"""What lies beside the weights in a Hugging Face folder: config.json and the vocabulary."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import sentencepiece
from etils import epath

from prompt_tuning_jax.networks.t5 import T5Config

BYTES = 'bytes'  # in place of a vocabulary file: ByT5's vocabulary of bytes
BYTE_IDS = 3 + 256  # padding, end and unknown, then the bytes
VOCABULARY_FILES = ('spiece.model', 'sentencepiece.model', 'tokenizer.model')
MODEL_TYPES = ('t5', 'mt5')
LAYER_NORM_EPSILON = 1e-6
# Hugging Face's names of the activations, in `feed_forward_proj`. Its 'gated-gelu' is the tanh
# approximation, which is this package's 'gelu'; its plain 'gelu' is not.
ACTIVATIONS = {
    'relu': ('relu',), 'silu': ('silu',), 'gelu_new': ('gelu',), 'gated-relu': ('relu', 'linear'),
    'gated-silu': ('silu', 'linear'), 'gated-gelu': ('gelu', 'linear'),
    'gated-gelu_new': ('gelu', 'linear'),
}
FEED_FORWARD = {('gelu', 'linear'): 'gated-gelu'} | {v: k for k, v in reversed(ACTIVATIONS.items())
                                                    if v != ('gelu', 'linear')}


@dataclasses.dataclass(frozen=True)
class VocabularyFile:
  """A SentencePiece model file (or 'bytes', ByT5's vocabulary) and its number of extra ids."""

  file: str
  extra_ids: int = 100

  @functools.cached_property
  def content(self) -> bytes:
    """The file's bytes, read once; b'' for the byte vocabulary."""
    if self.file == BYTES:
      return b''
    try:
      return epath.Path(self.file).read_bytes()
    except (OSError, NotImplementedError, ImportError) as error:
      raise ValueError(f'Cannot read the vocabulary {self.file}: {error}.') from error

  @functools.cached_property
  def sha256(self) -> str:
    """Of the file's content; 'bytes' for the byte vocabulary."""
    return BYTES if self.file == BYTES else hashlib.sha256(self.content).hexdigest()

  @property
  def size(self) -> int | None:
    """Number of ids, extra ids included; None if the file is no SentencePiece model."""
    if self.file == BYTES:
      return BYTE_IDS + self.extra_ids
    return self._pieces and self._pieces.get_piece_size() + self.extra_ids

  @property
  def has_sentinels(self) -> bool:
    """Whether the model's own pieces hold <extra_id_0>, as mT5's do: then it needs no extra ids.
    """
    model = self._pieces
    return model is not None and any(model.piece_to_id(f'{space}<extra_id_0>') != model.unk_id()
                                     for space in ('', '▁'))

  @functools.cached_property
  def _pieces(self) -> sentencepiece.SentencePieceProcessor | None:
    model = sentencepiece.SentencePieceProcessor()
    try:
      return model if self.content and model.LoadFromSerializedProto(self.content) else None
    except RuntimeError:
      return None  # `data.vocabulary` says so when it is used.


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """A JSON object; raises a one-line ValueError for anything else."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise ValueError(f'Cannot read {path}: {error.strerror}.') from None
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON: {str(error).splitlines()[0]}.') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} should hold a JSON object, not a {type(value).__name__}.')
  return value


def read_config(folder: pathlib.Path) -> tuple[T5Config, dict[str, Any]]:
  """(the network that config.json describes, config.json as it is).

  The embedding's rows and the tied output layer are what config.json says here; the weights
  know better (`hf_safetensors.open_folder`).
  """
  path = folder / 'config.json'
  config = read_json(path)
  kind = config.get('model_type', 't5')
  if kind not in MODEL_TYPES:
    raise ValueError(f'{path}: model_type is {kind!r}, expected one of {list(MODEL_TYPES)}.')
  epsilon = config.get('layer_norm_epsilon', LAYER_NORM_EPSILON)
  if epsilon != LAYER_NORM_EPSILON:
    raise ValueError(f'{path}: layer_norm_epsilon is {epsilon!r}; T5 here has 1e-6.')
  layers = _positive(path, config, 'num_layers', 6)
  return T5Config(
      vocab_size=_positive(path, config, 'vocab_size', 32128),
      emb_dim=_positive(path, config, 'd_model', 512),
      num_heads=_positive(path, config, 'num_heads', 8),
      num_encoder_layers=layers,
      num_decoder_layers=_positive(path, config, 'num_decoder_layers', layers),
      head_dim=_positive(path, config, 'd_kv', 64),
      mlp_dim=_positive(path, config, 'd_ff', 2048),
      mlp_activations=_activations(path, config, kind),
      dropout_rate=_dropout(path, config),
      logits_via_embedding=kind == 't5' and config.get('tie_word_embeddings', True) is not False
      and config.get('scale_decoder_outputs', True) is not False,
      relative_attention_num_buckets=_positive(
          path, config, 'relative_attention_num_buckets', 32),
      relative_attention_max_distance=_positive(
          path, config, 'relative_attention_max_distance', 128)), config


def _positive(path: pathlib.Path, config: Mapping[str, Any], key: str, default: int) -> int:
  value = config.get(key)
  value = default if value is None else value
  if type(value) is not int or not 0 < value < 2 ** 31:
    raise ValueError(f'{path}: {key} should be a positive whole number, got {value!r}.')
  return value


def _dropout(path: pathlib.Path, config: Mapping[str, Any]) -> float:
  rate = config.get('dropout_rate', 0.1)
  if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
    raise ValueError(f'{path}: dropout_rate should be in [0, 1), got {rate!r}.')
  return float(rate)


def _activations(path: pathlib.Path, config: Mapping[str, Any], kind: str) -> tuple[str, ...]:
  name = config.get('feed_forward_proj', 'gated-gelu' if kind == 'mt5' else 'relu')
  if not isinstance(name, str) or name not in ACTIVATIONS:
    raise ValueError(f'{path}: feed_forward_proj is {name!r}, expected one of '
                     f'{sorted(ACTIVATIONS)}.')
  return ACTIVATIONS[name]


def config_json(config: T5Config, dtype: str) -> dict[str, Any]:
  """What Hugging Face reads the network from; `dtype` is that of the weights."""
  if config.mlp_activations not in FEED_FORWARD:
    raise ValueError(f'Hugging Face has no name for the activations {config.mlp_activations}.')
  return {
      'architectures': ['T5ForConditionalGeneration'], 'model_type': 't5',
      'vocab_size': config.vocab_size, 'd_model': config.emb_dim, 'd_kv': config.head_dim,
      'd_ff': config.mlp_dim, 'num_heads': config.num_heads,
      'num_layers': config.num_encoder_layers, 'num_decoder_layers': config.num_decoder_layers,
      'feed_forward_proj': FEED_FORWARD[config.mlp_activations],
      'relative_attention_num_buckets': config.relative_attention_num_buckets,
      'relative_attention_max_distance': config.relative_attention_max_distance,
      'dropout_rate': config.dropout_rate, 'layer_norm_epsilon': LAYER_NORM_EPSILON,
      'tie_word_embeddings': config.logits_via_embedding, 'is_encoder_decoder': True,
      'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0, 'torch_dtype': dtype,
  }


def find_vocabulary(folder: pathlib.Path, model_type: str = 't5') -> VocabularyFile | None:
  """The vocabulary that lies in a folder, or None where there is none (tokenizer.json is not one).

  The number of extra ids is tokenizer_config.json's, else the model's usual one.
  """
  path = folder / 'tokenizer_config.json'
  tokenizer = read_json(path) if path.exists() else {}
  is_bytes = str(tokenizer.get('tokenizer_class', '')).startswith('ByT5')
  # mT5's 100 sentinels are pieces of its file; ByT5 has 125.
  extra_ids = tokenizer.get('extra_ids', 125 if is_bytes else 0 if model_type == 'mt5' else 100)
  if type(extra_ids) is not int or extra_ids < 0:
    raise ValueError(f'{path}: extra_ids should be a whole number, got {extra_ids!r}.')
  if is_bytes:
    return VocabularyFile(BYTES, extra_ids)
  for name in VOCABULARY_FILES:
    if (folder / name).is_file():
      return without_double_sentinels(VocabularyFile(os.fspath(folder / name), extra_ids))
  return None


def without_double_sentinels(vocabulary: VocabularyFile) -> VocabularyFile:
  """The vocabulary, with no extra ids where the model's own pieces hold the sentinels."""
  return dataclasses.replace(vocabulary, extra_ids=0) if vocabulary.has_sentinels else vocabulary


def write_beside(folder: pathlib.Path, config: T5Config, dtype: str,
                 vocabulary: VocabularyFile | None = None):
  """Writes config.json and, given a `vocabulary` (file, extra_ids), the tokenizer's files."""
  _write_json(folder / 'config.json', config_json(config, dtype))
  if vocabulary is None:
    return
  is_bytes = vocabulary.file == BYTES
  if not is_bytes:
    (folder / VOCABULARY_FILES[0]).write_bytes(vocabulary.content)
  _write_json(folder / 'tokenizer_config.json', {
      'tokenizer_class': 'ByT5Tokenizer' if is_bytes else 'T5Tokenizer',
      'extra_ids': vocabulary.extra_ids, 'eos_token': '</s>', 'pad_token': '<pad>',
      'unk_token': '<unk>'})


def _write_json(path: pathlib.Path, value: dict[str, Any]):
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')

"""The prompt file: a few kilobytes of trained leaves and what they belong to.

safetensors, float32 leaves under their parameter names (`prompt/embedding` [P, D],
`prompt/deep_embedding` [L, P, D], `prefix/…`, `adapter/…`) and one metadata entry,
`prompt_tuning_jax`, in JSON: `describe` makes it. Checksums cover both (`safetensors_file`); an
older file without them is read as well. Also reads the .npy prompts of
google-research/prompt-tuning.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import prompt_tuning_jax
from prompt_tuning_jax import cloud_storage
from prompt_tuning_jax.checkpoints import safetensors_file
from prompt_tuning_jax.checkpoints.atomic_write import atomic_file

KEY = 'prompt_tuning_jax'
EMBEDDING = 'prompt/embedding'
DEEP_EMBEDDING = 'prompt/deep_embedding'
_ROWS = {EMBEDDING: ('P', 'D'), DEEP_EMBEDDING: ('L', 'P', 'D')}  # leaves of rows, their axes
FORMAT_VERSION = 1
SENTINEL = '<extra_id_0> '  # what a run with `SeqioTask.sentinel` writes before every target
MAX_LENGTH = 100_000  # rows of a prompt: more is a mistake, such as a whole embedding table
_NAME = re.compile(r'[\w.-]+(/[\w.-]+)*')


@dataclasses.dataclass(frozen=True, eq=False)
class PromptFile:
  """Trained leaves {path: float32 array}, and the metadata ({} for a .npy prompt)."""

  params: dict[str, np.ndarray]
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

  def under(self, name: str) -> dict[str, np.ndarray]:
    """The leaves `name/REST` by REST; {} where there are none."""
    return {path.removeprefix(f'{name}/'): leaf for path, leaf in self.params.items()
            if path.startswith(f'{name}/')}

  @property
  def sha256(self) -> str:
    """Of leaves and metadata: two files of one answer alike."""
    digest = hashlib.sha256(json.dumps(self.metadata, sort_keys=True).encode())
    for path, leaf in sorted(self.params.items()):
      digest.update(f'{path} {leaf.shape}'.encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def describe(base: Any, *, method: str = 'prompt_tuning', placement: str = 'before',
             length: int | None = None, task: str | None = None,
             labels: Sequence[str] | None = None,
             metric: Mapping[str, Any] | None = None, **others: Any) -> dict[str, Any]:
  """The metadata of a prompt trained on `base` (a `base_checkpoint.Base`).

  `length` counts virtual tokens, `metric` has name, value and step. `others`, in JSON, are a
  method's own: `activation` of adapters, `text` of a designed prompt, `tasks` ({task: its metric})
  of what trained on a mixture. Labels that all begin with a sentinel are kept without it, and
  `target_prefix` tells of it (`written`).
  """
  vocabulary = base.vocabulary
  return _with_plain_labels({
      'format_version': FORMAT_VERSION, 'method': method, 'placement': placement,
      'length': length,
      'base': {'name': base.name, 'fingerprint': base.fingerprint,
               'd_model': base.config.emb_dim, 'num_embeddings': base.config.vocab_size},
      'vocabulary': vocabulary and {'sha256': vocabulary.sha256,
                                    'extra_ids': vocabulary.extra_ids},
      'task': task, 'labels': None if labels is None else list(labels),
      'metric': None if metric is None else dict(metric),
      'version': prompt_tuning_jax.__version__, **others})


def written(metadata: Mapping[str, Any], labels: Sequence[str]) -> tuple[str, ...]:
  """Labels as a prompt with this metadata was trained to write them."""
  prefix = metadata.get('target_prefix') or ''
  return tuple(label if label.startswith(prefix) else prefix + label for label in labels)


def _with_plain_labels(metadata: dict[str, Any]) -> dict[str, Any]:
  labels = metadata.get('labels')
  if not isinstance(labels, list) or not labels or not all(
      isinstance(label, str) and label.startswith(SENTINEL) for label in labels):
    return metadata
  return {**metadata, 'labels': [label.removeprefix(SENTINEL) for label in labels],
          'target_prefix': SENTINEL}


def save(path: str | os.PathLike, prompt: PromptFile):
  """Writes a prompt file; it replaces `path` in one step. Raises ValueError for NaN or no leaves.
  """
  params = {name: np.asarray(leaf, np.float32) for name, leaf in sorted(prompt.params.items())}
  metadata = {'format_version': FORMAT_VERSION, **prompt.metadata}
  _check_params(path, params)
  _check_metadata(path, metadata, params)
  with atomic_file(path) as temporary:
    safetensors_file.write(
        temporary, {name: ('float32', leaf.shape) for name, leaf in params.items()},
        params.__getitem__, {KEY: json.dumps(metadata, allow_nan=False)})


def load(path: str | os.PathLike) -> PromptFile:
  """Reads a prompt file, a .npy prompt [P, D], or a folder of PEFT's prompt tuning.

  Raises a one-line ValueError for any other.
  """
  from prompt_tuning_jax.checkpoints import peft_adapter  # which makes a PromptFile itself
  path = cloud_storage.fetch(path)
  is_peft = peft_adapter.is_folder(path)
  if os.path.isdir(path) and not is_peft:
    inside = sorted(name for name in os.listdir(path) if name.endswith('.safetensors'))
    is_base = os.path.isfile(os.path.join(path, 'config.json'))
    hint = ('it is a whole model: give it as --base, without a prompt' if is_base else
            f'name a file in it: {", ".join(inside) or "there is none"}')
    raise ValueError(f'{path} is a folder, expected a prompt file: {hint}.')
  if not is_peft and not os.path.isfile(path):
    raise ValueError(f'There is no prompt file {path}.')
  if is_peft:
    prompt = peft_adapter.read(path)
    params, metadata = prompt.params, prompt.metadata
  elif _is_numpy(path):
    params, metadata = {EMBEDDING: _load_numpy(path)}, {}
  else:
    header = safetensors_file.read_header(path)
    metadata = _with_plain_labels(_metadata(path, header))  # older files have the sentinel in them
    params = {name: _read(path, header, name) for name in sorted(header.tensors)}
  _check_params(path, params)
  if metadata:
    _check_metadata(path, metadata, params)
  return PromptFile(params, metadata)


def name_of(path: str | os.PathLike) -> str:
  """What a prompt is called: its file's name without the ending, or its PEFT folder's name."""
  name = os.path.basename(os.path.normpath(path))
  return name if os.path.isdir(path) else os.path.splitext(name)[0]


def in_folder(folder: str | os.PathLike) -> dict[str, str]:
  """{name: path} of what a folder may hold of prompts: NAME.safetensors, NAME.npy, PEFT folders.

  Raises ValueError where there is none, or two of one name.
  """
  from prompt_tuning_jax.checkpoints import peft_adapter
  folder = cloud_storage.fetch(folder)
  if not os.path.isdir(folder):
    raise ValueError(f'There is no folder of prompts {folder}.')
  found = {}
  for entry in sorted(os.listdir(folder)):
    path = os.path.join(folder, entry)
    name = name_of(path)
    if os.path.isdir(path):
      fits = peft_adapter.is_folder(path)
    else:
      fits = entry.endswith(('.safetensors', '.npy')) and not entry.startswith('.')
    if not fits:
      continue
    if name in found:
      raise ValueError(f'{found[name]} and {path} are two prompts of one name: rename one.')
    found[name] = path
  if not found:
    raise ValueError(f'{folder} holds no prompts: expected NAME.safetensors or NAME.npy.')
  return found


def _is_numpy(path: str) -> bool:
  with open(path, 'rb') as file:
    return file.read(6) == b'\x93NUMPY' or path.endswith('.npy')


def _load_numpy(path: str) -> np.ndarray:
  try:
    # Memory-mapped, so that a shape in the header is checked against the file's size.
    array = np.load(path, mmap_mode='r', allow_pickle=False)
  except Exception as error:  # NumPy raises many kinds where it cannot parse a header
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise ValueError(f'{path} is not a .npy prompt: {reason.rstrip(".")}.') from None
  if not isinstance(array, np.ndarray):
    raise ValueError(f'{path} is not a .npy prompt: it is an archive of arrays.')
  if array.dtype not in (np.float32, np.float64, np.float16) or array.ndim != 2:
    raise ValueError(f'{path} is not a prompt: expected floats [P, D], got {array.dtype} '
                     f'{list(array.shape)}.')
  return np.array(array, np.float32)


def _metadata(path: str, header: safetensors_file.Header) -> dict[str, Any]:
  if KEY not in header.metadata:
    raise ValueError(f'{path} is a safetensors file but no prompt file: its metadata has no entry '
                     f'{KEY!r}.')
  try:
    metadata = json.loads(header.metadata[KEY])
  except (ValueError, RecursionError):
    metadata = None
  if not isinstance(metadata, dict):
    raise ValueError(f'{path}: the metadata entry {KEY!r} is not a JSON object.')
  return metadata


def _read(path: str, header: safetensors_file.Header, name: str) -> np.ndarray:
  entry = header.tensors[name]
  if entry.dtype != 'float32':
    raise ValueError(f'{path}: {name} is {entry.dtype}, expected float32.')
  return header.read(name)


def _check_params(path: str | os.PathLike, params: Mapping[str, np.ndarray]):
  if not params:
    raise ValueError(f'{path} holds no parameters.')
  for name, leaf in params.items():
    if not _NAME.fullmatch(name):
      raise ValueError(f'{path}: {name!r} is no parameter path.')
    if not leaf.size or leaf.ndim > 8:
      raise ValueError(f'{path}: {name} has the impossible shape {list(leaf.shape)}.')
    if not np.isfinite(leaf).all():
      raise ValueError(f'{path}: {name} has values that are NaN or infinite; the training that '
                       'made it diverged.')
  for name, rows in _rows(params):
    axes = _ROWS[name]
    if rows.ndim != len(axes) or rows.shape[-2] > MAX_LENGTH:
      raise ValueError(f'{path}: {name} should be [{", ".join(axes)}] with P up to {MAX_LENGTH}, '
                       f'got {list(rows.shape)}.')


def _check_metadata(path: str | os.PathLike, metadata: Mapping[str, Any],
                    params: Mapping[str, np.ndarray]):
  """Checks the types that a reader relies on, and the lengths against the arrays."""
  version = metadata.get('format_version')
  if version != FORMAT_VERSION or isinstance(version, bool):
    raise ValueError(f'{path} has format_version {version!r}; this is '
                     f'prompt_tuning_jax {prompt_tuning_jax.__version__}, which reads '
                     f'{FORMAT_VERSION}. A newer version may read it.')
  kinds = {'method': str, 'placement': str, 'length': int, 'base': dict, 'vocabulary': dict,
           'task': str, 'labels': list, 'metric': dict, 'activation': str, 'version': str,
           'tasks': dict, 'text': str, 'sources': list, 'target_prefix': str}
  for key, kind in kinds.items():
    value = metadata.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
      raise ValueError(f'{path}: {key} in the metadata should be a {kind.__name__}, got '
                       f'{str(value)[:40]!r}.')
  labels = metadata.get('labels') or []
  if (not all(isinstance(label, str) and label for label in labels)
      or len(set(labels)) < len(labels)
      or any(label.encode('utf-8', 'ignore').decode() != label for label in labels)):
    raise ValueError(f'{path}: labels in the metadata should be different texts, got '
                     f'{ascii(labels)[:60]}.')
  length, width = metadata.get('length'), (metadata.get('base') or {}).get('d_model')
  for name, rows in _rows(params):
    if length is not None and rows.shape[-2] != length:
      raise ValueError(f'{path}: {name} has {rows.shape[-2]} rows, but the metadata says '
                       f'length {length}.')
    if width is not None and rows.shape[-1] != width:
      raise ValueError(f'{path}: {name} is {rows.shape[-1]} wide, but the metadata says '
                       f'd_model {width}.')


def _rows(params: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
  """The leaves that are rows of virtual tokens, with their names."""
  return [(name, params[name]) for name in _ROWS if name in params]


def check(prompt: PromptFile, base: Any):
  """Raises one ValueError, saying which, where a prompt does not belong to `base`.

  Compares width, number of embedding rows, fingerprint and vocabulary, as far as the file has
  them: a .npy prompt has nothing but its width.
  """
  made = prompt.metadata.get('base') or {}
  words = prompt.metadata.get('vocabulary') or {}
  config, problems = base.config, []

  def compare(what: str, of_prompt: Any, of_base: Any):
    if of_prompt is not None and of_prompt != of_base:
      problems.append(f'{what} is {str(of_prompt)[:12]}, but {str(of_base)[:12]} in this base')

  widths = [rows.shape[-1] for _, rows in _rows(prompt.params)] or [made.get('d_model')]
  compare('the width', widths[0], config.emb_dim)
  compare('the number of embedding rows', made.get('num_embeddings'), config.vocab_size)
  compare("the base's fingerprint", made.get('fingerprint'), base.fingerprint)
  if base.vocabulary is not None:
    compare("the vocabulary's SHA-256", words.get('sha256'), base.vocabulary.sha256)
    compare("the vocabulary's number of extra ids", words.get('extra_ids'),
            base.vocabulary.extra_ids)
  if problems:
    raise ValueError(f'The prompt does not belong to the base {base.name!r} (it was trained on '
                     f'{made.get("name", "an unnamed one")!r}): {"; ".join(problems)}.')

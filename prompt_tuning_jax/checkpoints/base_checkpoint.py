"""A frozen base model: found by name or folder, read onto its shards, known by a fingerprint."""

import dataclasses
import hashlib
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import cloud_storage, param_paths
from prompt_tuning_jax.checkpoints import (
    hf_config,
    hf_families,
    hf_safetensors,
    stored_leaf,
    t5x_legacy,
)
from prompt_tuning_jax.checkpoints.atomic_write import atomic_folder
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.checkpoints.stored_leaf import ShardingFor, StoredLeaf
from prompt_tuning_jax.networks import int8, layer_stack, parameters
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.types import Array, DType, PyTree

logger = logging.getLogger(__name__)

BUNDLED = pathlib.Path(__file__).parents[1] / 'bases'
FINGERPRINT_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Base:
  """A base model in memory, or with its leaves still in their files (`open_base`).

  `vocabulary` is None where the folder has none.
  """

  name: str
  config: Any
  params: PyTree
  vocabulary: VocabularyFile | None
  fingerprint: str

  @property
  def embedding(self) -> Array:
    """The embedding table [V, D]."""
    table = _in_memory(param_paths.flatten(self.params)[self.config.embedding])
    return table.dequantized() if isinstance(table, int8.Quantized) else table

  def apply(self, *args: Any, **kwargs: Any) -> Any:
    """The network's `apply` with these parameters; its layers have their own names, always."""
    config = dataclasses.replace(self.config, scan_layers=False)

    def applied(params: PyTree) -> Any:
      if self.config.scan_layers:  # Within a program, parts are no copy of the model.
        params = param_paths.unflatten(layer_stack.unrolled(
            param_paths.flatten(params), lambda leaf, i: jax.tree.map(lambda x: x[i], leaf)))
      return config.network().apply({'params': params}, *args, **kwargs)

    params = jax.tree.map(_in_memory, self.params)
    return (jax.jit(applied) if self.config.scan_layers else applied)(params)


def bundled_bases() -> list[str]:
  """The names of the bases that come with the package."""
  return sorted(path.parent.name for path in BUNDLED.glob('*/config.json'))


def load_base(name_or_folder: str | os.PathLike, *, config: Any = None,
              vocabulary_file: str | VocabularyFile | None = None,
              dtype: DType | None = 'float32', sharding_for: ShardingFor | None = None,
              scan_layers: bool = False) -> Base:
  """Reads a base: a bundled name ('mini'), a Hugging Face or T5X folder, or one in a bucket
  (gs://…; a Hugging Face folder is copied from there first).

  A bundled name wins over a folder of that name ('./mini' is the folder). `dtype` is that of the
  parameters, None as stored, 'int8' of those that can be; `config.dtype`, of activations, is the
  caller's to replace. `scan_layers` is for a network whose layers are scanned, as is the result's.
  `sharding_for(path, shape)` places each leaf, by default on the first device. `config` and
  `vocabulary_file` ('bytes' for ByT5) override what the folder says. Raises ValueError naming
  all leaves that are missing, extra, misshaped or damaged, or a vocabulary too large for the base.
  """
  folder, config, stored, name_of = _open(name_or_folder, config)
  vocabulary = _vocabulary(folder, vocabulary_file)
  own = vocabulary_file and _vocabulary(folder, None)
  if own and own.sha256 != vocabulary.sha256:
    logger.warning('The base %s brings its vocabulary, %s, and %s is another one: unless it '
                   'numbers the same pieces in the same way, texts make no sense to the base.',
                   folder, own.file, vocabulary.file)
  shapes = {path: spec.shape for path, spec in parameter_specs(config).items()}
  params = stored_leaf.load(stored, shapes, folder, dtype, sharding_for, name_of, scan_layers)
  _check_size(folder, config, vocabulary)
  config = dataclasses.replace(_with_ids(config, vocabulary), scan_layers=scan_layers)
  return Base(_short_name(folder), config, params, vocabulary, fingerprint(
      param_paths.unflatten(stored)))


def open_base(name_or_folder: str | os.PathLike, *, config: Any = None,
              vocabulary_file: str | VocabularyFile | None = None) -> Base:
  """A base as `load_base` finds and checks it, its leaves still in their files."""
  folder, config, stored, name_of = _open(name_or_folder, config)
  vocabulary = _vocabulary(folder, vocabulary_file)
  config = _with_ids(config, vocabulary)
  shapes = {path: spec.shape for path, spec in parameter_specs(config).items()}
  stored_leaf.check(stored, shapes, folder, name_of)
  _check_size(folder, config, vocabulary)
  params = param_paths.unflatten(stored)
  return Base(_short_name(folder), config, params, vocabulary, fingerprint(params))


def network_of(name_or_folder: str | os.PathLike) -> Any:
  """The configuration of a base's network, as `load_base` finds it; no weights are read."""
  return _open(name_or_folder, None)[1]


def random_base(config: Any, vocabulary_file: str, seed: int = 0,
                sharding_for: ShardingFor | None = None) -> Base:
  """A base of random float32 weights, T5X's initialisation: where pretraining starts.

  `sharding_for` is as of `load_base`; the numbers do not depend on it.
  """
  vocabulary = _vocabulary('', vocabulary_file)
  _check_size('to be', config, vocabulary)
  config = _with_ids(config, vocabulary)
  token = jnp.ones((1, 1), jnp.int32)
  shardings = sharding_for and param_paths.unflatten(
      {path: sharding_for(path, leaf.shape) for path, leaf
       in param_paths.flatten(parameters.shapes(config)).items()})
  init = jax.jit(lambda key: config.network().init(key, token, token, token)['params'],
                 out_shardings=shardings)
  params = init(jax.random.key(seed))
  return Base('random', config, params, vocabulary, fingerprint(_unrolled(config, params)))


def write(folder: str | os.PathLike, config: Any, params: PyTree, *,
          vocabulary: VocabularyFile | None = None, replace: bool = False):
  """Writes what `load_base` reads, whole or not at all: a Hugging Face folder, or T5X's where
  Hugging Face has no such network. Raises ValueError if the folder exists, unless told to replace.
  """
  params = _unrolled(config, params)
  if hf_families.has_network(config):
    hf_safetensors.write(folder, config, params, vocabulary=vocabulary, replace=replace)
    return
  with atomic_folder(folder, replace) as temporary:
    t5x_legacy.write(temporary, params)
    if vocabulary is not None:
      vocabulary.write(temporary)


def _unrolled(config: Any, params: PyTree) -> PyTree:
  """The parameters under their names in a file."""
  if not config.scan_layers:
    return params
  return param_paths.unflatten(layer_stack.unrolled(param_paths.flatten(params)))


def _open(name_or_folder: str | os.PathLike, config: Any) -> tuple[str, Any, Any, Callable]:
  """(folder, configuration, stored leaves by name, the name there of a parameter's path)."""
  folder = _locate(os.path.expanduser(os.fspath(name_or_folder)))
  if t5x_legacy.is_folder(folder):
    stored = t5x_legacy.open_folder(folder)
    config = config or _config_beside(folder) or t5x_legacy.infer_config(stored, folder)
    return folder, config, stored, str
  config, stored = hf_safetensors.open_folder(folder, config)
  return folder, config, stored, hf_families.of_configuration(config).name_of


def _locate(name: str) -> str:
  """The folder that a user's name stands for; raises ValueError where it is no checkpoint."""
  bundled = bundled_bases()
  if name in bundled:
    return os.fspath(BUNDLED / name)
  is_remote = cloud_storage.is_remote(name)
  if is_remote and not t5x_legacy.is_folder(name) and not t5x_legacy.checkpoints_under(name):
    name, is_remote = cloud_storage.fetch(name), False
  if not is_remote and not os.path.isdir(name):
    what = 'a file, not a folder' if os.path.exists(name) else 'no folder'
    raise ValueError(f'The base {name!r} is {what}, and no bundled base: those are '
                     f'{", ".join(bundled) or "none in this installation"}.')
  if t5x_legacy.is_folder(name) or hf_safetensors.is_folder(pathlib.Path(name)):
    return name
  inside = t5x_legacy.checkpoints_under(name)
  hint = f' Did you mean {os.path.join(name, inside[-1])}?' if inside else ''
  raise ValueError(f'{name} is no checkpoint: it has neither the file `checkpoint` of T5X nor the '
                   f'config.json of Hugging Face.{hint}')


def _config_beside(folder: str) -> Any:
  """The network of a T5X folder that has a Hugging Face config.json beside its weights."""
  path = pathlib.Path(folder)
  is_there = not folder.startswith('gs://') and hf_safetensors.is_folder(path)
  return hf_families.read_config(path) if is_there else None


def _vocabulary(folder: str, given: str | VocabularyFile | None) -> VocabularyFile | None:
  if isinstance(given, str | os.PathLike):
    made = hf_config.vocabulary_named(os.path.expanduser(os.fspath(given)))
    return hf_config.without_double_sentinels(_existing(made))
  if given is not None:
    return _existing(given)
  return None if folder.startswith('gs://') else hf_families.find_vocabulary(pathlib.Path(folder))


def _existing(vocabulary: VocabularyFile) -> VocabularyFile:
  is_local = vocabulary.file != hf_config.BYTES and '://' not in vocabulary.file
  if is_local and not os.path.isfile(vocabulary.file):
    raise ValueError(f'There is no vocabulary file {vocabulary.file}.')
  return vocabulary


def _check_size(folder: str, config: Any, vocabulary: VocabularyFile | None):
  """Raises ValueError where a vocabulary has ids that the embedding table has no rows for."""
  size = vocabulary and vocabulary.size
  if size and size > config.vocab_size:
    raise ValueError(f'The vocabulary {vocabulary.file} has {size} ids, {vocabulary.extra_ids} '
                     f'extra ids among them, but the base {folder} has {config.vocab_size} '
                     'embedding rows: give the vocabulary it was trained with.')


def _with_ids(config: Any, vocabulary: VocabularyFile | None) -> Any:
  """The network with those ids of the vocabulary that it reads: BERT's mask and end."""
  if not (vocabulary and config.is_masked_lm):
    return config
  if vocabulary.mask_id is None:
    raise ValueError(f'The vocabulary {vocabulary.file} has no mask, which BERT fills in.')
  return dataclasses.replace(config, mask_id=vocabulary.mask_id, end_id=vocabulary.end_id)


def _short_name(folder: str) -> str:
  """The last part of the path; of a T5X 'checkpoint_N', the last two."""
  parts = [part for part in os.path.abspath(folder.removeprefix('gs:/')).split('/') if part]
  return '/'.join(parts[-2 if parts[-1].startswith('checkpoint') else -1:])


def fingerprint(params: PyTree) -> str:
  """SHA-256, in hex, of what makes a base this base.

  Over the sorted leaf names and shapes, then the bfloat16-rounded bytes of the embedding's rows
  0-1023 and of every one-dimensional leaf, in the order of their names. A fine-tuned sibling
  differs, unless its kernels alone have changed (a LoRA that was merged); a T5X, a Hugging Face, a
  float32 and a bfloat16 copy agree. Leaves may still be stored.
  """
  leaves: dict[str, Any] = param_paths.flatten(params)
  digest = hashlib.sha256()
  for path, leaf in leaves.items():
    digest.update(f'{path} {"x".join(map(str, leaf.shape))}\n'.encode())
  for path, leaf in leaves.items():
    if path.endswith('token_embedder/embedding'):
      digest.update(_rounded_bytes(leaf, FINGERPRINT_ROWS))
    elif len(leaf.shape) == 1:
      digest.update(_rounded_bytes(leaf))
  return digest.hexdigest()


def _in_memory(leaf: Array | StoredLeaf) -> Array:
  """A leaf that is stored, read whole in float32; any other as it is."""
  if not isinstance(leaf, StoredLeaf):
    return leaf
  return jnp.asarray(leaf.read((slice(None),) * len(leaf.shape)), jnp.float32)


def _rounded_bytes(leaf: Array | StoredLeaf, rows: int | None = None) -> bytes:
  if isinstance(leaf, StoredLeaf):
    leaf = leaf.read(tuple(slice(0, min(size, rows or size) if axis == 0 else size)
                           for axis, size in enumerate(leaf.shape)))
  elif rows is not None:
    leaf = leaf[:rows]
  if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    from jax.experimental import multihost_utils
    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  return np.asarray(leaf).astype(jnp.bfloat16).tobytes()

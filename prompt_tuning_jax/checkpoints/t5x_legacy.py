"""T5X's legacy checkpoint folders, without t5x: local, or gs:// (read by tensorstore).

The file `checkpoint` is flax msgpack, {version, optimizer: {state, target}}: small leaves sit in
it, large ones are zarr arrays in folders beside it. The optimizer's state is ignored.

Of zarr's chunks gzip keeps a CRC. What is written here has two entries more, which T5X does not
look at: `checksums`, {path: SHA-256 of a zarr array's bytes}, and `sha256`, of all but the version.
"""

import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import serialization

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints.atomic_write import atomic_folder
from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf, sha256, to_host
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.types import PyTree, Shape

VERSION = 3
CHUNK_BYTES = 64 * 2 ** 20
MAX_INDEX_BYTES = 2 ** 31
MAX_SIZE = 2 ** 31  # of an axis, as in JAX
DEFLATE = 1040  # deflate makes no more of a byte than this
_LEAF_KEYS = {'driver', 'kvstore'}  # a mapping with these is a zarr array, not a branch


def is_folder(folder: str | os.PathLike) -> bool:
  """Whether this is a T5X folder, readable or not."""
  if _is_remote(folder):
    return any(key == b'checkpoint' for key in _list(folder, 'checkpoint'))
  return os.path.isfile(os.path.join(folder, 'checkpoint'))


def checkpoints_under(folder: str | os.PathLike) -> list[str]:
  """Names of the folders `checkpoint_N` under `folder`, oldest first; for error messages."""
  if _is_remote(folder):
    names = {key.decode().split('/')[0] for key in _list(folder, 'checkpoint_')}
  else:
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
  return sorted((name for name in names if re.fullmatch(r'checkpoint_\d+', name)),
                key=lambda name: int(name.split('_')[1]))


def open_folder(folder: str | os.PathLike) -> dict[str, StoredLeaf]:
  """{path: leaf} of a legacy checkpoint; reads the `checkpoint` file only."""
  folder = os.fspath(folder)
  target, checksums = _read_index(folder)
  stored = {}

  def visit(branch: Mapping[str, Any], prefix: str):
    for key, value in branch.items():
      path = prefix + str(key)
      if not path.isprintable():
        raise ValueError(f'{folder}/checkpoint names a leaf {ascii(path)[:80]}: copy it again.')
      if isinstance(value, Mapping) and not _LEAF_KEYS <= value.keys():
        visit(value, path + '/')
      else:
        stored[path] = _leaf(folder, path, value, checksums.get(path))

  visit(target, '')
  return stored


def _read_index(folder: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
  """({name: branch or leaf}, {path: SHA-256 of a zarr array}); the second is {} of T5X's own."""
  where = f'{folder.rstrip("/")}/checkpoint'
  try:
    data = _open_store(folder).read('checkpoint').result()
    if data.state != 'value' or len(data.value) > MAX_INDEX_BYTES:
      raise ValueError(f'{folder} has no file named checkpoint: it is no T5X checkpoint.')
    content = serialization.msgpack_restore(data.value)
    if content.keys() & {'sha256', 'checksums'} and content.get('sha256') != _sha256(content):
      raise ValueError('it is not what was written (SHA-256): copy it again')
  except Exception as error:  # msgpack and tensorstore raise many kinds
    if isinstance(error, ValueError) and str(error).startswith(folder):
      raise
    raise ValueError(f'Cannot read {where}: {_first_line(error)}.') from None
  optimizer = content.get('optimizer') if isinstance(content, Mapping) else None
  target = optimizer.get('target') if isinstance(optimizer, Mapping) else None
  if not isinstance(target, Mapping):
    raise ValueError(f'{where} is not a legacy T5X checkpoint: it has no optimizer/target. '
                     'T5X writes one with `use_orbax=False`.')
  return target, content.get('checksums') or {}


def _sha256(content: Mapping[str, Any]) -> str:
  parts = {name: content[name] for name in ('optimizer', 'checksums')}
  return hashlib.sha256(serialization.msgpack_serialize(parts)).hexdigest()


def _leaf(folder: str, path: str, value: Any, checksum: str | None) -> StoredLeaf:
  if isinstance(value, np.ndarray | np.generic):
    array = np.asarray(value)
    return StoredLeaf(path, array.shape, array.dtype.name, lambda index: array[index])
  try:
    metadata = {'order': 'C', **value['metadata']}
    shape, chunks = (tuple(map(int, metadata[key])) for key in ('shape', 'chunks'))
    dtype = jnp.dtype(metadata['dtype']).name
    # The folder's last part only: T5X stores paths relative to the checkpoint, and what a file
    # says must not lead out of it.
    kvstore = value['kvstore']
    name = (kvstore.get('path') or value['path']).rstrip('/').split('/')[-1]
    if (value['driver'] != 'zarr' or name in ('', '.', '..')
        or not all(0 <= size < MAX_SIZE for size in shape)
        or metadata['compressor']['id'] != 'gzip'
        or not all(0 < chunk <= max(size, 1) for chunk, size in zip(chunks, shape, strict=True))):
      raise ValueError
  except (KeyError, TypeError, ValueError, AttributeError):
    return StoredLeaf(path, (), 'unknown', lambda index: np.zeros(()),
                      f'is {str(value)[:80]!r}, neither an array nor the place of a zarr array')
  where = f'{folder.rstrip("/")}/{name}'
  # What the zarr array says of itself must be what the index says, byte order and all.
  spec = {'driver': 'zarr', 'kvstore': _kvstore(where), 'metadata': metadata}
  if metadata.get('fill_value') is None:
    spec['fill_missing_data_reads'] = False  # a lost chunk would read as zeros

  def read(index: tuple[slice, ...]) -> np.ndarray:
    import tensorstore as ts
    try:
      size, found = math.prod(shape) * jnp.dtype(dtype).itemsize, _size_on_disk(where)
      if found and size > found * DEFLATE:  # Out of memory, tensorstore would end the process.
        raise ValueError(f'{size} bytes cannot be in {name}, which has {found}, compressed')
      store = ts.open(spec, open=True, read=True).result()
      part = tuple(slice(*each.indices(size)) for each, size in zip(index, shape, strict=True))
      array = store[part].read().result()
      if checksum and array.shape == shape and sha256(array) != checksum:
        raise ValueError(f'the bytes in {name} are not those that were written (SHA-256): copy '
                         'the folder again')
      return array
    except Exception as error:
      raise ValueError(_first_line(error)) from None

  return StoredLeaf(path, shape, dtype, read)


def infer_config(stored: Mapping[str, StoredLeaf], where: str) -> T5Config | GPTConfig:
  """The network that the leaves' shapes describe.

  Two things leave no trace in a T5X checkpoint and are T5's own here: the dropout rate (0.1) and
  the maximum distance of relative positions (128).
  """
  def shape(path: str, rank: int) -> Shape:
    if path not in stored or len(stored[path].shape) != rank:
      raise ValueError(f'Cannot tell the network from {where}: {path} is missing or is not of '
                       f'rank {rank}. Name the network.')
    return stored[path].shape

  def num_layers(side: str) -> int:
    return len({path.split('/')[1] for path in stored if path.startswith(f'{side}/layers_')})

  if GPTConfig.embedding in stored:
    return _decoder_only(stored, shape, num_layers('decoder'))
  vocab_size, emb_dim = shape('token_embedder/embedding', 2)
  heads, buckets = shape('encoder/relpos_bias/rel_embedding', 2)
  is_gated = 'encoder/layers_0/mlp/wi_0/kernel' in stored
  return T5Config(
      vocab_size=vocab_size, emb_dim=emb_dim, num_heads=heads,
      num_encoder_layers=num_layers('encoder'), num_decoder_layers=num_layers('decoder'),
      head_dim=shape('encoder/layers_0/attention/query/kernel', 2)[1] // max(heads, 1),
      mlp_dim=shape('encoder/layers_0/mlp/wo/kernel', 2)[0],
      mlp_activations=('gelu', 'linear') if is_gated else ('relu',),
      logits_via_embedding='decoder/logits_dense/kernel' not in stored,
      relative_attention_num_buckets=buckets)


def _decoder_only(stored: Mapping[str, StoredLeaf], shape: Callable[[str, int], Shape],
                  num_layers: int) -> GPTConfig:
  vocab_size, emb_dim = shape(GPTConfig.embedding, 2)
  heads, buckets = shape('decoder/relpos_bias/rel_embedding', 2)
  is_gated = 'decoder/layers_0/mlp/wi_0/kernel' in stored
  return GPTConfig(
      vocab_size=vocab_size, emb_dim=emb_dim, num_heads=heads, num_layers=num_layers,
      head_dim=shape('decoder/layers_0/self_attention/query/kernel', 2)[1] // max(heads, 1),
      mlp_dim=shape('decoder/layers_0/mlp/wo/kernel', 2)[0],
      mlp_activations=('gelu', 'linear') if is_gated else ('relu',),
      logits_via_embedding='decoder/logits_dense/kernel' not in stored,
      relative_attention_num_buckets=buckets)


def write(folder: str | os.PathLike, params: PyTree, *, step: int = 0):
  """Writes a legacy T5X checkpoint leaf by leaf, dtypes kept, with an empty optimizer state.

  Raises ValueError if `folder` exists. A local folder appears whole or not at all; on gs://,
  `checkpoint` is written last.
  """
  folder = os.fspath(folder).rstrip('/')
  if not _is_remote(folder):
    with atomic_folder(folder) as temporary:
      _write(os.fspath(temporary), params, step)
  elif next(iter(_list(folder, '')), None) is not None:
    raise ValueError(f'{folder} exists already: delete it or write to another folder.')
  else:
    _write(folder, params, step)


def _write(folder: str, params: PyTree, step: int):
  target, checksums = {}, {}
  for path, leaf in param_paths.flatten(params).items():
    array = to_host(path, leaf)
    # As T5X: norms and relative positions in the index, matrices in zarr.
    is_small = array.ndim < 2 or path.endswith('/rel_embedding')
    target[path] = array if is_small else _write_zarr(folder, path, array)
    if not is_small:
      checksums[path] = sha256(array)
  content = {'version': VERSION, 'checksums': checksums, 'optimizer': {
      'state': {'step': np.asarray(step, np.int32), 'param_states': {}},
      'target': param_paths.unflatten(target)}}
  content['sha256'] = _sha256(content)
  _open_store(folder).write('checkpoint', serialization.msgpack_serialize(content)).result()


def _write_zarr(folder: str, path: str, array: np.ndarray) -> dict[str, Any]:
  """Writes one array; returns the spec under which T5X's index knows it."""
  import tensorstore as ts
  name = f'target.{path.replace("/", ".")}'
  row_bytes = max(array.nbytes // max(array.shape[0], 1), 1)
  rows = min(max(CHUNK_BYTES // row_bytes, 1), max(array.shape[0], 1))
  metadata = {
      'chunks': [rows, *(max(size, 1) for size in array.shape[1:])], 'shape': list(array.shape),
      'compressor': {'id': 'gzip', 'level': 1},
      'dtype': 'bfloat16' if array.dtype == jnp.bfloat16 else array.dtype.str}
  spec = {'driver': 'zarr', 'kvstore': _kvstore(f'{folder}/{name}'), 'metadata': metadata}
  ts.open(spec, create=True).result().write(array).result()
  return {'driver': 'zarr', 'kvstore': {'driver': 'gfile', 'path': name}, 'metadata': metadata}


def _size_on_disk(folder: str) -> int | None:
  """Bytes of a local folder's files; None where there is none, and on gs://.

  Raises ValueError for a pipe or a device, of which tensorstore would wait for the end.
  """
  if _is_remote(folder) or not os.path.isdir(folder):
    return None
  files = list(os.scandir(folder))
  if strange := [file.name for file in files if not (file.is_file() or file.is_dir())]:
    raise ValueError(f'{strange[0]} in {os.path.basename(folder)} is no file')
  return sum(file.stat().st_size for file in files)


def _is_remote(folder: str | os.PathLike) -> bool:
  return os.fspath(folder).startswith('gs://')


def _kvstore(folder: str) -> dict[str, str]:
  """tensorstore's name of a folder."""
  if not _is_remote(folder):
    return {'driver': 'file', 'path': os.path.abspath(folder) + '/'}
  bucket, _, path = folder.removeprefix('gs://').partition('/')
  return {'driver': 'gcs', 'bucket': bucket, 'path': path.rstrip('/') + '/' if path else ''}


def _open_store(folder: str | os.PathLike):
  import tensorstore as ts
  return ts.KvStore.open(_kvstore(os.fspath(folder))).result()


def _list(folder: str | os.PathLike, prefix: str) -> list[bytes]:
  import tensorstore as ts
  end = prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else ''
  return _open_store(folder).list(ts.KvStore.KeyRange(prefix, end)).result()


def _first_line(error: Exception) -> str:
  """The message without tensorstore's specs and source lines."""
  text = (str(error).splitlines() or [type(error).__name__])[0]
  return text.split(' [tensorstore_spec=')[0].split(' [source locations=')[0].rstrip('.')

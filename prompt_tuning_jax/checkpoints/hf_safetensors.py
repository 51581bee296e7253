"""Hugging Face T5 folders: config.json, model.safetensors (or its shards), spiece.model.

Kernels are transposed there, the relative-position table too ([buckets, N]); norms and the
embedding are as in T5X. An output layer of its own (T5 1.1, mT5) is `lm_head.weight`.
"""

import dataclasses
import json
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import hf_config, safetensors_file
from prompt_tuning_jax.checkpoints.atomic_write import atomic_folder
from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf, to_host
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.types import PyTree

FILE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10 ** 9
EMBEDDING, LOGITS = 'token_embedder/embedding', 'decoder/logits_dense/kernel'

_WHOLE = {EMBEDDING: 'shared.weight', LOGITS: 'lm_head.weight'}
for _side in ('encoder', 'decoder'):
  _WHOLE[f'{_side}/{_side}_norm/scale'] = f'{_side}.final_layer_norm.weight'
  _WHOLE[f'{_side}/relpos_bias/rel_embedding'] = (
      f'{_side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight')
_PARTS = {
    'encoder/attention': 'layer.0.SelfAttention',
    'encoder/pre_attention_layer_norm': 'layer.0.layer_norm',
    'encoder/mlp': 'layer.1.DenseReluDense',
    'encoder/pre_mlp_layer_norm': 'layer.1.layer_norm',
    'decoder/self_attention': 'layer.0.SelfAttention',
    'decoder/pre_self_attention_layer_norm': 'layer.0.layer_norm',
    'decoder/encoder_decoder_attention': 'layer.1.EncDecAttention',
    'decoder/pre_cross_attention_layer_norm': 'layer.1.layer_norm',
    'decoder/mlp': 'layer.2.DenseReluDense',
    'decoder/pre_mlp_layer_norm': 'layer.2.layer_norm',
}
_KERNELS = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
# Copies of shared.weight, and a table that early T5 files hold and no network reads.
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_UNUSED = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'


def name_of(path: str) -> str:
  """'encoder/layers_0/attention/query/kernel' ->
  'encoder.block.0.layer.0.SelfAttention.q.weight'."""
  if path in _WHOLE:
    return _WHOLE[path]
  match = re.fullmatch(r'(encoder|decoder)/layers_(\d+)/(\w+)/(?:(\w+)/kernel|scale)', path)
  if not match or f'{match[1]}/{match[3]}' not in _PARTS:
    raise ValueError(f'{path} is no parameter of T5.')
  side, layer, part, kernel = match.groups()
  parts = [side, 'block', layer, _PARTS[f'{side}/{part}']]
  return '.'.join(parts + ([_KERNELS.get(kernel, kernel)] if kernel else []) + ['weight'])


def _is_transposed(path: str) -> bool:
  return path.endswith(('/kernel', '/rel_embedding'))


def is_folder(folder: pathlib.Path) -> bool:
  """Whether this is a Hugging Face folder, readable or not."""
  return (folder / 'config.json').is_file()


def open_folder(folder: str | os.PathLike, config: T5Config | None = None
                ) -> tuple[T5Config, dict[str, StoredLeaf]]:
  """(the network, {canonical path: leaf}); reads headers only.

  `config` overrides config.json. Otherwise the embedding's rows are the file's, and the output
  layer is tied exactly where the file has no lm_head.weight of its own: transformers 5 writes
  `tie_word_embeddings: true` for every T5. A tensor of unknown name stands under that name.
  """
  folder = pathlib.Path(folder)
  tensors = {name: _leaf(header, name) for header in _headers(folder) for name in header.tensors}
  tensors.pop(_UNUSED, None)
  copies = [tensors.pop(name) for name in _COPIES if name in tensors]
  if copies:
    tensors.setdefault('shared.weight', copies[0])
  if config is None:
    config, _ = hf_config.read_config(folder)
    shared, head = tensors.get('shared.weight'), tensors.get('lm_head.weight')
    if shared and len(shared.shape) == 2:
      config = dataclasses.replace(config, vocab_size=shared.shape[0])
    if head and config.logits_via_embedding and not _is_same(shared, head):
      config = dataclasses.replace(config, logits_via_embedding=False)
  if config.logits_via_embedding and _is_same(
      tensors.get('shared.weight'), tensors.get('lm_head.weight')):
    del tensors['lm_head.weight']
  paths = {name_of(path): path for path in parameter_specs(config)}
  return config, {paths.get(name, name): _canonical(leaf, paths.get(name, name))
                  for name, leaf in tensors.items()}


def _headers(folder: pathlib.Path) -> list[safetensors_file.Header]:
  if (folder / FILE).is_file():
    return [safetensors_file.read_header(folder / FILE)]
  if not (folder / INDEX).is_file():
    hint = ('' if not list(folder.glob('pytorch_model*.bin')) else ' Its pytorch_model.bin is a '
            'pickle, which could run code: convert it with transformers, '
            'save_pretrained(folder, safe_serialization=True).')
    raise ValueError(f'{folder} has no {FILE} and no {INDEX}.{hint}')
  weights = hf_config.read_json(folder / INDEX).get('weight_map')
  if not isinstance(weights, dict) or not all(
      isinstance(name, str) and name == os.path.basename(name) for name in weights.values()):
    raise ValueError(f'{folder / INDEX} should map each tensor, in weight_map, to a file there.')
  absent = sorted(name for name in set(weights.values()) if not (folder / name).is_file())
  if absent:
    lost = sorted(name for name, file in weights.items() if file in absent)
    raise ValueError(f'{folder} lacks {", ".join(absent)}, which should hold {", ".join(lost)}.')
  return [safetensors_file.read_header(folder / name) for name in sorted(set(weights.values()))]


def _leaf(header: safetensors_file.Header, name: str) -> StoredLeaf:
  entry = header.tensors[name]
  return StoredLeaf(name, entry.shape, entry.dtype, lambda index: header.tensor(name)[index],
                    header.problem(name))


def _canonical(leaf: StoredLeaf, path: str) -> StoredLeaf:
  """The same tensor, seen transposed where T5X has it so."""
  if not _is_transposed(path):
    return leaf
  return dataclasses.replace(leaf, shape=leaf.shape[::-1],
                             read=lambda index: leaf.read(index[::-1]).T)


def _is_same(shared: StoredLeaf | None, head: StoredLeaf | None, rows: int = 4096) -> bool:
  """Whether the output layer is a mere copy of the embedding; stops at the first difference."""
  if not (shared and head) or shared.problem or head.problem or len(shared.shape) != 2:
    return False
  if (shared.shape, shared.dtype) != (head.shape, head.dtype):
    return False
  parts = [(slice(i, i + rows), slice(None)) for i in range(0, shared.shape[0], rows)]
  return all(np.array_equal(shared.read(part), head.read(part)) for part in parts)


def write(folder: str | os.PathLike, config: T5Config, params: PyTree, *, vocabulary: Any = None,
          replace: bool = False, shard_bytes: int = SHARD_BYTES):
  """Writes a folder that transformers and `open_folder` read, atomically, leaf by leaf.

  Leaves keep their dtype. `vocabulary` (anything with `file` and `extra_ids`) is copied as
  spiece.model. More than `shard_bytes` go into several files with an index. Raises ValueError if
  the folder exists, unless told to `replace` it.
  """
  leaves = param_paths.flatten(params)
  specs = parameter_specs(config)
  if leaves.keys() != specs.keys():
    raise ValueError('The parameters are not those of the network; only in one of the two: '
                     f'{", ".join(sorted(leaves.keys() ^ specs.keys()))}.')
  paths = {name_of(path): path for path in leaves}
  tensors = {}
  for name, path in sorted(paths.items()):
    shape = tuple(leaves[path].shape)
    if shape != specs[path].shape:
      raise ValueError(f'{path} is {list(shape)}, expected {list(specs[path].shape)}.')
    tensors[name] = (jnp.dtype(leaves[path].dtype).name,
                     shape[::-1] if _is_transposed(path) else shape)

  def get(name: str) -> np.ndarray:
    array = to_host(paths[name], leaves[paths[name]])
    return array.T if _is_transposed(paths[name]) else array

  files = _assign(tensors, shard_bytes)
  with atomic_folder(folder, replace) as temporary:
    for file, names in files.items():
      safetensors_file.write(temporary / file, {name: tensors[name] for name in names}, get,
                             {'format': 'pt'})
    if len(files) > 1:
      index = {'metadata': {'total_size': sum(map(_num_bytes, tensors.values()))},
               'weight_map': {name: file for file, names in files.items() for name in names}}
      (temporary / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
    hf_config.write_beside(temporary, config, tensors['shared.weight'][0], vocabulary)


def _num_bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
  return int(np.prod(tensor[1])) * jnp.dtype(tensor[0]).itemsize


def _assign(tensors: dict[str, tuple[str, tuple[int, ...]]], limit: int) -> dict[str, list[str]]:
  """{file: names}, each file filled up to `limit` bytes (a larger tensor has its own)."""
  groups: list[list[str]] = [[]]
  filled = 0
  for name, tensor in tensors.items():
    if groups[-1] and filled + _num_bytes(tensor) > limit:
      groups.append([])
      filled = 0
    groups[-1].append(name)
    filled += _num_bytes(tensor)
  if len(groups) == 1:
    return {FILE: groups[0]}
  return {f'model-{i:05d}-of-{len(groups):05d}.safetensors': group
          for i, group in enumerate(groups, start=1)}

"""Hugging Face folders: config.json, model.safetensors (or its shards) and the vocabulary.

What is particular to one kind of network stands in its family (`hf_families`).
"""

import functools
import math
import os
import pathlib
from typing import Any

import jax.numpy as jnp

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import hf_config, hf_families, safetensors_file
from prompt_tuning_jax.checkpoints.atomic_write import atomic_folder
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.checkpoints.hf_family import Tensor
from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.types import PyTree

FILE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
SHARD_BYTES = 5 * 10 ** 9
END = 'eos_token_id'  # of config.json; a GPT-2's row 0 is that token's


def is_folder(folder: pathlib.Path) -> bool:
  """Whether this is a Hugging Face folder, readable or not."""
  return (folder / 'config.json').is_file()


def open_folder(folder: str | os.PathLike,
                config: Any = None) -> tuple[Any, dict[str, StoredLeaf]]:
  """(the network, {canonical path: leaf}); reads headers only.

  `config` overrides config.json; otherwise the embedding's rows are the file's. A tensor of unknown
  name stands under that name.
  """
  folder = pathlib.Path(folder)
  tensors, headers = {}, _headers(folder)
  for header in headers:
    if twice := sorted(tensors.keys() & header.tensors.keys()):
      raise ValueError(f'{header.path} holds {twice[0]}, which another file of {folder} holds too: '
                       'delete the one that does not belong to this model.')
    tensors |= {name: _leaf(header, name) for name in header.tensors}
  described, is_given = hf_config.read_json(folder / 'config.json'), config is not None
  for header in headers:
    if header.metadata.get(END, str(described.get(END))) != str(described.get(END)):
      raise ValueError(f'{folder / "config.json"} has {END} {described.get(END)!r}, but was '
                       f'written with {header.metadata[END]!r}.')
  if not is_given:
    config = hf_families.read_config(folder)
  family = hf_families.of_configuration(config)
  return family.canonical(tensors, described, config, is_given)


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
      isinstance(name, str) and name == os.path.basename(name) and (tensor + name).isprintable()
      for tensor, name in weights.items()):
    raise ValueError(f'{folder / INDEX} should map each tensor, in weight_map, to a file there.')
  absent = sorted(name for name in set(weights.values()) if not (folder / name).is_file())
  if absent:
    lost = sorted(name for name, file in weights.items() if file in absent)
    raise ValueError(f'{folder} lacks {", ".join(absent)}, which should hold {", ".join(lost)}.')
  return [safetensors_file.read_header(folder / name) for name in sorted(set(weights.values()))]


def _leaf(header: safetensors_file.Header, name: str) -> StoredLeaf:
  entry = header.tensors[name]
  return StoredLeaf(name, entry.shape, entry.dtype, lambda index: header.tensor(name)[index],
                    header.problem(name), functools.cache(lambda: header.check(name)))


def write(folder: str | os.PathLike, config: Any, params: PyTree, *,
          vocabulary: VocabularyFile | None = None, replace: bool = False,
          shard_bytes: int = SHARD_BYTES):
  """Writes a folder that transformers and `open_folder` read, atomically, leaf by leaf.

  Leaves keep their dtype. The files of `vocabulary` are copied. More than `shard_bytes` go into
  several files with an index. Raises ValueError if the folder exists, unless told to `replace` it,
  and for a network that Hugging Face has no name for.
  """
  leaves = param_paths.flatten(params)
  specs = parameter_specs(config)
  if leaves.keys() != specs.keys():
    raise ValueError('The parameters are not those of the network; only in one of the two: '
                     f'{", ".join(sorted(leaves.keys() ^ specs.keys()))}.')
  for path, leaf in leaves.items():
    if tuple(leaf.shape) != specs[path].shape:
      raise ValueError(f'{path} is {list(leaf.shape)}, expected {list(specs[path].shape)}.')
  family = hf_families.of_configuration(config)
  described = family.config_json(config, leaves, vocabulary)
  tensors = dict(sorted(family.tensors(leaves).items()))
  files = _assign(tensors, shard_bytes)
  metadata = {'format': 'pt', END: str(described.get(END))}
  with atomic_folder(folder, replace) as temporary:
    for file, names in files.items():
      safetensors_file.write(
          temporary / file, {name: (tensors[name].dtype, tensors[name].shape) for name in names},
          lambda name: tensors[name].get(), metadata)
    if len(files) > 1:
      index = {'metadata': {'total_size': sum(map(_num_bytes, tensors.values()))},
               'weight_map': {name: file for file, names in files.items() for name in names}}
      hf_config.write_json(temporary / INDEX, index)
    hf_config.write_json(temporary / 'config.json', described)
    if vocabulary is not None:
      vocabulary.write(temporary)


def _num_bytes(tensor: Tensor) -> int:
  return math.prod(tensor.shape) * jnp.dtype(tensor.dtype).itemsize


def _assign(tensors: dict[str, Tensor], limit: int) -> dict[str, list[str]]:
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

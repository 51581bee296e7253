"""A base with a prompt file, ready to answer: what eval, infer and score start from."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks import layers
from prompt_tuning_jax.networks.parameters import logical_axes
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts import adapters, prefix
from prompt_tuning_jax.prompts.places import layers_at
from prompt_tuning_jax.prompts.soft_prompt import LayeredPrompt, SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.prompts.weight_changes import combined
from prompt_tuning_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedBase:
  """A predictor with its parameters, vocabulary and the prompt's metadata ({} without one)."""

  predictor: Predictor
  params: PyTree
  vocabulary: Vocabulary
  metadata: dict[str, Any]

  def tokens(self, place: str, row: dict[str, Any], name: str,
             max_length: int | None = None) -> np.ndarray:
    """A row's text `{name}s`, or its ids `{name}_tokens`, as ids ending in EOS: [n] int32.

    Ids that are given are taken as they are: whoever gives them writes the end-of-sequence id.
    `place` says in an error where the row stands.
    """
    ids, text = row.get(f'{name}_tokens'), row.get(f'{name}s')
    if ids is not None:
      size = self.vocabulary.size
      if (not isinstance(ids, list) or not ids
          or not all(type(i) is int and 0 < i < size for i in ids)):
        raise ValueError(f'{place}: {name}_tokens should be a list of ids from 1 to {size - 1}, '
                         f'got {str(ids)[:40]}.')
      return np.asarray(ids[:max_length], np.int32)
    if not isinstance(text, str):
      raise ValueError(f'{place}: expected text in "{name}s" or ids in "{name}_tokens", got the '
                       f'fields {sorted(row)}.')
    ids = self.vocabulary.encode(text)
    kept = ids if max_length is None else ids[:max_length - 1]
    return np.asarray([*kept, self.vocabulary.eos_id], np.int32)


def load(base: str, prompt: str | None = None, *, network: Any = None,
         vocabulary_file: str | None = None, dtype: str = 'float32', batch_size: int = 32,
         max_decode_length: int = 64) -> PromptedBase:
  """Reads base and prompt, and checks that they belong together (ValueError if not).

  Every device has a copy of the base. `batch_size` is rounded up to a multiple of the devices.
  """
  file = prompt_file.load(prompt) if prompt else None
  partitioner = Partitioner()
  batch_size += -batch_size % partitioner.mesh.size
  loaded = base_checkpoint.load_base(base, config=network, vocabulary_file=vocabulary_file,
                                     dtype=dtype,
                                     sharding_for=partitioner.sharding_for(logical_axes))
  if loaded.vocabulary is None:
    raise ValueError(f'The base {base} brings no vocabulary: give its file with --vocabulary.')
  vocabulary = Vocabulary(loaded.vocabulary.file, loaded.vocabulary.extra_ids)
  config = dataclasses.replace(loaded.config, dtype=dtype)
  modules, virtual, params, metadata = {}, None, loaded.params, {}
  if file:
    prompt_file.check(file, loaded)
    metadata = file.metadata
    modules, virtual = _parts(file, config)
    params = _with_leaves(file, params)
  predictor = Predictor(PromptedModel(config.network(), **modules), vocabulary, virtual,
                        batch_size, max_decode_length, partitioner)
  return PromptedBase(predictor, params, vocabulary, metadata)


def _parts(file: prompt_file.PromptFile,
           config: Any) -> tuple[dict[str, nn.Module], VirtualTokens | None]:
  """The modules that own a file's leaves, and the ids of its prompt."""
  modules, virtual = {}, None
  if (rows := file.params.get(prompt_file.EMBEDDING)) is not None:
    modules['prompt'] = SoftPrompt(len(rows), config.emb_dim)
  elif (rows := file.params.get(prompt_file.DEEP_EMBEDDING)) is not None:
    modules['prompt'] = LayeredPrompt(config.prompted_layers, rows.shape[1], config.emb_dim)
  if rows is not None:
    virtual = VirtualTokens(config.vocab_size, rows.shape[-2],
                            file.metadata.get('placement', 'before'))
  if prefixes := file.under('prefix'):
    length = len(next(iter(prefixes.values()))[0, 0])
    modules['prefix'] = prefix.DirectPrefix(length, layers_at(prefixes, config.attentions),
                                            config.num_heads, config.head_dim)
  if leaves := file.under('adapter'):
    modules['adapter'] = _adapters(leaves, file.metadata.get('activation', 'gelu'), config)
  expected = {}
  for name, module in modules.items():
    leaves = jax.eval_shape(module.init, jax.random.key(0))['params']
    expected.update(param_paths.flatten({name: leaves}))
  expected = {path: tuple(leaf.shape) for path, leaf in expected.items()}
  found = {path: leaf.shape for path, leaf in file.params.items()
           if path.partition('/')[0] in modules}
  if found != expected:
    raise ValueError(f'The prompt file holds {found}, but this base takes {expected}.')
  return modules, virtual


def _adapters(leaves: Mapping[str, Array], activation: str,
              config: Any) -> adapters.BottleneckAdapters:
  """The module of a file's adapters {PLACE/NAME: leaf}; their width is that of any of them."""
  if activation not in layers.ACTIVATIONS:
    raise ValueError(f'The adapters have the activation {activation!r}; this version knows '
                     f'{tuple(layers.ACTIVATIONS)}.')
  width = next((leaf.shape[-1] for path, leaf in leaves.items()
                if path.endswith('/down') and leaf.ndim), 0)
  places = {path.partition('/')[0] for path in leaves}
  return adapters.BottleneckAdapters(width, config.emb_dim, layers_at(places, config.sublayers),
                                     activation)


def _with_leaves(file: prompt_file.PromptFile, params: PyTree) -> PyTree:
  """The base's parameters with a file's: leaves beside them, changes of them, or in their place."""
  leaves, taken = param_paths.flatten(params), {}
  for path, leaf in file.params.items():
    if path in leaves:
      if leaf.shape != leaves[path].shape:
        raise ValueError(f'The prompt file holds {path} {list(leaf.shape)}, but in this base it is '
                         f'{list(leaves[path].shape)}.')
      leaf = jax.device_put(leaf.astype(leaves[path].dtype), leaves.pop(path).sharding)
    taken[path] = leaf
  return combined(param_paths.unflatten(taken), param_paths.unflatten(leaves))

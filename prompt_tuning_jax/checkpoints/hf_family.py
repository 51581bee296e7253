"""What tells one kind of Hugging Face folder from another, and how config.json is read."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf, to_host
from prompt_tuning_jax.types import Array, Shape

MOST_LAYERS = 256  # more are a mistake, which would take minutes to find out
# What BERT and BART call the activations; their GELU is exact.
ACTIVATIONS = {'gelu': 'gelu_exact', 'gelu_new': 'gelu', 'relu': 'relu', 'silu': 'silu'}
Json = dict[str, Any]
Leaves = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor to be written; `get` makes it when its turn has come."""

  dtype: str
  shape: Shape
  get: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of network, as transformers stores it.

  Args:
    model_type: its name in config.json.
    configuration: the class of its configurations here.
    vocabulary_files: names that its vocabulary may have in a folder, the best first.
    extra_ids: how many sentinels it has where tokenizer_config.json does not tell.
    read_config: (path, config.json) -> configuration, or ValueError; the number of rows is that
      of config.json, and the weights know better (`canonical`).
    config_json: (configuration, {path: leaf}, vocabulary or None) -> config.json, or ValueError
      for a network that the family has no name for, which `fits` tells beforehand.
    name_of: canonical path of a parameter -> name of the tensor that holds it.
    canonical: ({name: tensor of the file}, config.json, configuration, whether it was given in
      place of config.json's) -> (configuration, {canonical path: leaf}). A tensor of unknown name
      keeps it.
    tensors: {path: leaf} -> {name: what is written}.
  """

  model_type: str
  configuration: type
  vocabulary_files: tuple[str, ...]
  extra_ids: int
  read_config: Callable[[pathlib.Path, Json], Any]
  config_json: Callable[[Any, Leaves, Any], Json]
  fits: Callable[[Any], bool]
  name_of: Callable[[str], str]
  canonical: Callable[[dict[str, StoredLeaf], Json, Any, bool], tuple[Any, dict[str, StoredLeaf]]]
  tensors: Callable[[Leaves], dict[str, Tensor]]


def tensor(path: str, leaf: Array,
           view: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> Tensor:
  """What is written for a parameter: `view` of it, in its dtype."""
  shape = view(np.broadcast_to(np.float32(0), leaf.shape)).shape
  return Tensor(jnp.dtype(leaf.dtype).name, shape, lambda: view(to_host(path, leaf)))


def activation(path: pathlib.Path, config: Json, key: str) -> tuple[str]:
  """This package's name of the activation that config.json names; GELU where it names none."""
  name = config.get(key, 'gelu')
  if not isinstance(name, str) or name not in ACTIVATIONS:
    raise ValueError(f'{path}: {key} is {name!r}, expected one of {sorted(ACTIVATIONS)}.')
  return (ACTIVATIONS[name],)


def is_post_norm(config: Any) -> bool:
  """Whether BERT or BART could be of this shape."""
  return (config.emb_dim == config.num_heads * config.head_dim
          and len(config.mlp_activations) == 1
          and config.mlp_activations[0] in ACTIVATIONS.values())


def activation_name(config: Any) -> str:
  """What config.json calls the activation; ValueError for a network that `is_post_norm` is not."""
  if not is_post_norm(config):
    raise ValueError(
        'Hugging Face has no such network: expected emb_dim = num_heads * head_dim and one of the '
        f'activations {sorted(ACTIVATIONS.values())}, got {config.emb_dim}, {config.num_heads} * '
        f'{config.head_dim} and {config.mlp_activations}.')
  return next(theirs for theirs, ours in ACTIVATIONS.items() if (ours,) == config.mlp_activations)


def width_and_heads(path: pathlib.Path, config: Json, width: tuple[str, int],
                    heads: tuple[str, int]) -> dict[str, int]:
  """emb_dim, num_heads and head_dim, from config.json's names and defaults of the first two."""
  emb_dim, num_heads = positive(path, config, *width), positive(path, config, *heads)
  if emb_dim % num_heads:
    raise ValueError(f'{path}: {width[0]} is {emb_dim}, which {heads[0]}, {num_heads}, does not '
                     'divide.')
  return {'emb_dim': emb_dim, 'num_heads': num_heads, 'head_dim': emb_dim // num_heads}


def positive(path: pathlib.Path, config: Json, key: str, default: int,
             most: int = 2 ** 31 - 1) -> int:
  """A whole number of config.json; `default` where it has none or null."""
  value = config.get(key)
  value = default if value is None else value
  if type(value) is not int or not 0 < value <= most:
    raise ValueError(f'{path}: {key} should be a whole number from 1 to {most}, got {value!r}.')
  return value


def rate(path: pathlib.Path, config: Json, key: str) -> float:
  """A rate of dropout; 0.1 where config.json has none."""
  value = config.get(key, 0.1)
  if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
    raise ValueError(f'{path}: {key} should be in [0, 1), got {value!r}.')
  return float(value)


def expect(path: pathlib.Path, config: Json, **values: Any):
  """Raises ValueError where config.json has another value than the only one that is known here."""
  for key, value in values.items():
    if config.get(key, value) != value:
      raise ValueError(f'{path}: {key} is {config[key]!r}, expected {value!r}: this package has '
                       'no other such network.')

"""What tells one kind of Hugging Face folder from another, and how config.json is read."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf
from prompt_tuning_jax.types import Array, Shape

MOST_LAYERS = 256  # more are a mistake, which would take minutes to find out
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

"""Which parameters a network has: their paths, shapes and logical axes.

A network's configuration is all that is asked: `config.network()` is its module.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.networks import bart, bert, gpt, int8, layer_stack, t5
from prompt_tuning_jax.types import DType, PyTree

# Between them, networks of one layer that have every parameter that any network has.
_SMALLEST = (
    t5.T5Config(8, 2, 1, 1, 1, 2, 2),
    t5.T5Config(8, 2, 1, 1, 1, 2, 2, mlp_activations=('relu',)),
    gpt.GPTConfig(8, 2, 1, 1, 2, 2, max_positions=4, use_bias=True),
    gpt.GPTConfig(8, 2, 1, 1, 2, 2, mlp_activations=('relu',), max_positions=4, use_bias=True),
    bart.BartConfig(8, 2, 1, 1, 1, 2, 2, max_positions=4),
    bert.BertConfig(8, 2, 1, 1, 2, 2, max_positions=4))


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
  """Shape of a parameter and the logical name of each of its axes."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]


@functools.lru_cache(maxsize=32)
def parameter_specs(config: Any) -> dict[str, ParameterSpec]:
  """Every parameter of the network by its path in a file, whether or not its layers are scanned;
  nothing is allocated."""
  config = dataclasses.replace(config, scan_layers=False)
  token = jnp.ones((1, 1), jnp.int32)
  init = functools.partial(config.network().init, enable_dropout=False)
  variables = jax.eval_shape(init, jax.random.key(0), token, token, token)
  axes = partitioning.get_axis_names(variables['params_axes'])
  axes = param_paths.flatten(axes)
  return {path: ParameterSpec(tuple(leaf.shape), tuple(axes[path]))
          for path, leaf in param_paths.flatten(variables['params']).items()}


def shapes(config: Any, dtype: DType = 'float32') -> PyTree:
  """The parameters as the network takes them, as ShapeDtypeStructs.

  `dtype` 'int8' is that of kernels and the embedding table (`networks.int8`), the rest is float32.
  """
  def leaf(path: str, of: list[str]) -> Any:
    shape = specs[of[0]].shape
    shape = shape if path in specs else (len(of), *shape)
    if dtype != 'int8' or not int8.is_small(path):
      return jax.ShapeDtypeStruct(shape, jnp.float32 if dtype == 'int8' else dtype)
    exchanged = int8.is_kernel(path)
    shape = int8.exchange(shape) if exchanged else shape
    return int8.Quantized(jax.ShapeDtypeStruct(shape, jnp.int8),
                          jax.ShapeDtypeStruct((*shape[:-1], 1), jnp.float32), exchanged)

  specs = parameter_specs(config)
  paths = layer_stack.grouped(specs) if config.scan_layers else {path: [path] for path in specs}
  return param_paths.unflatten({path: leaf(path, of) for path, of in paths.items()})


def logical_axes(path: str) -> tuple[str, ...] | None:
  """The logical axes of a parameter of any network; None for a path that none has."""
  one = re.sub(r'/layers(_\d+)?/', '/layers_0/', path)
  for config in _SMALLEST:
    spec = parameter_specs(config).get(one)
    if spec:
      return ('layers', *spec.axes) if '/layers/' in path else spec.axes
  return None

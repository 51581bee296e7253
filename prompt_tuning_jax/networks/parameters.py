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
from prompt_tuning_jax.networks import gpt, t5

# Between them, networks of one layer that have every parameter that any network has.
_SMALLEST = (
    t5.T5Config(8, 2, 1, 1, 1, 2, 2),
    t5.T5Config(8, 2, 1, 1, 1, 2, 2, mlp_activations=('relu',)),
    gpt.GPTConfig(8, 2, 1, 1, 2, 2, max_positions=4, use_bias=True),
    gpt.GPTConfig(8, 2, 1, 1, 2, 2, mlp_activations=('relu',), max_positions=4, use_bias=True))


@dataclasses.dataclass(frozen=True)
class ParameterSpec:
  """Shape of a parameter and the logical name of each of its axes."""

  shape: tuple[int, ...]
  axes: tuple[str, ...]


@functools.lru_cache(maxsize=32)
def parameter_specs(config: Any) -> dict[str, ParameterSpec]:
  """Every parameter of the network by its path; nothing is allocated."""
  token = jnp.ones((1, 1), jnp.int32)
  init = functools.partial(config.network().init, enable_dropout=False)
  variables = jax.eval_shape(init, jax.random.key(0), token, token, token)
  axes = partitioning.get_axis_names(variables['params_axes'])
  axes = param_paths.flatten(axes)
  return {path: ParameterSpec(tuple(leaf.shape), tuple(axes[path]))
          for path, leaf in param_paths.flatten(variables['params']).items()}


def logical_axes(path: str) -> tuple[str, ...] | None:
  """The logical axes of a parameter of any network; None for a path that none has."""
  path = re.sub(r'/layers_\d+/', '/layers_0/', path)
  for config in _SMALLEST:
    spec = parameter_specs(config).get(path)
    if spec:
      return spec.axes
  return None

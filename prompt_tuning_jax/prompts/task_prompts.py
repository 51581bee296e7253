"""One prompt for each of several tasks, of rows that are its own and rows that all tasks share.

A way to combine the two says how many rows of each a prompt of P rows takes (`lengths`), where they
start (`start`, from initial rows for both, own: [K, P, D]), and what they make (the call).
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Separate:
  """Nothing is shared: K prompts that only learn side by side."""

  def lengths(self, length: int) -> tuple[int, int]:
    return 0, length

  def start(self, shared: Array, own: Array) -> tuple[Array, Array]:
    return shared, own

  def __call__(self, shared: Array, own: Array) -> Array:
    return own


@dataclasses.dataclass(frozen=True)
class Sum:
  """A task's prompt is what all share plus what is its own; it starts as what they share."""

  def lengths(self, length: int) -> tuple[int, int]:
    return length, length

  def start(self, shared: Array, own: Array) -> tuple[Array, Array]:
    return shared, jnp.zeros_like(own)

  def __call__(self, shared: Array, own: Array) -> Array:
    return shared + own


@dataclasses.dataclass(frozen=True)
class Product:
  """A task's prompt is what all share times what is its own, element by element (as in Wang et al.
  2023, equation 1, without its low rank); it starts as what they share."""

  def lengths(self, length: int) -> tuple[int, int]:
    return length, length

  def start(self, shared: Array, own: Array) -> tuple[Array, Array]:
    return shared, jnp.ones_like(own)

  def __call__(self, shared: Array, own: Array) -> Array:
    return shared * own


@dataclasses.dataclass(frozen=True)
class Concatenation:
  """A task's prompt is `shared` rows that all share, then its own."""

  shared: int

  def __post_init__(self):
    if type(self.shared) is not int or self.shared < 1:
      raise ValueError(f'shared must be a whole number of rows from 1, got {self.shared!r}.')

  def lengths(self, length: int) -> tuple[int, int]:
    if self.shared >= length:
      raise ValueError(f'A prompt of PROMPT_LENGTH={length} cannot share {self.shared} rows and '
                       'have some of its own.')
    return self.shared, length - self.shared

  def start(self, shared: Array, own: Array) -> tuple[Array, Array]:
    return shared, own[:, len(shared):]

  def __call__(self, shared: Array, own: Array) -> Array:
    repeated = jnp.broadcast_to(shared, (len(own), *shared.shape))
    return jnp.concatenate([repeated, own], axis=1)


Combine = Separate | Sum | Product | Concatenation


class TaskPrompts(nn.Module):
  """K prompts [K, P, D] from parameters `shared` [S, D] (if S > 0) and `own` [K, P or P - S, D].

  Args:
    combine: (shared [S, D], own [K, …, D]) -> [K, P, D].
    shared, own: shapes of the two.
  """

  combine: Callable[[Array, Array], Array]
  shared: tuple[int, int]
  own: tuple[int, int, int]

  @nn.compact
  def __call__(self) -> Array:
    """-> [K P, D] float32: the prompts one after another, as `VirtualTokens.offset` counts."""
    shared = jnp.zeros(self.shared)
    if self.shared[0]:
      shared = partitioning.param_with_axes('shared', nn.initializers.zeros, self.shared,
                                            jnp.float32, axes=('prompt', 'embed'))
    own = partitioning.param_with_axes('own', nn.initializers.zeros, self.own, jnp.float32,
                                       axes=('tasks', 'prompt', 'embed'))
    return self.combine(shared, own).reshape(-1, self.own[-1])

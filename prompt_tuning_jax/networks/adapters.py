"""Small networks behind every sub-layer of a frozen network (Houlsby et al. 2019, section 2)."""

from collections.abc import Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.networks import layers
from prompt_tuning_jax.types import Array

LEAVES = ('down', 'down_bias', 'up', 'up_bias')


@flax.struct.dataclass
class Adapters:
  """K adapters for each of the sub-layers of some places; none by default.

  An adapter stands behind a sub-layer's projection back to D, before it is added to what went
  into the sub-layer: x + activation(x W_down + b_down) W_up + b_up.

  Attributes:
    places: {place: {'down': [L, K, D, r], 'down_bias': [L, K, r], 'up': [L, K, r, D], 'up_bias':
      [L, K, D]}}, a place being such as 'encoder_mlp' (a network's configuration has them as
      `sublayers`) and L its layers.
    rows: [B] int32, the adapter of each example of a batch; None gives all the first.
    activation: a name among `layers.ACTIVATIONS`.
  """

  places: Mapping[str, Mapping[str, Array]] = flax.struct.field(default_factory=dict)
  rows: Array | None = None
  activation: str = flax.struct.field(pytree_node=False, default='gelu')

  def at(self, place: str, layer: int) -> Callable[[Array], Array]:
    """What one sub-layer's output [B, T, D] goes through: itself, where the place has none."""
    if place not in self.places:
      return _unchanged
    of_layer = {name: self.places[place][name][layer] for name in LEAVES}
    of_rows = jax.tree.map(lambda leaf: leaf[:1] if self.rows is None else leaf[self.rows],
                           of_layer)
    return LayerAdapter(**of_rows, activation=self.activation)


@flax.struct.dataclass
class LayerAdapter:
  """One sub-layer's adapter: down [1 or B, D, r], up [1 or B, r, D], biases [1 or B, r or D]."""

  down: Array
  down_bias: Array
  up: Array
  up_bias: Array
  activation: str = flax.struct.field(pytree_node=False, default='gelu')

  def __call__(self, x: Array) -> Array:
    """[B, T, D] -> [B, T, D], in the dtype of `x`."""
    hidden = _affine(x, self.down, self.down_bias)
    return x + _affine(layers.ACTIVATIONS[self.activation](hidden), self.up, self.up_bias)


def _unchanged(x: Array) -> Array:
  return x


def _affine(x: Array, kernel: Array, bias: Array) -> Array:
  """x: [B, T, M], kernel: [1 or B, M, M'], bias: [1 or B, M'] -> [B, T, M']."""
  return jnp.matmul(x, kernel.astype(x.dtype)) + bias[:, None].astype(x.dtype)

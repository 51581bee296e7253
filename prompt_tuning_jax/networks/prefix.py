"""Keys and values that every attention appends to its own (Li & Liang 2021, section 4.2)."""

from collections.abc import Mapping

import flax.struct
import jax.numpy as jnp

from prompt_tuning_jax.types import Array

PLACES = ('encoder', 'decoder', 'cross')


@flax.struct.dataclass
class Prefix:
  """K prefixes for encoder self-attention, decoder self-attention and cross-attention.

  A place that is None has no prefix. A prefix stands before the keys and is always visible; its
  relative-position bias is 0, and it shifts no token's position.

  Attributes:
    encoder, decoder, cross: [L, 2, K, P, N, H] keys and values of every layer of that stack.
    rows: [B] int32, the prefix of each example of a batch; None gives all the first.
    lengths: {place: [K] int32}, how many of its P positions each prefix has; a place that is not
      named has all.
  """

  encoder: Array | None = None
  decoder: Array | None = None
  cross: Array | None = None
  rows: Array | None = None
  lengths: Mapping[str, Array] = flax.struct.field(default_factory=dict)

  def at(self, place: str, layer: int) -> 'LayerPrefix | None':
    """What one attention appends; None where the place has no prefix."""
    stacked = getattr(self, place)
    if stacked is None or not stacked.shape[3]:
      return None
    rows = jnp.zeros(1, jnp.int32) if self.rows is None else self.rows
    keys, values = stacked[layer, 0][rows], stacked[layer, 1][rows]
    visible = None
    if place in self.lengths:
      visible = jnp.arange(stacked.shape[3]) < self.lengths[place][rows][:, None]
    return LayerPrefix(keys, values, visible)


@flax.struct.dataclass
class LayerPrefix:
  """One attention's prefix: keys, values [1 or B, P, N, H], visible [1 or B, P] bool or None."""

  keys: Array
  values: Array
  visible: Array | None = None

  def prepend(self, key: Array, value: Array, bias: Array | None,
              mask: Array | None) -> tuple[Array, Array, Array | None, Array | None]:
    """Keys [B, N, H, S], values [B, N, S, H], bias [1 or B, N, T, S] and mask [B, 1, 1 or T, S] of
    an attention -> the same with P + S for S."""
    batch, length = key.shape[0], self.keys.shape[1]
    own = lambda x, axes: jnp.broadcast_to(
        x, (batch, *x.shape[1:])).transpose(axes).astype(key.dtype)
    key = jnp.concatenate([own(self.keys, (0, 2, 3, 1)), key], axis=-1)
    value = jnp.concatenate([own(self.values, (0, 2, 1, 3)), value], axis=-2)
    front = lambda x, fill: jnp.pad(x, ((0, 0),) * 3 + ((length, 0),), constant_values=fill)
    bias = None if bias is None else front(bias, 0)
    if mask is None and self.visible is not None:
      mask = jnp.ones((batch, 1, 1, key.shape[-1] - length), bool)
    mask = None if mask is None else front(mask, True)
    if self.visible is not None:
      shown = jnp.pad(self.visible, ((0, 0), (0, key.shape[-1] - length)), constant_values=True)
      mask &= shown[:, None, None]
    return key, value, bias, mask

"""T5's relative-position bias (Raffel et al. 2020, section 2.1)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning

from prompt_tuning_jax.types import Array, DType


def check(config: Any, bidirectional: bool) -> None:
  """Raises ValueError where a network's buckets and their distance leave nothing to grow over."""
  least = 4 if bidirectional else 2
  buckets, farthest = config.relative_attention_num_buckets, config.relative_attention_max_distance
  if buckets < least or farthest <= buckets // 2:
    raise ValueError(f'relative_attention_num_buckets must be at least {least}, and '
                     'relative_attention_max_distance more than half of it, got '
                     f'{buckets} and {farthest}.')


def bucket(relative_position: Array, *, bidirectional: bool, num_buckets: int,
           max_distance: int) -> Array:
  """Bucket number of each distance (key position minus query position).

  Half of the buckets are exact distances, the other half grow logarithmically up to
  `max_distance`; all farther distances share the last. Bidirectional attention spends one half of
  the buckets on keys after the query.

  Args:
    relative_position: [..., T, S] int32, in tokens.

  Returns:
    [..., T, S] int32 in [0, num_buckets).
  """
  offset = jnp.zeros_like(relative_position)
  if bidirectional:
    num_buckets //= 2
    offset = num_buckets * (relative_position > 0)
    distance = jnp.abs(relative_position)
  else:
    distance = jnp.maximum(-relative_position, 0)
  exact = num_buckets // 2
  growth = (num_buckets - exact) / np.log(max_distance / exact)
  # The epsilon keeps log(0) out; those distances take the exact branch.
  ratio = distance.astype(jnp.float32) / exact + np.finfo(np.float32).eps
  far = jnp.minimum(exact + (jnp.log(ratio) * growth).astype(jnp.int32), num_buckets - 1)
  return offset + jnp.where(distance < exact, distance, far)


class RelativePositionBias(nn.Module):
  """A learned number per head and bucket, added to the attention logits."""

  num_heads: int
  num_buckets: int
  max_distance: int
  bidirectional: bool
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, query_positions: Array, key_positions: Array) -> Array:
    """Positions of all rows, [T] and [S] int -> bias [1, N, T, S]; of each row, [B, T] and [B, S]
    int -> [B, N, T, S]."""
    table = partitioning.param_with_axes(
        'rel_embedding', nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
        (self.num_heads, self.num_buckets), jnp.float32, axes=('heads', 'relpos_buckets'))
    buckets = bucket(
        key_positions[..., None, :] - query_positions[..., :, None],
        bidirectional=self.bidirectional, num_buckets=self.num_buckets,
        max_distance=self.max_distance)
    bias = jnp.take(table.astype(self.dtype), buckets, axis=1)
    return bias[None] if bias.ndim == 3 else bias.swapaxes(0, 1)

"""Adapters: trained bottlenecks behind the sub-layers of a frozen network (Houlsby et al. 2019)."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.types import Array


class BottleneckAdapters(nn.Module):
  """Parameters `PLACE/{down,down_bias,up,up_bias}` float32 for the L layers of each place.

  An adapter has 2 D r + D + r of them, r being `width` and D `features`. `up` starts at 0, so the
  network starts as the base, bit for bit; the paper starts both kernels near 0.
  """

  width: int
  features: int
  num_layers: Mapping[str, int]
  activation: str = 'gelu'

  @nn.compact
  def __call__(self) -> dict[str, dict[str, Array]]:
    """-> {place: {'down': [L, D, r], 'down_bias': [L, r], 'up': [L, r, D], 'up_bias': [L, D]}}."""
    return {place: _PlaceAdapters(layers, self.width, self.features, name=place)()
            for place, layers in self.num_layers.items()}


class _PlaceAdapters(nn.Module):
  num_layers: int
  width: int
  features: int

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    sizes = {'embed': self.features, 'bottleneck': self.width}
    zeros, random = nn.initializers.zeros, nn.initializers.lecun_normal(batch_axis=0)
    leaf = lambda name, init, *axes: partitioning.param_with_axes(
        name, init, (self.num_layers, *map(sizes.get, axes)), jnp.float32, axes=('layers', *axes))
    return {'down': leaf('down', random, 'embed', 'bottleneck'),
            'down_bias': leaf('down_bias', zeros, 'bottleneck'),
            'up': leaf('up', zeros, 'bottleneck', 'embed'),
            'up_bias': leaf('up_bias', zeros, 'embed')}

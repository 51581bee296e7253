"""The prefix: trained keys and values of every layer (Li & Liang 2021, section 4)."""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.types import Array

AXES = ('layers', 'keys_values', 'prompt', 'heads', 'kv')
_INIT = nn.initializers.normal(0.02)


class DirectPrefix(nn.Module):
  """Parameters `PLACE` [L, 2, P, N, H] float32: keys and values of the L layers of each place.

  `num_layers` has a place ('encoder', 'decoder', 'cross') for each attention that gets a prefix.
  """

  length: int
  num_layers: Mapping[str, int]
  num_heads: int
  head_dim: int

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    """-> {place: [L, 2, P, N, H] float32}."""
    shape = (2, self.length, self.num_heads, self.head_dim)
    return {place: partitioning.param_with_axes(place, _INIT, (layers, *shape), jnp.float32,
                                                axes=AXES)
            for place, layers in self.num_layers.items()}


class ReparameterizedPrefix(nn.Module):
  """The same keys and values as the output of an MLP of each place (section 4.3).

  P_θ[i] = MLP(P'_θ[i]): a table P' [P, features], a tanh layer of `width`, and a linear one.
  Training moves through it steadily where the direct prefix is sensitive to rate and start; only
  its output is kept. Parameters of a place: `PLACE/embedding`, `PLACE/wi/{kernel,bias}` and
  `PLACE/wo/{kernel,bias}`.
  """

  length: int
  num_layers: Mapping[str, int]
  num_heads: int
  head_dim: int
  features: int
  width: int = 512

  @nn.compact
  def __call__(self) -> dict[str, Array]:
    """-> {place: [L, 2, P, N, H] float32}."""
    return {place: _PlaceMLP((layers, 2, self.num_heads, self.head_dim), self.length,
                             self.features, self.width, name=place)()
            for place, layers in self.num_layers.items()}


class _PlaceMLP(nn.Module):
  shape: tuple[int, int, int, int]  # L, 2, N, H
  length: int
  features: int
  width: int

  @nn.compact
  def __call__(self) -> Array:
    """-> [L, 2, P, N, H] float32."""
    table = partitioning.param_with_axes(
        'embedding', nn.initializers.normal(1.0), (self.length, self.features), jnp.float32,
        axes=('prompt', 'embed'))
    hidden = jnp.tanh(_Linear(self.width, ('embed', 'mlp'), name='wi')(table))
    out = _Linear(math.prod(self.shape), ('mlp', 'joined_kv'), name='wo')(hidden)
    layers, two, heads, dim = self.shape
    return out.reshape(self.length, layers, two, heads, dim).transpose(1, 2, 0, 3, 4)


class _Linear(nn.Module):
  features: int
  axes: tuple[str, str]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[P, M] -> [P, features]."""
    kernel = partitioning.param_with_axes(
        'kernel', nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32,
        axes=self.axes)
    bias = partitioning.param_with_axes('bias', nn.initializers.zeros, (self.features,),
                                        jnp.float32, axes=self.axes[1:])
    return x @ kernel + bias

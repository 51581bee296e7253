"""Soft prompts: a small table of extra embeddings, or one for each layer."""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.types import Array


class SoftPrompt(nn.Module):
  """`length` trainable rows of width `features` (Lester et al. 2021, section 2).

  Parameter `embedding` [P, D] float32. Values come from `prompts.initializers`, which read the
  base's embedding table; the zeros here only give the shape.
  """

  length: int
  features: int

  @nn.compact
  def __call__(self) -> Array:
    """-> [P, D] float32."""
    return partitioning.param_with_axes(
        'embedding', nn.initializers.zeros, (self.length, self.features), jnp.float32,
        axes=('prompt', 'embed'))


class LayeredPrompt(nn.Module):
  """`length` trainable rows for each of `num_layers` layers (Liu et al. 2022, "P-Tuning v2").

  Parameter `deep_embedding` [L, P, D] float32: row p of layer i is what goes into layer i at the
  prompt's position p, whatever the layer below made there. The zeros only give the shape.
  """

  num_layers: int
  length: int
  features: int

  @nn.compact
  def __call__(self) -> Array:
    """-> [L, P, D] float32."""
    return partitioning.param_with_axes(
        'deep_embedding', nn.initializers.zeros, (self.num_layers, self.length, self.features),
        jnp.float32, axes=('layers', 'prompt', 'embed'))

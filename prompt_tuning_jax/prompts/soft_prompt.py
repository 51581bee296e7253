"""The soft prompt: a small table of extra embeddings (Lester et al. 2021, section 2)."""

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.types import Array


class SoftPrompt(nn.Module):
  """`length` trainable rows of width `features`: parameter `embedding` [P, D] float32.

  Values come from `prompts.initializers`, which read the base's embedding table; the zeros here
  only give the shape.
  """

  length: int
  features: int

  @nn.compact
  def __call__(self) -> Array:
    """-> [P, D] float32."""
    return partitioning.param_with_axes(
        'embedding', nn.initializers.zeros, (self.length, self.features), jnp.float32,
        axes=('prompt', 'embed'))

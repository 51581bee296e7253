"""The layers that T5 is made of besides attention, with T5X's parameter names and axes."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.types import Array, DType, Initializer

# Gated GELU in T5 1.1 is the tanh approximation; 'linear' is the ungated half.
ACTIVATIONS = {'relu': nn.relu, 'gelu': nn.gelu, 'silu': nn.silu, 'linear': lambda x: x}
FAN_IN = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


def dropout(rate: float, broadcast: bool = True) -> nn.Dropout:
  """T5X's dropout: a feature of an example is dropped at all of its positions or at none."""
  return nn.Dropout(rate, broadcast_dims=(-2,) if broadcast else ())


class Embed(nn.Module):
  """The embedding table, followed by the rows of virtual tokens.

  This is the one place in a network that knows virtual tokens: id V + r embeds as row r of
  `virtual_embeddings`. Everything after it sees ordinary vectors.
  """

  num_embeddings: int
  features: int
  dtype: DType = jnp.float32

  def setup(self):
    self.embedding = partitioning.param_with_axes(
        'embedding', nn.initializers.normal(1.0), (self.num_embeddings, self.features),
        jnp.float32, axes=('vocab', 'embed'), module=self)

  def __call__(self, tokens: Array, virtual_embeddings: Array | None = None) -> Array:
    """tokens: [B, T] int in [0, V + R), virtual_embeddings: [R, D] or [L, R, D] -> [B, T, D].

    Of rows for every layer these are the first layer's; the others go in by `virtual`.
    """
    # An id that has no row embeds as NaN: a prompt shorter than its ids must not go unnoticed.
    words = jnp.take(self.embedding, tokens, axis=0, mode='fill').astype(self.dtype)
    return self.virtual(words, tokens, virtual_embeddings, 0)

  def virtual(self, x: Array, tokens: Array, virtual_embeddings: Array | None,
              layer: int) -> Array:
    """What goes into a layer, x: [B, T, D], with that layer's rows at the virtual tokens.

    Rows [R, D] are the first layer's alone: any other gets x as it is. Those of every layer,
    [L, R, D], replace what came out of the layer below (Liu et al. 2022, "P-Tuning v2").
    """
    if virtual_embeddings is None or virtual_embeddings.shape[-2] == 0:
      return x
    if virtual_embeddings.ndim == 2:
      if layer:
        return x
      virtual_embeddings = virtual_embeddings[None]
    row = jnp.maximum(tokens - self.num_embeddings, 0)
    virtual = jnp.take(virtual_embeddings[layer].astype(self.dtype), row, axis=0, mode='fill')
    return jnp.where((tokens >= self.num_embeddings)[..., None], virtual, x)

  def attend(self, x: Array) -> Array:
    """Logits of the tied output layer: [..., D] -> [..., V], float32."""
    return jnp.dot(x, self.embedding.astype(x.dtype).T, preferred_element_type=jnp.float32)


class Dense(nn.Module):
  """A matrix product without bias: [..., in] -> [..., features], of `out_dtype` or `dtype`."""

  features: int
  axes: tuple[str, str]
  dtype: DType = jnp.float32
  kernel_init: Initializer = FAN_IN
  out_dtype: DType | None = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = partitioning.param_with_axes(
        'kernel', self.kernel_init, (x.shape[-1], self.features), jnp.float32, axes=self.axes)
    return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype),
                   preferred_element_type=self.out_dtype)


class LayerNorm(nn.Module):
  """T5's layer norm: scaled by the root mean square, not centred, no bias (epsilon 1e-6)."""

  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """x: [..., D] -> [..., D]; the mean square is taken in float32."""
    scale = partitioning.param_with_axes(
        'scale', nn.initializers.ones, (x.shape[-1],), jnp.float32, axes=('embed',))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return (x * scale).astype(self.dtype)


class MlpBlock(nn.Module):
  """Feed-forward block; with several activations their outputs are multiplied (gated units)."""

  mlp_dim: int
  activations: Sequence[str]
  dropout_rate: float
  dtype: DType = jnp.float32

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    """x: [B, T, D] -> [B, T, D]."""
    hidden = None
    for i, name in enumerate(self.activations):
      wi = 'wi' if len(self.activations) == 1 else f'wi_{i}'
      part = ACTIVATIONS[name](Dense(self.mlp_dim, ('embed', 'mlp'), self.dtype, name=wi)(x))
      hidden = part if hidden is None else hidden * part
    hidden = dropout(self.dropout_rate)(hidden, deterministic=deterministic)
    hidden = partitioning.with_sharding_constraint(hidden, ('batch', 'length', 'mlp'))
    return Dense(x.shape[-1], ('mlp', 'embed'), self.dtype, name='wo')(hidden)

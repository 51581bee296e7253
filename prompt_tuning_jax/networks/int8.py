"""Frozen weights in eight bits: symmetric, a scale for each output of a kernel or row of a table.

Only weights are stored so; what is computed with them has the dtype of the activations. A scale
multiplies the product, not the weights, so that the compiler may turn int8 into bfloat16 as it
reads it. A weight w of an output whose largest is m becomes round(127 w / m) m / 127: at most
m / 254 off.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning
from jax.sharding import PartitionSpec

from prompt_tuning_jax.types import Array, DType, Initializer, Shape


@flax.struct.dataclass
class Quantized:
  """A leaf in the place of a kernel [in, out] or of an embedding table [V, D]: values * scale.

  Attributes:
    values: of the leaf's shape, int8.
    scale: [1, out] or [V, 1], float32. Those of scanned layers have an axis more, [L, …].
  """

  values: Array
  scale: Array

  @property
  def shape(self) -> Shape:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim

  @property
  def dtype(self) -> DType:
    """That of the weights that it stands for."""
    return self.scale.dtype

  @property
  def sharding(self) -> jax.sharding.Sharding:
    return self.values.sharding

  @property
  def T(self) -> 'Quantized':
    return Quantized(self.values.T, self.scale.T)

  def dequantized(self) -> Array:
    """The weights, float32."""
    return self.values.astype(jnp.float32) * self.scale


def reduced_axis(path: str) -> int | None:
  """The axis that shares a scale, of a parameter that is stored in eight bits; None if it is not.
  """
  if path.endswith('/kernel'):
    return -2
  return -1 if path.endswith('token_embedder/embedding') else None


def quantize(weights: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
  """Weights -> (values int8, scale float32 with size 1 at `axis`)."""
  weights = np.asarray(weights, np.float32)
  scale = np.max(np.abs(weights), axis=axis, keepdims=True) / np.float32(127)
  scale = np.where(scale > 0, scale, np.float32(1))  # of nothing but zeros
  return np.rint(weights / scale).astype(np.int8), scale


def param_with_axes(name: str, init: Initializer, shape: Shape, axes: tuple[str, ...],
                    module: nn.Module) -> Any:
  """A float32 parameter of the module, or the `Quantized` leaf that it was given in its place."""
  if not isinstance(module.get_variable('params', name), Quantized):
    return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes, module=module)
  leaf = module.param(name, init, shape, jnp.float32)
  return leaf.replace(
      values=partitioning.with_sharding_constraint(leaf.values, PartitionSpec(*axes)))


def take(table: Array | Quantized, rows: Array, dtype: DType) -> Array:
  """Rows of a table, [...] -> [..., D]; NaN where it has none."""
  if not isinstance(table, Quantized):
    return jnp.take(table, rows, axis=0, mode='fill').astype(dtype)
  return (jnp.take(table.values, rows, axis=0, mode='clip').astype(jnp.float32)
          * jnp.take(table.scale, rows, axis=0, mode='fill')).astype(dtype)


def dot(x: Array, kernel: Array | Quantized, out_dtype: DType | None = None) -> Array:
  """[..., in] @ [in, out] in the dtype of x -> [..., out] of `out_dtype`, by default the same."""
  if not isinstance(kernel, Quantized):
    return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=out_dtype)
  return _dot(x.dtype, jnp.dtype(out_dtype or x.dtype), x, kernel)


# With a derivative of its own, as JAX's would keep every kernel in the dtype of x for the backward
# pass: a second and larger copy of the model.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(dtype: jnp.dtype, out_dtype: jnp.dtype, x: Array, kernel: Quantized) -> Array:
  product = jnp.dot(x, kernel.values.astype(dtype), preferred_element_type=out_dtype)
  return (product.astype(jnp.float32) * kernel.scale[0]).astype(out_dtype)


def _forward(dtype: jnp.dtype, out_dtype: jnp.dtype, x: Array, kernel: Quantized):
  return _dot(dtype, out_dtype, x, kernel), kernel


def _backward(dtype: jnp.dtype, out_dtype: jnp.dtype, kernel: Quantized, gradient: Array):
  del out_dtype
  scaled = (gradient.astype(jnp.float32) * kernel.scale[0]).astype(dtype)
  frozen = Quantized(np.zeros(kernel.shape, jax.dtypes.float0), jnp.zeros_like(kernel.scale))
  return jnp.dot(scaled, kernel.values.T.astype(dtype)), frozen


_dot.defvjp(_forward, _backward)

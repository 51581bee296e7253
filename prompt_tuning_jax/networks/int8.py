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
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning_jax.types import Array, DType, Initializer, Shape

FEW_ROWS = 8  # of inputs, as a step of decoding has


@flax.struct.dataclass
class Quantized:
  """A leaf in the place of a kernel [in, out] or of an embedding table [V, D]: values * scale.

  A row of `values` is what shares a scale, an output's weights or a word's. So those of a kernel
  are stored with their axes exchanged: a processor that multiplies one row of inputs, as decoding
  does, then reads them as they are, where it would else make them float32 in memory first.

  Attributes:
    values: int8, [out, in] of a kernel, [V, D] of a table. Those of scanned layers have an axis
      more, [L, …].
    scale: [out, 1] or [V, 1], float32.
    exchanged: whether the leaf is `values` with its last two axes exchanged: a kernel.
  """

  values: Array
  scale: Array
  exchanged: bool = flax.struct.field(pytree_node=False)

  @property
  def shape(self) -> Shape:
    """That of the weights that it stands for."""
    return exchange(self.values.shape) if self.exchanged else self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim

  @property
  def dtype(self) -> DType:
    """That of the weights that it stands for."""
    return self.scale.dtype

  @property
  def sharding(self) -> jax.sharding.Sharding:
    """That of the weights that it stands for."""
    own = self.values.sharding
    return exchanged_sharding(own, self.ndim) if self.exchanged else own

  @property
  def T(self) -> 'Quantized':
    return self.replace(exchanged=not self.exchanged)

  def dequantized(self) -> Array:
    """The weights, float32."""
    weights = self.values.astype(jnp.float32) * self.scale
    return weights.swapaxes(-1, -2) if self.exchanged else weights


def exchange(axes: tuple) -> tuple:
  """What belongs to axes, such as a shape, with that of the last two exchanged."""
  return (*axes[:-2], axes[-1], axes[-2])


def exchanged_sharding(sharding: jax.sharding.Sharding, ndim: int) -> jax.sharding.Sharding:
  """That of an array of `ndim` axes whose last two are exchanged."""
  if not isinstance(sharding, NamedSharding):
    return sharding
  spec = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
  return NamedSharding(sharding.mesh, PartitionSpec(*exchange(spec)))


def is_kernel(path: str) -> bool:
  """Whether a parameter is a kernel, whose `values` are [out, in]."""
  return path.endswith('/kernel')


def is_small(path: str) -> bool:
  """Whether a parameter is stored in eight bits, where the base is."""
  return is_kernel(path) or path.endswith('token_embedder/embedding')


def quantize(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Weights [..., rows, n] -> (values int8, scale [..., rows, 1] float32)."""
  weights = np.asarray(weights, np.float32)
  scale = np.max(np.abs(weights), axis=-1, keepdims=True) / np.float32(127)
  scale = np.where(scale > 0, scale, np.float32(1))  # of nothing but zeros
  return np.rint(weights / scale).astype(np.int8), scale


def quantized(weights: Array, kernel: bool) -> Quantized:
  """A kernel [..., in, out] or a table [V, D] as the leaf that takes its place."""
  weights = np.asarray(weights)
  values, scale = quantize(weights.swapaxes(-1, -2) if kernel else weights)
  return Quantized(jnp.asarray(values), jnp.asarray(scale), kernel)


def param_with_axes(name: str, init: Initializer, shape: Shape, axes: tuple[str, ...],
                    module: nn.Module) -> Any:
  """A float32 parameter of the module, or the `Quantized` leaf that it was given in its place."""
  leaf = module.get_variable('params', name)
  if not isinstance(leaf, Quantized):
    return partitioning.param_with_axes(name, init, shape, jnp.float32, axes=axes, module=module)
  if leaf.shape != shape:  # Flax compares no shapes but those of arrays.
    raise ValueError(f'{name} should be {shape}, got {leaf.shape}.')
  spec = PartitionSpec(*(exchange(axes) if leaf.exchanged else axes))
  return leaf.replace(values=partitioning.with_sharding_constraint(leaf.values, spec))


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
  if not kernel.exchanged:
    raise ValueError(f'Expected a kernel [in, out], got a table {kernel.shape}: take its `T`.')
  return _dot(x.dtype, jnp.dtype(out_dtype or x.dtype), x, kernel)


# With a derivative of its own, as JAX's would keep every kernel in the dtype of x for the backward
# pass: a second and larger copy of the model.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(dtype: jnp.dtype, out_dtype: jnp.dtype, x: Array, kernel: Quantized) -> Array:
  values, rows = kernel.values, x.size // x.shape[-1]
  if rows == 1:  # In a loop, the compiler would widen the kernel before it.
    values, x = jax.lax.optimization_barrier((values, x))
  if 1 < rows <= FEW_ROWS:  # It would also exchange the kernel's axes, if that stood on the right.
    product = jnp.dot(values.astype(dtype), x.reshape(rows, -1).T,
                      preferred_element_type=out_dtype).T.reshape(*x.shape[:-1], -1)
  else:
    product = jnp.dot(x, values.T.astype(dtype), preferred_element_type=out_dtype)
  return (product.astype(jnp.float32) * kernel.scale[:, 0]).astype(out_dtype)


def _forward(dtype: jnp.dtype, out_dtype: jnp.dtype, x: Array, kernel: Quantized):
  return _dot(dtype, out_dtype, x, kernel), kernel


def _backward(dtype: jnp.dtype, out_dtype: jnp.dtype, kernel: Quantized, gradient: Array):
  del out_dtype
  scaled = (gradient.astype(jnp.float32) * kernel.scale[:, 0]).astype(dtype)
  frozen = kernel.replace(values=np.zeros(kernel.values.shape, jax.dtypes.float0),
                          scale=jnp.zeros_like(kernel.scale))
  return jnp.dot(scaled, kernel.values.astype(dtype)), frozen


_dot.defvjp(_forward, _backward)

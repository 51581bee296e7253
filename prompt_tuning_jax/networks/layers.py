"""The layers that networks are made of besides attention, with T5X's parameter names and axes."""

import functools
import operator
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import partitioning
from jax.sharding import PartitionSpec

from prompt_tuning_jax.networks import int8
from prompt_tuning_jax.types import Array, DType, Initializer

# GELU is the tanh approximation in T5 1.1 and GPT-2, and exact in BERT and BART; 'linear' is the
# ungated half.
ACTIVATIONS = {'relu': nn.relu, 'gelu': nn.gelu, 'silu': nn.silu, 'linear': lambda x: x,
               'gelu_exact': functools.partial(nn.gelu, approximate=False)}
FAN_IN = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


def check_settings(activations: Sequence[str], dtype: str) -> None:
  """Raises ValueError for what no network's configuration may have."""
  if not activations or set(activations) - set(ACTIVATIONS):
    raise ValueError(f'mlp_activations must be among {sorted(ACTIVATIONS)}, got {activations}.')
  if dtype not in ('float32', 'bfloat16'):
    raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}.")


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
  axes: tuple[str, str] = ('vocab', 'embed')
  stddev: float = 1.0  # of a new table

  def setup(self):
    self.embedding = int8.param_with_axes(
        'embedding', nn.initializers.normal(self.stddev), (self.num_embeddings, self.features),
        self.axes, self)

  def __call__(self, tokens: Array, virtual_embeddings: Array | None = None) -> Array:
    """tokens: [B, T] int in [0, V + R), virtual_embeddings: [R, D] or [L, R, D] -> [B, T, D].

    Of rows for every layer these are the first layer's; the others go in by `virtual_of_layer`.
    """
    # An id that has no row embeds as NaN: a prompt shorter than its ids must not go unnoticed.
    words = int8.take(self.embedding, tokens, self.dtype)
    if virtual_embeddings is None:
      return words
    first = virtual_embeddings if virtual_embeddings.ndim == 2 else virtual_embeddings[0]
    return _with_virtual(words, tokens, first, self.num_embeddings)


def virtual_of_layer(x: Array, tokens: Array, virtual_embeddings: Array | None,
                     layer: Array | int, num_embeddings: int) -> Array:
  """What goes into a layer, x: [B, T, D], with that layer's rows at the virtual tokens.

  Rows [R, D] are the first layer's alone, and `Embed` has placed those. Rows of every layer,
  [L, R, D], replace what came out of the layer below (Liu et al. 2022, "P-Tuning v2").
  """
  if virtual_embeddings is None or virtual_embeddings.ndim == 2:
    return x
  placed = _with_virtual(x, tokens, virtual_embeddings[layer], num_embeddings)
  return jnp.where(layer > 0, placed, x)


def _with_virtual(x: Array, tokens: Array, rows: Array, num_embeddings: int) -> Array:
  """x: [B, T, D] with the rows [R, D] at tokens from `num_embeddings` on."""
  if not rows.shape[0]:
    return x
  virtual = _rows_at(rows, jnp.maximum(tokens - num_embeddings, 0), x.dtype)
  return jnp.where((tokens >= num_embeddings)[..., None], virtual, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows_at(rows: Array, places: Array, dtype: DType) -> Array:
  """Rows [R, D] at the places [B, T], as [B, T, D]; NaN where there is none.

  Their gradient is a product, not a scattering: in float32, and with the same bits each time. So
  one that is not finite makes those of all rows NaN.
  """
  return jnp.take(rows.astype(dtype), places, axis=0, mode='fill')


def _rows_forward(rows: Array, places: Array, dtype: DType) -> tuple[Array, tuple[Array, Array]]:
  return _rows_at(rows, places, dtype), (rows, places)


def _rows_backward(dtype: DType, kept: tuple[Array, Array],
                   gradient: Array) -> tuple[Array, None]:
  rows, places = kept
  chosen = jax.nn.one_hot(places, rows.shape[0], dtype=dtype)
  of_rows = jnp.einsum('BTR,BTD->RD', chosen, gradient, precision='highest',
                       preferred_element_type=jnp.float32)
  return of_rows.astype(rows.dtype), None


_rows_at.defvjp(_rows_forward, _rows_backward)


class Dense(nn.Module):
  """A matrix product and a bias, if any: [..., in] -> [..., features] of `out_dtype` or `dtype`.

  Changes of the kernel (`prompts.weight_changes`) may stand beside it: `lora_a` [in, r] @ `lora_b`
  [r, features] is added to it, `ia3_in` [in] scales its inputs and `ia3` [features] its outputs.
  A collection `changes` has those of each example of a batch, with an axis [B, …] more.
  """

  features: int
  axes: tuple[str, str]
  dtype: DType = jnp.float32
  kernel_init: Initializer = FAN_IN
  out_dtype: DType | None = None
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = int8.param_with_axes('kernel', self.kernel_init, (x.shape[-1], self.features),
                                  self.axes, self)
    x = x.astype(self.dtype)
    for scale in _changes(self, 'ia3_in'):
      x = (x * scale).astype(x.dtype)
    product = _with_lora(self, x, int8.dot(x, kernel, self.out_dtype))
    if self.use_bias:
      bias = partitioning.param_with_axes(
          'bias', nn.initializers.zeros, (self.features,), jnp.float32, axes=self.axes[-1:])
      product += bias.astype(product.dtype)
    for scale in _changes(self, 'ia3'):
      product = (product * scale).astype(product.dtype)
    return product

  def plain_kernel(self) -> Array | None:
    """The kernel [in, features] if a call is a product with it and no more, else None."""
    kernel = self.get_variable('params', 'kernel')
    if (not isinstance(kernel, jax.Array) or set(self.variables['params']) != {'kernel'}
        or self.variables.get('changes')):
      return None
    kernel = partitioning.with_sharding_constraint(kernel, PartitionSpec(*self.axes))
    return kernel.astype(self.dtype)


def _changes(module: nn.Module, name: str) -> list[Array]:
  """A change of a module's kernel for all examples, and one for each, if there are any."""
  of_all, of_each = (module.get_variable(place, name) for place in ('params', 'changes'))
  if of_each is not None and of_each.ndim == 2:  # [B, features]
    of_each = of_each[:, None]
  return [change for change in (of_all, of_each) if change is not None]


def _with_lora(module: nn.Module, x: Array, product: Array) -> Array:
  """A module's product with x, and that of its LoRA added, if it has one."""
  for a, b in zip(_changes(module, 'lora_a'), _changes(module, 'lora_b'), strict=True):
    product += (x @ a.astype(x.dtype) @ b.astype(x.dtype)).astype(product.dtype)
  return product


class TiedOutput(nn.Module):
  """Logits of an output layer that is the embedding table: [..., D] -> [..., V], float32.

  A LoRA of the layer (`prompts.weight_changes`), which leaves the embeddings of inputs as they are,
  is added as `Dense` does it.
  """

  shared_embedding: Embed

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return _with_lora(self, x, int8.dot(x, self.shared_embedding.embedding.T, jnp.float32))


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


class CentredLayerNorm(nn.Module):
  """The layer norm of Ba et al. (2016): mean 0, variance 1, then scale and bias."""

  dtype: DType = jnp.float32
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """x: [..., D] -> [..., D]; mean and variance are taken in float32."""
    scale, bias = (partitioning.param_with_axes(name, init, (x.shape[-1],), jnp.float32,
                                                axes=('embed',))
                   for name, init in (('scale', nn.initializers.ones),
                                      ('bias', nn.initializers.zeros)))
    x = x.astype(jnp.float32)
    x -= jnp.mean(x, axis=-1, keepdims=True)
    x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


def _product(activations: Sequence[str], *parts: Array) -> Array:
  """The product of the parts, [..., M] each, after an activation each."""
  return functools.reduce(operator.mul, (ACTIVATIONS[name](x) for name, x in zip(
      activations, parts, strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _units(activations: tuple[str, ...], *parts: Array) -> Array:
  """`_product`, with activations computed once more for the backward pass.

  To keep them takes longer: what stands between products with weights is bound by memory.
  """
  return _product(activations, *parts)


# Behind a barrier, compilers do not know what the parts were computed from. Else the forward pass
# would keep activations after all, and a GPU's products would write parts before and after these.
def _units_forward(activations: tuple[str, ...], *parts: Array) -> tuple[Array, tuple[Array, ...]]:
  parts = jax.lax.optimization_barrier(parts)
  return _product(activations, *parts), parts


def _units_backward(activations: tuple[str, ...], parts: tuple[Array, ...],
                    gradient: Array) -> tuple[Array, ...]:
  parts = jax.lax.optimization_barrier(parts)
  gradients = []
  for i in range(len(parts)):
    of_part = lambda part, i=i, parts=parts: _product(activations, *parts[:i], part, *parts[i + 1:])
    gradients += jax.vjp(of_part, parts[i])[1](gradient)
    # A processor would keep what two gradients share, from the forward pass on; a GPU makes both in
    # one kernel.
    parts = jax.lax.platform_dependent(
        parts, cpu=jax.lax.optimization_barrier, default=lambda parts: parts)
  return tuple(gradients)


_units.defvjp(_units_forward, _units_backward)


class MlpBlock(nn.Module):
  """Feed-forward block; with several activations their outputs are multiplied (gated units)."""

  mlp_dim: int
  activations: Sequence[str]
  dropout_rate: float
  dtype: DType = jnp.float32
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Array, deterministic: bool) -> Array:
    """x: [B, T, D] -> [B, T, D]."""
    dense = functools.partial(Dense, dtype=self.dtype, use_bias=self.use_bias)
    names = ['wi'] if len(self.activations) == 1 else [
        f'wi_{i}' for i in range(len(self.activations))]
    hidden = _units(tuple(self.activations), *(
        dense(self.mlp_dim, ('embed', 'mlp'), name=name)(x) for name in names))
    hidden = dropout(self.dropout_rate)(hidden, deterministic=deterministic)
    hidden = partitioning.with_sharding_constraint(hidden, ('batch', 'length', 'mlp'))
    return dense(x.shape[-1], ('mlp', 'embed'), name='wo')(hidden)

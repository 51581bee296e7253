"""Multi-head attention with an additive position bias; T5's does not scale the logits.

Heads stand before positions (`[B, N, T, H]`), so that both products are plain batched matrix
products; keys are kept as `[B, N, H, S]` for a step of decoding.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.networks import fused_attention, layers, masks
from prompt_tuning_jax.networks.prefix import LayerPrefix
from prompt_tuning_jax.types import Array, DType

_KERNEL_INIT = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


def _query_init(head_dim: int):
  """T5 leaves the logits unscaled, so the queries start small instead (Mesh TensorFlow)."""
  return nn.initializers.variance_scaling(1.0 / head_dim, 'fan_in', 'normal')


@flax.struct.dataclass
class Context:
  """Keys and values of a text that has gone before, which attention sees besides its own.

  They are not joined with its own, so that a step of decoding does not copy them.

  Attributes:
    key: [B, N, H, T].
    value: [B, N, T, H].
    bias: [1 or B, N, S, T], added to the logits of the S queries.
    mask: [B, 1, S, T] bool, False where attention is not allowed.
  """

  key: Array
  value: Array
  bias: Array | None
  mask: Array | None


def _logits(query: Array, key: Array, bias: Array | None, mask: Array | None) -> Array:
  """query @ key + bias, far below all where masked: float32."""
  return _with_terms(jnp.matmul(query, key, preferred_element_type=jnp.float32), bias, mask)


def _with_terms(logits: Array, bias: Array | None, mask: Array | None) -> Array:
  if bias is not None:
    logits += bias.astype(jnp.float32)
  return logits if mask is None else jnp.where(mask, logits, masks.MASKED)


def attend(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None,
           drop: nn.Dropout | None = None, deterministic: bool = True,
           context: Context | None = None, implementation: str = 'xla') -> Array:
  """softmax(query @ key + bias) @ value; logits and softmax in float32.

  Another `implementation` (`fused_attention`) is for many queries: a step of decoding has one.

  Args:
    query: [B, N, T, H].
    key: [B, N, H, S].
    value: [B, N, S, H].
    bias: [1 or B, N, T, S], added to the logits.
    mask: [B, 1, 1 or T, S] bool, False where attention is not allowed.
    context: more keys and values, under the same softmax.

  Returns:
    [B, N, T, H] of the query's type.
  """
  kept = None
  if drop is not None and not deterministic:
    keys = key.shape[-1] + (0 if context is None else context.key.shape[-1])
    kept = _kept(drop, query.shape[:2], keys, value.dtype)
  if implementation != 'xla' and query.shape[2] > 1:
    return fused_attention.attend(implementation, query,
                                  *_joined(key, value, bias, mask, context), kept)
  if kept is not None:
    value, context = _dropped(value, context, kept.swapaxes(-1, -2))
  if context is None:
    return _attend(query, key.swapaxes(-1, -2), value, bias, mask)
  own = key.shape[-1]
  made = weights(query, key, bias, mask, context).astype(query.dtype)
  return (jnp.matmul(made[..., :own], value)
          + jnp.matmul(made[..., own:], context.value))


def weights(query: Array, key: Array, bias: Array | None, mask: Array | None,
            context: Context | None = None) -> Array:
  """The weights of `attend`, whose arguments these are: softmax(query @ key + bias).

  Returns [B, N, T, S] float32, the keys of a context behind the others; those of a query sum to 1.
  """
  logits = _logits(query, key, bias, mask)
  if context is not None:
    before = _logits(query, context.key, context.bias, context.mask)
    logits = jnp.concatenate([logits, before], axis=-1)
  return jax.nn.softmax(logits, axis=-1)


def _kept(drop: nn.Dropout, heads: tuple[int, int], keys: int, dtype: DType) -> Array:
  """What dropout multiplies weights by, [B, N, 1, S]: as in T5X, the same for all queries."""
  return drop(jnp.ones((*heads, 1, keys), dtype), deterministic=False)


def _dropped(value: Array, context: Context | None,
             kept: Array) -> tuple[Array, Context | None]:
  """Values, the context's too, after dropout of their weights: there are fewer of them."""
  own = value.shape[2]
  if context is not None:
    context = context.replace(value=context.value * kept[:, :, own:])
  return value * kept[:, :, :own], context


def _joined(key: Array, value: Array, bias: Array | None, mask: Array | None,
            context: Context | None) -> tuple[Array, Array, Array | None, Array | None]:
  """Keys, values, bias and mask with those of the context, all of them or none, behind them."""
  if context is None:
    return key, value, bias, mask
  behind = lambda own, other: None if own is None else jnp.concatenate(
      [jnp.broadcast_to(own, (*other.shape[:3], own.shape[3])), other], axis=-1)
  return (behind(key, context.key), jnp.concatenate([value, context.value], axis=-2),
          behind(bias, context.bias), behind(mask, context.mask))


@jax.custom_vjp
def _attend(query: Array, key: Array, value: Array, bias: Array | None,
            mask: Array | None) -> Array:
  """`attend` without a context, of keys [B, N, S, H], with a derivative of its own.

  Arrays [B, N, T, S] are the largest of a network, and to go through one once more takes time. So
  the sums of values are divided, not the weights, and the inner product that the derivative of a
  softmax has in it is taken over H, not S (Dao et al. 2022, "FlashAttention", appendix B.4).
  """
  return _attend_forward(query, key, value, bias, mask)[0]


def _attend_forward(query: Array, key: Array, value: Array, bias: Array | None,
                    mask: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
  logits = jnp.einsum('BNTH,BNSH->BNTS', query, key, preferred_element_type=jnp.float32)
  logits = _with_terms(logits, bias, mask)
  largest = jnp.max(logits, axis=-1, keepdims=True, initial=masks.MASKED)  # of no keys
  weights = jnp.exp(logits - largest)
  # Behind a barrier, or a processor would make an array of H times its size.
  share = jax.lax.optimization_barrier(1 / jnp.sum(weights, axis=-1, keepdims=True))
  weights = weights.astype(query.dtype)
  out = share * jnp.matmul(weights, value, preferred_element_type=jnp.float32)
  out = out.astype(query.dtype)
  return out, (query, key, value, bias, mask, weights, share, out)


def _attend_backward(kept: tuple[Array | None, ...], gradient: Array,
                     ) -> tuple[Array | None, ...]:
  query, key, value, bias, mask, weights, share, out = kept
  gradient = gradient * share  # float32
  inner = jnp.sum(gradient * out, axis=-1, keepdims=True)
  gradient = gradient.astype(query.dtype)
  of_weights = jnp.matmul(gradient, value.swapaxes(-1, -2), preferred_element_type=jnp.float32)
  of_logits = weights * (of_weights - inner)
  # A key that is masked has no weight, unless the query may see none: then nothing depends on them.
  if mask is not None:
    of_logits *= jnp.any(mask, axis=-1, keepdims=True)
  of_bias = None
  if bias is not None:
    shared = bias.shape[0] == 1
    of_bias = jnp.sum(of_logits, axis=0, keepdims=True) if shared else of_logits
    of_bias = of_bias.astype(bias.dtype)
  of_logits = of_logits.astype(query.dtype)
  return (jnp.matmul(of_logits, key),
          jnp.matmul(of_logits.swapaxes(-1, -2), query),
          jnp.matmul(weights.swapaxes(-1, -2), gradient), of_bias, None)


_attend.defvjp(_attend_forward, _attend_backward)


def attend_to_inputs(query: Array, inputs: Array, key_kernel: Array, value_kernel: Array,
                     mask: Array | None, kept: Array | None = None) -> Array:
  """`attend` to keys inputs @ key_kernel and values inputs @ value_kernel, which are not made.

  (query @ key_kernel^T) @ inputs^T are the same logits, and (weights @ inputs) @ value_kernel is
  the same sum: a few queries are less to project than many inputs.

  Args:
    query: [B, N, T, H].
    inputs: [B, S, D].
    key_kernel, value_kernel: [D, N, H].
    mask: [B, 1, 1 or T, S] bool, False where attention is not allowed.
    kept: [B, N, 1, S], what the weights are multiplied by (dropout).

  Returns:
    [B, N, T, H] of the query's type.
  """
  query = jnp.einsum('BNTH,DNH->BNTD', query, key_kernel)
  logits = jnp.einsum('BNTD,BSD->BNTS', query, inputs, preferred_element_type=jnp.float32)
  if mask is not None:
    logits = jnp.where(mask, logits, masks.MASKED)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  if kept is not None:
    weights *= kept
  mixed = jnp.einsum('BNTS,BSD->BNTD', weights, inputs)
  return jnp.einsum('BNTD,DNH->BNTH', mixed, value_kernel)


class MultiHeadAttention(nn.Module):
  """Attention with T5X's parameters `query`, `key`, `value`, `out`, all [D, N*H] or [N*H, D].

  `use_bias` adds a bias to each of the four; `scale` divides the logits by sqrt(H);
  `implementation` is one of `fused_attention.IMPLEMENTATIONS`.

  Two caches serve decoding. Collection `cache` holds the keys and values of the tokens so far
  (self-attention). Collection `cross_cache`, where the caller makes it mutable or passes it, holds
  the keys and values of the encoded input, which never change during decoding and take its place.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: DType = jnp.float32
  use_bias: bool = False
  scale: bool = False
  implementation: str = 'xla'

  def _projection(self, name: str, kernel_init=_KERNEL_INIT) -> layers.Dense:
    return layers.Dense(self.num_heads * self.head_dim, ('embed', 'joined_kv'), self.dtype,
                        kernel_init, use_bias=self.use_bias, name=name)

  def _heads(self, projection: layers.Dense, x: Array) -> Array:
    """[B, T, D] -> [B, T, N, H]."""
    heads = projection(x).reshape(*x.shape[:-1], self.num_heads, self.head_dim)
    return partitioning.with_sharding_constraint(heads, ('batch', 'length', 'heads', 'kv'))

  def __call__(self, *args, **kwargs) -> Array:
    """The first of what `with_keys_values` returns."""
    return self.with_keys_values(*args, **kwargs)[0]

  @nn.compact
  def with_keys_values(
      self, inputs_q: Array, inputs_kv: Array, bias: Array | None = None,
      mask: Array | None = None, *, deterministic: bool = True, cache_index: Array | None = None,
      cache_length: int | None = None, cross: bool = False, prefix: LayerPrefix | None = None,
      context: Context | None = None) -> tuple[Array, tuple[Array, Array]]:
    """inputs_q: [B, T, D], inputs_kv: [B, S, D] -> [B, T, D], ([B, N, H, S], [B, N, S, H]).

    With `cache_length` the self-attention keys and values are written into a cache of that many
    positions from `cache_index` on, and attention runs over the whole cache: `mask` and `bias`
    then have cache_length keys. The first call only makes the (empty) cache. A prefix stands before
    all of these keys and is in no cache. Cross-attention that has no need of keys and values
    (`attend_to_inputs`) returns None for both.
    """
    query_init = _KERNEL_INIT if self.scale else _query_init(self.head_dim)
    query = self._heads(self._projection('query', query_init), inputs_q).transpose(0, 2, 1, 3)
    if self.scale:
      query *= self.head_dim ** -0.5
    projections = self._projection('key'), self._projection('value')
    drop = layers.dropout(self.dropout_rate)
    kernels = self._kernels(projections, inputs_q, inputs_kv) if cross and prefix is None else None
    if kernels is not None:
      made = None, None
      kept = None if deterministic else _kept(drop, query.shape[:2], inputs_kv.shape[1], self.dtype)
      out = attend_to_inputs(query, inputs_kv, *kernels, mask, kept)
    else:
      made = self._keys_values(projections, inputs_kv, cross)
      key, value = made
      if cache_length is not None:
        key, value = self._update_cache(key, value, cache_index, cache_length)
      if prefix is not None:
        key, value, bias, mask = prefix.prepend(key, value, bias, mask)
      # For whoever asks for the weights (`analysis.attention_mass`); for others it does nothing.
      self.sow('intermediates', 'attends', (query, key, bias, mask, context))
      out = attend(query, key, value, bias, mask, drop, deterministic, context,
                   self.implementation)
    out = out.transpose(0, 2, 1, 3).reshape(*inputs_q.shape[:-1], self.num_heads * self.head_dim)
    out = layers.Dense(inputs_q.shape[-1], ('joined_kv', 'embed'), self.dtype, _KERNEL_INIT,
                       use_bias=self.use_bias, name='out')(out)
    return out, made

  def _kernels(self, projections: tuple[layers.Dense, layers.Dense], inputs_q: Array,
               inputs_kv: Array) -> list[Array] | None:
    """The kernels [D, N, H] of cross-attention that `attend_to_inputs`; None where it should not.

    It should where that is less work, and where nobody else wants the keys and values. A fused
    kernel does: beside it, all of the many small products and what lies between them is slow.
    """
    wanted = (self.is_initializing() or self.has_variable('cross_cache', 'cached_key')
              or any(map(self.is_mutable_collection, ('cross_cache', 'intermediates'))))
    if wanted or self.implementation != 'xla':
      return None
    queries, keys, dim = inputs_q.shape[1], inputs_kv.shape[1], self.head_dim
    if queries * (keys + dim) >= keys * dim:
      return None
    kernels = [projection.plain_kernel() for projection in projections]
    if any(kernel is None for kernel in kernels):
      return None
    return [kernel.reshape(-1, self.num_heads, dim) for kernel in kernels]

  def _keys_values(self, projections: tuple[layers.Dense, layers.Dense], x: Array,
                   cross: bool) -> tuple[Array, Array]:
    """[B, S, D] -> [B, N, H, S] and [B, N, S, H], from the cross cache if it has them."""
    if cross and self.has_variable('cross_cache', 'cached_key'):
      return tuple(self.get_variable('cross_cache', name)
                   for name in ('cached_key', 'cached_value'))
    key = self._heads(projections[0], x).transpose(0, 2, 3, 1)
    value = self._heads(projections[1], x).transpose(0, 2, 1, 3)
    if cross and self.is_mutable_collection('cross_cache') and not self.is_initializing():
      self.put_variable('cross_cache', 'cached_key', key)
      self.put_variable('cross_cache', 'cached_value', value)
    return key, value

  def _update_cache(self, key: Array, value: Array, index: Array | None, length: int):
    filled = self.has_variable('cache', 'cached_key')
    batch, heads, dim, _ = key.shape
    cached_key = self.variable('cache', 'cached_key', jnp.zeros, (batch, heads, dim, length),
                               key.dtype)
    cached_value = self.variable('cache', 'cached_value', jnp.zeros, (batch, heads, length, dim),
                                 value.dtype)
    if not filled:
      return key, value
    zero = jnp.zeros((), jnp.int32)
    cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, key,
                                                    (zero, zero, zero, index))
    cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, value,
                                                      (zero, zero, index, zero))
    return cached_key.value, cached_value.value

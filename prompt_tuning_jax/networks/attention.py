"""Multi-head attention with an additive position bias; T5's does not scale the logits.

Heads stand before positions (`[B, N, T, H]`), so that both products are plain batched matrix
products; keys are kept as `[B, N, H, S]`.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.networks import fused_attention, layers
from prompt_tuning_jax.networks.prefix import LayerPrefix
from prompt_tuning_jax.types import Array, DType

MASKED = -1e10
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
  logits = jnp.matmul(query, key, preferred_element_type=jnp.float32)
  if bias is not None:
    logits += bias.astype(jnp.float32)
  return logits if mask is None else jnp.where(mask, logits, MASKED)


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
    mask: [B, 1, T, S] bool, False where attention is not allowed.
    context: more keys and values, under the same softmax.

  Returns:
    [B, N, T, H] of the query's type.
  """
  if implementation != 'xla' and query.shape[2] > 1:
    return fused_attention.attend(implementation, query, *_joined(key, value, bias, mask, context),
                                  drop, deterministic)
  logits = _logits(query, key, bias, mask)
  if context is not None:
    before = _logits(query, context.key, context.bias, context.mask)
    logits = jnp.concatenate([logits, before], axis=-1)
  weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
  if drop is not None:
    weights = drop(weights, deterministic=deterministic)
  if context is None:
    return jnp.matmul(weights, value)
  own = key.shape[-1]
  return (jnp.matmul(weights[..., :own], value)
          + jnp.matmul(weights[..., own:], context.value))


def _joined(key: Array, value: Array, bias: Array | None, mask: Array | None,
            context: Context | None) -> tuple[Array, Array, Array | None, Array | None]:
  """Keys, values, bias and mask with those of the context, all of them or none, behind them."""
  if context is None:
    return key, value, bias, mask
  behind = lambda own, other: None if own is None else jnp.concatenate(
      [jnp.broadcast_to(own, (*other.shape[:2], *own.shape[2:])), other], axis=-1)
  return (behind(key, context.key), jnp.concatenate([value, context.value], axis=-2),
          behind(bias, context.bias), behind(mask, context.mask))


class MultiHeadAttention(nn.Module):
  """Attention with T5X's parameters `query`, `key`, `value`, `out`, all [D, N*H] or [N*H, D].

  `use_bias` adds a bias to each of the four; `scale` divides the logits by sqrt(H);
  `implementation` is one of `fused_attention.IMPLEMENTATIONS`.

  Two caches serve decoding. Collection `cache` holds the keys and values of the tokens so far
  (self-attention). Collection `cross_cache`, where the caller makes it mutable or passes it, holds
  the keys and values of the encoded input, which never change during decoding.
  """

  num_heads: int
  head_dim: int
  dropout_rate: float
  dtype: DType = jnp.float32
  use_bias: bool = False
  scale: bool = False
  implementation: str = 'xla'

  def _heads(self, name: str, x: Array, kernel_init=_KERNEL_INIT) -> Array:
    """[B, T, D] -> [B, T, N, H]."""
    joined = layers.Dense(self.num_heads * self.head_dim, ('embed', 'joined_kv'), self.dtype,
                          kernel_init, use_bias=self.use_bias, name=name)(x)
    heads = joined.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
    return partitioning.with_sharding_constraint(heads, ('batch', 'length', 'heads', 'kv'))

  def _keys_values(self, x: Array) -> tuple[Array, Array]:
    key = self._heads('key', x).transpose(0, 2, 3, 1)
    value = self._heads('value', x).transpose(0, 2, 1, 3)
    return key, value

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
    all of these keys and is in no cache.
    """
    query_init = _KERNEL_INIT if self.scale else _query_init(self.head_dim)
    query = self._heads('query', inputs_q, query_init).transpose(0, 2, 1, 3)
    if self.scale:
      query *= self.head_dim ** -0.5
    if cross and self.has_variable('cross_cache', 'cached_key'):
      key = self.get_variable('cross_cache', 'cached_key')
      value = self.get_variable('cross_cache', 'cached_value')
    else:
      key, value = self._keys_values(inputs_kv)
      if cross and self.is_mutable_collection('cross_cache') and not self.is_initializing():
        self.put_variable('cross_cache', 'cached_key', key)
        self.put_variable('cross_cache', 'cached_value', value)
    made = key, value
    if cache_length is not None:
      key, value = self._update_cache(key, value, cache_index, cache_length)
    if prefix is not None:
      key, value, bias, mask = prefix.prepend(key, value, bias, mask)
    # For whoever asks for the weights (`analysis.attention_mass`); for others it does nothing.
    self.sow('intermediates', 'attends', (query, key, bias, mask, context))
    drop = layers.dropout(self.dropout_rate)
    out = attend(query, key, value, bias, mask, drop, deterministic, context,
                 self.implementation)
    out = out.transpose(0, 2, 1, 3).reshape(*inputs_q.shape[:-1], self.num_heads * self.head_dim)
    out = layers.Dense(inputs_q.shape[-1], ('joined_kv', 'embed'), self.dtype, _KERNEL_INIT,
                       use_bias=self.use_bias, name='out')(out)
    return out, made

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

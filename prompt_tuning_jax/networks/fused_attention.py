"""Attention in one kernel, which keeps no logits: ours or cuDNN's on NVIDIA GPUs, JAX's on TPUs.

All add a bias to the logits. Only ours (`flash_attention`, in Triton) has a mask besides, and drops
weights: for the others what is not to be seen has a very low bias, and values are dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.networks import flash_attention, masks
from prompt_tuning_jax.types import Array

IMPLEMENTATIONS = ('xla', 'triton', 'cudnn', 'pallas')
_MULTIPLE = {'cudnn': 2, 'pallas': 128}  # of positions; more are added, which nobody sees


def chosen(attention: str, config: Any, backend: str, devices: int = 1) -> str:
  """Which of IMPLEMENTATIONS a network of `config` uses on this backend; 'auto' is the best for it.

  Raises ValueError for one that the backend or the network does not fit.
  """
  fits, dim = {'xla': None}, config.head_dim
  of_gpu = ('needs an NVIDIA GPU' if backend not in ('gpu', 'cuda') else
            "needs ACTIVATION_DTYPE='bfloat16'" if config.dtype != 'bfloat16' else None)
  fits['triton'] = of_gpu or (
      f'needs a head_dim of 16, 32 or 64, got {dim}' if dim not in (16, 32, 64) else
      f'runs on one device, got {devices}' if devices > 1 else None)
  fits['cudnn'] = of_gpu or (f'needs a head_dim of a multiple of 8 up to 128, got {dim}'
                             if dim % 8 or dim > 128 else None)
  fits['pallas'] = ('needs a TPU' if backend != 'tpu' else
                    f'runs on one device, got {devices}' if devices > 1 else None)
  if attention == 'auto':
    return next(name for name in ('triton', 'cudnn', 'pallas', 'xla') if not fits[name])
  if attention not in fits:
    raise ValueError(f"ATTENTION must be one of {('auto', *fits)}, got {attention!r}.")
  if fits[attention]:
    raise ValueError(f'ATTENTION={attention!r} {fits[attention]} (this is {backend}): take '
                     "'auto'.")
  return attention


def with_mask(implementation: str, bias: Array, mask: Array) -> tuple[Array, Array | None]:
  """Bias [1, N, T, S] and mask [B, 1, 1 or T, S] of many layers, as `attend` had best get them.

  cuDNN and TPUs have no mask but a bias [B, N, T, S], too large to be made in every layer.
  """
  if implementation in ('xla', 'triton'):
    return bias, mask
  return jnp.where(mask, bias, masks.MASKED), None


def attend(implementation: str, query: Array, key: Array, value: Array, bias: Array | None,
           mask: Array | None, kept: Array | None = None) -> Array:
  """`attention.attend`: query [B, N, T, H], key [B, N, H, S], value [B, N, S, H] -> [B, N, T, H].

  Bias and mask are cast to the dtype of the query, and so are weights within the kernel. The
  weights of a key are multiplied by `kept` [B, N, 1, S].
  """
  if implementation == 'triton':
    return flash_attention.attend(
        query.swapaxes(1, 2), key.transpose(0, 3, 1, 2), value.swapaxes(1, 2), bias, mask,
        None if kept is None else kept[:, :, 0]).swapaxes(1, 2)
  if kept is not None:
    value *= kept.swapaxes(-1, -2)
  batch, heads, queries, _ = query.shape
  keys = key.shape[-1]
  if bias is None:
    bias = jnp.zeros((1, 1, 1, 1), query.dtype)
  if mask is not None:
    bias, _ = with_mask(implementation, bias, mask)
  bias = jnp.broadcast_to(bias.astype(query.dtype), (batch, heads, queries, keys))
  more_queries, more_keys = (-size % _MULTIPLE[implementation] for size in (queries, keys))
  longer = lambda x, more: jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
  bias = jnp.pad(longer(bias, more_queries), ((0, 0),) * 3 + ((0, more_keys),),
                 constant_values=masks.MASKED)
  kernel = _pallas if implementation == 'pallas' else _cudnn
  out = kernel(longer(query, more_queries), longer(key.swapaxes(-1, -2), more_keys),
               longer(value, more_keys), bias)
  return out[:, :, :queries]


def _cudnn(query: Array, key: Array, value: Array, bias: Array) -> Array:
  by_position = lambda x: x.swapaxes(1, 2)
  return by_position(jax.nn.dot_product_attention(
      by_position(query), by_position(key), by_position(value), bias, scale=1.0,
      implementation='cudnn'))


def _pallas(query: Array, key: Array, value: Array, bias: Array) -> Array:
  from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
  # The kernel scales after it has added the bias, so the scale has to be 1.
  return flash_attention(query, key, value, bias, sm_scale=1.0)

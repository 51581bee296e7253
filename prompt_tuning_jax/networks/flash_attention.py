"""Flash attention (Dao et al. 2022) with a bias, for NVIDIA GPUs: Triton kernels, by Pallas.

cuDNN's kernels make a gradient [B, N, T, S] of the bias for each layer, whether anybody wants it or
not. A frozen T5 needs none: here it is made, without a kernel, only where the bias is trained. Bias
and mask are two terms that no layer has to join, and dropout of weights is within the kernel too.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.types import Array

_LOG2_E = math.log2(math.e)  # exponentials are of base 2, which a GPU has an instruction for
# Logits of what is not allowed, and of keys behind the last, which fill a block. Where a query may
# see nothing, all of its logits are the former, and their differences must be exact enough for an
# exponential, also where products and sums are fused.
_MASKED, _BEHIND = -1e6, -4e6
INTERPRET = False  # Kernels are run as JAX operations: for tests, where there is no GPU.


@dataclasses.dataclass(frozen=True)
class Blocks:
  """What one program of a kernel takes at a time, and how Triton compiles it."""

  queries: int
  keys: int
  warps: int
  stages: int

  def of(self, queries: int, keys: int) -> 'Blocks':
    """The same, no larger than so many positions need."""
    fitting = lambda block, size: min(block, max(16, 1 << (size - 1).bit_length()))
    return dataclasses.replace(self, queries=fitting(self.queries, queries),
                               keys=fitting(self.keys, keys))


# The forward pass's queries are a multiple of the others', which read its sums.
FORWARD = Blocks(128, 64, 4, 3)
BACKWARD_QUERIES = Blocks(128, 64, 4, 2)
BACKWARD_KEYS = Blocks(64, 64, 4, 3)


@jax.custom_vjp
def attend(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None,
           kept: Array | None) -> Array:
  """(softmax(query @ key + bias) * kept) @ value, with a derivative of its own.

  Args:
    query: [B, T, N, H], H of 16, 32 or 64.
    key, value: [B, S, N, H].
    bias: [1 or B, 1 or N, T, S], added to the logits.
    mask: [1 or B, 1 or N, 1 or T, S] bool, False where attention is not allowed. Nothing depends on
      what comes of a query that may see nothing: it has no gradient.
    kept: [B, N, S], what the weights of a key are multiplied by (dropout); it has no gradient.

  Returns:
    [B, T, N, H] of the query's type. Logits and softmax are float32, products of the query's type.
  """
  return _forward(query, key, value, bias, mask, kept)[0]


def _with_residuals(*primals: Any) -> tuple[Array, tuple[Array | None, ...]]:
  arrays = jax.tree.map(lambda x: x.value, primals)
  bias = primals[3]
  trained = bias.value if bias is not None and bias.perturbed else None
  out, sums = _forward(*arrays)
  return out, (*arrays, trained, out, sums)


def _backward(kept_arrays: tuple[Array | None, ...], gradient: Array) -> tuple[Array | None, ...]:
  *arrays, trained, out, sums = kept_arrays
  of_query, inner = _of_queries(*arrays, out, gradient, sums)
  of_key, of_value = _of_keys(*arrays, gradient, sums, inner)
  of_bias = None if trained is None else _of_bias(*arrays, gradient, sums, inner)
  return of_query, of_key, of_value, of_bias, None, None


attend.defvjp(_with_residuals, _backward, symbolic_zeros=True)


def _terms(bias: Array | None, mask: Array | None, dtype: Any) -> list[Array]:
  """What is added to the logits."""
  terms = [] if bias is None else [bias.astype(dtype)]
  return terms if mask is None else [*terms, jnp.where(mask, 0.0, _MASKED).astype(dtype)]


def _padded(x: Array, block: int, axis: int = -1) -> Array:
  """As long as whole blocks are."""
  width = [(0, 0)] * x.ndim
  width[axis] = 0, -x.shape[axis] % block
  return jnp.pad(x, width)


def _padded_term(x: Array, queries: int, keys: int) -> Array:
  """[..., T, S] as long as whole blocks of so many queries and keys are."""
  x = x if x.shape[-2] == 1 else _padded(x, queries, axis=-2)
  return _padded(x, keys)


def _kernel(body: Callable[..., None], name: str, blocks: Blocks, grid: tuple[int, int, int],
            operands: Sequence[tuple[Array, Any]], outputs: Sequence[tuple[Any, Any]]) -> Any:
  """Calls a kernel; each operand and each output (shape and type) has its `BlockSpec`."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
  call = pl.pallas_call(
      body, grid=grid, in_specs=[spec for _, spec in operands],
      out_specs=[spec for _, spec in outputs], out_shape=[shape for shape, _ in outputs],
      compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
      interpret=INTERPRET, name=name)
  return call(*(array for array, _ in operands))


def _specs(heads_dim: int) -> tuple[Callable[..., Any], ...]:
  """`BlockSpec`s over a grid (block of rows, head, example).

  Of a block of rows [B, T, N, H], of all rows, of a block [B, N, T], of all, and of a term's block
  of rows: a vector of keys where it is the same for all queries, also with keys for rows.
  """
  from jax.experimental import pallas as pl
  rows = lambda block: pl.BlockSpec((None, block, None, heads_dim), lambda i, n, b: (b, i, n, 0))
  all_rows = lambda size: pl.BlockSpec((None, size, None, heads_dim), lambda i, n, b: (b, 0, n, 0))
  numbers = lambda block: pl.BlockSpec((None, None, block), lambda i, n, b: (b, n, i))
  all_numbers = lambda size: pl.BlockSpec((None, None, size), lambda i, n, b: (b, n, 0))
  term = lambda x, block: pl.BlockSpec(
      (None, None, None if x.shape[2] == 1 else block, None if x.shape[3] == 1 else x.shape[3]),
      lambda i, n, b: (b if x.shape[0] > 1 else 0, n if x.shape[1] > 1 else 0,
                       i if x.shape[2] > 1 else 0, 0))
  return rows, all_rows, numbers, all_numbers, term


def _load(ref: Any, start: Any, block: int, size: int) -> Array:
  """Rows [block, H] of a ref [size, H] from `start` on; zeros behind its end."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
  live = start + jnp.arange(block) < size
  return triton.load(ref.at[pl.ds(start, block), :], mask=live[:, None], other=0.0)


def _load_own(ref: Any, start: Any, size: int) -> Array:
  """A program's own block of rows, which begins at `start`; zeros behind the end of the array."""
  from jax.experimental.pallas import triton
  live = start + jnp.arange(ref.shape[0]) < size
  return triton.load(ref, mask=live[:, None], other=0.0)


def _store(ref: Any, rows: Array, start: Any, size: int) -> None:
  """Into a ref of a block, without the rows that lie behind the end of the array."""
  from jax.experimental.pallas import triton
  live = start + jnp.arange(rows.shape[0]) < size
  triton.store(ref, rows.astype(ref.dtype), mask=live[:, None])


def _logits(rows: Array, columns: Array, terms: Sequence[Any], at: Any,
            rows_are_keys: bool = False) -> Array:
  """rows @ columns^T and the terms' columns `at`, for exponentials of base 2."""
  from jax.experimental.pallas import triton
  logits = triton.dot(rows, columns.T)
  for term in terms:
    if len(term.shape) == 2:
      part = term[:, at]
    else:
      part = term[:][:, None] if rows_are_keys else term[at][None, :]
    logits += part.astype(jnp.float32)
  return logits * _LOG2_E


def _of_keys_block(i: Any, block: int, keys: int, query: Array, key_ref: Any, value_ref: Any,
                   term_refs: Sequence[Any], kept_ref: Any) -> tuple[Array, Array, Array]:
  """The i-th block's keys, values after dropout, and logits, far below all behind the last key."""
  from jax.experimental import pallas as pl
  first = i * block
  at = pl.ds(first, block)
  key, value = (_load(ref, first, block, keys) for ref in (key_ref, value_ref))
  if kept_ref is not None:
    value *= kept_ref[at][:, None]
  logits = _logits(query, key, term_refs, at)
  if keys % block:
    logits = jnp.where((first + jnp.arange(block) < keys)[None, :], logits, _BEHIND)
  return key, value, logits


def _forward(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None,
             kept: Array | None) -> tuple[Array, Array]:
  """(what `attend` returns, [B, N, T'] the logarithms of the softmax's sums, base 2)."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
  batch, queries, heads, dim = query.shape
  keys = key.shape[1]
  blocks = FORWARD.of(queries, keys)
  rows, all_rows, numbers, all_numbers, term = _specs(dim)
  grid = (pl.cdiv(queries, blocks.queries), heads, batch)
  terms = [_padded_term(x, blocks.queries, blocks.keys) for x in _terms(bias, mask, query.dtype)]
  operands = [(query, rows(blocks.queries)), (key, all_rows(keys)), (value, all_rows(keys)),
              *((x, term(x, blocks.queries)) for x in terms)]
  if kept is not None:
    kept = _padded(kept, blocks.keys)
    operands.append((kept, all_numbers(kept.shape[-1])))

  def body(query_ref, key_ref, value_ref, *refs):
    *term_refs, out_ref, sums_ref = refs
    kept_ref = None if kept is None else term_refs.pop()
    start = pl.program_id(0) * blocks.queries
    q = _load_own(query_ref, start, queries)

    def of_keys(i, carry):
      out, largest, total = carry
      _, v, logits = _of_keys_block(i, blocks.keys, keys, q, key_ref, value_ref, term_refs,
                                    kept_ref)
      now = jnp.maximum(largest, jnp.max(logits, axis=-1))
      weights, shrink = jnp.exp2(logits - now[:, None]), jnp.exp2(largest - now)
      out = out * shrink[:, None] + triton.dot(weights.astype(v.dtype), v)
      return out, now, total * shrink + jnp.sum(weights, axis=-1)

    zeros = jnp.zeros((blocks.queries,), jnp.float32)
    out, largest, total = jax.lax.fori_loop(
        0, pl.cdiv(keys, blocks.keys), of_keys,
        (jnp.zeros((blocks.queries, dim), jnp.float32), zeros - jnp.inf, zeros))
    _store(out_ref, out / total[:, None], start, queries)
    # Queries behind the last, and those that may see nothing, have no weights in the backward pass.
    live = (start + jnp.arange(blocks.queries) < queries) & (largest > _MASKED / 2)
    sums_ref[:] = jnp.where(live, largest + jnp.log2(total), -_BEHIND)

  return tuple(_kernel(
      body, 'attention', blocks, grid, operands,
      [(jax.ShapeDtypeStruct(query.shape, query.dtype), rows(blocks.queries)),
       (jax.ShapeDtypeStruct((batch, heads, grid[0] * blocks.queries), jnp.float32),
        numbers(blocks.queries))]))


def _of_queries(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None,
                kept: Array | None, out: Array, gradient: Array, sums: Array,
                ) -> tuple[Array, Array]:
  """(the gradient of queries, [B, N, T'] the inner products of outputs and their gradients)."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
  batch, queries, heads, dim = query.shape
  keys = key.shape[1]
  blocks = BACKWARD_QUERIES.of(queries, keys)
  rows, all_rows, numbers, all_numbers, term = _specs(dim)
  terms = [_padded_term(x, sums.shape[-1], blocks.keys) for x in _terms(bias, mask, query.dtype)]
  grid = (sums.shape[-1] // blocks.queries, heads, batch)  # `_of_keys` reads what is behind T, too
  block = rows(blocks.queries)
  operands = [(query, block), (key, all_rows(keys)), (value, all_rows(keys)), (out, block),
              (gradient, block), (sums, numbers(blocks.queries)),
              *((x, term(x, blocks.queries)) for x in terms)]
  if kept is not None:
    kept = _padded(kept, blocks.keys)
    operands.append((kept, all_numbers(kept.shape[-1])))

  def body(query_ref, key_ref, value_ref, out_ref, gradient_ref, sums_ref, *refs):
    *term_refs, of_query_ref, inner_ref = refs
    kept_ref = None if kept is None else term_refs.pop()
    start = pl.program_id(0) * blocks.queries
    q, o, g = (_load_own(ref, start, queries) for ref in (query_ref, out_ref, gradient_ref))
    total = sums_ref[:]
    inner = jnp.sum(o.astype(jnp.float32) * g.astype(jnp.float32), axis=-1)
    inner_ref[:] = inner

    def of_keys(i, of_query):
      k, v, logits = _of_keys_block(i, blocks.keys, keys, q, key_ref, value_ref, term_refs,
                                    kept_ref)
      weights = jnp.exp2(logits - total[:, None])
      of_logits = weights * (triton.dot(g, v.T) - inner[:, None])
      return of_query + triton.dot(of_logits.astype(k.dtype), k)

    of_query = jax.lax.fori_loop(0, pl.cdiv(keys, blocks.keys), of_keys,
                                 jnp.zeros((blocks.queries, dim), jnp.float32))
    _store(of_query_ref, of_query, start, queries)

  return tuple(_kernel(
      body, 'attention_of_queries', blocks, grid, operands,
      [(jax.ShapeDtypeStruct(query.shape, query.dtype), block),
       (jax.ShapeDtypeStruct(sums.shape, jnp.float32), numbers(blocks.queries))]))


def _of_keys(query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None,
             kept: Array | None, gradient: Array, sums: Array, inner: Array,
             ) -> tuple[Array, Array]:
  """The gradients of keys and of values. Logits are transposed: keys are rows."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton
  batch, queries, heads, dim = query.shape
  keys = key.shape[1]
  blocks = BACKWARD_KEYS.of(queries, keys)
  rows, all_rows, numbers, all_numbers, term = _specs(dim)
  grid = (pl.cdiv(keys, blocks.keys), heads, batch)
  terms = [_padded_term(x, blocks.queries, blocks.keys).swapaxes(-1, -2)
           for x in _terms(bias, mask, query.dtype)]
  block = rows(blocks.keys)
  operands = [(query, all_rows(queries)), (key, block), (value, block),
              (gradient, all_rows(queries)), (sums, all_numbers(sums.shape[-1])),
              (inner, all_numbers(inner.shape[-1])), *((x, term(x, blocks.keys)) for x in terms)]
  if kept is not None:
    kept = _padded(kept, blocks.keys)
    operands.append((kept, numbers(blocks.keys)))

  def body(query_ref, key_ref, value_ref, gradient_ref, sums_ref, inner_ref, *refs):
    *term_refs, of_key_ref, of_value_ref = refs
    kept_ref = None if kept is None else term_refs.pop()
    start = pl.program_id(0) * blocks.keys
    k, v = (_load_own(ref, start, keys) for ref in (key_ref, value_ref))
    if kept_ref is not None:
      v *= kept_ref[:][:, None]

    def of_queries(i, carry):
      of_key, of_value = carry
      first = i * blocks.queries
      at = pl.ds(first, blocks.queries)
      q, g = (_load(ref, first, blocks.queries, queries) for ref in (query_ref, gradient_ref))
      weights = jnp.exp2(_logits(k, q, term_refs, at, True) - sums_ref[at][None, :])
      of_value += triton.dot(weights.astype(g.dtype), g)
      of_logits = weights * (triton.dot(v, g.T) - inner_ref[at][None, :])
      return of_key + triton.dot(of_logits.astype(q.dtype), q), of_value

    zeros = jnp.zeros((blocks.keys, dim), jnp.float32)
    of_key, of_value = jax.lax.fori_loop(0, pl.cdiv(queries, blocks.queries), of_queries,
                                         (zeros, zeros))
    if kept_ref is not None:
      of_value *= kept_ref[:].astype(jnp.float32)[:, None]
    _store(of_key_ref, of_key, start, keys)
    _store(of_value_ref, of_value, start, keys)

  like = jax.ShapeDtypeStruct(key.shape, key.dtype)
  return tuple(_kernel(body, 'attention_of_keys', blocks, grid, operands,
                       [(like, block), (like, block)]))


def _of_bias(query: Array, key: Array, value: Array, bias: Array, mask: Array | None,
             kept: Array | None, gradient: Array, sums: Array, inner: Array) -> Array:
  """The gradient of a bias that is trained, which has all the logits' in memory."""
  queries = query.shape[1]
  product = functools.partial(jnp.einsum, 'BTNH,BSNH->BNTS', preferred_element_type=jnp.float32)
  logits = product(query, key)
  for term in _terms(bias, mask, query.dtype):
    logits += term.astype(jnp.float32)
  weights = jnp.exp2(logits * _LOG2_E - sums[..., :queries, None])
  if kept is not None:
    value = value * kept.swapaxes(-1, -2)[..., None]
  of_logits = weights * (product(gradient, value) - inner[..., :queries, None])
  shared = [axis for axis in (0, 1) if bias.shape[axis] == 1]
  return jnp.sum(of_logits, shared, keepdims=True).astype(bias.dtype)

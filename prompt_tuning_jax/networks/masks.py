"""Which query may attend to which key. Masks are boolean, True where attention is allowed."""

import jax
import jax.numpy as jnp

from prompt_tuning_jax.types import Array

MASKED = -1e10  # a logit of what is not allowed


def pairwise(query_valid: Array, key_valid: Array) -> Array:
  """Pairs of live positions: [B, T] bool, [B, S] bool -> [B, 1, T, S] bool."""
  return (query_valid[:, :, None] & key_valid[:, None, :])[:, None]


def keys(valid: Array) -> Array:
  """Live keys, for all queries: those that are padding may see them too. [B, S] -> [B, 1, 1, S]."""
  return valid[:, None, None]


def same_segment(query_segments: Array, key_segments: Array) -> Array:
  """Pairs within one packed example: [B, T] int, [B, S] int -> [B, 1, T, S] bool."""
  return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def causal(query_positions: Array, key_positions: Array) -> Array:
  """Keys not after the query: [T] int, [S] int -> [1, 1, T, S] bool."""
  return (key_positions[None, :] <= query_positions[:, None])[None, None]


def positions(live: Array, segments: Array | None = None) -> Array:
  """How many live tokens of its text stand before each token; 0 for what is not live.

  Texts of one row stand one after another: [B, T] bool, [B, T] int -> [B, T] int32.
  """
  return jnp.where(live, count_before(live, segments), 0)


def count_before(counted: Array, segments: Array | None = None) -> Array:
  """How many tokens that count stand before each token of its text, which is one of the row's.

  [B, T] bool, [B, T] int -> [B, T] int32.
  """
  count = jnp.cumsum(counted, axis=-1, dtype=jnp.int32) - counted
  if segments is None:
    return count
  starts = jnp.diff(segments, axis=-1, prepend=-1) != 0
  return count - jax.lax.cummax(jnp.where(starts, count, 0), axis=1)

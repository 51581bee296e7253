"""Decoding token by token, in one compiled loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax.types import Array

START = 0  # The padding id, from which T5 starts; what takes its place, a network may say.


def sample(next_logits: Callable[[Any, Array], tuple[Array, Any]], cache: Any, key: Array,
           batch: int, max_length: int, choose: Callable[[Array, Array], Array],
           eos_id: int = 1) -> Array:
  """Draws tokens until every row has ended or has `max_length` of them.

  Args:
    next_logits: (cache, tokens [B]) -> (logits [B, V], cache); the first call gets the start id.
    choose: (key, logits [B, V]) -> tokens [B].

  Returns:
    [B, max_length] int32: each row's tokens, its end-of-sequence id included, then 0.
  """

  def unfinished(carry):
    position, _, ended, _, _ = carry
    return (position < max_length) & ~jnp.all(ended)

  def advance(carry):
    position, last, ended, tokens, cache = carry
    logits, cache = next_logits(cache, last)
    chosen = choose(jax.random.fold_in(key, position), logits)
    chosen = jnp.where(ended, 0, chosen)
    tokens = jax.lax.dynamic_update_slice(tokens, chosen[:, None], (0, position))
    return position + 1, chosen, ended | (chosen == eos_id), tokens, cache

  start = jnp.full((batch,), START, jnp.int32)
  ended = jnp.zeros((batch,), bool)
  tokens = jnp.zeros((batch, max_length), jnp.int32)
  return jax.lax.while_loop(unfinished, advance, (0, start, ended, tokens, cache))[3]

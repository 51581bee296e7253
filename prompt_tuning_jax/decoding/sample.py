"""Decoding token by token, in one compiled loop that can be left and entered again."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.decoding.stop_strings import Stops
from prompt_tuning_jax.types import Array

START = 0  # The padding id, from which T5 starts; what takes its place, a network may say.
NextLogits = Callable[[Any, Array], tuple[Array, Any]]


@flax.struct.dataclass
class State:
  """How far a batch has been decoded.

  Attributes:
    position: [] int32, how many tokens the rows have.
    last: [B] int32, what the network is given next.
    ended: [B] bool, which rows get no more tokens.
    tokens: [B, max_length] int32: each row's tokens, its end-of-sequence id included, then 0.
    log_likelihood: [B] float32, the sum of log p of these tokens in nats, under the network's own
      distribution, whatever they were chosen by.
    cache: what the network keeps.
    stops: the rows' stop strings, if there are any.
  """

  position: Array
  last: Array
  ended: Array
  tokens: Array
  log_likelihood: Array
  cache: Any
  stops: Stops | None = None


def start(cache: Any, batch: int, max_length: int, stops: Stops | None = None) -> State:
  """Before the first token."""
  return State(jnp.zeros((), jnp.int32), jnp.full((batch,), START, jnp.int32),
               jnp.zeros((batch,), bool), jnp.zeros((batch, max_length), jnp.int32),
               jnp.zeros((batch,), jnp.float32), cache, stops)


def advance(next_logits: NextLogits, state: State, choose: Callable[[Array, Array], Array],
            limits: Array | None = None, steps: Array | int | None = None,
            eos_id: Array | int = 1) -> State:
  """Goes on until every row has ended, or for `steps` tokens more.

  A row ends with its end-of-sequence id, at its limit, or with the token that completes one of its
  stop strings. Any number of calls gives the same bits as one.

  Args:
    next_logits: (cache, tokens [B]) -> (logits [B, V], cache); the first call gets the start id.
    choose: (logits [B, V], position []) -> tokens [B] (`token_choice`).
    limits: [B] int32, the most tokens of each row, at most max_length, which is the default.
    steps: by default as many as it takes.
  """
  batch, max_length = state.tokens.shape
  limits = jnp.full((batch,), max_length) if limits is None else jnp.minimum(limits, max_length)
  until = max_length if steps is None else jnp.minimum(state.position + steps, max_length)
  state = state.replace(ended=state.ended | (state.position >= limits))

  def step(state: State) -> State:
    logits, cache = next_logits(state.cache, state.last)
    chosen = choose(logits, state.position)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
    live, position = ~state.ended, state.position + 1
    chosen = jnp.where(live, chosen, 0)
    ended = state.ended | (chosen == eos_id) | (position >= limits)
    stops = state.stops
    if stops is not None:
      stops, found = stops.append(chosen)
      ended |= live & found
    tokens = jax.lax.dynamic_update_slice(state.tokens, chosen[:, None], (0, state.position))
    return State(position, chosen, ended, tokens,
                 state.log_likelihood + jnp.where(live, log_p, 0.0), cache, stops)

  return jax.lax.while_loop(
      lambda state: (state.position < until) & ~jnp.all(state.ended), step, state)

"""Beam search: the N best texts of each example that a search of width N finds.

Live beams are extended by 2N candidates a step, as in T5X and Hugging Face, so that N of them go
on even if N end. As in Hugging Face, a candidate ends as a hypothesis only from among the N best,
so one beam is greedy decoding; and what stands at the limit is a hypothesis too, without an
end-of-sequence id.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.decoding.sample import START, NextLogits
from prompt_tuning_jax.types import Array


@flax.struct.dataclass
class BrevityPenalty:
  """log p / ((5 + n) / 6) ** alpha (Wu et al. 2016, equation 14), T5X's; n counts the end."""

  alpha: float = 0.6

  def score(self, log_likelihood: Array, length: Array) -> Array:
    """What hypotheses are ranked by."""
    return log_likelihood / ((5 + jnp.asarray(length, jnp.float32)) / 6) ** self.alpha

  def bound(self, log_likelihood: Array, length: Array, limit: Array) -> Array:
    """No continuation has a higher score: log p only falls, n is between length and limit."""
    return jnp.maximum(self.score(log_likelihood, length), self.score(log_likelihood, limit))


@flax.struct.dataclass
class _Beams:
  """position []; done [B]; tokens [B, N, max_length] and log p [B, N] of live beams, best first;
  tokens and scores of hypotheses, best first, with -inf where there is none."""

  position: Array
  done: Array
  live: Array
  log_likelihood: Array
  last: Array
  hypotheses: Array
  scores: Array
  cache: Any


def _leading(cache: Any, rows: Array) -> Any:
  return jax.tree.map(lambda leaf: leaf[rows] if jnp.ndim(leaf) else leaf, cache)


def beam_search(next_logits: NextLogits, cache: Any, batch: int, max_length: int, beams: int,
                penalty: Any = BrevityPenalty(), eos_id: Array | int = 1,
                take_rows: Callable[[Any, Array], Any] = _leading) -> tuple[Array, Array]:
  """The best texts by their scores.

  A row is done when no live beam can beat the worst of its N hypotheses (`penalty.bound`) or, with
  one beam, as soon as it has one.

  Args:
    next_logits: (cache, tokens [B*N]) -> (logits [B*N, V], cache); the first call gets the start
      id.
    cache: what `take_rows` takes, by default leaves with a leading axis of B*N and scalars, which
      are the same for all.
    take_rows: (cache, rows [B*N]) -> the cache with these rows of it.

  Returns:
    (tokens [B, N, max_length] int32, each with its end-of-sequence id, then 0;
    scores [B, N] float32), best first; -inf and all 0 where there are fewer texts than beams.
  """
  def step(state: _Beams) -> _Beams:
    logits, cache = next_logits(state.cache, state.last.reshape(-1))
    log_p, parents, tokens = _candidates(logits, state.log_likelihood)
    candidates = jnp.take_along_axis(state.live, parents[..., None], axis=1)
    candidates = jax.lax.dynamic_update_slice(candidates, tokens[..., None],
                                              (0, 0, state.position))
    length = state.position + 1
    ends = tokens == eos_id
    finish = ends | (length >= max_length)
    finish &= (jnp.arange(2 * beams) < beams) & ~state.done[:, None]
    scores, hypotheses = _best(
        beams, jnp.concatenate([state.scores, jnp.where(
            finish, penalty.score(log_p, length), -jnp.inf)], axis=1),
        jnp.concatenate([state.hypotheses, candidates], axis=1))
    log_p, live, parents, tokens = _best(beams, jnp.where(ends, -jnp.inf, log_p), candidates,
                                         parents, tokens)
    full = jnp.all(scores > -jnp.inf, axis=1)
    beaten = penalty.bound(log_p[:, 0], length, max_length) <= scores[:, -1]
    done = state.done | full & (beaten | (beams == 1))
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    cache = take_rows(cache, rows)
    return _Beams(length, done, live, log_p, tokens, hypotheses, scores, cache)

  nothing = jnp.zeros((batch, beams, max_length), jnp.int32)
  none = jnp.full((batch, beams), -jnp.inf)
  first = _Beams(jnp.zeros((), jnp.int32), jnp.zeros((batch,), bool), nothing,
                 none.at[:, 0].set(0.0), jnp.full((batch, beams), START, jnp.int32), nothing, none,
                 cache)
  last = jax.lax.while_loop(
      lambda state: (state.position < max_length) & ~jnp.all(state.done), step, first)
  return last.hypotheses, last.scores


def _candidates(logits: Array, log_likelihood: Array) -> tuple[Array, Array, Array]:
  """logits: [B*N, V], log_likelihood: [B, N] -> log p, parent and token of the 2N best: [B, 2N]."""
  batch, beams = log_likelihood.shape
  size = logits.shape[-1]
  log_p = jax.nn.log_softmax(logits).reshape(batch, beams, size) + log_likelihood[..., None]
  best, index = jax.lax.top_k(log_p.reshape(batch, beams * size), 2 * beams)
  return best, index // size, (index % size).astype(jnp.int32)


def _best(count: int, scores: Array, *arrays: Array) -> tuple[Array, ...]:
  """The highest `count` of scores [B, M], and these entries of arrays [B, M, …]."""
  scores, index = jax.lax.top_k(scores, count)
  return scores, *(jnp.take_along_axis(
      array, index.reshape(*index.shape, *[1] * (array.ndim - 2)), axis=1) for array in arrays)

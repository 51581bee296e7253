"""How the next token is chosen from its logits: (logits [B, V], position []) -> [B] int32.

What a row is given depends on the row alone, never on the rest of the batch.
"""

import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax.types import Array

FIRST = 256  # so many of the most probable tokens are found without sorting all


@flax.struct.dataclass
class Greedy:
  """The most probable token; of equals, the one with the lowest id."""

  def __call__(self, logits: Array, position: Array) -> Array:
    """logits: [B, V] -> [B] int32."""
    del position
    # On a CPU argmax is one scalar loop, eight times as slow as a maximum and a minimum.
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    best = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.min(jnp.where((logits == best) | jnp.isnan(logits), ids, logits.shape[-1]), axis=-1)


@flax.struct.dataclass
class Sampling:
  """A draw from softmax(logits / temperature), cut to the most probable tokens; an entry a row.

  `top_k` keeps the k most probable tokens. `top_p` then keeps the fewest of these whose share of
  their probability is at least p (Holtzman et al. 2020, section 3.1), and always one.

  Attributes:
    temperature: [B] float32; 0 or less is greedy.
    top_k: [B] int32; 0 or less keeps all.
    top_p: [B] float32; 1 or more keeps all.
    seed: [B] uint32. The same seed draws the same tokens at the same logits.
  """

  temperature: Array
  top_k: Array
  top_p: Array
  seed: Array

  def __call__(self, logits: Array, position: Array) -> Array:
    """logits: [B, V], position: [] int -> [B] int32."""
    best = Greedy()(logits, position)
    drawn = jax.lax.cond(jnp.any(self.temperature > 0), self._draw, lambda *_: best, logits,
                         position)
    return jnp.where(self.temperature > 0, drawn, best)

  def _draw(self, logits: Array, position: Array) -> Array:
    temperature = jnp.where(self.temperature > 0, self.temperature, 1.0)[:, None]
    # The largest becomes 0, so that a small temperature overflows to -inf alone.
    logits = logits.astype(jnp.float32)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), position))(self.seed)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    whole = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)
    # A token's noise is its own, sorted or not, and so are a row's results: whether others in the
    # batch are cut, or need all to be sorted, changes nothing.
    cut = (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1))
    kept = jax.lax.cond(jnp.any(cut), self._of_kept, lambda *_: whole, scaled, noise, cut)
    return jnp.where(cut, kept, whole)

  def _of_kept(self, scaled: Array, noise: Array, cut: Array) -> Array:
    """The token with the largest sum among those that top_k and top_p keep; of equal logits, they
    keep those with the lowest ids."""
    # To sort all takes 50 times as long as to find these, which nearly always are enough.
    first, enough = self._of_first(min(FIRST, scaled.shape[-1]), scaled, noise)
    return jax.lax.cond(
        jnp.all(enough | ~cut), lambda *_: first,
        lambda *both: jnp.where(enough, first, self._of_first(scaled.shape[-1], *both)[0]),
        scaled, noise)

  def _of_first(self, count: int, scaled: Array, noise: Array) -> tuple[Array, Array]:
    """scaled: [B, V], at most 0 -> what is chosen if the `count` most probable tokens hold all that
    are kept, and whether they do: [B] each."""
    best, tokens = jax.lax.top_k(scaled, count)
    noise = jnp.take_along_axis(noise, tokens, axis=-1)
    rank = jnp.arange(count)
    top_k, top_p = self.top_k[:, None], self.top_p[:, None]
    kept = (top_k <= 0) | (rank < top_k)
    masses = jnp.where(kept, jnp.exp(best), 0.0)
    total = jnp.where(top_k > 0, jnp.sum(masses, axis=-1, keepdims=True),
                      jnp.sum(jnp.exp(scaled), axis=-1, keepdims=True))
    reached = jnp.cumsum(masses, axis=-1) / total
    kept &= (top_p >= 1) | (reached - masses / total < top_p) | (rank == 0)
    chosen = jnp.argmax(jnp.where(kept, best + noise, -jnp.inf), axis=-1, keepdims=True)
    enough = (((self.top_k > 0) & (self.top_k <= count))
              | ((self.top_k <= 0) & (self.top_p < 1) & (reached[:, -1] >= self.top_p)))
    return jnp.take_along_axis(tokens, chosen, axis=-1)[:, 0].astype(jnp.int32), enough

"""How the next token is chosen from its logits. Each way is a frozen dataclass."""

import dataclasses

import jax.numpy as jnp

from prompt_tuning_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Greedy:
  """The most probable token; of equals, the one with the lowest id."""

  def __call__(self, key: Array, logits: Array) -> Array:
    """logits: [B, V] -> [B] int32; the key is not used."""
    del key
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)

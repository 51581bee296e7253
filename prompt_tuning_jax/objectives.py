"""Losses over target tokens."""

import jax
import jax.numpy as jnp

from prompt_tuning_jax.types import Array

IMPOSSIBLE = -1e9  # A logit below it is a mask's.


def cross_entropy(logits: Array, targets: Array, z_loss: float = 0.0,
                  label_smoothing: float = 0.0) -> Array:
  """Cross entropy of each token in nats, with T5X's z-loss and label smoothing.

  z-loss adds z_loss * log(Z)^2, which keeps the softmax normaliser Z near 1. Smoothing gives the
  target probability 1 - label_smoothing and shares the rest among all other words that the network
  can give (not a masked one), if there are any; the entropy of that target distribution is taken
  off, so a perfect prediction costs 0.

  Args:
    logits: [..., V] float32.
    targets: [...] int32 in [0, V).

  Returns:
    [...] float32.
  """
  log_z = jax.nn.logsumexp(logits, axis=-1)
  log_likelihood = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - log_z
  loss = -log_likelihood
  if label_smoothing:
    possible = logits > IMPOSSIBLE
    size = jnp.sum(possible, axis=-1)
    low = jnp.where(size > 1, label_smoothing / jnp.maximum(size - 1, 1), 0.0)
    high = jnp.where(size > 1, 1.0 - label_smoothing, 1.0)
    every = jnp.sum(jnp.where(possible, logits, 0.0), axis=-1) - size * log_z
    entropy = -(high * jnp.log(high) + (size - 1) * low * jnp.log(low + 1e-20))
    loss = -(high - low) * log_likelihood - low * every - entropy
  return loss + z_loss * jnp.square(log_z)


def token_log_likelihood(logits: Array, targets: Array) -> Array:
  """log p(target) of each token: [..., V] float32, [...] int32 -> [...] float32 (nats)."""
  return -cross_entropy(logits, targets)

"""What changes while training: nothing of the frozen base is in here."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax.types import PyTree


@flax.struct.dataclass
class TrainState:
  """Everything that a resumed run needs of the device.

  Attributes:
    step: [] int32, updates done.
    trainable: the leaves that train, a subtree of the model's parameters.
    opt_state: the optimizer's state, for those leaves alone.
    diverged_at: [] int32, the first step whose loss or gradient was not finite, or -1. From that
      step on nothing is updated, so `trainable` stays the last good one.
  """

  step: jax.Array
  trainable: PyTree
  opt_state: optax.OptState
  diverged_at: jax.Array


def create(trainable: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
  """The state at step 0. What the optimizer keeps of a leaf is split as the leaf is."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable),
                    jnp.full((), -1, jnp.int32))

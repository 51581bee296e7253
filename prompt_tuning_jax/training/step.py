"""One training step: the gradient of the trainable leaves alone, and their update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax import prompted_model
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts import weight_changes
from prompt_tuning_jax.training.state import TrainState
from prompt_tuning_jax.types import Batch, PyTree


def make_train_step(model: PromptedModel, optimizer: optax.GradientTransformation, seed: int,
                    z_loss: float = 0.0, label_smoothing: float = 0.0) -> Callable:
  """A compiled (state, frozen, batch) -> (state, metrics); `state` is donated.

  The frozen leaves are an argument, so they are neither differentiated, copied nor baked into the
  program. The dropout key is a function of seed and step, so a resumed run draws the same masks.

  Metrics are [] float32: loss (nats per target token), accuracy (teacher-forced), tokens,
  grad_norm.
  """

  def train_step(state: TrainState, frozen: PyTree, batch: Batch):
    dropout_key = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss(trainable):
      params = weight_changes.combined(trainable, frozen)
      return prompted_model.loss(model, params, batch, dropout_key, z_loss, label_smoothing)

    gradients, metrics = jax.grad(loss, has_aux=True)(state.trainable)
    norm = optax.global_norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)

    finite = (jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
              & jnp.isfinite(optax.global_norm(trainable)))
    good = finite & (state.diverged_at < 0)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
    updated = TrainState(
        step=state.step + 1,
        trainable=keep(trainable, state.trainable),
        opt_state=keep(opt_state, state.opt_state),
        diverged_at=jnp.where(finite | (state.diverged_at >= 0), state.diverged_at, state.step))
    return updated, {**metrics, 'grad_norm': norm}

  return jax.jit(train_step, donate_argnums=0)

"""One training step: the gradient of the trainable leaves alone, and their update."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax import param_paths, prompted_model
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.prompted_model import Choices, PromptedModel
from prompt_tuning_jax.prompts import weight_changes
from prompt_tuning_jax.training.state import TrainState
from prompt_tuning_jax.training.word_search import WordSearch
from prompt_tuning_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that decides a step of training, but for the state, the frozen leaves and the batch.

  The dropout key is a function of seed and step, so a resumed run draws the same masks.

  With `num_microbatches` the batch is gone through in so many parts, one after another, so that
  activations of one part are in memory at a time; the gradient is the whole batch's.

  `partitioner` says how the step is split over devices. With a `WordSearch` as the optimizer a step
  is one of search over prompts of words. With `choices` the loss is, or holds, that of labels among
  these (`prompted_model.loss`).
  """

  model: PromptedModel
  optimizer: optax.GradientTransformation | WordSearch
  seed: int = 0
  z_loss: float = 0.0
  label_smoothing: float = 0.0
  num_microbatches: int = 1
  partitioner: Partitioner = Partitioner()
  choices: Choices | None = None

  @property
  def guided(self) -> bool:
    """Whether a step takes gradients; where it does not, they are zeros that cost nothing."""
    return not isinstance(self.optimizer, WordSearch) or self.optimizer.guided

  def dropout_key(self, step: Array) -> Array:
    """The key of a step."""
    return jax.random.fold_in(jax.random.key(self.seed), step)

  def gradients(self, trainable: PyTree, frozen: PyTree, batch: Batch, dropout_key: Array,
                ) -> tuple[PyTree, dict[str, Array]]:
    """(gradients of the trainable leaves, metrics of `prompted_model.loss`)."""

    def loss(trainable, batch, dropout_key):
      trainable = trainable if self.guided else jax.lax.stop_gradient(trainable)
      params = weight_changes.combined(trainable, frozen)
      return prompted_model.loss(self.model, params, batch, dropout_key, self.z_loss,
                                 self.label_smoothing, self.choices)

    gradient = functools.partial(
        jax.grad(self.partitioner.rematerialized(loss), has_aux=True), trainable)
    if self.num_microbatches == 1:
      return gradient(batch, dropout_key)
    return _accumulated(gradient, batch, dropout_key, self.num_microbatches)

  def updated(self, state: TrainState, gradients: PyTree, metrics: dict[str, Array],
              frozen: PyTree, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """The state after a step with these gradients, as it was where they are not finite; metrics.
    """
    norm = optax.global_norm(gradients)
    if isinstance(self.optimizer, WordSearch):
      trainable, opt_state = self._searched(state, gradients, frozen, batch)
    else:
      updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.trainable)
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

  def _searched(self, state: TrainState, gradients: PyTree, frozen: PyTree,
                batch: Batch) -> tuple[PyTree, PyTree]:
    """What a step of search makes of (the trainable leaves, the search's state)."""
    def loss(trainable):  # The batch's, without dropout: prompts are compared.
      params = weight_changes.combined(trainable, frozen)
      return prompted_model.loss(self.model, params, batch, choices=self.choices)[1]['loss']

    table = param_paths.flatten(frozen)[self.model.network.config.embedding]
    key = jax.random.fold_in(self.dropout_key(state.step), 1)
    return self.optimizer.step(key, state.trainable, state.opt_state, gradients, table, loss)


def make_train_step(recipe: Recipe, shardings: TrainState | None = None) -> Callable:
  """A compiled (state, frozen, batch) -> (state, metrics); `state` is donated.

  `shardings` are those of the state as it comes out. The frozen leaves are an argument of the step,
  so they are neither differentiated, copied nor baked into the program.

  Metrics are [] float32: loss (nats per target token; per target with `choices`), accuracy
  (teacher-forced), tokens, grad_norm.
  """
  def train_step(state: TrainState, frozen: PyTree, batch: Batch):
    gradients, metrics = recipe.gradients(state.trainable, frozen, batch,
                                          recipe.dropout_key(state.step))
    return recipe.updated(state, gradients, metrics, frozen, batch)

  outputs = shardings and (shardings, recipe.partitioner.replicated)
  return recipe.partitioner.jit(train_step, donate_argnums=0, out_shardings=outputs)


def _accumulated(gradient: Callable, batch: Batch, key: Array, count: int) -> tuple[PyTree, dict]:
  """`gradient` (batch, key) -> (gradients, metrics) of a batch in `count` parts, summed up.

  Each part has every count-th row, so that all devices work on each. Means per target token are
  weighted by the tokens of their part.
  """
  rows = len(batch['decoder_target_tokens'])
  if rows % count:
    raise ValueError(f'BATCH_SIZE must be a multiple of num_microbatches, got {rows} and {count}.')
  parts = jax.tree.map(
      lambda x: x.reshape(rows // count, count, *x.shape[1:]).swapaxes(0, 1), dict(batch))

  def add(total, part):
    gradients, metrics = gradient(*part)
    weight = metrics.pop('tokens')
    weighted = jax.tree.map(lambda x: x * weight, (gradients, metrics))
    return jax.tree.map(jnp.add, total, (*weighted, weight)), None

  keys = jax.random.split(key, count)
  shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], (parts, keys)))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  tokens = zeros[1].pop('tokens')
  (gradients, metrics, tokens), _ = jax.lax.scan(add, (*zeros, tokens), (parts, keys))
  mean = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1), (gradients, metrics))
  return mean[0], {**mean[1], 'tokens': tokens}

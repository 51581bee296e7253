"""Steering: the vectors from which a frozen model writes a given sentence, for each its own.

Subramani et al. (2019), "Can unconditional language models recover arbitrary sentences?", and 2022,
"Extracting latent steering vectors". The vectors are virtual tokens, a prompt of one example: all
examples of a batch are optimised together, each as it would be alone, for no gradient, moment or
stopping rule has anything of another's.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning_jax import objectives, predictor, prompted_model
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.prompted_model import Added, PromptedModel
from prompt_tuning_jax.prompts.initializers import SampledVocabulary
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Settings:
  """How vectors are found: Adam, with a rate that falls linearly to 0.

  Args:
    length: P, vectors of each sentence.
    steps: at most; a sentence is done earlier once it is recovered.
    learning_rate: at the beginning. Elements of embeddings of a T5 are large.
    margin: a sentence is recovered when each of its tokens has a logit this much above all others'.
    seed: with a sentence's number, decides the words whose embeddings it starts from.
  """

  length: int = 1
  steps: int = 500
  learning_rate: float = 4.0
  margin: float = 0.01
  seed: int = 0

  def __post_init__(self):
    for name in ('length', 'steps'):
      if type(getattr(self, name)) is not int or getattr(self, name) < 1:
        raise ValueError(f'{name} should be a whole number from 1, got {getattr(self, name)!r}.')
    for name in ('learning_rate', 'margin'):
      if not 0 < getattr(self, name) < float('inf'):
        raise ValueError(f'{name} should be above 0, got {getattr(self, name)!r}.')
    if self.seed < 0:
      raise ValueError(f'seed should be 0 or more, got {self.seed!r}.')


@flax.struct.dataclass
class Found:
  """What was found for each sentence of a batch.

  Attributes:
    vectors: [B, P, D] float32: those that recover it, or those of the lowest loss.
    loss: [B] float32, nats per token with them.
    accuracy: [B] float32, the share of its tokens that are foretold from those before.
    steps: [B] int32, after how many steps it was recovered, or -1.
    tokens: [B, max_decode_length] int32, what the model writes from them, greedily.
  """

  vectors: Array
  loss: Array
  accuracy: Array
  steps: Array
  tokens: Array


class Steerer:
  """Finds vectors for lists of sentences, a batch at a time."""

  def __init__(self, model: PromptedModel, params: PyTree, vocabulary: Any, settings: Settings,
               batch_size: int = 32, max_decode_length: int = 64):
    self._config, self._params, self._vocabulary = model.network.config, params, vocabulary
    self._settings, self._batch_size, self._most = settings, batch_size, max_decode_length
    self._find = jax.jit(functools.partial(find, model, settings, max_decode_length))

  def __call__(self, table: Array, inputs: Sequence[Sequence[int]],
               targets: Sequence[Sequence[int]], numbers: Sequence[int] | None = None) -> Found:
    """What was found for each pair of ids (end-of-sequence ids included), in their order.

    Args:
      table: [V, D], the base's embeddings.
      numbers: of the sentences, by default their indices.

    Raises:
      ValueError: a text is longer than what is generated, the network has too few positions, or an
        input too few masks.
    """
    numbers = list(range(len(targets))) if numbers is None else numbers
    lengths = list(map(len, targets))
    if max(lengths) > self._most:
      raise ValueError(f'A text has {max(lengths)} tokens, more than max_decode_length, '
                       f'{self._most}.')
    predictor.check_positions(self._config, [len(ids) + self._settings.length for ids in inputs],
                              [self._most] * len(inputs))
    predictor.check_masks(self._config, inputs, lengths)
    order = sorted(range(len(targets)), key=lambda i: (len(targets[i]), len(inputs[i]), i))
    parts = []
    for live, rows in predictor.full_batches(order, self._batch_size):
      batch = batch_of(self._config, self._settings.length, [inputs[i] for i in rows],
                       [targets[i] for i in rows])
      first = start(self._settings, table, [numbers[i] for i in rows], self._vocabulary)
      found = jax.device_get(self._find(self._params, batch, first, self._vocabulary.eos_id))
      parts.append(jax.tree.map(lambda leaf, count=len(live): leaf[:count], found))
    back = np.argsort(order)
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[back], *parts)


def batch_of(config: Any, length: int, inputs: Sequence[Sequence[int]],
             targets: Sequence[Sequence[int]]) -> Batch:
  """A batch in which example b has the virtual tokens V + b P, …, V + b P + P - 1 before its input.
  """
  own = [VirtualTokens(config.vocab_size, length, offset=b * length) for b in range(len(inputs))]
  return batches.batch_of(inputs, targets, own)


def start(settings: Settings, table: Array, numbers: Sequence[int],
          vocabulary: Any = None) -> Array:
  """The embeddings of frequent words [B, P, D] that sentences of these numbers start from."""
  key, draw = jax.random.key(settings.seed), SampledVocabulary()
  return jnp.stack([draw(jax.random.fold_in(key, number), settings.length, table, vocabulary)
                    for number in numbers])


@flax.struct.dataclass
class _Search:
  step: Array
  vectors: Array
  moments: PyTree
  best: Found


def find(model: PromptedModel, settings: Settings, max_decode_length: int, params: PyTree,
         batch: Batch, first: Array, eos_id: Array | int) -> Found:
  """Optimises the vectors of each example of a batch (`batch_of`) from `first` [B, P, D]."""
  optimizer = optax.adam(optax.linear_schedule(settings.learning_rate, 0.0, settings.steps))
  count = len(first)

  def step(search: _Search) -> _Search:
    measured = functools.partial(_measured, model, params, batch, settings.margin)
    gradient, (loss, accuracy, recovered) = jax.grad(measured, has_aux=True)(search.vectors)
    live, best = search.best.steps < 0, search.best
    better = live & ((loss < best.loss) | recovered)
    best = best.replace(
        vectors=jnp.where(better[:, None, None], search.vectors, best.vectors),
        loss=jnp.where(better, loss, best.loss),
        accuracy=jnp.where(better, accuracy, best.accuracy),
        steps=jnp.where(live & recovered, search.step, best.steps))
    updates, moments = optimizer.update(gradient, search.moments)
    return _Search(search.step + 1, optax.apply_updates(search.vectors, updates), moments, best)

  unknown = Found(first, jnp.full(count, jnp.inf), jnp.zeros(count), jnp.full(count, -1, jnp.int32),
                  jnp.zeros((count, max_decode_length), jnp.int32))
  last = jax.lax.while_loop(
      lambda search: (search.step <= settings.steps) & jnp.any(search.best.steps < 0), step,
      _Search(jnp.zeros((), jnp.int32), first, optimizer.init(first), unknown))
  tokens = prompted_model.predict(model, params, batch['encoder_input_tokens'],
                                  max_decode_length, eos_id=eos_id,
                                  added=_added(last.best.vectors))
  return last.best.replace(tokens=tokens)


def _measured(model: PromptedModel, params: PyTree, batch: Batch, margin: float,
              vectors: Array) -> tuple[Array, tuple[Array, Array, Array]]:
  """(sum of the examples' losses, (their losses, accuracies, whether recovered): [B] each)."""
  targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
  logits = prompted_model.logits(model, params, batch, added=_added(vectors))
  mean = lambda values: jnp.sum(values * weights, axis=1) / jnp.sum(weights, axis=1)
  losses = mean(objectives.cross_entropy(logits, targets))
  of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)
  is_target = targets[..., None] == jnp.arange(logits.shape[-1])
  above = of_target[..., 0] - jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=-1)
  recovered = jnp.all((above >= margin) | (weights == 0), axis=1)
  return jnp.sum(losses), (losses, mean(above > 0), recovered)


def _added(vectors: Array) -> Added:
  return Added(virtual_embeddings=vectors.reshape(-1, vectors.shape[-1]))

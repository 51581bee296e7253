"""Search over prompts of words: what takes the place of an optimizer where every row of a prompt
stays a row of the base's embedding table.

A search keeps some prompts, the best first, and is a kind of step: new prompts are proposed, all of
them are measured on the batch, and the best stay. Of equals the older stays, so on its batch no
step makes the prompt worse.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.networks import int8
from prompt_tuning_jax.types import Array, PyTree


def first_order_changes(gradient: Array, row: Array, table: Any) -> Array:
  """How much the loss changes, to first order, when a word takes the place of `row`.

  (e_w - row) . gradient for every word w (Ebrahimi et al. 2018, "HotFlip"; Shin et al. 2020,
  equation 2, without the term that all words share).

  Args:
    gradient, row: [D], the loss's gradient at the row, and the row.
    table: [V, D], which may have eight bits.

  Returns:
    [V] float32, nats.
  """
  return int8.dot(gradient, table.T, jnp.float32) - jnp.dot(row, gradient)


@dataclasses.dataclass(frozen=True)
class FirstOrder:
  """At one position, drawn at random, the words that the gradient likes best (Shin et al. 2020,
  "AutoPrompt", section 2.2).

  `candidates` is how many of them are measured.
  """

  candidates: int = 32

  guided = True

  def __call__(self, key: Array, prompts: Array, gradient: Array, table: Any,
               words: Array) -> Array:
    """prompts: [M, P, D], the best first, gradient: [P, D] of it, words: [W] ids -> [C, P, D]."""
    position = jax.random.randint(key, (), 0, prompts.shape[1])
    changes = first_order_changes(gradient[position], prompts[0, position], table)
    _, best = jax.lax.top_k(-changes[words], min(self.candidates, len(words)))
    rows = int8.take(table, words[best], jnp.float32)
    return jnp.repeat(prompts[:1], len(rows), axis=0).at[:, position].set(rows)


@dataclasses.dataclass(frozen=True)
class Mutations:
  """Children of the prompts that are kept, in each of which one word is another, drawn at random.

  No gradient: the model is only asked how good a prompt is.

  Args:
    candidates: children of a step.
    crossover: the share of children that have two parents; each word is then one's or the other's.
  """

  candidates: int = 32
  crossover: float = 0.5

  guided = False

  def __post_init__(self):
    if not 0 <= self.crossover <= 1:
      raise ValueError(f'crossover should be a share from 0 to 1, got {self.crossover!r}.')

  def __call__(self, key: Array, prompts: Array, gradient: Array, table: Any,
               words: Array) -> Array:
    """prompts: [M, P, D], words: [W] ids -> [C, P, D]."""
    del gradient
    count, (kept, length, _) = self.candidates, prompts.shape
    keys = iter(jax.random.split(key, 6))
    parents, others = (prompts[jax.random.randint(next(keys), (count,), 0, kept)] for _ in range(2))
    crossed = jax.random.uniform(next(keys), (count, 1)) < self.crossover
    taken = crossed & jax.random.bernoulli(next(keys), shape=(count, length))
    children = jnp.where(taken[..., None], others, parents)
    positions = jax.random.randint(next(keys), (count,), 0, length)
    drawn = words[jax.random.randint(next(keys), (count,), 0, len(words))]
    return children.at[jnp.arange(count), positions].set(int8.take(table, drawn, jnp.float32))


@dataclasses.dataclass(frozen=True)
class WordSearch:
  """A step of search: propose, measure, keep the best.

  Args:
    moves: what proposes prompts, `FirstOrder` or `Mutations`.
    keep: M, how many prompts go from step to step; `FirstOrder` changes the best alone.
    words: [W], the ids that a prompt may have; set by the method.
  """

  moves: FirstOrder | Mutations = FirstOrder()
  keep: int = 1
  words: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

  def __post_init__(self):
    for name, count in (('keep', self.keep), ('candidates', self.moves.candidates)):
      if type(count) is not int or count < 1:
        raise ValueError(f'{name} should be a whole number from 1, got {count!r}.')

  @property
  def guided(self) -> bool:
    """Whether it asks for gradients."""
    return self.moves.guided

  def init(self, trainable: PyTree) -> Array:
    """M times the prompt: [M, P, D]."""
    [prompt] = jax.tree.leaves(trainable)
    return jnp.repeat(prompt[None], self.keep, axis=0)

  def step(self, key: Array, trainable: PyTree, prompts: Array, gradients: PyTree, table: Any,
           loss: Callable[[PyTree], Array]) -> tuple[PyTree, Array]:
    """(the best prompt as the trainable leaves, the prompts that are kept [M, P, D]).

    Args:
      trainable: the one leaf [P, D] of a prompt, whose `gradients` these are.
      prompts: [M, P, D], the best first, which is `trainable`.
      table: [V, D], of the base.
      loss: of such leaves on the batch, [] float32.
    """
    [gradient], tree = jax.tree.leaves(gradients), jax.tree.structure(trainable)
    proposed = self.moves(key, prompts, gradient, table, jnp.asarray(self.words))
    both = jnp.concatenate([prompts, proposed])
    losses = jax.lax.map(lambda prompt: loss(tree.unflatten([prompt])), both)
    kept = both[best_different(losses, self.keep)]
    return tree.unflatten([kept[0]]), kept


def best_different(losses: Array, count: int) -> Array:
  """Indices of the `count` smallest losses [N], best first, of equal ones the first alone.

  Prompts of one loss are one prompt. Only where there are too few different ones, others follow.
  """
  order = jnp.argsort(jnp.where(jnp.isnan(losses), jnp.inf, losses), stable=True)
  ranked = losses[order]
  again = jnp.concatenate([jnp.zeros(1, bool), ranked[1:] == ranked[:-1]])
  return order[jnp.argsort(again, stable=True)][:count]

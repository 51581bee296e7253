"""Prompts of several tasks that train together on a mixture."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.prompts.task_prompts import Combine, Sum, TaskPrompts
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.training.evaluate import labels_of
from prompt_tuning_jax.training.methods import check_length, save_file
from prompt_tuning_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class MultitaskPrompts:
  """A prompt of `length` rows for each task of a mixture; saved as one prompt file a task.

  Args:
    combine: how a task's prompt is made of rows that all tasks share and rows of its own
      (`prompts.task_prompts`: Separate, Sum, Product, Concatenation).
    tasks, labels: set by `for_data`.
  """

  length: int = 100
  placement: str = 'before'
  initializer: Callable = initializers.SampledVocabulary()
  combine: Combine = Sum()
  tasks: tuple[str, ...] = ()
  labels: tuple[tuple[str, ...] | None, ...] = ()

  trainable = ('prompt/.*',)

  def __post_init__(self):
    if not isinstance(self.combine, Combine):
      raise ValueError(f'COMBINE should be %SUM, %PRODUCT, %CONCATENATION or %SEPARATE, got '
                       f'{self.combine!r}.')

  def for_data(self, caches: Sequence[TokenCache], base: Base, vocabulary: Any,
               seed: int) -> 'MultitaskPrompts':
    """This method for the tasks of these caches."""
    if len(caches) < 2:
      raise ValueError('Prompts of several tasks need a mixture of at least two: '
                       "--gin_file=task/mixture.gin --gin.MIXTURE_TASKS=('sst2', 'mrpc').")
    labels = [labels_of(cache.rows) for cache in caches]
    return dataclasses.replace(self, tasks=tuple(cache.meta['task'] for cache in caches),
                               labels=tuple(each and tuple(each) for each in labels))

  def model(self, config: Any) -> PromptedModel:
    """The network with this method's modules around it."""
    return PromptedModel(config.network(), self._bank(config.emb_dim))

  def virtual_tokens(self, num_embeddings: int) -> tuple[VirtualTokens, ...]:
    """What the data path writes into the inputs of each task."""
    check_length(self.length)
    return tuple(VirtualTokens(num_embeddings, self.length, self.placement, i * self.length)
                 for i in range(len(self.tasks)))

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """The leaves this method adds to the base's tree: `prompt/own`, and `prompt/shared` if any."""
    make = lambda i, rows: self.initializer(jax.random.fold_in(key, i), rows, base.embedding,
                                            vocabulary)
    own = jnp.stack([make(i, self.length) for i in range(len(self.tasks))])
    shared, own = self.combine.start(
        make(len(self.tasks), self.combine.lengths(self.length)[0]), own)
    return {'prompt': {'own': own, **({'shared': shared} if len(shared) else {})}}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes `path`/TASK.safetensors for every task: prompts like any other, each alone."""
    leaves = jax.device_get(trained['prompt'])
    bank = np.asarray(self._bank(leaves['own'].shape[-1]).apply({'params': leaves}))
    prompts = bank.reshape(len(self.tasks), self.length, -1)
    for task, labels, prompt in zip(self.tasks, self.labels, prompts, strict=True):
      own = {'task': task, 'labels': labels, 'metric': about['tasks'].get(task)}
      save_file(path / task, {'prompt': {'embedding': prompt}}, base, own,
                method='multitask_prompts', placement=self.placement, length=self.length)

  def _bank(self, width: int) -> TaskPrompts:
    shared, own = self.combine.lengths(self.length)
    return TaskPrompts(self.combine, (shared, width), (len(self.tasks), own, width))

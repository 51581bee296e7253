"""Several tasks trained on together. Their examples stay apart, so each may have its own prompt."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from prompt_tuning_jax.data.seqio_task import SeqioTask

Rate = Callable[[Sequence[int]], list[float]]


@dataclasses.dataclass(frozen=True)
class Proportional:
  """As many examples of a task as it has, but counted as `cap` if it has more (Raffel et al. 2020,
  section 3.5.2: artificial data set size limit)."""

  cap: int | None = None

  def __post_init__(self):
    if self.cap is not None and (type(self.cap) is not int or self.cap < 1):
      raise ValueError(f'MIXTURE_CAP should be a whole number from 1, or None, got {self.cap!r}.')

  def __call__(self, sizes: Sequence[int]) -> list[float]:
    return [float(min(size, self.cap or size)) for size in sizes]


@dataclasses.dataclass(frozen=True)
class Temperature:
  """Capped sizes to the power 1 / temperature: 1 is proportional, very large is equal (same
  section)."""

  temperature: float = 2.0
  cap: int | None = 1 << 21

  def __post_init__(self):
    if not self.temperature > 0:
      raise ValueError(f'temperature must be positive, got {self.temperature}.')

  def __call__(self, sizes: Sequence[int]) -> list[float]:
    return [rate ** (1 / self.temperature) for rate in Proportional(self.cap)(sizes)]


@dataclasses.dataclass(frozen=True)
class Equal:
  """As many examples of each task."""

  def __call__(self, sizes: Sequence[int]) -> list[float]:
    return [1.0] * len(sizes)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Tasks (`SeqioTask`, `TextFile`) and their shares of a batch.

  Args:
    tasks: the tasks, each tokenised into a cache of its own and evaluated on its own.
    rate: sizes of the training splits -> shares: `Proportional`, `Temperature` or `Equal`.
  """

  tasks: Sequence[Any]
  rate: Rate = Proportional()

  def __post_init__(self):
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    names = [task.name for task in self.tasks]
    if not names or len(set(names)) < len(names):
      raise ValueError(f'A mixture needs tasks of different names, got {names}.')

  @property
  def name(self) -> str:
    return '+'.join(task.name for task in self.tasks)


def seqio_mixture(names: Sequence[str], rate: Rate = Proportional(),
                  modules: Sequence[str] = ('prompt_tuning_jax.tasks',),
                  tfds_data_dir: str | None = None, train_split: str = 'train',
                  eval_split: str | None = 'validation',
                  max_examples: int | None = None) -> Mixture:
  """The mixture of several SeqIO tasks; what follows `rate` is as of `SeqioTask`."""
  if not isinstance(names, list | tuple):
    raise ValueError(f"MIXTURE_TASKS should be names such as ('sst2', 'mrpc'), got {names!r}.")
  return Mixture([SeqioTask(name, modules, tfds_data_dir, train_split, eval_split, max_examples)
                  for name in names], rate)


def as_mixture(task: Any) -> Mixture:
  """A task alone is a mixture of one."""
  return task if isinstance(task, Mixture) else Mixture([task])

"""The training loop, and who takes its steps."""

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from prompt_tuning_jax.checkpoints.training_state import TrainingStates
from prompt_tuning_jax.data.prefetch import Prefetch
from prompt_tuning_jax.training import checks, report
from prompt_tuning_jax.training.evaluate import Evaluation
from prompt_tuning_jax.training.progress import Progress
from prompt_tuning_jax.training.state import TrainState
from prompt_tuning_jax.training.step import Recipe, make_train_step
from prompt_tuning_jax.types import Batch, PyTree

logger = logging.getLogger(__name__)
# Yields (step, state), is sent (state, metrics) after that step.
Steps = Generator[tuple[int, TrainState], tuple[TrainState, dict[str, jax.Array]], Any]
AHEAD = 4  # steps the host may queue before the device has done them: a stop must not wait long


class Diverged(ValueError):
  """The loss or its gradient was not finite."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When things happen, in steps; 0 turns a thing off. No steps evaluate what there is.

  Training stops early once `patience` evaluations in a row have not been better than the best.
  """

  train_steps: int
  eval_period: int = 0
  save_period: int = 0
  log_period: int = 50
  patience: int = 0

  def __post_init__(self):
    checks.counts(0, **vars(self))


@dataclasses.dataclass
class Records:
  """What the host remembers between steps and across restarts.

  `run` is what a run may not change when it resumes; the best's and the last's are those of
  `Evaluation`: rank, value, and the values of all metrics.
  """

  run: dict[str, Any] = dataclasses.field(default_factory=dict)
  best_rank: float | None = None
  best_value: float | None = None
  best_values: dict[str, float] = dataclasses.field(default_factory=dict)
  best_step: int = 0
  last_value: float | None = None
  last_values: dict[str, float] = dataclasses.field(default_factory=dict)
  last_step: int = 0
  evaluations_since_best: int = 0
  seconds: float = 0.0  # of training, compilation and evaluation, up to the last save
  best_seconds: float = 0.0
  peak_bytes: int = 0
  stopped: bool = False  # by a signal, the last time
  # The metrics of the steps that no line has told yet.
  pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def add(self, evaluation: Evaluation, step: int) -> bool:
    """Takes an evaluation; True if it is the best so far."""
    rank = evaluation.rank
    self.last_value, self.last_step = evaluation.value, step
    self.last_values = dict(evaluation.values)
    if np.isfinite(rank) and (self.best_rank is None or rank > self.best_rank):
      self.best_rank, self.best_value, self.best_step = rank, evaluation.value, step
      self.best_values, self.best_seconds = self.last_values, self.seconds
      self.evaluations_since_best = 0
      return True
    self.evaluations_since_best += 1
    return False


@dataclasses.dataclass(frozen=True)
class Training:
  """A run that is ready for its first step.

  Attributes:
    state: before its first step; a resumed run goes on with another.
    batch_at: the batch of a step, counted from 0.
    steps: given what tells whether to stop (`stop_requested`), the run itself as a generator: it
      asks for steps and does all that comes between them; it returns the report.
  """

  recipe: Recipe
  state: TrainState
  frozen: PyTree
  batch_at: Callable[[int], Batch]
  steps: Callable[[Callable[[int], bool]], Steps]


def alone(training: Training) -> Any:
  """Takes every step of one training; returns its report."""
  with stop_requested() as stop, contextlib.closing(training.steps(stop)) as running:
    try:
      step, state = next(running)
      train_step = make_train_step(training.recipe,
                                   jax.tree.map(lambda leaf: leaf.sharding, state))
      put = lambda step: training.recipe.partitioner.put_batch(training.batch_at(step))
      with contextlib.closing(Prefetch(put, step)) as batches:
        while True:
          _, state = running.send(train_step(state, training.frozen, next(batches)))
    except StopIteration as finished:
      return finished.value


def train(state: TrainState, stop: Callable[[int], bool],
          evaluate: Callable[[PyTree], Evaluation] | None, save: Callable[[str, PyTree], Any],
          states: TrainingStates, progress: Progress, records: Records, schedule: Schedule,
          task: str, per_batch: float) -> Steps:
  """Trains from `state.step` to the last step, or to SIGTERM, early stopping or divergence.

  A generator: whoever drives it takes the steps, of this run alone or of several together. Returns
  the last state.

  Args:
    evaluate: trainable leaves -> their evaluation.
    per_batch: examples of a batch, for the rate that is reported.
    save: ('best' or 'last', trainable leaves); writes them as the user's file.

  Raises:
    Diverged: the loss stopped being finite; the last good leaves have been saved.
  """
  pending, step = records.pending, int(state.step)
  began = time.monotonic() - records.seconds

  def measure() -> None:
    _check_divergence(state, states, save)
    states.settle()  # what is being written tells of the records as they are
    evaluation = evaluate(state.trainable)
    records.seconds = time.monotonic() - began
    best = records.add(evaluation, step)
    progress.report_evaluation(step, task, evaluation.values, best)
    if best:
      save('best', state.trainable)

  if evaluate and not schedule.train_steps and records.last_value is None:
    measure()
  stopped, saved = False, None
  while step < schedule.train_steps and not (stopped := stop(step)):
    if schedule.patience and records.evaluations_since_best >= schedule.patience:
      logger.info('Stopped early: no evaluation was better than the one at step %d.',
                  records.best_step)
      break
    state, metrics = yield step, state
    pending.append(metrics)
    if not schedule.log_period:
      del pending[:-AHEAD]  # the last step tells of these alone: a long run must not gather more
    jax.block_until_ready(pending[-AHEAD:1 - AHEAD])  # none right after a report
    step += 1
    last = step == schedule.train_steps
    if last or _due(step, schedule.log_period):
      _check_divergence(state, states, save)
      states.check()
      progress.report_training(step, task, _mean(pending), per_batch)
      pending.clear()
    if evaluate and (last or _due(step, schedule.eval_period)):
      measure()
    if _due(step, schedule.save_period):
      _save_all(state, states, records, save, began)
      saved = step
  records.stopped = stopped
  if stopped:
    logger.warning('Stopping at step %d as a signal asked; the same command resumes there.', step)
  if saved != step:
    _save_all(state, states, records, save, began)
  states.wait()
  return state


def _save_all(state: TrainState, states: TrainingStates, records: Records, save: Callable,
              began: float) -> None:
  _check_divergence(state, states, save)
  records.seconds = time.monotonic() - began
  records.pending[:] = [{name: float(value) for name, value in metrics.items()}
                        for metrics in jax.device_get(records.pending)]
  records.peak_bytes = max(records.peak_bytes, report.peak_memory()['peak_bytes'])
  # A state that is whole has its files beside it.
  states.save(int(state.step), state, dataclasses.asdict(records),
              first=lambda saved: save('last', saved.trainable))


def _due(step: int, period: int) -> bool:
  return period > 0 and step % period == 0


def _mean(metrics: list[dict[str, Any]]) -> dict[str, float]:
  """Means over steps, in float64: the same of what was saved and of what is on the device."""
  fetched = jax.device_get(metrics)
  return {name: float(np.mean([m[name] for m in fetched], dtype=np.float64))
          for name in fetched[0]}


def _check_divergence(state: TrainState, states: TrainingStates, save: Callable) -> None:
  at = int(state.diverged_at)
  if at < 0:
    return
  states.settle()
  save('last', state.trainable)
  raise Diverged(f'The loss or its gradient was not finite at step {at}; the last good weights '
                 '(before that step) are saved. Lower the learning rate, or look at the data of '
                 'that step.')


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[int], bool]]:
  """Gives what tells, before each step, whether to stop there.

  SIGTERM and SIGINT ask for it; a second SIGINT interrupts. SIGTERM to one of several processes
  stops all of them before the same step (JAX's preemption service).
  """
  if jax.process_count() > 1:
    yield multihost_utils.reached_preemption_sync_point
    return
  stop = threading.Event()

  def ask(number, _):
    if stop.is_set() and number == signal.SIGINT:
      raise KeyboardInterrupt
    stop.set()

  numbers = (signal.SIGTERM, signal.SIGINT)
  in_main = threading.current_thread() is threading.main_thread()
  previous = [signal.signal(number, ask) for number in numbers] if in_main else []
  try:
    yield lambda step: stop.is_set()
  finally:
    for number, handler in zip(numbers, previous, strict=False):
      signal.signal(number, handler)

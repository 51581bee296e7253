"""The training loop."""

import dataclasses
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax.checkpoints.training_state import TrainingStates
from prompt_tuning_jax.training.progress import Progress
from prompt_tuning_jax.training.state import TrainState
from prompt_tuning_jax.types import Batch, PyTree

logger = logging.getLogger(__name__)
AHEAD = 4  # steps the host may queue before the device has done them: a stop must not wait long


class Diverged(ValueError):
  """The loss or its gradient was not finite."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When things happen, in steps; 0 turns a thing off.

  Training stops early once `patience` evaluations in a row have not been better than the best.
  """

  train_steps: int
  eval_period: int = 0
  save_period: int = 0
  log_period: int = 50
  patience: int = 0


@dataclasses.dataclass
class Records:
  """What the host remembers between steps and across restarts."""

  best_value: float | None = None
  best_step: int = 0
  evaluations_since_best: int = 0

  def add(self, value: float, step: int) -> bool:
    """Takes an evaluation's value, larger being better; True if it is the best so far."""
    if np.isfinite(value) and (self.best_value is None or value > self.best_value):
      self.best_value, self.best_step, self.evaluations_since_best = float(value), step, 0
      return True
    self.evaluations_since_best += 1
    return False


def train(state: TrainState, frozen: PyTree, batches: Iterator[Batch], train_step: Callable,
          evaluate: Callable[[PyTree], tuple[float, dict[str, float]]] | None,
          save_best: Callable[[PyTree, int, float], Any], save_last: Callable[[PyTree, int], Any],
          states: TrainingStates, progress: Progress, records: Records, schedule: Schedule,
          task: str, batch_size: int) -> TrainState:
  """Trains from `state.step` to the last step, or to SIGTERM, early stopping or divergence.

  Args:
    evaluate: trainable leaves -> (the value that chooses the best, all metrics).
    save_best, save_last: write the trainable leaves as the user's file.

  Raises:
    Diverged: the loss stopped being finite; the last good leaves have been saved.
  """
  pending: list[dict[str, jax.Array]] = []
  step = int(state.step)
  with _stop_requested() as stop:
    while step < schedule.train_steps and not stop.is_set():
      state, metrics = train_step(state, frozen, next(batches))
      pending.append(metrics)
      jax.block_until_ready(pending[-AHEAD:][0])
      step += 1
      last = step == schedule.train_steps
      if last or _due(step, schedule.log_period):
        progress.report_training(step, task, _mean(pending), batch_size)
        pending.clear()
        _check_divergence(state, save_last)
      if evaluate and (last or _due(step, schedule.eval_period)):
        _check_divergence(state, save_last)
        value, values = evaluate(state.trainable)
        best = records.add(value, step)
        progress.report_evaluation(step, task, values, best)
        if best:
          save_best(state.trainable, step, value)
      if _due(step, schedule.save_period):
        _check_divergence(state, save_last)
        states.save(step, state, dataclasses.asdict(records))
        save_last(state.trainable, step)
      if schedule.patience and records.evaluations_since_best >= schedule.patience:
        logger.info('Stopped early: no evaluation was better than the one at step %d.',
                    records.best_step)
        break
    if stop.is_set():
      logger.warning('Stopped by a signal at step %d; the same command resumes there.', step)
  _check_divergence(state, save_last)
  states.save(step, state, dataclasses.asdict(records))
  save_last(state.trainable, step)
  return state


def _due(step: int, period: int) -> bool:
  return period > 0 and step % period == 0


def _mean(metrics: list[dict[str, jax.Array]]) -> dict[str, float]:
  """Means over steps."""
  fetched = jax.device_get(metrics)
  return {name: float(np.mean([m[name] for m in fetched])) for name in fetched[0]}


def _check_divergence(state: TrainState, save_last: Callable) -> None:
  at = int(state.diverged_at)
  if at < 0:
    return
  save_last(state.trainable, at)
  raise Diverged(f'The loss or its gradient was not finite at step {at}; the last good weights '
                 '(before that step) are saved. Lower the learning rate, or look at the data of '
                 'that step.')


class _stop_requested:  # pylint: disable=invalid-name
  """Context in which SIGTERM and SIGINT ask for a clean stop after the current step."""

  def __enter__(self) -> threading.Event:
    self._event = threading.Event()
    self._previous = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, lambda *_: self._event.set())
    return self._event

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

"""The loop's own behaviour: best, early stopping, divergence, signals, reports."""

import itertools
import json
import os
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.training_state import TrainingStates
from prompt_tuning_jax.training import loop
from prompt_tuning_jax.training.evaluate import Evaluation
from prompt_tuning_jax.training.progress import Progress
from prompt_tuning_jax.training.state import TrainState


def driven(running, step):
  """Takes every step, counted from 0; returns what the run returns."""
  try:
    number, state = next(running)
    for batch in itertools.count(number):
      _, state = running.send(step(state, {}, batch))
  except StopIteration as finished:
    return finished.value


def run(folder, schedule, values=(), step_hook=lambda step: None, diverge_at=None):
  """Runs the loop over a stand-in step that counts; returns what happened."""
  seen = types.SimpleNamespace(best=[], last=[], records=loop.Records())

  def save(name, trainable):
    value = (seen.records.best_step, seen.records.best_value) if name == 'best' else int(
        trainable['w'][0])
    getattr(seen, name).append(value)

  state = TrainState(jnp.zeros((), jnp.int32), {'w': jnp.zeros(2)}, (), jnp.full((), -1, jnp.int32))

  def step(state, frozen, batch):
    step_hook(batch)
    at = jnp.where(batch == diverge_at, batch, state.diverged_at) if diverge_at else (
        state.diverged_at)
    metrics = {'loss': np.float32(batch)}
    return state.replace(step=state.step + 1, diverged_at=at,
                         trainable={'w': state.trainable['w'] + 1}), metrics

  remaining = iter(values)
  evaluate = (lambda _: Evaluation('accuracy', {'accuracy': next(remaining)})) if values else None
  states, progress = TrainingStates(folder / 'checkpoints'), Progress(folder, schedule.train_steps)
  try:
    steps = lambda stop: loop.train(
        state, stop, evaluate, save, states, progress, seen.records, schedule, 'task', per_batch=4)
    with loop.stop_requested() as stop:
      seen.state = driven(steps(stop), step)
  finally:
    states.close()
    progress.close()
  return seen


def test_the_best_is_saved_when_it_is_found(tmp_path):
  seen = run(tmp_path, loop.Schedule(4, eval_period=1), values=[.5, .7, .6, .7])
  assert seen.best == [(1, .5), (2, .7)]
  assert seen.last[-1] == 4
  assert seen.records.best_step == 2


def test_training_stops_when_evaluations_no_longer_get_better(tmp_path):
  seen = run(tmp_path, loop.Schedule(100, eval_period=2, patience=2), values=[.5, .4, .4, .9])
  assert int(seen.state.step) == 6


def test_divergence_stops_with_the_step_and_saves_the_last_good_weights(tmp_path):
  with pytest.raises(loop.Diverged, match='at step 3'):
    run(tmp_path, loop.Schedule(20, log_period=2), diverge_at=3)
  assert TrainingStates(tmp_path / 'checkpoints').restore_latest({}) is None


def test_sigterm_saves_and_returns_after_the_step(tmp_path):
  hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 5 else None
  seen = run(tmp_path, loop.Schedule(100), step_hook=hook)
  assert int(seen.state.step) == 6 and seen.last == [6]
  assert (tmp_path / 'checkpoints' / '6').is_dir()


def test_a_step_that_was_just_saved_is_not_saved_again(tmp_path):
  assert run(tmp_path / 'end', loop.Schedule(4, save_period=2)).last == [2, 4]
  hook = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
  assert run(tmp_path / 'stop', loop.Schedule(100, save_period=4), step_hook=hook).last == [4]


def test_metrics_are_one_object_a_line_and_a_restart_writes_no_step_twice(tmp_path):
  run(tmp_path, loop.Schedule(6, eval_period=3, log_period=2), values=[.5, .6])
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [(line['step'], line['split']) for line in lines] == [
      (2, 'train'), (3, 'validation'), (4, 'train'), (6, 'train'), (6, 'validation')]
  assert lines[0]['loss'] == .5 and lines[1]['accuracy'] == .5 and lines[0]['task'] == 'task'
  Progress(tmp_path, 6, first_step=3).close()
  assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2


def test_the_host_waits_for_the_step_before_the_last_three_and_for_no_later_one(
    tmp_path, monkeypatch):
  waited = []
  wait = lambda metrics: waited.append([int(each['loss']) for each in metrics])
  monkeypatch.setattr(loop.jax, 'block_until_ready', wait)
  run(tmp_path, loop.Schedule(12, log_period=6))
  assert waited == [[], [], [], [0], [1], [2], [], [], [], [6], [7], [8]]
  waited.clear()
  run(tmp_path / 'silent', loop.Schedule(6, log_period=0))
  assert waited == [[], [], [], [0], [1], [2]]


def test_a_run_that_tells_nothing_gathers_nothing(tmp_path):
  run(tmp_path, loop.Schedule(20, log_period=0))
  line, = map(json.loads, (tmp_path / 'metrics.jsonl').open())
  last = range(20 - loop.AHEAD, 20)
  assert (line['step'], line['loss']) == (20, sum(last) / len(last))


def test_curves_and_events_are_written(tmp_path):
  progress = Progress(tmp_path, 10)
  for step in (5, 10):
    progress.report_training(step, 'task', {'loss': 1 / step}, 2)
    progress.report_evaluation(step, 'task', {'accuracy': float('nan')}, best=False)
  progress.plot()
  progress.close()
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
  from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
  events = list(EventFileLoader(str(next(tmp_path.glob('events.*')))).Load())
  assert {value.tag for event in events for value in event.summary.value} == {
      'train/loss', 'train/examples_per_second', 'validation/accuracy'}

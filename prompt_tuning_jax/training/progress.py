"""What a run reports: MODEL_DIR/metrics.jsonl, TensorBoard events, a progress line, curves.png."""

import io
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Mapping

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from prompt_tuning_jax.checkpoints.atomic_write import atomic_file, told

logger = logging.getLogger(__name__)


class Progress:
  """Writes each report to every place at once; a resumed run goes on in the same files.

  `first_step` is where this run (re)starts: lines of later steps, left by a killed process, are
  taken out, so that metrics.jsonl holds every step once. `config` is kept as config.gin. `push` is
  called after each report, with False for those of training: see `cloud_storage.Mirror`.
  """

  def __init__(self, folder: pathlib.Path, total_steps: int, first_step: int = 0,
               config: str | None = None, push: Callable[[bool], None] = lambda soon: None):
    if config is not None:
      with atomic_file(folder / 'config.gin') as temporary:
        temporary.write_text(config, encoding='utf-8')
    self._path = folder / 'metrics.jsonl'
    self._drop_after(first_step)
    with told(folder):
      # Not buffered: after a full disk, there is nothing left that closing could fail to write.
      self._lines = self._path.open('ab', buffering=0)
      name = f'events.out.tfevents.{_after_all(folder)}.{first_step:08d}'
      self._events = RecordWriter((folder / name).open('xb', buffering=0))
      self._event(event_pb2.Event(wall_time=time.time(), file_version='brain.Event:2'))
      restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      self._event(event_pb2.Event(wall_time=time.time(), step=first_step + 1, session_log=restart))
    self._folder, self._total_steps, self._push = folder, total_steps, push
    self._last_step, self._last_time = first_step, time.monotonic()

  def _drop_after(self, step: int) -> None:
    if not self._path.is_file():
      return
    kept, num_later = [], 0
    for line in self._path.read_text(encoding='utf-8', errors='replace').splitlines():
      try:
        if json.loads(line)['step'] <= step:
          kept.append(line + '\n')
        else:
          num_later += 1
      except (ValueError, KeyError, TypeError, RecursionError):
        logger.warning('Dropped a broken line of %s.', self._path)
    if num_later:
      logger.warning('Dropped the %d lines of %s that tell of steps after %d: no saved state has '
                     'them, they are taken again.', num_later, self._path, step)
    with atomic_file(self._path) as temporary:
      temporary.write_text(''.join(kept), encoding='utf-8')

  def _event(self, event: event_pb2.Event) -> None:
    self._events.write(event.SerializeToString())

  def report(self, step: int, split: str, task: str, values: Mapping[str, float]) -> None:
    """Writes one line {'step', 'split', 'task', name: value, …} and the same to TensorBoard."""
    values = {name: float(value) for name, value in values.items()}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    line = {'step': step, 'split': split, 'task': task, **finite}
    summary = summary_pb2.Summary(value=[
        summary_pb2.Summary.Value(tag=f'{split}/{name}', simple_value=value)
        for name, value in values.items()])
    with told(self._path.parent):
      _append(self._lines, (json.dumps(line) + '\n').encode())
      self._event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

  def report_training(self, step: int, task: str, values: Mapping[str, float],
                      examples_per_batch: float) -> None:
    """Reports the training metrics and prints the progress line."""
    now = time.monotonic()
    rate = (step - self._last_step) / max(now - self._last_time, 1e-9)
    self._last_step, self._last_time = step, now
    values = {**values, 'examples_per_second': rate * examples_per_batch}
    self.report(step, 'train', task, values)
    self._push(False)
    logger.info('step %d/%d  loss %.4f  %.1f examples/s  ETA %s', step, self._total_steps,
                values['loss'], values['examples_per_second'],
                _clock((self._total_steps - step) / rate if rate > 0 else math.inf))

  def report_evaluation(self, step: int, task: str, values: Mapping[str, float],
                        best: bool) -> None:
    """Reports an evaluation; its time does not count against examples/s."""
    self.report(step, 'validation', task, values)
    self._push(True)
    shown = '  '.join(f'{name} {value:.4g}' for name, value in values.items())
    logger.info('step %d/%d  validation: %s%s', step, self._total_steps, shown,
                '  (best so far)' if best else '')
    self._last_step, self._last_time = step, time.monotonic()

  def plot(self) -> None:
    """Draws every metric over the steps into curves.png."""
    import matplotlib  # slow to import, and used once a run
    matplotlib.use('Agg')
    from matplotlib import pyplot
    series: dict[str, dict[str, list]] = {}
    for line in self._path.read_text(encoding='utf-8').splitlines():
      row = json.loads(line)
      for name in row.keys() - {'step', 'split', 'task', 'tokens', 'examples_per_second'}:
        if row[name] is not None:
          series.setdefault(name, {}).setdefault(row['split'], []).append((row['step'], row[name]))
    if not series:
      return
    figure, axes = pyplot.subplots(1, len(series), figsize=(4 * len(series), 3), squeeze=False)
    for axis, (name, splits) in zip(axes[0], sorted(series.items()), strict=True):
      for split, points in sorted(splits.items()):
        axis.plot(*zip(*points, strict=True), label=split)
      axis.set(title=name, xlabel='step')
      axis.legend()
    figure.tight_layout()
    with atomic_file(self._folder / 'curves.png') as temporary:
      figure.savefig(temporary, dpi=100, format='png')
    pyplot.close(figure)

  def close(self) -> None:
    """Closes the files."""
    self._lines.close()
    self._events.close()


class Unwritten:
  """What a process reports that is not the first of a run: nothing."""

  report_training = report_evaluation = close = lambda self, *_: None


def _after_all(folder: pathlib.Path) -> int:
  """The time in seconds, or later: TensorBoard reads event files in the order of their names."""
  there = [int(name.split('.')[3]) for path in folder.glob('events.out.tfevents.*.*')
           if (name := path.name).split('.')[3].isdecimal()]
  return max([int(time.time()), *(second + 1 for second in there)])


def _append(file: io.FileIO, line: bytes) -> None:
  """Writes all of a line: a nearly full disk takes a piece before it refuses the rest."""
  while line:
    line = line[file.write(line):]


def _clock(seconds: float) -> str:
  if not math.isfinite(seconds):
    return '?'
  minutes, seconds = divmod(int(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02d}:{seconds:02d}'

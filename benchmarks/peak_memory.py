"""Peak memory of a training step, for benchmarks: measured in a fresh process, Linux alone."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

STEPS = 3
_STATUS = pathlib.Path('/proc/self/status')
_CLEAR = pathlib.Path('/proc/self/clear_refs')


def _status(name: str) -> int:
  """A field of this process's status, in bytes: VmRSS is resident now, VmHWM was at most."""
  line = next(line for line in _STATUS.read_text('utf-8').splitlines() if line.startswith(name))
  return int(line.split()[1]) * 1024


def _peak(run: Callable[[], None], times: int) -> int:
  """The most bytes that were resident while `run` ran."""
  _CLEAR.write_text('5', encoding='utf-8')  # VmHWM starts again from what is resident now
  for _ in range(times):
    run()
  return _status('VmHWM')


def measured(make: Callable[[], Callable[[], None]]) -> dict[str, int]:
  """Bytes of the steps that `make` prepares, in this process, which should do nothing else.

  Returns:
    at_rest: resident with imports and weights, before the first step.
    first_step: most during the first step, compilation included.
    steps: most during those after it.
    steps_alone: `steps` without `at_rest`.
  """
  run = make()
  at_rest = _status('VmRSS')
  first, steps = _peak(run, 1), _peak(run, STEPS)
  return {'at_rest': at_rest, 'first_step': first, 'steps': steps, 'steps_alone': steps - at_rest}


def of_process(*command: str) -> dict[str, int]:
  """What another process of this Python measures and prints as the last line of its output."""
  done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f'{" ".join(command)} failed:\n{done.stderr[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])

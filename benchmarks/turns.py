"""Runs that are compared take turns (A B A B …): how benchmarks time them.

They stand in one process or, where they would be in each other's way (`Apart`), in one each.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

Run = Callable[[], None]
CLOCKS = {'seconds': time.perf_counter, 'processor_seconds': time.process_time}


def timed(run: Run) -> dict[str, float]:
  """{clock: seconds} of one turn."""
  starts = {clock: now() for clock, now in CLOCKS.items()}
  run()
  return {clock: now() - starts[clock] for clock, now in CLOCKS.items()}


def serve(make: Callable[[], Run]) -> None:
  """A turn for each line of the input, until it ends; prints what each took.

  What else is printed, by libraries say, goes to stderr.
  """
  answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
  os.dup2(2, 1)
  run = make()
  for _ in sys.stdin:
    print(json.dumps(timed(run)), file=answers, flush=True)


class Apart:
  """A run in another process of this Python, in whose script `serve` takes the turns.

  The process ends with the `with` block.
  """

  def __init__(self, *command: str):
    self._command = command
    self._process = subprocess.Popen([sys.executable, *command], stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, text=True)

  def __enter__(self) -> 'Apart':
    return self

  def __exit__(self, *error) -> None:
    self._process.kill()
    self._process.communicate()

  def turn(self) -> dict[str, float]:
    """As `timed`. Raises SystemExit where the process has ended."""
    try:
      self._process.stdin.write('\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # it has no answer either
    answer = self._process.stdout.readline()
    if not answer:
      raise SystemExit(f'{" ".join(self._command)} failed ({self._process.wait()}): see above.')
    return json.loads(answer)


def take_turns(runs: dict[str, Run | Apart], repeats: int, before: int = 2,
               settle: int = 0) -> dict[str, dict[str, list[float]]]:
  """{clock: {run: the seconds of every turn}}, after `before` turns that compile and warm up.

  A turn that is timed comes behind `settle` of the same run that are not. Where another process has
  just given its memory back, the system takes a second or two to hand it on; in training, where a
  step follows one of its own, nobody waits for that.
  """
  taken = {clock: {name: [] for name in runs} for clock in CLOCKS}
  turn = lambda run: run.turn() if isinstance(run, Apart) else timed(run)
  for run in runs.values():
    for _ in range(before):
      turn(run)
  for _ in range(repeats):
    for name, run in runs.items():
      for _ in range(settle):
        turn(run)
      for clock, seconds in turn(run).items():
        taken[clock][name].append(seconds)
  return taken


def compared(runs: dict[str, Run | Apart], ratios: dict[str, tuple[str, str]],
             repeats: int, settle: int = 0) -> dict:
  """{clock: the runs' medians, and {ratio: (over, under)}: of medians, and quartiles of turns'}."""
  result = {}
  for clock, taken in take_turns(runs, repeats, settle=settle).items():
    medians = {name: statistics.median(times) for name, times in taken.items()}
    quartiles = lambda over, under, taken=taken: statistics.quantiles(
        [a / b for a, b in zip(taken[over], taken[under], strict=True)], method='inclusive')
    result[clock] = {'medians': medians,
                     'ratios': {name: {'of_medians': medians[over] / medians[under],
                                       'quartiles': quartiles(over, under)}
                                for name, (over, under) in ratios.items()}}
  return result

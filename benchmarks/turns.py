"""Runs that are compared take turns in one process (A B A B …): how benchmarks time them."""

import statistics
import time
from collections.abc import Callable

Run = Callable[[], None]
CLOCKS = {'seconds': time.perf_counter, 'processor_seconds': time.process_time}


def take_turns(runs: dict[str, Run], repeats: int,
               before: int = 2) -> dict[str, dict[str, list[float]]]:
  """{clock: {run: the seconds of every turn}}, after `before` turns that compile and warm up."""
  for run in runs.values():
    for _ in range(before):
      run()
  taken = {clock: {name: [] for name in runs} for clock in CLOCKS}
  for _ in range(repeats):
    for name, run in runs.items():
      starts = {clock: now() for clock, now in CLOCKS.items()}
      run()
      for clock, now in CLOCKS.items():
        taken[clock][name].append(now() - starts[clock])
  return taken


def compared(runs: dict[str, Run], ratios: dict[str, tuple[str, str]], repeats: int) -> dict:
  """{clock: the runs' medians, and {ratio: (over, under)}: of medians, and quartiles of turns'}."""
  result = {}
  for clock, taken in take_turns(runs, repeats).items():
    medians = {name: statistics.median(times) for name, times in taken.items()}
    quartiles = lambda over, under, taken=taken: statistics.quantiles(
        [a / b for a, b in zip(taken[over], taken[under], strict=True)], method='inclusive')
    result[clock] = {'medians': medians,
                     'ratios': {name: {'of_medians': medians[over] / medians[under],
                                       'quartiles': quartiles(over, under)}
                                for name, (over, under) in ratios.items()}}
  return result

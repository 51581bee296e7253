"""All comparisons of speed, one after another, in one table.

  TFDS_DATA_DIR=… PROMPT_TUNING_TEST_ASSETS=… python benchmarks/speed.py --output=speed.json

Each benchmark runs in a process of its own; what it compares takes turns. A line says
what is compared, our figure and the other's (seconds, unless it says otherwise), their ratio, the
target (`TARGETS`), and whether it holds. --quick takes few turns: for a look, not for figures.
--only runs some of the benchmarks. All sides have memory in huge pages, where the system gives them
to those that ask, unless GLIBC_TUNABLES in the environment says otherwise. A benchmark that fails
is a line that says so, and exit status 1. What needs an accelerator is accelerator.py's. With
--output the JSON holds the table and the whole JSON of each benchmark, and a plot stands beside it;
with --only as well, other benchmarks that the file has stay as they are.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
HUGE_PAGES = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'}
AT_LEAST, AT_MOST = '≥', '≤'
# {kind of line: (how, the ratio)}; a kind without a target is told without one.
TARGETS = {
    'end_to_end peft': (AT_LEAST, 2.0),
    'end_to_end ours_fixed': (AT_LEAST, 4.0),
    'host_pipeline': (AT_LEAST, 1.0),  # the host makes batches as fast as the step uses them up
    'against_peft prompt_tuning': (AT_LEAST, 1.5),
    'against_peft prompt_tuning memory': (AT_MOST, 0.8),
    'method_step_time': (AT_MOST, 0.75),
    'population': (AT_LEAST, 1.5),  # of the smallest batches
    'prediction mixed': (AT_MOST, 1.03),
    'prediction generation': (AT_LEAST, 3.0),
    'prediction rank': (AT_MOST, 1.3),
    'prediction ensemble': (AT_LEAST, 1.5),  # of small batches
    'kept_state': (AT_MOST, 0.01),
    'kept_state bytes': (AT_MOST, 3.0),
}


@dataclasses.dataclass(frozen=True)
class Line:
  """One comparison. `ratio` is as the benchmark defines it; the target is of that."""

  kind: str
  name: str
  ours: float
  peer: float
  ratio: float

  @property
  def target(self) -> str:
    """Such as '≥ 2'; '' where there is none."""
    relation, value = TARGETS.get(self.kind, ('', None))
    return '' if value is None else f'{relation} {value:g}'

  @property
  def holds(self) -> bool | None:
    """None where there is no target."""
    relation, value = TARGETS.get(self.kind, ('', None))
    if value is None:
      return None
    return self.ratio >= value if relation == AT_LEAST else self.ratio <= value


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A script beside this one: its flags, those for a quick look, and the lines of its JSON."""

  flags: tuple[str, ...]
  quick: tuple[str, ...]
  lines: Callable[[Any], Iterator[Line]]


def of_method_step_time(found: dict) -> Iterator[Line]:
  """A step of prompt tuning against one of model tuning."""
  seconds = found['median_seconds']
  yield Line('method_step_time', 'step: prompt tuning, model tuning', seconds['prompt_tuning'],
             seconds['model_tuning'], found['prompt_tuning_to_model_tuning'])
  if peaks := found.get('peak_bytes'):
    yield Line('method_step_time memory', 'peak bytes: prompt tuning, model tuning',
               peaks['prompt_tuning']['steps'], peaks['model_tuning']['steps'],
               found['peak_bytes_ratios']['steps'])


def of_against_peft(found: dict) -> Iterator[Line]:
  """A step against PEFT's, and the memory that it takes."""
  for network, methods in found.items():
    for method, both in methods.items():
      seconds, peak = both['time']['seconds'], both['memory']
      medians, bytes_of = seconds['medians'], peak['bytes']
      what = f'{method} of {network}, PEFT'
      yield Line(f'against_peft {method}', f'step: {what}', medians['ours'], medians['peft'],
                 seconds['ratios']['ours_speedup']['of_medians'])
      yield Line(f'against_peft {method} memory', f'peak bytes: {what}', bytes_of['ours']['steps'],
                 bytes_of['peft']['steps'], peak['ratios']['steps'])


def of_end_to_end(found: dict) -> Iterator[Line]:
  """SST-2 from texts to accuracy: rows a second."""
  rates, ratios = found['seconds']['rows_per_second'], found['seconds']['ours_to']
  for side, what in {'peft': 'PEFT with Trainer', 'ours_fixed': 'ours padded to 512',
                     'peft_fixed': 'PEFT padded to 512'}.items():
    if side not in ratios:
      continue
    yield Line(f'end_to_end {side}', f'SST-2 end to end, rows/s: {what}', rates['ours']['whole'],
               rates[side]['whole'], ratios[side]['whole'])


def of_prediction(found: dict) -> Iterator[Line]:
  """Many prompts, generation, ranking and ensembles."""
  shown = {'mixed': ('different_to_bank_of_one', '16_different', 'bank_of_one'),
           'generation': ('speedup', 'ours', 'hugging_face'),
           'rank': ('four_to_one', 'four_labels', 'one_label'),
           'ensemble': ('speedup', 'together', 'apart')}
  for comparison, by_threads in found.items():
    ratio, ours, peer = shown[comparison]
    for networks in by_threads.values():
      for network, entry in networks.items():
        for case, result in entry['results'].items():
          seconds = result['seconds']
          yield Line(f'prediction {comparison}', f'{case} of {network}: {ours}, {peer}',
                     seconds['medians'][ours], seconds['medians'][peer],
                     seconds['ratios'][ratio]['of_medians'])


def of_population(found: dict) -> Iterator[Line]:
  """A step of many prompts at once against one after another."""
  fewest = min(case['rows'] * case['input_length'] for case in found['cases'])
  for case in found['cases']:
    seconds, rows, length = case['passed']['median_seconds'], case['rows'], case['input_length']
    kind = 'population' if rows * length == fewest else 'population larger'
    yield Line(kind, f'{case["members"]} prompts, {rows} × {length} tokens each, '
               f'{case["network"]}: at once, in turn', seconds['at_once'], seconds['in_turn'],
               case['passed']['ratio'])


def of_host_pipeline(found: dict) -> Iterator[Line]:
  """The host's time for a batch against the step that uses it up."""
  for result in found['results']:
    seconds = result['median_seconds']
    yield Line('host_pipeline', f'{result["network"]}, {result["batching"]}: batch, step',
               seconds['batch'], seconds['step'], result['ratio'])


def of_kept_state(found: dict) -> Iterator[Line]:
  """What a save holds up of a step, the bytes of a state, and the time to the first step."""
  seconds = found['stall']['seconds']
  yield Line('kept_state', f'a save holds the loop, step of {found["stall"]["network"]}',
             seconds['loop_held'], seconds['step'], seconds['loop_held'] / seconds['step'])
  for state in found['bytes']:
    yield Line('kept_state bytes', f'bytes of a state, of a prompt of {state["prompt_of"]} '
               f'({state["optimizer"]})', state['saved_bytes'], state['trainable_bytes'],
               state['saved_bytes'] / state['trainable_bytes'])
  for base in dict.fromkeys(start['base'] for start in found['start']):
    of = {start['compilation_cache']: start['seconds']['all'] for start in found['start']
          if start['base'] == base}
    yield Line('kept_state start', f'to the first step of {base}: with a warm compilation cache, '
               'a cold one', of['warm'], of['cold'], of['warm'] / of['cold'])


BENCHMARKS = {
    'method_step_time': Benchmark((), ('--repeats=3',), of_method_step_time),
    'against_peft': Benchmark((), ('--networks=t5_1_1_small', '--repeats=3'), of_against_peft),
    'end_to_end': Benchmark((), ('--rows=64', '--eval_rows=32', '--turns=1'), of_end_to_end),
    'population': Benchmark((), ('--networks=mini', '--rows=1', '--input_lengths=16',
                                 '--repeats=3'), of_population),
    'prediction': Benchmark((), ('--networks=mini', '--repeats=3'), of_prediction),
    'host_pipeline': Benchmark((), ('--networks=mini', '--repeats=3'), of_host_pipeline),
    'kept_state': Benchmark((), ('--network=mini', '--repeats=5', '--starts=2'), of_kept_state),
}


def run(name: str, quick: bool, folder: pathlib.Path) -> Any:
  """What a benchmark wrote; its own output goes to stderr. Raises SystemExit where it fails."""
  benchmark, output = BENCHMARKS[name], folder / f'{name}.json'
  command = [sys.executable, str(HERE / f'{name}.py'), *benchmark.flags,
             *(benchmark.quick if quick else ()), f'--output={output}']
  print(' '.join(command), file=sys.stderr, flush=True)
  done = subprocess.run(command, stdout=sys.stderr, check=False, env={**HUGE_PAGES, **os.environ})
  if done.returncode or not output.exists():
    raise SystemExit(f'{name}.py ended with status {done.returncode}')
  return json.loads(output.read_text('utf-8'))


def table(lines: list[Line], failed: list[str]) -> str:
  """Markdown."""
  words = {None: '', True: 'yes', False: 'NO'}
  rows = [[line.name, f'{line.ours:.4g}', f'{line.peer:.4g}', f'{line.ratio:.2f}',
           line.target, words[line.holds]]
          for line in lines]
  rows += [[name, '', '', '', '', 'FAILED'] for name in failed]
  return '\n'.join(f'| {" | ".join(row)} |' for row in [
      ['what: ours, the other', 'ours', 'the other', 'ratio', 'target', 'holds'], ['---'] * 6,
      *rows])


def plot(lines: list[Line], output: pathlib.Path) -> None:
  """Every ratio as a bar, its target as a mark."""
  from matplotlib import figure
  picture = figure.Figure(figsize=(8, 0.6 + 0.28 * len(lines)), layout='constrained')
  axes = picture.subplots()
  colors = {None: 'C7', True: 'C0', False: 'C3'}
  for at, line in enumerate(reversed(lines)):
    axes.barh(at, line.ratio, color=colors[line.holds], height=0.6)
    if line.target:
      axes.plot([TARGETS[line.kind][1]] * 2, [at - 0.4, at + 0.4], color='black')
  axes.set_yticks(range(len(lines)), [line.name for line in reversed(lines)], fontsize=6)
  axes.set_xscale('log')
  axes.set_xlabel('ratio; the black mark is the target', fontsize=8)
  axes.spines[['top', 'right']].set_visible(False)
  picture.savefig(output, dpi=120)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', nargs='+', choices=BENCHMARKS, default=list(BENCHMARKS))
  parser.add_argument('--quick', action='store_true', help='few turns and the small networks')
  parser.add_argument('--output', type=pathlib.Path, metavar='FILE.json')
  flags = parser.parse_args()
  known, failed = {}, []
  if flags.output and flags.output.exists() and flags.only != list(BENCHMARKS):
    before = json.loads(flags.output.read_text('utf-8'))
    if before['quick'] != flags.quick:
      parser.error(f'{flags.output} has figures {"of" if before["quick"] else "without"} --quick: '
                   'name another --output.')
    known = before['benchmarks']
    failed = [name for name in before['failed'] if name not in flags.only]
  with tempfile.TemporaryDirectory() as folder:
    for name in flags.only:
      try:
        known[name] = run(name, flags.quick, pathlib.Path(folder))
      except SystemExit as error:
        print(error, file=sys.stderr)
        failed.append(name)
  found = {name: known[name] for name in BENCHMARKS if name in known}
  lines = [line for name in found for line in BENCHMARKS[name].lines(found[name])]
  print(table(lines, failed))
  if flags.output:
    flags.output.write_text(json.dumps({
        'quick': flags.quick, 'processor': platform.machine(), 'cores': os.cpu_count(),
        'load_average': os.getloadavg()[0], 'failed': failed,
        'lines': [{**dataclasses.asdict(line), 'target': line.target, 'holds': line.holds}
                  for line in lines],
        'benchmarks': found}, indent=1) + '\n', encoding='utf-8')
    plot(lines, flags.output.with_suffix('.png'))
  return bool(failed)


if __name__ == '__main__':
  sys.exit(main())

"""Trains every combination of some settings from several seeds, together over one base.

`python -m prompt_tuning_jax.sweep --vary PROMPT_LENGTH 1 5 20 --seeds 0 1 2 --gin_file=… …`
"""

import itertools
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax import many_runs, verb
from prompt_tuning_jax.many_runs import MODEL_DIR, SEED

ABOUT = ('Trains every combination of the values that --vary gives, from every seed, each as '
         '`train` with these values trains it, in MODEL_DIR/COMBINATION/seed_N. Several runs train '
         'together over one base, where they may. Then MODEL_DIR/sweep.json and sweep.txt have '
         'mean and standard deviation over seeds of the best evaluation of each. What is done is '
         'not done again. All other flags are those of `train`.')
FILE = 'gin_file'


def combinations(vary: Sequence[Sequence[str]]) -> dict[str, dict[str, str]]:
  """[[NAME, VALUE, VALUE, …], …] -> {name of a combination: {NAME: VALUE}}.

  Raises ValueError for a name without values, given twice, or that each run has its own of, and
  where two combinations have one name.
  """
  names = [name for name, *_ in vary]
  for name, *values in vary:
    if not values:
      raise ValueError(f'--vary {name} needs values: --vary {name} VALUE VALUE.')
    if name == 'MODEL_DIR' or re.fullmatch(r'(.*[./])?train\.seed', name):
      raise ValueError(f'--vary {name}: each run has its own. --seeds say the seeds, '
                       f'{MODEL_DIR}FOLDER where all runs are.')
    if names.count(name) > 1:
      raise ValueError(f'--vary {name} should be given once, with all of its values.')
  short = [name.rpartition('.')[2] for name in names]
  shown = [_plain(name) for name in (short if len(set(short)) == len(short) else names)]
  found = {}
  for values in itertools.product(*(values for _, *values in vary)):
    parts = [_plain(pathlib.Path(value).stem) if name == FILE else f'{own}={_plain(value)}'
             for name, own, value in zip(names, shown, values, strict=True)]
    if (combination := ','.join(parts)) in found:
      raise ValueError(f'Two combinations would be {combination}: give different values.')
    found[combination] = dict(zip(names, values, strict=True))
  return found


def commands(argv: Sequence[str], folder: pathlib.Path, settings: Mapping[str, Mapping[str, str]],
             seeds: Sequence[int]) -> dict[str, list[str]]:
  """{COMBINATION/seed_N: its command line of `train`}."""
  given = lambda values: [f'--{FILE}={value}' if name == FILE else f'--gin.{name}={value}'
                          for name, value in values.items()]
  return {f'{combination}/seed_{seed}': [
      *argv, *given(values), f'{MODEL_DIR}{folder}/{combination}/seed_{seed}', f'{SEED}{seed}']
      for combination, values in settings.items() for seed in seeds}


def summary(settings: Mapping[str, Mapping[str, str]], seeds: Sequence[int],
            outcomes: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What each combination gave: its settings, runs, and mean and deviation of the best values.

  The standard deviation is the sample's (over n - 1); None where there are fewer than two values.
  """
  rows = []
  for combination, values in settings.items():
    runs = {str(seed): _outcome(outcomes[f'{combination}/seed_{seed}']) for seed in seeds}
    best = [run['best_value'] for run in runs.values() if run.get('best_value') is not None]
    rows.append({
        'name': combination, 'settings': dict(values),
        'metric': next((run['metric'] for run in runs.values() if 'metric' in run), None),
        'mean': statistics.fmean(best) if best else None,
        'deviation': statistics.stdev(best) if len(best) > 1 else None,
        'diverged': sum('diverged' in run for run in runs.values()), 'seeds': runs})
  return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The summary, a line a combination."""
  width = max(len(row['name']) for row in rows)
  lines = []
  for row in rows:
    mean = 'no value' if row['mean'] is None else f'{row["mean"]:.4g}'
    spread = '' if row['deviation'] is None else f' ± {row["deviation"]:.2g}'
    note = f'  ({row["diverged"]} diverged)' if row['diverged'] else ''
    lines.append(f'{row["name"]:<{width}}  {row["metric"] or "":>12}  {mean}{spread}{note}')
  return '\n'.join(lines)


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = many_runs.flags_of(verb.bare_parser('sweep', ABOUT),
                            'every combination is trained from each (default 0)', required=False)
  made.add_argument('--vary', action='append', nargs='+', required=True, metavar='NAME_OR_VALUE',
                    help=f'a name of gin, or {FILE}, and the values it takes; may be repeated')
  flags, rest = many_runs.parsed(made, argv)

  def work() -> None:
    given, others = many_runs.folder_of(rest)
    if len(set(flags.seeds)) < len(flags.seeds):
      raise ValueError(f'--seeds should be different ones, got {flags.seeds}.')
    folder, settings = pathlib.Path(given).expanduser(), combinations(flags.vary)
    outcomes = many_runs.train(commands(others, folder, settings, flags.seeds), flags.at_once)
    from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
    rows = summary(settings, flags.seeds, outcomes)
    for name, text in (('sweep.json', json.dumps(rows, indent=1)), ('sweep.txt', table(rows))):
      with atomic_file(folder / name) as temporary:
        pathlib.Path(temporary).write_text(text + '\n', encoding='utf-8')
    print(table(rows))
    print(f'{folder}/sweep.json', file=sys.stderr)

  return verb.exit_status(work)


def _outcome(outcome: Any) -> dict[str, Any]:
  if isinstance(outcome, ValueError):
    return {'diverged': str(outcome)}
  kept = ('metric', 'best_value', 'best_step', 'steps', 'seconds', 'trainable_parameters', 'prompt')
  return {name: outcome[name] for name in kept}


def _plain(text: str) -> str:
  """As a folder's name has it."""
  return re.sub(r'[^\w.+-]+', '_', text).strip('_') or '_'


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

"""Methods x tasks x seeds on one base: scores, parameters and time side by side.

  python benchmarks/compare_methods.py --output=DIR --methods lora prompt_tuning --tasks sst2

What a method and a task are is written in compare_methods.toml (--settings=FILE for another). Every
run is `python -m prompt_tuning_jax.train` in a process and a MODEL_DIR of its own, so that a run
that was cut goes on where it was, and a finished one is not repeated. Prints a table (mean and
standard deviation over seeds), and writes DIR/results.json and DIR/results.png.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tomllib

SETTINGS = pathlib.Path(__file__).with_suffix('.toml')


def command(settings: dict, method: str, task: str, seed: int, folder: pathlib.Path) -> list[str]:
  """The training run of one cell and seed."""
  parts = [settings['common'], settings['tasks'][task], settings['methods'][method]]
  flags = [f'--gin_file={name}' for part in parts for name in part.get('files', ())]
  flags += [f'--gin.{binding}' for part in parts for binding in part.get('gin', ())]
  return [sys.executable, '-m', 'prompt_tuning_jax.train', *flags,
          f"--gin.MODEL_DIR='{folder}'", f'--gin.run.train.seed={seed}']


def report_of(settings: dict, method: str, task: str, seed: int, output: pathlib.Path) -> dict:
  """Runs one cell and seed, unless it is there, and reads its report."""
  folder = output / method / task / str(seed)
  wanted = command(settings, method, task, seed, folder)
  done = folder / 'command.json'
  if done.exists() and json.loads(done.read_text('utf-8')) != wanted[1:]:
    raise SystemExit(f'{folder} holds a run of other settings: choose another --output, or remove '
                     'it.')
  if not done.exists():
    print(f'{method}, {task}, seed {seed} …', file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log.txt', 'a', encoding='utf-8') as log:
      status = subprocess.run(wanted, stdout=log, stderr=log, check=False).returncode
    if status:
      last = (folder / 'log.txt').read_text('utf-8').strip().splitlines()[-1:]
      raise SystemExit(f'{method} on {task}, seed {seed}, failed ({folder}/log.txt): '
                       f'{" ".join(last)}')
    done.write_text(json.dumps(wanted[1:]), encoding='utf-8')
  return json.loads((folder / 'report.json').read_text('utf-8'))


def cell(reports: list[dict]) -> dict:
  """The seeds of one method and task together."""
  scores = [report['best_value'] for report in reports]
  each = lambda name: statistics.median(report[name] for report in reports)
  return {'metric': reports[0]['metric'], 'scores': scores, 'mean': statistics.mean(scores),
          'deviation': statistics.stdev(scores) if len(scores) > 1 else 0.0,
          **{name: reports[0][name] for name in (
              'trainable_parameters', 'saved_parameters', 'parameters', 'saved_bytes')},
          **{name: each(name) for name in ('seconds', 'seconds_to_best', 'peak_bytes')}}


def table(results: dict[str, dict[str, dict]], tasks: list[str]) -> str:
  """Markdown: a row a method, a column a task."""
  metrics = [next(iter(results.values()))[task]['metric'] for task in tasks]
  lines = [['method', 'trained', 'kept', 'file', *(
      f'{task} {metric}' for task, metric in zip(tasks, metrics, strict=True)), 'seconds a run']]
  for method, cells in results.items():
    first = cells[tasks[0]]
    lines.append([
        method, f'{first["trainable_parameters"]:,}', f'{first["saved_parameters"]:,}',
        f'{first["saved_bytes"] / 1024:,.0f} KiB',
        *(f'{cells[task]["mean"]:.1f} ± {cells[task]["deviation"]:.1f}' for task in tasks),
        ' / '.join(f'{cells[task]["seconds"]:.0f}' for task in tasks)])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  rows = ['| ' + ' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))
          + ' |' for line in lines]
  return '\n'.join([rows[0], '|' + '|'.join('-' * (width + 2) for width in widths) + '|',
                    *rows[1:]])


def plot(results: dict[str, dict[str, dict]], tasks: list[str], path: pathlib.Path) -> None:
  """Scores over trained parameters, one picture a task."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 4), squeeze=False)
  for axis, task in zip(axes[0], tasks, strict=True):
    for method, cells in results.items():
      here = cells[task]
      axis.errorbar(here['saved_parameters'], here['mean'], here['deviation'], fmt='o', capsize=3,
                    label=method)
    axis.set(xscale='log', title=task, xlabel='parameters kept for a task',
             ylabel=next(iter(results.values()))[task]['metric'])
  axes[0][-1].legend(fontsize='small', loc='upper left', bbox_to_anchor=(1.02, 1))
  figure.tight_layout()
  figure.savefig(path, dpi=100, bbox_inches='tight')
  pyplot.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--settings', type=pathlib.Path, default=SETTINGS, metavar='FILE.toml')
  parser.add_argument('--methods', nargs='+', metavar='NAME', help='default: all of the settings')
  parser.add_argument('--tasks', nargs='+', metavar='NAME', help='default: all of the settings')
  parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='N')
  parser.add_argument('--output', type=pathlib.Path, required=True, metavar='DIR')
  flags = parser.parse_args()
  settings = tomllib.loads(flags.settings.read_text('utf-8'))
  chosen = {}
  for kind in ('methods', 'tasks'):
    chosen[kind] = getattr(flags, kind) or list(settings[kind])
    unknown = set(chosen[kind]) - set(settings[kind])
    if unknown:
      parser.error(f'{flags.settings} has the {kind} {", ".join(settings[kind])}, not '
                   f'{", ".join(sorted(unknown))}.')
  output = flags.output.resolve()
  reports = {}
  # Seeds outermost: a comparison that is cut has some seeds of everything.
  for seed, task, method in itertools.product(flags.seeds, chosen['tasks'], chosen['methods']):
    reports.setdefault((method, task), []).append(
        report_of(settings, method, task, seed, output))
  results = {method: {task: cell(reports[method, task]) for task in chosen['tasks']}
             for method in chosen['methods']}
  (output / 'results.json').write_text(json.dumps(
      {'settings': settings, 'seeds': flags.seeds, 'results': results}, indent=1) + '\n', 'utf-8')
  plot(results, chosen['tasks'], output / 'results.png')
  print(table(results, chosen['tasks']))


if __name__ == '__main__':
  main()

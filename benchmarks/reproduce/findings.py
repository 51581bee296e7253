"""The papers' findings on a base of yours: trained, measured, judged by a rule; one command each.

  python benchmarks/reproduce/findings.py prompt_length --base=mini
  python benchmarks/reproduce/findings.py adaptation --bases 0=SPAN 10=LM_10 50=LM_50 100=LM_100
  python benchmarks/reproduce/findings.py --front

What a finding compares, and what would show it, is written in findings.toml. Seeds of an arm train
together over one base. The same command goes on where it was cut, and does nothing again. A finding
is results/NAME.json and NAME.png; --front draws all that are there as one page, results/front.png,
and lists them in results/README.md. What is not known here is given to every run:
--gin.TRAIN_STEPS=1000.
"""

import argparse
import json
import logging
import os
import pathlib
import platform
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import claims
import runs

from prompt_tuning_jax import launch, verb
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.checkpoints.atomic_write import atomic_file

HERE = pathlib.Path(__file__).resolve().parent
SETTINGS = tomllib.loads((HERE / 'findings.toml').read_text('utf-8'))
COUNTED = 'parameter_efficiency'  # of shapes alone
ALL = (*SETTINGS['findings'], COUNTED)


def found(name: str, arms: Sequence[runs.Arm], seeds: Sequence[int], output: pathlib.Path,
          at_once: int, always: float) -> dict[str, Any]:
  """Trains and measures a finding's arms, and judges its claims."""
  table, scores, told = SETTINGS['findings'][name], {}, {}
  for arm in arms:
    reports = [record['report'] for record in runs.trained(arm, seeds, output, at_once)]
    told[arm.name] = _told(arm, reports)
    scores |= dict(runs.scores(arm, seeds, output))
  needs = [claims.judged({'says': f'{score} against always the most frequent answer',
                          'more': [score], 'than': always}, scores) for score in table['learnt']]
  judged = [claims.judged(claim, scores) for claim in table['claims']]
  return {'finding': name, 'verdict': claims.verdict(needs, judged),
          'reading': claims.reading(needs, judged), 'rule': claims.RULE,
          **{key: table[key] for key in ('says', 'source', 'chosen', 'axis')},
          'unit': next((each['metric'] for each in told.values() if each['metric']), 'score'),
          'ordered': table.get('ordered', False), 'always': always, 'needs': needs,
          'claims': judged,
          'scores': {key: _spread(values) for key, values in scores.items()}, 'seeds': list(seeds),
          'arms': told, 'seconds': sum(each['seconds'] for each in told.values())}


def _told(arm: runs.Arm, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  whole = [report for report in reports if 'diverged' not in report]
  first = whole[0] if whole else {}
  return {'flags': list(arm.flags), 'base': arm.base.fingerprint,
          **{key: first.get(key) for key in (
              'metric', 'trainable_parameters', 'saved_parameters', 'parameters')},
          'diverged': len(reports) - len(whole), 'best_steps': [
              report.get('best_step') for report in reports],
          # Seeds train side by side, so each tells of the time of all.
          'seconds': max((report['seconds'] for report in whole), default=0)}


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
  finite = [value for value in values if value is not None]
  return {'values': list(values), 'mean': statistics.fmean(finite) if finite else None,
          'deviation': statistics.stdev(finite) if len(finite) > 1 else None}


def about(bases: Mapping[str, runs.Base]) -> dict[str, Any]:
  """What a result depends on besides its settings."""
  versions = {name: metadata.version(name) for name in (
      'prompt_tuning_jax', 'jax', 'flax', 'optax', 'numpy')}
  return {'bases': {name or 'base': {'name': pathlib.Path(base.folder).name,
                                     'fingerprint': base.fingerprint,
                                     'parameters': base.parameters}
                    for name, base in bases.items()},
          'versions': {'python': platform.python_version(), **versions},
          'machine': f'{os.cpu_count()} cores, {platform.machine()}'}


def write(result: Mapping[str, Any], folder: pathlib.Path) -> None:
  """NAME.json and NAME.png in `folder`."""
  import pictures
  folder.mkdir(parents=True, exist_ok=True)
  with atomic_file(folder / f'{result["finding"]}.json') as temporary:
    pathlib.Path(temporary).write_text(json.dumps(result, indent=1) + '\n', 'utf-8')
  pictures.save([result], folder / f'{result["finding"]}.png')
  print(result['reading'])


def front(folder: pathlib.Path) -> None:
  """All findings of `folder` as one page (front.png) and one table (README.md)."""
  import pictures
  results = [json.loads((folder / f'{name}.json').read_text('utf-8')) for name in ALL
             if (folder / f'{name}.json').exists()]
  if not results:
    raise SystemExit(f'{folder} has no finding: run one first.')
  pictures.save(results, folder / 'front.png')
  lines = ['# Findings', '', 'Made by `python benchmarks/reproduce/findings.py --front`.', '',
           '![all findings](front.png)', '']
  for result in results:
    bases = ', '.join(f'{base["name"]} ({base["fingerprint"][:8]})'
                      for base in result.get('bases', {}).values())
    took = f' {result["seconds"]:.0f} s,' if 'seconds' in result else ''
    seeds = f' seeds {result["seeds"]},' if 'seeds' in result else ''
    lines += [f'**{result["finding"]}**: {result["says"]} ({result["source"]}).', '',
              f'Here: {result["chosen"]}.{took}{seeds} {bases}'.rstrip(', '), '',
              f'**{result["reading"]}**', '']
  lines += [f'The rule. {claims.RULE}', '']
  (folder / 'README.md').write_text('\n'.join(lines), encoding='utf-8')
  print(f'{folder}/front.png')


def parser() -> argparse.ArgumentParser:
  """The flags; all others that begin with --gin are those of `train`."""
  made = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
  add = made.add_argument
  add('findings', nargs='*', metavar='FINDING', help=', '.join(ALL))
  add('--base', default='mini', metavar='NAME_OR_FOLDER', help='default mini')
  add('--bases', nargs='+', default=[], metavar='NAME=FOLDER',
      help='of findings that compare bases: adaptation (0, 10, 50, 100), model_size (small, '
           'medium, large)')
  add('--task', metavar='PART', help="in the place of the finding's own")
  add('--seeds', nargs='+', type=int, metavar='N', help='default: as findings.toml says')
  add('--at_once', type=int, default=8, metavar='K', help='seeds whose steps are taken together')
  add('--output', type=pathlib.Path, metavar='DIR', help='where runs are kept',
      default=pathlib.Path('~/.cache/prompt_tuning_jax/reproduce'))
  add('--results', type=pathlib.Path, metavar='DIR', default=HERE / 'results',
      help='where results go')
  add('--smoke', action='store_true',
      help='two seeds and four steps, to see that all runs work; results go to OUTPUT/smoke')
  add('--front', action='store_true', help='one page of all results')
  return made


def main(argv: Sequence[str]) -> int:
  """Returns the exit status."""
  made = parser()
  flags, extra = made.parse_known_args(argv)
  if unknown := set(flags.findings) - set(ALL):
    made.error(f'there are the findings {", ".join(ALL)}, not {", ".join(sorted(unknown))}.')
  if wrong := [flag for flag in extra if not flag.startswith('--gin')]:
    made.error(f'{" ".join(wrong)}: only --gin… flags are handed to train.')
  if wrong := [text for text in flags.bases if not all(text.partition('='))]:
    made.error(f'--bases takes NAME=FOLDER, such as 0=SPAN, not {", ".join(map(repr, wrong))}.')
  if not flags.findings and not flags.front:
    made.error(f'name a finding: {", ".join(ALL)}; or --front.')
  output = flags.output.expanduser().resolve()
  results = output / 'smoke' if flags.smoke else flags.results
  logging.getLogger().handlers.clear()  # what is imported above has made one of its own
  launch.set_up_process()

  def work() -> None:
    folders = {'': flags.base, **{name: name for name in base_checkpoint.bundled_bases()},
               **dict(text.split('=', 1) for text in flags.bases)}
    known: dict[str, runs.Base] = {}
    for name in flags.findings:
      if name == COUNTED:
        import efficiency
        write({**efficiency.result(), **about({})}, results)
        continue
      table = SETTINGS['findings'][name]
      for base in table.get('bases', ('',)):
        if base not in known and base in folders:
          known[base] = runs.Base.read(folders[base])
      arms = runs.arms_of(SETTINGS, name, known, flags.task, extra, flags.smoke)
      always = table.get('always', SETTINGS['parts'][flags.task or table['task']]['always']
                         if 'task' in table else None)
      seeds = flags.seeds or table['seeds'][:2 if flags.smoke else None]
      result = found(name, arms, seeds, output, flags.at_once, always)
      used = {base: known[base] for base in table.get('bases', ('',))}
      write({**result, **about(used), 'task': flags.task or table.get('task'),
             'overrides': extra, 'smoke': flags.smoke}, results)
    if flags.front:
      front(results)

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

"""The runs of a finding: what each is told, its training beside those of other seeds, its scores.

A run lives in a folder named by a digest of its command, its base's fingerprint and our version. So
one that was cut goes on, one that is done is not done again (for another finding neither), and runs
of another base or setting never meet.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompt_tuning_jax import __version__, many_runs, param_paths, prompted_base
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
from prompt_tuning_jax.data import token_cache
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.training import evaluate, run

LABELS = 'prompt/class_labels.gin'
BASE = '--gin.INITIAL_CHECKPOINT_PATH='
KEPT = ('metric', 'best_value', 'best_step', 'steps', 'seconds', 'trainable_parameters',
        'saved_parameters', 'parameters', 'prompt')
SMOKE = {'TRAIN_STEPS': 4, 'EVAL_PERIOD': 2, 'BATCH_SIZE': 4, 'SAVE_PERIOD': 0,
         'run.train.max_eval_examples': 8}


@dataclasses.dataclass(frozen=True)
class Base:
  """A base by its name in a finding: where it is, what it is."""

  folder: str
  fingerprint: str
  parameters: int

  @classmethod
  def read(cls, folder: str) -> 'Base':
    """Raises ValueError where there is no base."""
    found = base_checkpoint.open_base(folder)
    return cls(folder, found.fingerprint, param_paths.count(found.params))


@dataclasses.dataclass(frozen=True)
class Arm:
  """One of the things that a finding compares.

  Attributes:
    flags: of `train`, but base, seed and MODEL_DIR.
    measures: {name: what its best is measured on besides its own evaluation}.
    ensemble: so many seeds make an ensemble; 0 is none.
  """

  name: str
  flags: tuple[str, ...]
  base: Base
  measures: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  ensemble: int = 0

  def folder(self, output: pathlib.Path, seed: int) -> pathlib.Path:
    """Where this arm's run from this seed is."""
    told = json.dumps([self.flags, self.base.fingerprint, seed, __version__])
    return output / 'runs' / hashlib.sha256(told.encode()).hexdigest()[:16]

  def command(self, output: pathlib.Path, seed: int) -> list[str]:
    """The flags of `train`."""
    flags = [flag.replace('{seed}', str(seed)) for flag in self.flags]
    return [*flags, f'{BASE}{self.base.folder}', f'{many_runs.SEED}{seed}',
            f'{many_runs.MODEL_DIR}{self.folder(output, seed)}']


def arms_of(settings: Mapping[str, Any], finding: str, bases: Mapping[str, Base],
            task: str | None = None, extra: Sequence[str] = (), smoke: bool = False) -> list[Arm]:
  """The arms of a finding: as written, or each of them with each of the finding's bases.

  Args:
    settings: findings.toml.
    bases: '' is that of findings which need one.
    task: a part that takes the place of the finding's own task.
    extra: flags of `train` that all get, last.

  Raises ValueError for a part or a base that is not there.
  """
  table, found = settings['findings'][finding], []
  task = task or table.get('task')
  for name, arm in table['arms'].items():
    parts = [*([task] if task else ()), *table.get('parts', ()), *arm.get('parts', ())]
    if unknown := set(parts) - set(settings['parts']):
      raise ValueError(f'{finding}, {name}: there is no part {", ".join(sorted(unknown))}, only '
                       f'{", ".join(settings["parts"])}.')
    tables = [settings['common'], *(settings['parts'][part] for part in parts), table, arm]
    files = [file for each in tables for file in each.get('files', ())]
    if LABELS in files:
      labels = [each['labels'] for each in tables if 'labels' in each]
      tables.append({'gin': [f'CLASS_LABELS={labels[-1]}']})
    flags = tuple(f'--gin_file={file}' for file in files)
    measures = {**table.get('measures', {}), **arm.get('measures', {})}
    if smoke:
      measures = {key: {**measure, 'count': 8} for key, measure in measures.items()}
    flags += (*_bindings(tables, SMOKE if smoke else {}), *extra)
    for base in [arm['base']] if 'base' in arm else table.get('bases', ('',)):
      if base not in bases:
        raise ValueError(f'{finding} needs a base {base}: --bases {base}=FOLDER.')
      of_many = 'bases' in table and 'base' not in arm
      found.append(Arm(f'{name}@{base}' if of_many else name, flags, bases[base], measures,
                       min(table.get('ensemble', 0), 2 if smoke else 100)))
  return found


def _bindings(tables: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> Iterator[str]:
  """Flags of all bindings, the last of a name alone."""
  given = {binding.partition('=')[0]: binding for table in tables for binding in
           table.get('gin', ())}
  given |= {name: f'{name}={value}' for name, value in last.items()}
  yield from (f'--gin.{binding}' for binding in given.values())


def trained(arm: Arm, seeds: Sequence[int], output: pathlib.Path, at_once: int) -> list[dict]:
  """The record of this arm's run from each seed; those that are not done train together."""
  missing = [seed for seed in seeds if not (arm.folder(output, seed) / 'run.json').exists()]
  if missing:
    try:
      outcomes = many_runs.train({f'{arm.name}, seed {seed}': arm.command(output, seed)
                                  for seed in missing}, at_once)
    except SystemExit:  # a signal, after which there is no result
      raise SystemExit('Stopped: the same command goes on.') from None
    for seed, outcome in zip(missing, outcomes.values(), strict=True):
      folder = arm.folder(output, seed)
      lost = isinstance(outcome, ValueError)
      _write(folder, {'command': arm.command(output, seed), 'base': arm.base.fingerprint,
                      'report': {'diverged': str(outcome)} if lost else
                      {name: outcome[name] for name in KEPT}, 'measures': {}})
      shutil.rmtree(folder / 'checkpoints', ignore_errors=True)  # nothing is left to resume
  return [_read(arm.folder(output, seed)) for seed in seeds]


def scores(arm: Arm, seeds: Sequence[int], output: pathlib.Path,
           ) -> Iterator[tuple[str, list[float | None]]]:
  """(name, one score of each seed, or of each ensemble) of an arm that is trained."""
  records = [_read(arm.folder(output, seed)) for seed in seeds]
  if arm.ensemble:
    together = [_ensemble(arm, seeds[i:i + arm.ensemble], output)
                for i in range(0, len(seeds) - arm.ensemble + 1, arm.ensemble)]
    for name in ('average', 'best', 'majority_vote', 'mean_probability'):
      yield name.replace('_', ' '), [
          result and result[name][result['metric']] for result in together]
    return
  yield arm.name, [record['report'].get('best_value') for record in records]
  for name, measure in arm.measures.items():
    values = [_measured(arm, seed, output, measure) for seed in seeds]
    yield f'{arm.name}/{name}', values


def _measured(arm: Arm, seed: int, output: pathlib.Path, measure: Mapping[str, Any],
              ) -> float | None:
  """The score of a run's best on something else; kept beside it. None where it diverged.

  measure: 'task', 'split', 'lengths', 'count' of examples; 'modules' and 'metric', if not ours and
  not the task's first.
  """
  folder = arm.folder(output, seed)
  record, key = _read(folder), json.dumps(measure, sort_keys=True)
  if 'diverged' in record['report']:
    return None
  if key not in record['measures']:
    kept = pathlib.Path(record['report']['prompt'])
    model = kept if kept.is_dir() else pathlib.Path(arm.base.folder)
    prompted = prompted_base.load(
        str(model), None if kept.is_dir() else str(kept),
        max_decode_length=measure['lengths']['targets'])
    task = SeqioTask(measure['task'], tuple(measure.get('modules', ())),
                     eval_split=measure['split'])
    cache = token_cache.open_or_build(task, task.eval_split, prompted.vocabulary,
                                      measure['lengths'])
    evaluator = evaluate.Evaluator(prompted.predictor, cache, measure.get('metric'),
                                   measure['count'])
    record['measures'][key] = evaluator(prompted.params).value
    _write(folder, record)
  return record['measures'][key]


def _ensemble(arm: Arm, seeds: Sequence[int], output: pathlib.Path) -> dict[str, Any] | None:
  """`training.ensemble.report` of the prompts from these seeds; None where one of them diverged."""
  folders = [arm.folder(output, seed) for seed in seeds]
  reports = {f'seed_{seed}': _read(folder)['report']
             for seed, folder in zip(seeds, folders, strict=True)}
  if any('diverged' in report for report in reports.values()):
    return None
  named = hashlib.sha256(' '.join(folder.name for folder in folders).encode()).hexdigest()[:16]
  folder = output / 'ensembles' / named
  if not (folder / 'ensemble.json').exists():
    folder.mkdir(parents=True, exist_ok=True)
    run.evaluate_ensemble(
        {name: report['prompt'] for name, report in reports.items()}, folder,
        **many_runs.configured(arm.command(output, seeds[0])))
  return json.loads((folder / 'ensemble.json').read_text('utf-8'))


def _read(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / 'run.json').read_text('utf-8'))


def _write(folder: pathlib.Path, record: Mapping[str, Any]) -> None:
  with atomic_file(folder / 'run.json') as temporary:
    pathlib.Path(temporary).write_text(json.dumps(record, indent=1) + '\n', 'utf-8')

"""Measures: `python -m prompt_tuning_jax.eval --base=… --prompt=… --input=FILE or --task=NAME`."""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from prompt_tuning_jax import verb

ABOUT = ('Computes the metrics of a file or of a SeqIO task, and prints them as one JSON object. A '
         'row of a file has "inputs" and "targets" (texts) or "input_tokens" and "target_tokens" '
         '(ids ending in the end-of-sequence id). Labels, where the prompt or the task has them, '
         'are ranked; other targets are generated. With --prompts, a folder of prompts of one '
         'task, each answers every example: their average, the best, and both ensembles.')

Answered = tuple[str, dict[str, float], list[dict[str, Any]]]


def evaluate(flags, prompted) -> None:
  """Prints the metrics; writes every example with its prediction to flags.output."""
  import dataclasses

  from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
  from prompt_tuning_jax.predictor import DecodingSettings
  from prompt_tuning_jax.training import ensemble
  prompted = dataclasses.replace(prompted, predictor=prompted.predictor.decoding(
      DecodingSettings(num_beams=flags.num_beams, length_penalty=flags.length_penalty)))
  for flag in ('split', 'modules', 'template', 'sentinel') if flags.input else ():
    if getattr(flags, flag):
      raise ValueError(f'--{flag} belongs to --task; the rows of --input are taken as they are.')
  name, values, rows = (_task if flags.task else _file)(flags, prompted)
  if flags.prompts:
    print(ensemble.table(values), file=sys.stderr)
  if flags.output:
    with atomic_file(flags.output) as temporary, open(temporary, 'w', encoding='utf-8') as file:
      for row in rows:
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
  print(json.dumps({'task': name, **values}))


def _task(flags, prompted) -> Answered:
  """A SeqIO task's name, metrics, and rows with their predictions."""
  from prompt_tuning_jax.data import token_cache
  from prompt_tuning_jax.data.seqio_task import SeqioTask
  from prompt_tuning_jax.training.evaluate import Evaluator
  task = SeqioTask(flags.task, eval_split=flags.split or 'validation',
                   sentinel=flags.sentinel or 'target_prefix' in prompted.metadata,
                   template=flags.template or '{}', modules=tuple(flags.modules))
  lengths = {'inputs': flags.max_input_length, 'targets': flags.max_decode_length}
  cache = token_cache.open_or_build(task, task.eval_split, prompted.vocabulary, lengths)
  evaluator = Evaluator(prompted.predictor, cache, rank_labels=not flags.decode)
  _check_search(flags, evaluator.generates)
  if prompted.bank:
    values = evaluator.ensemble(prompted.params, prompted.bank)[1]
  else:
    values = evaluator(prompted.params).values
  return task.name, {'examples': cache.num_examples, **values}, evaluator.answered()


def _file(flags, prompted) -> Answered:
  """A file's name, metrics, and rows with their predictions."""
  import collections

  import numpy as np

  from prompt_tuning_jax import jsonl, metrics, ranking
  from prompt_tuning_jax.checkpoints import prompt_file
  from prompt_tuning_jax.data import text_file, token_cache
  from prompt_tuning_jax.training import ensemble
  rows = list(jsonl.rows(flags.input))
  if not rows:
    raise ValueError(f'{flags.input} has no rows.')
  inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in rows]
  told = _told(prompted)
  marked = any('target_prefix' in prompt.metadata for prompt in _prompts(prompted))
  plain = token_cache.without_sentinel if marked else str
  targets = [plain(_target(prompted, place, row, told or ())) for place, row in rows]
  labels = text_file.labels_among(collections.Counter(targets)) if told is None else told
  for (place, _), target in zip(rows, targets, strict=True):
    if labels and target not in labels:
      raise ValueError(f'{place}: the target {target!r} is none of the labels {labels}.')
  metric = metrics.accuracy if labels else metrics.exact_match
  measured = lambda texts: metric(targets, list(map(plain, texts)))
  written = prompt_file.written(prompted.metadata, labels)
  choices = [written] * len(inputs) if labels and not flags.decode else None
  if choices and len(labels) > 1:
    ranking.check_distinct(labels, prompted.predictor.choice_ids([labels])[0])
  _check_search(flags, choices is None)
  predictor, params = prompted.predictor, prompted.params
  predictor.check(inputs, predictor.choice_ids(choices) if choices else None,
                  places=[place for place, _ in rows])
  if prompted.bank:
    given = ensemble.answers(predictor, params, prompted.bank, inputs, choices)
    predictions = given.majority_vote
    values = ensemble.report(given, measured, lambda of: next(iter(of.values())))
  else:
    if choices:
      ranked = predictor.rank(params, inputs, choices)
      predictions = [labels[int(np.argmax(scores))] for scores in ranked]
    else:
      predictions = predictor.generate(params, inputs)
    values = measured(predictions)
  answered = [{**row, 'prediction': plain(text)}
              for (_, row), text in zip(rows, predictions, strict=True)]
  name = pathlib.Path(flags.input).name.removesuffix('.gz')
  return pathlib.Path(name).stem, {'examples': len(rows), **values}, answered


def _check_search(flags, generates: bool) -> None:
  if flags.num_beams > 1 and not generates:
    raise ValueError('--num_beams is of texts that are generated: here labels are ranked (--decode '
                     'generates them) or the loss is measured.')


def _target(prompted, place: str, row: dict[str, Any], labels: Sequence[str]) -> str:
  """A row's target as text. Ids of a label are that label, though it may be written otherwise."""
  ids = prompted.tokens(place, row, 'target').tolist()
  if row.get('target_tokens') is None:
    return row['targets'].strip()
  for label in labels:
    if prompted.vocabulary.framed(prompted.vocabulary.encode(label), 'targets') == ids:
      return label
  return prompted.vocabulary.decode(ids).strip()


def _prompts(prompted) -> list[Any]:
  """What has the metadata of each prompt."""
  return [*prompted.bank.files.values()] if prompted.bank else [prompted]


def _told(prompted) -> list[str] | None:
  """The labels that the prompts tell; [] is free text; None if none of them tells."""
  told = [prompt.metadata['labels'] or [] for prompt in _prompts(prompted)
          if 'labels' in prompt.metadata]
  if any(sorted(labels) != sorted(told[0]) for labels in told):
    raise ValueError(f'The prompts have different labels, so they are no ensemble: {told}.')
  return told[0] if told else None


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = verb.search_flags(verb.parser('eval', ABOUT, bank='an ensemble, all of one task'))
  what = made.add_mutually_exclusive_group(required=True)
  what.add_argument('--input', type=verb.path, metavar='FILE.jsonl',
                    help='one JSON object a line (or .csv, .tsv; also .gz)')
  what.add_argument('--task', metavar='NAME', help='a SeqIO task, such as sst2')
  made.add_argument('--split', help="the task's split (default validation)")
  made.add_argument('--modules', nargs='*', default=(), metavar='MODULE',
                    help='Python modules that register tasks of your own')
  made.add_argument('--template', metavar='TEXT',
                    help="what a task's inputs are written into, such as '{} It was [MASK].'")
  made.add_argument('--sentinel', action='store_true',
                    help="the task's targets begin with <extra_id_0>, as the prompt was trained "
                         '(a prompt with labels tells it itself)')
  made.add_argument('--decode', action='store_true',
                    help='generate labels too instead of ranking them: what is no label is wrong')
  made.add_argument('--output', type=verb.path, metavar='FILE.jsonl',
                    help='every example with its "prediction"')
  return verb.run(made, argv, evaluate)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

"""Measures: `python -m prompt_tuning_jax.eval --base=… --prompt=… --input=FILE or --task=NAME`."""

import json
import sys

from prompt_tuning_jax import verb

ABOUT = ('Computes the metrics of a file ("inputs" and "targets" in every row) or of a SeqIO '
         'task, and prints them as one JSON object. Labels, where the prompt or the task has '
         'them, are ranked; other targets are generated.')


def evaluate(flags, prompted) -> None:
  """Prints the metrics; writes every example with its prediction to flags.output."""
  from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
  from prompt_tuning_jax.data import token_cache
  from prompt_tuning_jax.data.seqio_task import SeqioTask
  from prompt_tuning_jax.data.text_file import TextFile
  from prompt_tuning_jax.training.evaluate import Evaluator
  if bool(flags.task) == bool(flags.input):
    raise ValueError('Give --input=FILE.jsonl or --task=NAME, one of the two.')
  labels = prompted.metadata.get('labels')
  task = (SeqioTask(flags.task, eval_split=flags.split) if flags.task else
          TextFile(train_file=None, eval_file=flags.input, inputs='inputs', targets='targets',
                   labels=tuple(labels) if labels else None))
  lengths = {'inputs': flags.max_input_length, 'targets': flags.max_decode_length}
  cache = token_cache.open_or_build(task, task.eval_split, prompted.vocabulary, lengths)
  evaluator = Evaluator(prompted.predictor, cache)
  values = evaluator(prompted.params).values
  if flags.output:
    with atomic_file(flags.output) as temporary, open(temporary, 'w', encoding='utf-8') as file:
      for row in evaluator.answered():
        file.write(json.dumps(row, ensure_ascii=False) + '\n')
  print(json.dumps({'task': task.name, 'examples': cache.num_examples, **values}))


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = verb.parser('eval', ABOUT)
  made.add_argument('--input', metavar='FILE.jsonl', help='one JSON object a line')
  made.add_argument('--task', metavar='NAME', help='a SeqIO task, such as sst2')
  made.add_argument('--split', default='validation', help="the task's split (default validation)")
  made.add_argument('--output', metavar='FILE.jsonl', help='every example with its "prediction"')
  return verb.run(made, argv, evaluate)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

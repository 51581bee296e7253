"""Steers: `python -m prompt_tuning_jax.steer --base=… --input=… --output=… --folder=…`."""

import sys

from prompt_tuning_jax import verb

ABOUT = ('Finds, for each row, the vectors from which the frozen base writes its "targets" (text, '
         'or ids in "target_tokens"), and saves them as a prompt file in the folder. "inputs", '
         'after the vectors, may be given as well. Adds to every row "prompt" (the file\'s name), '
         '"prediction" (what the base writes from it), "recovered", "token_accuracy" and "steps"; '
         '`infer --prompts=FOLDER --input=OUTPUT` writes the same.')


def steer(flags, prompted) -> None:
  """Answers the rows of flags.input into flags.output, with a prompt file of each."""
  import collections
  import json
  import pathlib

  from prompt_tuning_jax import cloud_storage, jsonl
  from prompt_tuning_jax.checkpoints import partial_file
  from prompt_tuning_jax.steering import Settings, Steerer
  if flags.prompt:
    raise ValueError('Steering finds prompts and takes none: leave out --prompt.')
  if cloud_storage.is_remote(flags.folder):
    raise ValueError(f'--folder must be a folder of this machine, got {flags.folder}.')
  settings = Settings(flags.length, flags.steps, flags.learning_rate, seed=flags.seed)
  steerer = Steerer(prompted.model, prompted.params, prompted.vocabulary, settings,
                    flags.batch_size, flags.max_decode_length)
  folder, base = pathlib.Path(flags.folder), prompted.bank.base
  folder.mkdir(parents=True, exist_ok=True)
  if any(folder.glob('line_*.safetensors')) and not partial_file.beside(flags.output).exists():
    raise ValueError(f'{folder} holds vectors already, which these would replace: choose another '
                     '--folder.')
  table = _table(prompted)

  def answer(part):
    rows = [(place, row if 'input_tokens' in row else {'inputs': '', **row}) for place, row in part]
    inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in rows]
    targets = [_target(prompted, place, row, flags.max_decode_length) for place, row in rows]
    numbers = [int(place.rpartition(' ')[2]) for place, _ in rows]  # 'FILE, line N'
    found = steerer(table, inputs, targets, numbers)
    answers = []
    for i, number in enumerate(numbers):
      ids = found.tokens[i]
      answers.append({
          **rows[i][1], 'prompt': f'line_{number}', 'prediction': prompted.vocabulary.decode(ids),
          'recovered': ids[:len(targets[i])].tolist() == targets[i].tolist(),
          'token_accuracy': 100 * float(found.accuracy[i]), 'steps': int(found.steps[i])})
      _save(folder / f'line_{number}.safetensors', base, found.vectors[i], answers[-1])
    return answers

  totals = collections.Counter()
  count = jsonl.answer_file(
      flags.input, flags.output, answer, settings=verb.settings(flags, prompted),
      tell=lambda row: totals.update(exact_match=100.0 * row['recovered'],
                                     token_accuracy=row['token_accuracy']))
  print(json.dumps({'sentences': count, **{name: totals[name] / count for name in (
      'exact_match', 'token_accuracy')}}))


def _target(prompted, place, row, most):
  """A row's text to recover, whole: ValueError where it is longer than what is generated."""
  ids = prompted.tokens(place, row, 'target')
  if len(ids) > most:
    raise ValueError(f'{place}: the text has {len(ids)} tokens, more than --max_decode_length '
                     f'({most}).')
  return ids


def _table(prompted):
  """The base's embeddings [V, D]."""
  import dataclasses
  return dataclasses.replace(prompted.bank.base, params=prompted.untuned).embedding


def _save(path, base, vectors, answer) -> None:
  from prompt_tuning_jax.checkpoints import prompt_file
  metric = {'name': 'token_accuracy', 'value': answer['token_accuracy'], 'step': answer['steps']}
  prompt_file.save(path, prompt_file.PromptFile(
      {prompt_file.EMBEDDING: vectors},
      prompt_file.describe(base, method='steering', length=len(vectors), metric=metric)))


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = verb.file_flags(verb.parser('steer', ABOUT))
  add = made.add_argument
  add('--folder', required=True, type=verb.path, metavar='FOLDER', help='for the prompt files')
  add('--length', type=int, default=1, metavar='N', help='vectors of each row (default 1)')
  add('--steps', type=int, default=500, metavar='N', help='at most (default 500)')
  add('--learning_rate', type=float, default=4.0, metavar='RATE',
      help="Adam's, which falls to 0 (default 4)")
  add('--seed', type=int, default=0, metavar='N', help='decides the words to start from')
  made.set_defaults(prompts={})  # A bank without any: what is found could stand in it.
  return verb.run(made, argv, steer)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

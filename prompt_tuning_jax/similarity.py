"""Compares prompts: `python -m prompt_tuning_jax.similarity PROMPT_OR_FOLDER … --target=…`."""

import sys

from prompt_tuning_jax import launch, verb

ABOUT = ('Prints how alike trained prompts of one base are: the cosine of the means of their '
         'tokens, and the mean of the cosines of all pairs of tokens (SPoT, Vu et al. 2022). '
         'With --target, ranks them as sources for that prompt to be trained again from.')
MEASURES = ('cosine_of_means', 'mean_of_cosines')
WORDS_SHOWN = 20


def parser():
  """The flags of this verb."""
  made = verb.bare_parser('similarity', ABOUT)
  add = made.add_argument
  add('prompts', nargs='+', type=verb.path, metavar='PROMPT_OR_FOLDER',
      help='prompt files, .npy prompts, or folders searched for them (of the best and the last '
           'prompt of a run, the best is taken)')
  add('--target', type=verb.path, metavar='FILE',
      help='a prompt trained (shortly) on the target task: the others are ranked as its sources')
  add('--by', default=MEASURES[0], choices=MEASURES, help=f'what ranks (default {MEASURES[0]})')
  add('--average', type=verb.path, metavar='FILE.safetensors',
      help='write the average of the best sources, weighted by similarity, to start from')
  add('--top', type=int, default=3, metavar='K', help='sources in the average (default 3)')
  add('--output', type=verb.path, metavar='FILE.csv|FILE.json', help='keep the table')
  add('--words', type=verb.path, metavar='NAME_OR_FOLDER',
      help="a base: print each prompt's nearest words in its embedding table")
  add('--nearest', type=int, default=5, metavar='N',
      help='nearest words of each token of a prompt (default 5)')
  add('--network', metavar='NAME', help='such as t5_1_1_base, for a T5X folder')
  add('--vocabulary', type=verb.path, metavar='FILE',
      help="the base's SentencePiece file, if it is not beside it")
  return made


def check(flags) -> None:
  """Raises ValueError for flags that cannot be."""
  if flags.average and not flags.target:
    raise ValueError('--average weighs sources by their similarity to a target: add --target=FILE.')
  if flags.average and not flags.average.endswith('.safetensors'):
    raise ValueError(f'--average writes a prompt file, NAME.safetensors; got {flags.average}.')
  if flags.output and not flags.output.endswith(('.csv', '.json')):
    raise ValueError(f'--output should end in .csv or .json, got {flags.output}.')
  for name in ('top', 'nearest'):
    if getattr(flags, name) < 1:
      raise ValueError(f'--{name} must be at least 1, got {getattr(flags, name)}.')
  from prompt_tuning_jax import cloud_storage
  from prompt_tuning_jax.checkpoints import peft_adapter
  is_file = flags.target and not peft_adapter.is_folder(cloud_storage.fetch(flags.target))
  verb.check_files([flags.target] if is_file else [], flags.output)
  verb.check_files([], flags.average)


def compare(flags) -> None:
  """Prints, and writes where asked, what flags ask for."""
  import os

  from prompt_tuning_jax.analysis import trained_prompts
  prompts, target, left_out = trained_prompts.read(flags.prompts, flags.target)
  for reason in left_out:
    print(f'left out: {reason}', file=sys.stderr)
  needed = 1 if target or flags.words and not flags.output else 2
  if len(prompts) < needed:
    raise ValueError(f'Needed at least {needed} soft prompt{"s" * (needed > 1)} to compare'
                     f'{" with the target" if target else ""}, found {len(prompts)} in '
                     f'{" ".join(flags.prompts)}.')
  everything = [*([target] if target else []), *prompts]
  for output in filter(None, (flags.average, flags.output)):
    if os.path.realpath(output) in {str(prompt.path) for prompt in everything}:
      raise ValueError(f'{output} is one of the prompts to compare: write to another file.')
  if target:
    rank(flags, prompts, target)
  elif len(prompts) > 1:
    table = pairs(prompts, flags.by)
    show(table)
    keep(table, flags.output)
  if flags.words:
    words(flags, everything)


def pairs(prompts, by: str) -> list[dict]:
  """A row for every pair of prompts, the most alike first."""
  found = _matrices(prompts)
  table = [{'prompt': prompts[i].name, 'other': prompts[j].name,
            **{name: float(matrix[i, j]) for name, matrix in found.items()}}
           for i in range(len(prompts)) for j in range(i + 1, len(prompts))]
  return sorted(table, key=lambda row: -row[by])


def rank(flags, sources, target) -> None:
  """Prints sources by their similarity to the target, the best first, and writes their average."""
  import shlex

  from prompt_tuning_jax.analysis import similarity, trained_prompts
  from prompt_tuning_jax.checkpoints import prompt_file
  found = {name: matrix[0, 1:] for name, matrix in _matrices([target, *sources]).items()}
  order = sorted(range(len(sources)), key=lambda i: -found[flags.by][i])
  table = [{'rank': place + 1, 'source': sources[i].name,
            **{name: float(values[i]) for name, values in found.items()}}
           for place, i in enumerate(order)]
  if flags.average:
    top = order[:flags.top]
    if len(top) < flags.top:
      raise ValueError(f'--top={flags.top} asks for more sources than the {len(top)} there are.')
    weights = similarity.transfer_weights(found[flags.by][top])
    file = trained_prompts.average([sources[i] for i in top], weights)
    for row, weight in zip(table, [*weights, *[0.0] * len(sources)], strict=False):
      row['weight'] = float(weight)
    prompt_file.save(flags.average, file)
  print(f'sources for {target.name}')
  show(table, marked=0)
  keep(table, flags.output)
  start = shlex.quote(str(flags.average or sources[order[0]].path))
  length = len(sources[order[0]].embedding)
  print(f'start from {"the average" if flags.average else "the best (*)"}: '
        f'--gin_file=prompt/from_file.gin --gin.INITIAL_PROMPT_PATH={start} '
        f'--gin.PROMPT_LENGTH={length}')


def words(flags, prompts) -> None:
  """Prints the words nearest to each prompt's rows."""
  from prompt_tuning_jax.analysis import nearest_words
  from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
  from prompt_tuning_jax.data.vocabulary import Vocabulary
  launch.set_up_process()
  network = launch.network_named(flags.network) if flags.network else None
  base = base_checkpoint.load_base(flags.words, config=network, vocabulary_file=flags.vocabulary,
                                   dtype=None)
  vocabulary = Vocabulary.of_base(base)
  table = base.embedding[:vocabulary.size]  # the rows behind it stand for no word
  for prompt in prompts:
    prompt_file.check(prompt_file.PromptFile({prompt_file.EMBEDDING: prompt.embedding},
                                             prompt.metadata), base)
    ids, cosines = nearest_words.nearest_rows(prompt.embedding, table, flags.nearest)
    counted = nearest_words.most_frequent(ids, vocabulary.piece)
    print(f'{prompt.name} (nearest cosine {cosines[:, 0].mean():.3f} on average): ' + ', '.join(
        f'{word} {times}' for word, times in counted[:WORDS_SHOWN]))


def show(table: list[dict], marked: int | None = None) -> None:
  """Prints rows of equal fields in aligned columns; the row `marked` with a star."""
  cells = [list(table[0]), *([f'{value:.4f}' if isinstance(value, float) else str(value)
                              for value in row.values()] for row in table)]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  is_text = [isinstance(value, str) for value in table[0].values()]
  for number, row in enumerate(cells):
    line = '  '.join(cell.ljust(width) if text else cell.rjust(width)
                     for cell, width, text in zip(row, widths, is_text, strict=True))
    star = '' if marked is None else '* ' if number == marked + 1 else '  '
    print((star + line).rstrip())


def keep(table: list[dict], output: str | None) -> None:
  """Writes rows as CSV or JSON, as the file's name says; nothing without one."""
  if not output:
    return
  import csv
  import json

  from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
  with atomic_file(output) as temporary, open(
      temporary, 'w', encoding='utf-8', newline='') as file:
    if output.endswith('.json'):
      json.dump(table, file, ensure_ascii=False, indent=1)
    else:
      writer = csv.DictWriter(file, list(table[0]))
      writer.writeheader()
      writer.writerows(table)


def _matrices(prompts) -> dict:
  """{measure: [K, K]} of K prompts."""
  from prompt_tuning_jax.analysis import similarity
  return {name: getattr(similarity, name)([prompt.embedding for prompt in prompts])
          for name in MEASURES}


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  flags = parser().parse_args(argv)

  def work() -> None:
    check(flags)
    compare(flags)

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

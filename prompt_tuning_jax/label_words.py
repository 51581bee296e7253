"""Words for labels: `python -m prompt_tuning_jax.label_words --base=… --input=… --output=…`."""

import sys

from prompt_tuning_jax import verb

ABOUT = ('Chooses, from rows with "inputs" and "targets" (labels), a word of the vocabulary for '
         'each label, by which the frozen base tells the labels apart, and writes the rows with '
         'these words as targets; "label" keeps the label. Of several templates it takes the one '
         'whose words do that best, and writes the inputs in it. Prints the words and how many of '
         'the rows they get right.')


def label_words(flags, prompted) -> None:
  """Writes the rows of flags.input with words for labels into flags.output."""
  import json

  import numpy as np

  from prompt_tuning_jax import jsonl
  from prompt_tuning_jax.data.seqio_task import check_template
  for name in ('examples', 'candidates'):
    if getattr(flags, name) < 1:
      raise ValueError(f'--{name} must be at least 1, got {getattr(flags, name)}.')
  templates = flags.template or ['{}']
  for template in templates:
    check_template(template)
  rows = [row for _, row in zip(range(flags.examples), jsonl.rows(flags.input), strict=False)]
  targets = [_label(place, row) for place, row in rows]
  names = sorted(set(targets))
  if not 2 <= len(names) <= 100:
    raise ValueError(f'Expected from 2 to 100 labels in "targets", got {len(names)} in the '
                     f'first {len(rows)} rows'
                     + (': raise --examples, or mix rows that are sorted by label.'
                        if len(names) < 2 else '.'))
  labels = np.array([names.index(target) for target in targets])
  words = _whole_words(prompted.vocabulary)
  found = {template: _best_words(flags, prompted, rows, labels, names, words, template)
           for template in templates}
  template = max(found, key=lambda each: found[each]['log_likelihood'])
  best = found[template]
  word_of = best['words']

  def answer(part):
    return [{**({'inputs': _written(place, row, template)['inputs']} if template != '{}' else {}),
             'label': _known(place, row, word_of), 'targets': word_of[row['targets']]}
            for place, row in part]

  jsonl.answer_file(flags.input, flags.output, answer,
                    settings={**verb.settings(flags, prompted), 'words': word_of,
                              'template': template})
  told = {'words': word_of, 'examples': len(rows), 'accuracy': best['accuracy']}
  if flags.template:
    told |= {'template': template, 'templates': found}
  print(json.dumps(told, ensure_ascii=False))


def _best_words(flags, prompted, rows, labels, names, words, template) -> dict:
  """{label: word} in one template, and how well these words tell the labels apart: the mean
  log-likelihood of the right one among them, in nats, and their accuracy in percent."""
  from prompt_tuning_jax.analysis import label_choice
  inputs = [prompted.tokens(place, _written(place, row, template), 'input', flags.max_input_length)
            for place, row in rows]
  try:
    log_p = prompted.predictor.first_words(prompted.params, inputs)
  except ValueError as error:
    raise ValueError(f'--template={template!r}: {error}' if template != '{}' else error) from None
  chosen = label_choice.choose(
      log_p, labels, label_choice.candidates(log_p, labels, words, flags.candidates))
  return {'words': {name: prompted.vocabulary.decode([word]).strip()
                    for name, word in zip(names, chosen, strict=True)},
          'log_likelihood': label_choice.likelihood(log_p, labels, chosen),
          'accuracy': label_choice.accuracy(log_p, labels, chosen)}


def _written(place, row, template) -> dict:
  """The row with its inputs in the template."""
  if template == '{}':
    return row
  if not isinstance(text := row.get('inputs'), str) or 'input_tokens' in row:
    raise ValueError(f'{place}: a template takes a text in "inputs" and no "input_tokens", got the '
                     f'fields {sorted(row)}.')
  return {**row, 'inputs': template.replace('{}', text)}


def _whole_words(vocabulary):
  """The ids of words that are written as one piece where they stand alone."""
  from prompt_tuning_jax.training.discrete_prompt import words
  return [word for word in words(vocabulary).tolist()
          if vocabulary.encode(vocabulary.decode([word]).strip()) == [word]]


def _label(place, row) -> str:
  if 'targets' not in row:
    raise ValueError(f'{place}: expected a label in "targets", got the fields {sorted(row)}.')
  if not isinstance(label := row['targets'], str):
    raise ValueError(f'{place}: a label in "targets" should be a text, got {label!r}, '
                     f'of type {type(label).__name__}.')
  return label


def _known(place, row, word_of) -> str:
  if (label := _label(place, row)) not in word_of:
    raise ValueError(f'{place}: the label {label!r} is in none of the first rows: raise '
                     '--examples.')
  return label


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = verb.file_flags(verb.parser('label_words', ABOUT))
  made.add_argument('--examples', type=int, default=512, metavar='N',
                    help='rows that the words are chosen from (default the first 512)')
  made.add_argument('--candidates', type=int, default=20, metavar='K',
                    help='words that are tried for each label (default 20)')
  made.add_argument('--template', action='append', metavar='TEXT',
                    help="what inputs are written into, at its '{}': 'It was [MASK] : {}' for a "
                         'BERT, its mask where no cut loses it; given several times, the best')
  return verb.run(made, argv, label_words)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

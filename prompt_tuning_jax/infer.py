"""Predicts: `python -m prompt_tuning_jax.infer --base=… --prompt=… --input=… --output=…`."""

import sys
from collections.abc import Callable

from prompt_tuning_jax import verb

ABOUT = ('Adds "prediction" to every row: the generated text or, with --rank, the most probable '
         'label. With --num_samples also "predictions" and "scores", with --rank "probabilities". '
         'A row has "inputs" (text) or "input_tokens" (ids ending in the end-of-sequence id).')


CONTROL = {'attribute': {'against': None, 'weight': 1.0},  # flags, and their own with defaults
           'toward': {'step_size': 0.05, 'iterations': 3}}


def infer(flags, prompted) -> None:
  """Answers the rows of flags.input into flags.output."""
  from prompt_tuning_jax import jsonl
  if (flags.length_normalized or flags.calibrated or flags.labels) and not flags.rank:
    raise ValueError('--labels, --length_normalized and --calibrated belong to --rank.')
  for name, own in CONTROL.items():
    for setting in own:
      if getattr(flags, setting) is not None and not getattr(flags, name):
        raise ValueError(f'--{setting} belongs to --{name}.')
  if flags.rank and (verb.decodes_otherwise(flags) or flags.attribute or flags.toward):
    raise ValueError('--rank generates no text: --num_beams, --temperature and other flags of '
                     'generation do not belong to it.')
  answer = _ranking(flags, prompted) if flags.rank else _generating(flags, prompted)
  count = jsonl.answer_file(flags.input, flags.output, answer,
                            settings=verb.settings(flags, prompted))
  print(f'{count} predictions in {flags.output}', file=sys.stderr)


def _generating(flags, prompted) -> Callable[[list], list[dict]]:
  """The function of a part of the rows that generates their texts."""
  decoding, control = verb.decoding(flags), _control(flags, prompted)

  def answer(part):
    inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in part]
    numbers = [int(place.rpartition(' ')[2]) for place, _ in part]  # 'FILE, line N'
    if flags.attribute:  # A row that names no prompt has the base alone.
      slots = [prompted.bank.slot(prompted.name(place, row) if 'prompt' in row else None)
               for place, row in part]
    else:
      slots = prompted.slots(part)
    found = prompted.predictor.generate_with(prompted.params, inputs, decoding, slots, numbers,
                                             control, [place for place, _ in part])
    if decoding.num_samples == 1:
      return [{'prediction': texts[0].text} for texts in found]
    return [{'prediction': texts[0].text, 'predictions': [each.text for each in texts],
             'scores': [each.score for each in texts]} for texts in found]

  return answer


def _control(flags, prompted):
  """What the flags of control say, or None."""
  from prompt_tuning_jax import controlled
  if flags.toward and flags.attribute:
    raise ValueError('Give --attribute (prompts re-weight the next token) or --toward (activations '
                     'move), not both.')
  own = {setting: default if getattr(flags, setting) is None else getattr(flags, setting)
         for settings in CONTROL.values() for setting, default in settings.items()}
  if flags.toward:
    return controlled.Perturbed(controlled.bag(prompted.vocabulary, flags.toward),
                                own['step_size'], own['iterations'])
  if not flags.attribute:
    return None
  if prompted.bank is None:
    raise ValueError('--attribute and --against name prompts of a folder: give --prompts=FOLDER.')
  slot = lambda name: prompted.bank.slot(prompted.name('--attribute, --against', {'prompt': name}))
  return controlled.Weighted(slot(flags.attribute), own['weight'],
                             slot(flags.against) if flags.against else None)


def _ranking(flags, prompted) -> Callable[[list], list[dict]]:
  """The function of a part of the rows that ranks their labels."""
  import functools

  from prompt_tuning_jax import ranking
  from prompt_tuning_jax.checkpoints import prompt_file
  predictor = prompted.predictor
  prior = functools.cache(lambda labels: predictor.prior(prompted.untuned, labels))
  lengths = functools.cache(lambda labels: [len(ids) for ids in predictor.choice_ids([labels])[0]])

  @functools.cache
  def distinct(labels):
    ranking.check_distinct(labels, predictor.choice_ids([labels])[0])
    return labels

  def answer(part):
    inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in part]
    named = [flags.labels or prompted.labels(place, row) for place, row in part]
    choices = [distinct(prompt_file.written(prompted.about(place, row), labels))
               for (place, row), labels in zip(part, named, strict=True)]
    ranked = predictor.rank(prompted.params, inputs, choices, prompted.slots(part),
                            [place for place, _ in part])
    answers = []
    for labels, texts, scores in zip(named, choices, ranked, strict=True):
      shares = ranking.probabilities(scores, prior(texts) if flags.calibrated else None,
                                     lengths(texts) if flags.length_normalized else None)
      answers.append({'prediction': labels[int(shares.argmax())],
                      'probabilities': dict(zip(labels, shares.tolist(), strict=True))})
    return answers

  return answer


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  made = verb.decoding_flags(verb.parser('infer', ABOUT, bank=verb.NAMED))
  made.add_argument('--rank', action='store_true', help="rank the prompt's labels")
  made.add_argument('--labels', nargs='+', metavar='LABEL', help='rank these labels')
  made.add_argument('--length_normalized', action='store_true',
                    help='rank by the mean log-likelihood of a token, not by the sum')
  made.add_argument('--calibrated', action='store_true',
                    help='take off what the base alone gives a label without any text')
  return verb.run(verb.file_flags(_control_flags(made)), argv, infer)


def _control_flags(made):
  """The flags of control while text is generated (`controlled`)."""
  add = made.add_argument
  add('--attribute', metavar='NAME', help='a prompt of --prompts that re-weights the next token: '
      'log p + WEIGHT (log p of NAME - log p of --against)')
  add('--against', metavar='NAME', help="another of them (default: the row's own prompt)")
  add('--weight', type=float, metavar='WEIGHT', help='of --attribute (default 1)')
  add('--toward', nargs='+', metavar='WORD',
      help='move activations so that these words become more probable (PPLM)')
  add('--step_size', type=float, metavar='SHARE',
      help="of --toward: a step's share of the activations' length (default 0.05)")
  add('--iterations', type=int, metavar='N', help='steps before a token (default 3)')
  return made


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

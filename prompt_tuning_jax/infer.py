"""Predicts: `python -m prompt_tuning_jax.infer --base=… --prompt=… --input=… --output=…`."""

import sys
from collections.abc import Callable

from prompt_tuning_jax import verb

ABOUT = ('Adds "prediction" to every row: the generated text or, with --rank, the most probable '
         'label. With --num_samples also "predictions" and "scores", with --rank "probabilities". '
         'A row has "inputs" (text) or "input_tokens" (ids ending in the end-of-sequence id).')


def infer(flags, prompted) -> None:
  """Answers the rows of flags.input into flags.output."""
  from prompt_tuning_jax import jsonl
  if (flags.length_normalized or flags.calibrated or flags.labels) and not flags.rank:
    raise ValueError('--labels, --length_normalized and --calibrated belong to --rank.')
  if flags.rank and verb.decoding(flags) != verb.decoding(None):
    raise ValueError('--rank generates no text: --num_beams, --temperature and other flags of '
                     'generation do not belong to it.')
  answer = _ranking(flags, prompted) if flags.rank else _generating(flags, prompted)
  count = jsonl.answer_file(flags.input, flags.output, answer,
                            settings=verb.settings(flags, prompted))
  print(f'{count} predictions in {flags.output}', file=sys.stderr)


def _generating(flags, prompted) -> Callable[[list], list[dict]]:
  """The function of a part of the rows that generates their texts."""
  decoding = verb.decoding(flags)

  def answer(part):
    inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in part]
    numbers = [int(place.rpartition(' ')[2]) for place, _ in part]  # 'FILE, line N'
    found = prompted.predictor.generate_with(prompted.params, inputs, decoding,
                                             prompted.slots(part), numbers)
    if decoding.num_samples == 1:
      return [{'prediction': texts[0].text} for texts in found]
    return [{'prediction': texts[0].text, 'predictions': [each.text for each in texts],
             'scores': [each.score for each in texts]} for texts in found]

  return answer


def _ranking(flags, prompted) -> Callable[[list], list[dict]]:
  """The function of a part of the rows that ranks their labels."""
  import functools

  from prompt_tuning_jax import ranking
  predictor = prompted.predictor
  prior = functools.cache(lambda labels: predictor.prior(prompted.untuned, labels))
  lengths = functools.cache(lambda labels: [len(ids) for ids in predictor.choice_ids([labels])[0]])

  @functools.cache
  def distinct(labels):
    ids = list(map(tuple, predictor.choice_ids([labels])[0]))
    if len(set(ids)) < len(ids) or len(labels) < 2:
      raise ValueError(f'Labels should be two or more that the vocabulary writes differently, got '
                       f'{list(labels)}.')
    return labels

  def answer(part):
    inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in part]
    choices = [distinct(tuple(flags.labels or prompted.labels(place, row))) for place, row in part]
    ranked = predictor.rank(prompted.params, inputs, choices, prompted.slots(part))
    answers = []
    for labels, scores in zip(choices, ranked, strict=True):
      shares = ranking.probabilities(scores, prior(labels) if flags.calibrated else None,
                                     lengths(labels) if flags.length_normalized else None)
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
  return verb.run(verb.file_flags(made), argv, infer)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

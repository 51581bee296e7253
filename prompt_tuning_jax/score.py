"""Scores pairs: `python -m prompt_tuning_jax.score --base=… --prompt=… --input=… --output=…`."""

import sys

from prompt_tuning_jax import verb

ABOUT = ('Adds "log_likelihood", log p(targets | inputs) in nats, to every row. A row has "inputs" '
         'and "targets" (texts) or "input_tokens" and "target_tokens" (ids ending in the '
         'end-of-sequence id).')


def score(flags, prompted) -> None:
  """Scores the rows of flags.input into flags.output."""
  from prompt_tuning_jax import jsonl

  def answer(part):
    inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in part]
    targets = [prompted.tokens(place, row, 'target') for place, row in part]
    scores = prompted.predictor.score(prompted.params, inputs, targets, prompted.slots(part),
                                      [place for place, _ in part])
    return [{'log_likelihood': float(value)} for value in scores]

  count = jsonl.answer_file(flags.input, flags.output, answer,
                            settings=verb.settings(flags, prompted))
  print(f'{count} scores in {flags.output}', file=sys.stderr)


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  return verb.run(verb.file_flags(verb.parser('score', ABOUT, bank=verb.NAMED)), argv, score)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

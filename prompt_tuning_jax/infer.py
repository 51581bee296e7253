"""Predicts: `python -m prompt_tuning_jax.infer --base=… --prompt=… --input=… --output=…`."""

import sys

from prompt_tuning_jax import verb

ABOUT = ('Adds "prediction", the generated text, to every row. A row has "inputs" (text) or '
         '"input_tokens" (ids ending in the end-of-sequence id).')


def infer(flags, prompted) -> None:
  """Answers the rows of flags.input into flags.output."""
  from prompt_tuning_jax import jsonl

  def answer(part):
    inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in part]
    texts = prompted.predictor.generate(prompted.params, inputs)
    return [{'prediction': text} for text in texts]

  count = jsonl.answer_file(flags.input, flags.output, answer)
  print(f'{count} predictions in {flags.output}', file=sys.stderr)


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  return verb.run(verb.file_flags(verb.parser('infer', ABOUT)), argv, infer)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

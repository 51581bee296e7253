"""Trains a vocabulary from text: `python -m prompt_tuning_jax.train_vocabulary --input=…`."""

import pathlib
import sys

from prompt_tuning_jax import verb

ABOUT = ("Trains a vocabulary from plain text, a line a sentence: a unigram SentencePiece model "
         "with T5's special ids (0 padding, 1 end, 2 unknown), or a tokenizer.json of the kind of "
         'GPT-2, BART or BERT.')


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  parser = verb.bare_parser('train_vocabulary', ABOUT)
  parser.add_argument('--input', required=True, nargs='+', type=verb.path, metavar='FILE',
                      help='text files, UTF-8, also .gz and .xz')
  parser.add_argument('--output', required=True, type=verb.path, metavar='FILE',
                      help='such as spiece.model, or tokenizer.json')
  parser.add_argument('--kind', choices=('t5', 'gpt2', 'bart', 'bert'), default='t5',
                      help='whose vocabulary it is like (default t5)')
  parser.add_argument('--pieces', type=int, default=8000, metavar='N',
                      help='size without the sentinels (default 8000)')
  parser.add_argument('--every', type=int, default=1, metavar='N',
                      help='read every N-th line only (default 1)')
  flags = parser.parse_args(argv)

  def work() -> None:
    if flags.pieces < 1 or flags.every < 1:
      raise ValueError('--pieces and --every must be at least 1.')
    verb.check_files(flags.input, flags.output)
    from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
    from prompt_tuning_jax.data.plain_text import lines
    from prompt_tuning_jax.data.tokenizer_training import train_tokenizer
    from prompt_tuning_jax.data.vocabulary import Vocabulary, train_vocabulary
    if flags.kind == 't5' and flags.output.endswith(('.json', '.txt')):
      raise ValueError(f'--output={flags.output} should end in .model, as SentencePiece files do.')
    if flags.kind != 't5':
      if not flags.output.endswith('.json'):
        raise ValueError(f'--output={flags.output} should end in .json, as tokenizers do.')
      made = train_tokenizer(flags.kind, lines(flags.input, flags.every), flags.pieces)
      with atomic_file(flags.output) as temporary:
        pathlib.Path(temporary).write_text(made, encoding='utf-8')
      print(f'{Vocabulary(flags.output).size} ids in {flags.output}')
      return
    with atomic_file(flags.output) as temporary:
      made = train_vocabulary(lines(flags.input, flags.every), temporary, flags.pieces)
      size = made.size  # reads the file, so before it gets its name
    print(f'{size - made.extra_ids} pieces and {made.extra_ids} sentinels in {flags.output}')

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

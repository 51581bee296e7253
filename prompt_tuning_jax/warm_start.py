"""A base to start pretraining from: `python -m prompt_tuning_jax.warm_start --input=…`."""

import itertools
import os
import sys

from prompt_tuning_jax import launch, verb

ABOUT = ('Writes a base of random weights whose embeddings and output layer know which words of a '
         'text stand together: what pretraining starts from, with INITIAL_CHECKPOINT_PATH, to come '
         'as far in a fraction of the steps.')
LINES_AT_ONCE = 20_000


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  parser = verb.bare_parser('warm_start', ABOUT)
  parser.add_argument('--network', required=True, metavar='NAME', help='such as mini')
  parser.add_argument('--vocabulary', required=True, type=verb.path, metavar='FILE',
                      help='a SentencePiece file, tokenizer.json or vocab.txt; bytes are no words')
  parser.add_argument('--input', required=True, nargs='+', type=verb.path, metavar='FILE',
                      help='text files, UTF-8, also .gz and .xz; words of a line are neighbours')
  parser.add_argument('--output', required=True, type=verb.path, metavar='FOLDER',
                      help='the base, a new folder')
  parser.add_argument('--seed', type=int, default=0, metavar='N',
                      help='of the random weights (default 0)')
  flags = parser.parse_args(argv)
  launch.set_up_process()
  return verb.exit_status(lambda: _write(flags))


def _write(flags) -> None:
  if os.path.exists(flags.output):
    raise ValueError(f'There is already a {flags.output}: name a new folder.')
  verb.check_files([flags.vocabulary, *flags.input], flags.output)
  import numpy as np

  from prompt_tuning_jax import param_paths
  from prompt_tuning_jax.checkpoints import base_checkpoint
  from prompt_tuning_jax.data.plain_text import lines
  from prompt_tuning_jax.data.vocabulary import Vocabulary
  from prompt_tuning_jax.data.word_vectors import word_vectors
  from prompt_tuning_jax.networks.warm_start import warm_start
  base = base_checkpoint.random_base(
      launch.network_named(flags.network), flags.vocabulary, flags.seed)
  words = Vocabulary.of_base(base)
  config, params = base.config, param_paths.flatten(base.params)

  def texts():
    rows = lines(flags.input)
    while portion := list(itertools.islice(rows, LINES_AT_ONCE)):
      yield from map(np.array, filter(None, words.encode_many(portion)))

  vectors = word_vectors(texts(), config.vocab_size, config.emb_dim - 1)
  params = warm_start(config, params, **vars(vectors))
  base_checkpoint.write(flags.output, config, param_paths.unflatten(params),
                        vocabulary=base.vocabulary)
  print(f'{vectors.known.sum()} of {config.vocab_size} words have vectors in {flags.output}')


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

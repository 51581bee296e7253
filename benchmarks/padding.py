"""How much of a batch is tokens: padded to the task's lengths, in buckets, and packed.

  TFDS_DATA_DIR=… python benchmarks/padding.py --vocabulary=spiece.model [--tasks sst2 boolq]

Every task whose data is prepared, with a prompt before each example. A share is of all positions of
encoder and decoder together, prompts counted as tokens, over up to 64 batches of the training split
(or the first split there is), of which the first 4,096 examples are taken. Prints a table;
--output also writes JSON.
"""

import argparse
import json
import os
import pathlib
import tempfile

import numpy as np

from prompt_tuning_jax.data import batches, packing, seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.tasks import prepared

EXAMPLES = 4096
SPLITS = ('train', 'validation', 'test')


def open_task(name: str, flags, folder: str) -> token_cache.TokenCache | None:
  """The first split that has rows; None where there is none."""
  vocabulary = {'file': flags.vocabulary, 'extra_ids': 100}
  lengths = {'inputs': flags.inputs, 'targets': flags.targets}
  for split in SPLITS:
    place = pathlib.Path(folder) / name / split
    try:
      seqio_builder.build(name, ['prompt_tuning_jax.tasks'], split, vocabulary, lengths, str(place),
                          EXAMPLES)
    except ValueError as error:  # a split that the task or the prepared data lacks
      if 'split' not in str(error).lower():
        raise
      continue
    cache = token_cache.open_cache(place)
    if cache.num_examples:
      cache.meta.update(task=name, split=split, lengths=lengths)
      return cache
  return None


def share(source, steps: int) -> float:
  """Positions that hold a token, of encoder and decoder together."""
  tokens = positions = 0
  for step in range(steps):
    batch = source.batch_at(step)
    for name in ('encoder_input_tokens', 'decoder_target_tokens'):
      tokens += int(np.count_nonzero(batch[name]))
      positions += batch[name].size
  return tokens / positions


def measure(cache: token_cache.TokenCache, flags) -> dict:
  """The shares of one task."""
  virtual = VirtualTokens(Vocabulary(flags.vocabulary).size, flags.prompt)
  packed = packing.PackedBatches([cache], flags.batch_size, virtual=virtual)
  sources = {
      'padded': batches.TrainBatches([cache], flags.batch_size, virtual=virtual,
                                     buckets=batches.Buckets((), ())),
      'buckets': batches.TrainBatches([cache], flags.batch_size, virtual=virtual),
      'packed': packed}
  steps = {name: max(1, min(64, round(cache.num_examples / source.examples_per_batch)))
           for name, source in sources.items()}
  return {'split': cache.meta['split'], 'examples': cache.num_examples,
          'mean_input': float(cache.input_lengths.mean()),
          'mean_target': float(cache.target_lengths.mean()),
          'packed_row': [int(width) for width in packed.widths],
          'examples_per_row': packed.examples_per_batch / flags.batch_size,
          **{name: share(source, steps[name]) for name, source in sources.items()}}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--vocabulary', required=True, help="a SentencePiece file, such as T5's")
  parser.add_argument('--tasks', nargs='*', help='default: all whose data is prepared')
  parser.add_argument('--prompt', type=int, default=100, help='length of the prompt')
  parser.add_argument('--inputs', type=int, default=512)
  parser.add_argument('--targets', type=int, default=128)
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--output', type=pathlib.Path)
  flags = parser.parse_args()
  os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
  datasets = prepared.declared()
  folder = prepared.data_dir()
  names = flags.tasks or [
      name for name in sorted(datasets)
      # Of a task with two names, the long one.
      if f'glue_{name}' not in datasets and f'super_glue_{name}' not in datasets
      and not prepared.missing(datasets[name], folder)]
  results = {}
  print(f'{"task":38} examples  inputs  padded  buckets  packed  packed row')
  with tempfile.TemporaryDirectory() as temporary:
    for name in names:
      cache = open_task(name, flags, temporary)
      if cache is None:
        print(f'{name:38} has no rows in the prepared data')
        continue
      row = results[name] = measure(cache, flags)
      print(f'{name:38} {row["examples"]:8} {row["mean_input"]:7.1f} {row["padded"]:7.1%} '
            f'{row["buckets"]:8.1%} {row["packed"]:7.1%}  {row["packed_row"]}', flush=True)
  settings = {key: getattr(flags, key) for key in ('prompt', 'inputs', 'targets', 'batch_size')}
  if flags.output:
    flags.output.write_text(json.dumps({**settings, 'tasks': results}, indent=1) + '\n')


if __name__ == '__main__':
  main()

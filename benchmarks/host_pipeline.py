"""The host's time for a batch against the training step it feeds, on the same cores.

  TFDS_DATA_DIR=… python benchmarks/host_pipeline.py --networks mini t5_1_1_small

Real SST-2 examples (or those of --task) from the token cache, in buckets and packed, each with its
prompt. Batch and step take turns (A B A B …) in one process, and the ratio is that of their median
times: how much faster the host makes batches than the device uses them up. Prints JSON; --output
also writes it.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from prompt_tuning_jax import launch, optimizers, param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.data import batches, packing, token_cache
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training import methods
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step


def clock(function, *arguments):
  """(seconds, what the function gives)."""
  began = time.perf_counter()
  result = jax.block_until_ready(function(*arguments))
  return time.perf_counter() - began, result


def compare(network: str, cache: token_cache.TokenCache, batching, rows: int, flags) -> dict:
  """Medians of both, in turns over `flags.repeats` batches, shapes compiled beforehand."""
  config = launch.network_named(network)
  method, optimizer = methods.PromptTuning(flags.prompt), optimizers.adafactor()
  token = jnp.ones((1, 1), jnp.int32)
  model = method.model(config)
  params = model.init(jax.random.key(0), token, token, token, enable_dropout=False)['params']
  trainable, frozen = param_paths.split(params, method.trainable)
  state = train_state.create(trainable, optimizer)
  step = make_train_step(Recipe(model, optimizer, z_loss=1e-4))
  source = batching([cache], rows, 0, method.virtual_tokens(config.vocab_size))
  for i in range(flags.repeats):
    state, _ = step(state, frozen, source.batch_at(i))
  times = {'batch': [], 'step': []}
  for i in range(flags.repeats):
    seconds, batch = clock(source.batch_at, i)
    times['batch'].append(seconds)
    seconds, (state, _) = clock(step, state, frozen, batch)
    times['step'].append(seconds)
  medians = {name: statistics.median(values) for name, values in times.items()}
  return {'network': network, 'batching': batching.__name__, 'rows': rows,
          'examples_per_batch': source.examples_per_batch, 'median_seconds': medians,
          'ratio': medians['step'] / medians['batch']}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--networks', nargs='+', default=['mini', 't5_1_1_small'])
  parser.add_argument('--task', default='sst2')
  parser.add_argument('--prompt', type=int, default=100)
  parser.add_argument('--batch_size', type=int, default=16, help='examples, about')
  parser.add_argument('--repeats', type=int, default=12)
  parser.add_argument('--output', type=pathlib.Path)
  flags = parser.parse_args()
  # The ids of mini's vocabulary are few enough for every network.
  vocabulary = Vocabulary(str(base_checkpoint.BUNDLED / 'mini' / 'spiece.model'))
  cache = token_cache.open_or_build(SeqioTask(flags.task), 'train', vocabulary,
                                    {'inputs': 512, 'targets': 32})
  results = []
  for network in flags.networks:
    for batching in (batches.TrainBatches, packing.PackedBatches):
      rows = flags.batch_size
      if batching is packing.PackedBatches:
        per_row = batching([cache], 1, 0, methods.PromptTuning(flags.prompt).virtual_tokens(
            1 << 17)).examples_per_batch
        rows = max(1, round(rows / per_row))
      results.append(compare(network, cache, batching, rows, flags))
      print(json.dumps(results[-1]), flush=True)
  if flags.output:
    flags.output.write_text(json.dumps(
        {'device': jax.devices()[0].platform, 'task': flags.task, 'prompt': flags.prompt,
         'results': results}, indent=1) + '\n')


if __name__ == '__main__':
  main()

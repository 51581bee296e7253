"""Step time of prompt tuning against model tuning: same network, same shapes, same code.

  python benchmarks/method_step_time.py --network=t5_1_1_small

A frozen weight needs no gradient of its own: of the 6 FLOPs a parameter and token that a training
step costs, prompt tuning spends 4. The two methods take turns (A B A B …) in one process, and the
ratio is that of their median times at an equal number of encoder positions (text + prompt). Peak
memory is what the system says of a process that takes one method's steps alone (`peak_memory`).
Prints one JSON object; --output also writes it.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import peak_memory
from turns import take_turns

from prompt_tuning_jax import launch, optimizers, param_paths
from prompt_tuning_jax.checkpoints import stored_leaf
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.training import methods
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step


def make_batch(rows: int, positions: int, targets: int, prompt: int, vocab_size: int):
  """Random tokens; the first `prompt` encoder positions are virtual."""
  rng = np.random.default_rng(0)
  inputs = rng.integers(3, vocab_size, (rows, positions), dtype=np.int32)
  inputs[:, :prompt] = vocab_size + np.arange(prompt)
  outputs = rng.integers(3, vocab_size, (rows, targets), dtype=np.int32)
  return {'encoder_input_tokens': inputs, 'decoder_input_tokens': outputs,
          'decoder_target_tokens': outputs,
          'decoder_loss_weights': np.ones((rows, targets), np.float32)}


def prepare(method, optimizer, config, batch):
  """A function that takes one step, on all devices, and waits for it."""
  model, partitioner = method.model(config), Partitioner()
  token, rng = jnp.ones((1, 1), jnp.int32), np.random.default_rng(0)

  def weights(leaf):  # placed as those of a base that is loaded
    values = stored_leaf.aligned_copy(0.05 * rng.standard_normal(leaf.shape, np.float32))
    return jax.make_array_from_callback(leaf.shape, partitioner.replicated, values.__getitem__)

  params = jax.tree.map(weights, jax.eval_shape(
      functools.partial(model.init, enable_dropout=False), jax.random.key(0), token, token,
      token)['params'])
  trainable, frozen = param_paths.split(params, method.trainable)
  step = make_train_step(Recipe(model, optimizer, z_loss=1e-4, partitioner=partitioner))
  trainable = jax.tree.map(jnp.array, trainable)  # a copy: steps donate these
  held = [partitioner.replicate(train_state.create(trainable, optimizer))]
  batch = partitioner.put_batch(batch)

  def run():
    held[0], metrics = step(held[0], frozen, batch)
    jax.block_until_ready(metrics)

  return run


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--network', default='t5_1_1_small')
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--input_length', type=int, default=128)
  parser.add_argument('--prompt_length', type=int, default=100)
  parser.add_argument('--target_length', type=int, default=8)
  parser.add_argument('--repeats', type=int, default=10)
  parser.add_argument('--alone', metavar='METHOD', help='print the peak memory of this one alone')
  parser.add_argument('--output')
  flags = parser.parse_args()
  config = dataclasses.replace(launch.network_named(flags.network), dropout_rate=0.1)
  positions = flags.input_length + flags.prompt_length
  batch = lambda prompt: make_batch(flags.batch_size, positions, flags.target_length, prompt,
                                    config.vocab_size)
  makers = {
      'prompt_tuning': lambda: prepare(methods.PromptTuning(flags.prompt_length),
                                       optimizers.adafactor(), config, batch(flags.prompt_length)),
      'model_tuning': lambda: prepare(
          methods.ModelTuning(), optimizers.adafactor(1e-3, weight_decay_rate=None), config,
          batch(0)),
  }
  if flags.alone:
    print(json.dumps(peak_memory.measured(makers[flags.alone])))
    return
  settings = {name: value for name, value in vars(flags).items() if name not in ('alone', 'output')}
  peaks = {name: peak_memory.of_process(
      __file__, f'--alone={name}', *(f'--{key}={value}' for key, value in settings.items()))
           for name in makers}
  runs = {name: make() for name, make in makers.items()}
  seconds = take_turns(runs, flags.repeats)['seconds']
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  result = {**settings, 'device': jax.devices()[0].device_kind,
            'median_seconds': medians, 'all_seconds': seconds,
            'prompt_tuning_to_model_tuning': medians['prompt_tuning'] / medians['model_tuning'],
            'peak_bytes': peaks,
            'peak_bytes_ratios': {kind: peaks['prompt_tuning'][kind] / peaks['model_tuning'][kind]
                                  for kind in peaks['prompt_tuning']}}
  print(json.dumps({name: value for name, value in result.items() if name != 'all_seconds'}))
  if flags.output:
    pathlib.Path(flags.output).write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
  main()

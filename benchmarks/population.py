"""Prompts trained at once over one base against the same prompts one after another.

  python benchmarks/population.py --networks mini t5_1_1_small --rows 1 4 --input_lengths 16 64

One step of all members together (`training.population`) and one step of each in turn, A B A B in
one process, at equal shapes and optimizers. A case's ratio is that of median times: how many times
as many steps of members a second. Besides the time that passes, the processor time of the process
is taken, which other programs on the machine disturb less. Prints a line a case; --output writes
all as JSON.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import statistics

import jax
import jax.numpy as jnp
from method_step_time import make_batch
from turns import take_turns

from prompt_tuning_jax import launch, optimizers, param_paths
from prompt_tuning_jax.training import methods, population
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step


def prepare(config, members: int, batch, prompt_length: int):
  """(one step of each member in turn, one step of all together); both wait for their end."""
  method, optimizer = methods.PromptTuning(prompt_length), optimizers.adafactor()
  model = method.model(config)
  token = jnp.ones((1, 1), jnp.int32)
  params = model.init(jax.random.key(0), token, token, token, enable_dropout=False)['params']
  trainable, frozen = param_paths.split(params, method.trainable)
  recipes = [Recipe(model, optimizer, seed, 1e-4) for seed in range(members)]
  start = lambda: [train_state.create(jax.tree.map(jnp.array, trainable), optimizer)
                   for _ in recipes]
  # One program for all: a sweep of one shape would compile no more either.
  step, states = make_train_step(recipes[0]), start()
  together, all_states = population.make_population_step(recipes, states), start()
  rows = population.together([batch] * members)

  def in_turn():
    for k in range(members):
      states[k], metrics = step(states[k], frozen, batch)
    jax.block_until_ready((states, metrics))

  def at_once():
    outcomes = together(all_states, frozen, rows)
    all_states[:] = [state for state, _ in outcomes]
    jax.block_until_ready(outcomes)

  return {'in_turn': in_turn, 'at_once': at_once}


def measure(runs, repeats: int) -> dict:
  """Median seconds, passed and of the processor, of each run, and their ratios."""
  taken, result = take_turns(runs, repeats), {}
  for kind, clock in (('passed', 'seconds'), ('processor', 'processor_seconds')):
    seconds = taken[clock]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result[kind] = {'median_seconds': medians, 'all_seconds': seconds,
                    'ratio': medians['in_turn'] / medians['at_once']}
  return result


def write(flags, cases) -> None:
  """What has been measured so far, where --output says."""
  if flags.output:
    of_cases = ('networks', 'members', 'rows', 'input_lengths', 'output')
    settings = {name: value for name, value in vars(flags).items() if name not in of_cases}
    pathlib.Path(flags.output).write_text(json.dumps(
        {**settings, 'device': jax.devices()[0].device_kind, 'cases': cases}, indent=1) + '\n',
        encoding='utf-8')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--networks', nargs='+', default=['mini', 't5_1_1_small'])
  add('--rows', type=int, nargs='+', default=[1, 4], help='of each member')
  add('--members', type=int, nargs='+', default=[8], help='prompts; `sweep` takes up to 8')
  add('--input_lengths', type=int, nargs='+', default=[16, 64])
  add('--prompt_length', type=int, default=20)
  add('--target_length', type=int, default=8)
  add('--dropout_rate', type=float, default=0.1)
  add('--repeats', type=int, default=9)
  add('--output')
  flags = parser.parse_args()
  cases = []
  for network in flags.networks:
    config = dataclasses.replace(launch.network_named(network), dropout_rate=flags.dropout_rate)
    for members, rows, length in itertools.product(flags.members, flags.rows, flags.input_lengths):
      batch = make_batch(rows, length + flags.prompt_length, flags.target_length,
                         flags.prompt_length, config.vocab_size)
      found = measure(prepare(config, members, batch, flags.prompt_length), flags.repeats)
      cases.append({'network': network, 'members': members, 'rows': rows, 'input_length': length,
                    'load': os.getloadavg()[0], **found})
      print(f'{network}: {members} members of {rows} rows of {length} tokens: '
            f'{found["passed"]["ratio"]:.2f} times as fast, processor time '
            f'{found["processor"]["ratio"]:.2f} times less', flush=True)
      jax.clear_caches()
      write(flags, cases)


if __name__ == '__main__':
  main()

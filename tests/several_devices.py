"""Run by tests with eight virtual devices: `python several_devices.py run|step|copies < settings`.

`run` trains as each of the given command lines says, `step` compiles a training step for each of
the given partitioners and tells what is in it, `copies` loads each of the given bases and tells how
often each of its leaves is in memory. Settings and answers are JSON.
"""

import json
import os
import sys

os.environ['JAX_NUM_CPU_DEVICES'] = '8'

import jax
import jax.numpy as jnp

from prompt_tuning_jax import launch, optimizers, param_paths, partitioning, prompted_model
from prompt_tuning_jax.networks import parameters
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.training import run, state
from prompt_tuning_jax.training.step import Recipe, make_train_step

CONFIG = T5Config(192, 64, 8, 2, 2, 8, 128)
LENGTH, ROWS = 5, 16


def trained(argv: list[str]) -> None:
  """As `python -m prompt_tuning_jax.train` would, in this process."""
  flags = launch.parse_flags(argv)
  launch.read_config(launch.find_files(flags.gin_file), flags.gin_bindings, run.train)
  run.train(**launch.resolve(run.train, config_text=None)[0])


def compiled(partitioner: Partitioner) -> dict:
  """Of a step of prompt tuning: bytes of collectives, what is gathered, and how leaves lie."""
  model = prompted_model.PromptedModel(CONFIG.network(), SoftPrompt(LENGTH, CONFIG.emb_dim))
  place = partitioner.sharding_for(parameters.logical_axes)
  frozen = param_paths.unflatten({
      path: jax.device_put(jnp.zeros(spec.shape), place(path, spec.shape))
      for path, spec in parameters.parameter_specs(CONFIG).items()})
  prompt = {'prompt': {'embedding': jnp.zeros((LENGTH, CONFIG.emb_dim))}}
  optimizer = optimizers.adamw()
  start = partitioner.replicate(state.create(prompt, optimizer))
  batch = partitioner.put_batch({
      'encoder_input_tokens': jnp.ones((ROWS, 24), jnp.int32),
      'decoder_input_tokens': jnp.ones((ROWS, 12), jnp.int32),
      'decoder_target_tokens': jnp.ones((ROWS, 12), jnp.int32),
      'decoder_loss_weights': jnp.ones((ROWS, 12), jnp.float32)})
  step = make_train_step(Recipe(model, optimizer, 0, partitioner=partitioner),
                         jax.tree.map(lambda leaf: leaf.sharding, start))
  program = step.lower(start, frozen, batch).compile()
  return {'collectives': partitioning.collectives(program.as_text()),
          'temporary': program.memory_analysis().temp_size_in_bytes,
          'parts': {path: leaf.size // leaf.addressable_shards[0].data.size
                    for path, leaf in param_paths.flatten(frozen).items()}}


def copies(base: str) -> dict[str, int]:
  """{path: how many buffers hold a leaf of a base that every device has whole}."""
  params = run.load_base(base).params
  return {path: len({shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards})
          for path, leaf in param_paths.flatten(params).items()}


VERBS = {'run': trained, 'step': lambda arguments: compiled(Partitioner(*arguments)),
         'copies': copies}

if __name__ == '__main__':
  print(json.dumps([VERBS[sys.argv[1]](each) for each in json.load(sys.stdin)]))

"""What keeping a run costs: bytes of a saved state, time that a save holds the loop, time to start.

  python benchmarks/kept_state.py --output /tmp/kept_state.json

`bytes`: all files of one saved state against the trained leaves, for prompts of several sizes,
after a few updates, so that the optimizer's moments are numbers and not zeros.
`stall`: steps of --network with a save after each and without take turns (A B A B …). What the loop
does at a save is timed by itself, and as the difference of medians, which also has what the thread
that writes takes from the next step.
`start`: seconds from the start of `train` to the end of its first step, without and with a filled
compilation cache, and what took them. Prints JSON; --output also writes it.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import launch, optimizers, param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors
from prompt_tuning_jax.checkpoints.training_state import TrainingStates
from prompt_tuning_jax.training import loop, methods, report
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step

PROMPTS = {'mini': 20, 't5_1_1_small': 100, 't5_1_1_base': 100, 't5_1_1_xxl': 100}  # lengths

# Times what `train` does, in a process of its own, until its first step is done.
START = """
import json, os, sys, time
began, seconds = float(sys.argv[1]), {}

def timed(name, module, function):
  inner = getattr(module, function)
  def outer(*arguments, **named):
    at = time.monotonic()
    try:
      return inner(*arguments, **named)
    finally:
      seconds[name] = seconds.get(name, 0) + time.monotonic() - at
  setattr(module, function, outer)

from prompt_tuning_jax import launch
launch.set_up_process()
from prompt_tuning_jax.training import step
made = step.make_train_step
def make(*arguments, **named):
  train_step = made(*arguments, **named)
  def first(*arguments):
    import jax
    at = time.monotonic()
    jax.block_until_ready(train_step(*arguments))
    now = time.monotonic()
    seconds['compile and step'] = now - at
    seconds['all'] = now - began
    seconds['rest'] = 2 * seconds['all'] - sum(seconds.values())
    print(json.dumps(seconds), flush=True)
    os._exit(0)
  return first
step.make_train_step = make
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.data import token_cache
from prompt_tuning_jax.training import run
timed('base', base_checkpoint, 'load_base')
timed('data', token_cache, 'open_or_build')
seconds['imports'] = time.monotonic() - began
sys.exit(launch.train(sys.argv[2:]))
"""


def updated(optimizer, leaves, times: int = 3) -> train_state.TrainState:
  """A state after updates with random gradients."""
  state, rng = train_state.create(leaves, optimizer), np.random.default_rng(0)
  for _ in range(times):
    gradients = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), state.trainable)
    updates, kept = optimizer.update(gradients, state.opt_state, state.trainable)
    trained = jax.tree.map(jnp.add, state.trainable, updates)
    state = state.replace(step=state.step + 1, trainable=trained, opt_state=kept)
  return state


def state_bytes(folder: pathlib.Path) -> list[dict]:
  """Bytes on the disk of one saved state, for each prompt and optimizer."""
  rows = []
  for optimizer in ('adafactor', 'adamw'):
    for name, length in PROMPTS.items():
      shape = length, launch.network_named(name).emb_dim
      rng = np.random.default_rng(1)
      leaves = {'prompt': {'embedding': jnp.asarray(rng.normal(size=shape), jnp.float32)}}
      state = updated(getattr(optimizers, optimizer)(), leaves)
      where = folder / f'{optimizer}_{name}'
      states = TrainingStates(where)
      states.save(3, state, loop.dataclasses.asdict(loop.Records()))
      states.close()
      trainable, moments = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
                            for tree in (state.trainable, state.opt_state))
      files = [path for path in (where / '3').rglob('*') if path.is_file()]
      saved = report.saved_bytes(where / '3')
      rows.append({'optimizer': optimizer, 'prompt_of': name, 'shape': list(shape),
                   'trainable_bytes': trainable, 'optimizer_bytes': moments, 'files': len(files),
                   'saved_bytes': saved, 'times_trainable': round(saved / trainable, 3)})
  return rows


def stall(folder: pathlib.Path, flags) -> dict:
  """Steps with and without a save after them, in turns."""
  config, method = launch.network_named(flags.network), methods.PromptTuning(100)
  words = base_checkpoint.load_base('mini').vocabulary
  base = base_checkpoint.random_base(config, words.file)
  added = method.initial(jax.random.key(0), base, words)
  model, optimizer = method.model(config), optimizers.adafactor()
  trainable, frozen = param_paths.split(param_paths.merge(added, base.params), method.trainable)
  state = train_state.create(jax.tree.map(jnp.copy, trainable), optimizer)
  step = make_train_step(Recipe(model, optimizer, z_loss=1e-4))
  virtual = np.arange(config.vocab_size, config.vocab_size + 100)
  rng = np.random.default_rng(0)
  texts = rng.integers(3, 8000, (flags.rows, flags.length))
  targets = rng.integers(3, 8000, (flags.rows, 8))
  batch = {'encoder_input_tokens': np.concatenate([np.tile(virtual, (flags.rows, 1)), texts], 1),
           'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
           'decoder_target_tokens': targets,
           'decoder_loss_weights': np.ones(targets.shape)}
  batch = {name: jnp.asarray(value, jnp.float32 if 'weights' in name else jnp.int32)
           for name, value in batch.items()}
  save = lambda name, leaves: method.save(folder / name, leaves, base, {'task': 'none'})
  states, records = TrainingStates(folder / 'states'), loop.Records()
  times = {'step': [], 'step with a save': [], 'held': []}
  for i in range(2 * flags.repeats + 4):
    began = time.perf_counter()
    state, _ = step(state, frozen, batch)
    jax.block_until_ready(state)
    done = time.perf_counter()
    if i % 2:
      loop._save_all(state, states, records, save, 0.0)
    ended = time.perf_counter()
    if i >= 4:  # compiled, and everything made once
      # What the writing thread takes from the next step counts for the save before it.
      times['step' if i % 2 else 'step with a save'].append(done - began)
      if i % 2:
        times['held'].append(ended - done)
  states.close()
  held, alone, after = (statistics.median(times[name])
                        for name in ('held', 'step', 'step with a save'))
  return {'network': flags.network, 'rows': flags.rows, 'input_tokens': flags.length, 'prompt': 100,
          'pairs': flags.repeats, 'seconds': {
              'step': alone, 'step_while_the_last_save_is_written': after, 'loop_held': held,
              'loop_held_at_most': max(times['held'])},
          'held_percent_of_step': round(100 * held / alone, 3),
          'writing_percent_of_step': round(100 * (after - alone) / alone, 3)}


def start(folder: pathlib.Path, name: str, flags) -> list[dict]:
  """Seconds until the first step is done: cold, then warm `repeats` times."""
  base = 'mini'
  if name != 'mini':
    base, config = folder / name, launch.network_named(name)
    words = base_checkpoint.load_base('mini').vocabulary
    made = base_checkpoint.random_base(config, words.file)
    hf_safetensors.write(base, config, made.params, vocabulary=words)
  rng = np.random.default_rng(0)
  rows = [{'text': ' '.join(rng.choice(['a', 'warm', 'dull', 'film', 'play'], 60)),
           'label': str(rng.choice(['good', 'bad']))} for _ in range(480)]
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows), 'utf-8')
  environment = {**os.environ, 'JAX_COMPILATION_CACHE_DIR': str(folder / f'xla_{name}'),
                 'PROMPT_TUNING_JAX_CACHE': str(folder / f'cache_{name}')}
  results = []
  for i in range(1 + flags.starts):
    command = [sys.executable, '-c', START, str(time.monotonic()),
               '--gin_file=run/prompt_tuning_text_file.gin', f'--gin.MODEL_DIR={folder / "model"}',
               f'--gin.INITIAL_CHECKPOINT_PATH={base}', '--gin.BATCH_SIZE=8',
               f'--gin.TRAIN_FILE={folder / "rows.jsonl"}',
               "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 8}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
      raise SystemExit(done.stderr)
    seconds = {key: round(value, 2) for key, value in json.loads(done.stdout).items()}
    results.append({'base': name, 'compilation_cache': 'warm' if i else 'cold',
                    'token_cache': 'warm' if i else 'cold', 'seconds': seconds})
  return results


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--network', default='t5_1_1_small')
  parser.add_argument('--rows', type=int, default=8)
  parser.add_argument('--length', type=int, default=128, help='tokens of an input')
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--starts', type=int, default=3)
  parser.add_argument('--parts', nargs='+', default=['bytes', 'stall', 'start'])
  parser.add_argument('--output', help='also write the JSON here')
  flags = parser.parse_args()
  launch.set_up_process()
  result = {'device': jax.devices()[0].device_kind}
  with tempfile.TemporaryDirectory(prefix='kept_state.') as folder:
    folder = pathlib.Path(folder)
    if 'bytes' in flags.parts:
      result['bytes'] = state_bytes(folder)
    if 'stall' in flags.parts:
      result['stall'] = stall(folder, flags)
    if 'start' in flags.parts:
      result['start'] = [row for name in dict.fromkeys(('mini', flags.network))
                         for row in start(folder, name, flags)]
  text = json.dumps(result, indent=1) + '\n'
  print(text, end='')
  if flags.output:
    pathlib.Path(flags.output).write_text(text, encoding='utf-8')


if __name__ == '__main__':
  main()

"""A GPT-2, a BERT and a BART of 2 million parameters, each pretrained by its own objective.

  python benchmarks/pretrain_networks.py --text novels.txt.xz wiki.txt.xz --output=DIR

The text files make the vocabularies; the training text is the TFDS data sets local_text/novels and
local_text/wiki. Runs `train_vocabulary`, `warm_start` and `train` for each network, and leaves
Hugging Face folders: DIR/gpt, DIR/bert, DIR/bart. A command that was cut goes on where it was.
"""

import argparse
import pathlib
import subprocess
import sys

# {network: (kind of vocabulary, run, task, lengths, steps)}
NETWORKS = {
    'bert': ('bert', 'pretrain_masked_tokens', 'masked_tokens_local_text',
             {'inputs': 64, 'targets': 10}, 1500),
    'gpt': ('gpt2', 'pretrain_left_to_right', 'lm_local_text', {'inputs': 2, 'targets': 64}, 1000),
    'bart': ('bart', 'pretrain_denoising', 'bart_denoising_local_text',
             {'inputs': 64, 'targets': 64}, 1000)}


def commands(name: str, text: list[str], output: pathlib.Path,
             steps: int | None = None) -> list[list[str]]:
  """What makes a network's vocabulary, and the weights it starts from, and what trains it."""
  kind, run, task, lengths, default = NETWORKS[name]
  steps = steps or default
  vocabulary, start, folder = (
      output / f'{name}.json', output / f'{name}_start', output / f'{name}_run')
  bindings = {
      'VOCABULARY': f"'{vocabulary}'", 'INITIAL_CHECKPOINT_PATH': f"'{start}'",
      'MODEL_DIR': f"'{folder}'",
      'MIXTURE_OR_TASK_NAME': f"'{task}'",
      'TASK_FEATURE_LENGTHS': lengths, 'TRAIN_STEPS': steps, 'BATCH_SIZE': 32,
      'EVAL_PERIOD': steps, 'SAVE_PERIOD': 500, 'DROPOUT_RATE': 0.0,
      'optimizers.linear_decay.peak': 1e-3, 'optimizers.linear_decay.warmup_steps': steps // 10,
      'run.train.max_eval_examples': 512, 'seqio_task.SeqioTask.max_examples': 32 * steps}
  module = [sys.executable, '-m']
  return [
      [*module, 'prompt_tuning_jax.train_vocabulary', f'--kind={kind}', '--input', *text,
       '--every=4', '--pieces=8000', f'--output={vocabulary}'],
      [*module, 'prompt_tuning_jax.warm_start', f'--network={name}_micro', '--input', *text,
       f'--vocabulary={vocabulary}', f'--output={start}'],
      [*module, 'prompt_tuning_jax.train', f'--gin_file=run/{run}.gin',
       f'--gin_file=network/{name}_micro.gin',
       *(f'--gin.{key}={value}' for key, value in bindings.items())]]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--text', nargs='+', required=True, metavar='FILE')
  parser.add_argument('--output', type=pathlib.Path, required=True, metavar='DIR')
  parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS))
  parser.add_argument('--steps', type=int, metavar='N', help='instead of what each network has')
  flags = parser.parse_args()
  output = flags.output.resolve()
  output.mkdir(parents=True, exist_ok=True)
  for name in flags.networks:
    vocabulary, start, training = commands(name, flags.text, output, flags.steps)
    if not (output / f'{name}.json').exists():
      subprocess.run(vocabulary, check=True)
    if not (output / f'{name}_start').exists():
      subprocess.run(start, check=True)
    if not (output / name).is_symlink():
      subprocess.run(training, check=True)
      (output / name).symlink_to(f'{name}_run/prompts/last')


if __name__ == '__main__':
  main()

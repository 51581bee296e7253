"""Trains a prompt: `python -m prompt_tuning_jax.train --gin_file=run/prompt_tuning.gin …`."""

import sys

from prompt_tuning_jax import launch

if __name__ == '__main__':
  sys.exit(launch.train(sys.argv[1:]))

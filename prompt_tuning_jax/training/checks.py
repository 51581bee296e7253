"""What a run refuses before it begins: settings that cannot be, data that is not there or too long.
"""

import numbers
import os
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax import cloud_storage, predictor
from prompt_tuning_jax.data import mixture
from prompt_tuning_jax.data.token_cache import TokenCache

PARAMETER_DTYPES = ('float32', 'bfloat16', 'int8')


def arguments(lengths: Mapping[str, int], model_dir: str, dropout_rate: float, z_loss: float,
              label_smoothing: float, seed: int, batch_size: int, num_microbatches: int,
              eval_batch_size: int | None, max_eval_examples: int | None) -> None:
  """Raises ValueError for arguments of `run.train` that are not what they should be."""
  if not isinstance(model_dir, str) or (
      '://' in model_dir and not cloud_storage.is_remote(model_dir)):
    raise ValueError('MODEL_DIR must be a folder of this machine or gs://BUCKET/FOLDER, got '
                     f'{model_dir!r}.')
  if not cloud_storage.is_remote(model_dir) and set('[]\\') & set(os.path.abspath(model_dir)):
    raise ValueError('MODEL_DIR may not have [, ] or a backslash in it, which Orbax takes for a '
                     f'pattern of names, got {os.path.abspath(model_dir)}.')
  if not isinstance(lengths, Mapping) or set(lengths) != {'inputs', 'targets'} or not all(
      type(length) is int and length > 1 for length in lengths.values()):
    raise ValueError("TASK_FEATURE_LENGTHS should be such as {'inputs': 512, 'targets': 32}, got "
                     f'{lengths!r}.')
  shares(dropout_rate=dropout_rate, label_smoothing=label_smoothing)
  shares(float('inf'), z_loss=z_loss)
  counts(1, batch_size=batch_size, num_microbatches=num_microbatches)
  counts(0, seed=seed, eval_batch_size=eval_batch_size or 0,
         max_eval_examples=max_eval_examples or 0)
  if batch_size % num_microbatches:
    raise ValueError(f'BATCH_SIZE should be a multiple of num_microbatches, got {batch_size} and '
                     f'{num_microbatches}.')


def counts(least: int, **values: int) -> None:
  """Raises ValueError for what is no whole number from `least` on that fits into 63 bits."""
  for name, count in values.items():
    is_whole = isinstance(count, numbers.Integral) and not isinstance(count, bool)
    if not is_whole or not least <= count < 2 ** 63:
      raise ValueError(f'{name.upper()} should be a whole number from {least} to 2 ** 63 - 1, got '
                       f'{count!r}.')


def shares(end: float = 1, **values: float) -> None:
  """Raises ValueError for what is not at least 0 and less than `end`."""
  for name, value in values.items():
    if not isinstance(value, numbers.Real) or not 0 <= value < end:
      raise ValueError(f'{name.upper()} should be at least 0 and less than {end}, got {value!r}.')


def parameter_dtype(dtype: str) -> None:
  """Raises ValueError for a dtype that a frozen base is not kept in."""
  if dtype not in PARAMETER_DTYPES:
    raise ValueError(f'PARAMETER_DTYPE should be one of {", ".join(PARAMETER_DTYPES)}, got '
                     f'{dtype!r}.')


def data(tasks: mixture.Mixture) -> mixture.Mixture:
  """The tasks; data that is missing is told before a large base is read."""
  for task in tasks.tasks:
    if not task.train_split:
      raise ValueError(f'The task {task.name} has no training split.')
    for split in filter(None, (task.train_split, task.eval_split)):
      task.key_parts(split)
  return tasks


def positions(config: Any, caches: Sequence[TokenCache], virtual: Sequence[Any]) -> None:
  """Raises ValueError where an example is too long for a network with learned positions."""
  for cache, prompt in zip(caches, virtual, strict=True):
    inputs = cache.input_lengths + (prompt.length if prompt else 0)
    predictor.check_positions(config, inputs.tolist(), cache.target_lengths.tolist())
    predictor.check_masks(config, map(cache.inputs, range(cache.num_examples)),
                          cache.target_lengths.tolist())

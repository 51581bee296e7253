"""What a run would train, keep and save, told from shapes alone: no weights, no data, no device."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning_jax import cloud_storage, param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.checkpoints.hf_config import BYTES, VocabularyFile
from prompt_tuning_jax.data import mixture
from prompt_tuning_jax.networks import parameters
from prompt_tuning_jax.training import report
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.types import PyTree

MOST_BYTES = 1 << 28


def table(*, task: Any, initial_checkpoint_path: str | None, method: Any,
          optimizer: optax.GradientTransformation, network: Any = None,
          parameter_dtype: str = 'float32', **others: Any) -> str:
  """Lines of comment in gin, so that they may stand behind a configuration.

  The arguments are those of `run.train`; `others` do not matter. Where neither they nor a folder of
  this machine say which network it is, one line says so.
  """
  if network is None:
    try:
      if cloud_storage.is_remote(initial_checkpoint_path):
        raise ValueError(f'{initial_checkpoint_path} is not on this machine.')
      network = base_checkpoint.network_of(initial_checkpoint_path)
    except (ValueError, OSError) as error:
      return (f'# Sizes are not known: {" ".join(str(error).split())} They need the checkpoint or '
              'its network, --gin_file=network/….gin.')
  found = sizes(task, method, optimizer, network, parameter_dtype)
  width = max(map(len, found))
  return '\n'.join(['# Sizes, from shapes alone:', *(
      f'#   {name:{width}} {value:>16,}' for name, value in found.items())])


def sizes(task: Any, method: Any, optimizer: optax.GradientTransformation, network: Any,
          parameter_dtype: str = 'float32') -> dict[str, int]:
  """{what: how many numbers or bytes}.

  The file that is kept is left out where nothing trains, and where more trains than is written in
  a moment.
  """
  config = dataclasses.replace(network, scan_layers=False)
  names = tuple(each.name for each in mixture.as_mixture(task).tasks)
  if 'tasks' in {field.name for field in dataclasses.fields(method)}:
    method = dataclasses.replace(method, tasks=names, labels=(None,) * len(names))
  trainable, frozen = _shapes(method, config, parameter_dtype)
  optimizer = getattr(method, 'search', optimizer)
  state = jax.eval_shape(functools.partial(train_state.create, optimizer=optimizer), trainable)
  told = report.sizes(state, frozen)
  found = {
      'parameters that train': told['trainable_parameters'],
      'parameters that are frozen': told['parameters'] - told['trainable_parameters'],
      f'bytes of the frozen base ({parameter_dtype})': told['bytes']['frozen'],
      'bytes of what trains (float32)': told['bytes']['trainable'],
      'bytes of its gradients': told['bytes']['gradients'],
      'bytes of the optimizer state': told['bytes']['optimizer_state']}
  if not frozen:
    found['bytes of the folder that is kept'] = told['bytes']['trainable']
  elif 0 < told['bytes']['trainable'] <= MOST_BYTES:
    found['bytes of the file that is kept'] = _file_bytes(method, config, trainable)
  return found


def _shapes(method: Any, config: Any, dtype: str) -> tuple[PyTree, PyTree]:
  """(what trains, in float32; what is frozen) as shapes."""
  base = param_paths.flatten(parameters.shapes(config, dtype))
  if not method.trainable:
    return {}, param_paths.unflatten(base)
  method.virtual_tokens(config.vocab_size)  # tells of a length that cannot be
  token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  init = functools.partial(method.model(config).init, enable_dropout=False)
  made = jax.eval_shape(init, jax.random.key(0), token, token, token)['params']
  added = {path: leaf for path, leaf in param_paths.flatten(made).items() if path not in base}
  if not added:  # No modules around the network: what is added, if anything, follows its shapes.
    added = param_paths.flatten(jax.eval_shape(
        lambda params: method.initial(jax.random.key(0), _base(config, params), None),
        param_paths.unflatten(base)))
  trainable, frozen = param_paths.split(param_paths.unflatten({**base, **added}), method.trainable)
  trainable = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
               for path, leaf in param_paths.flatten(trainable).items()}
  return param_paths.unflatten(trainable), frozen


def _base(config: Any, params: PyTree) -> Base:
  """A stand-in with what methods ask of a base."""
  return Base('base', config, params, VocabularyFile(BYTES), '0' * 64)


def _file_bytes(method: Any, config: Any, trainable: PyTree) -> int:
  """The size of the file that the method writes, found by writing one of zeros.

  Names of a base, a task and labels make the real one some bytes longer.
  """
  zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), trainable)
  about: Mapping[str, Any] = {'task': 'task', 'labels': None, 'metric': None}
  if getattr(method, 'tasks', None):
    about = {**about, 'tasks': {}}
  with tempfile.TemporaryDirectory() as folder:
    method.save(pathlib.Path(folder) / 'kept', zeros, _base(config, None), about)
    return report.saved_bytes(pathlib.Path(folder))

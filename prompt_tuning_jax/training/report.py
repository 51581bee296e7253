"""What a run cost and what it gave: MODEL_DIR/report.json."""

import json
import math
import pathlib
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import safetensors_file, t5x_legacy
from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
from prompt_tuning_jax.training.state import TrainState
from prompt_tuning_jax.types import PyTree

FILE = 'report.json'


def sizes(state: TrainState, frozen: PyTree) -> dict[str, Any]:
  """Counts of parameters (numbers), and bytes of one copy of all that a run keeps on its devices.
  """
  some, rest = param_paths.count(state.trainable), param_paths.count(frozen)
  return {
      'trainable_parameters': some, 'parameters': some + rest,
      'trainable_percent': 100 * some / (some + rest),
      'bytes': {'frozen': _bytes(frozen), 'trainable': _bytes(state.trainable),
                'gradients': _bytes(state.trainable), 'optimizer_state': _bytes(state.opt_state)}}


def peak_memory() -> dict[str, Any]:
  """The most bytes held so far: of the busiest device, or of this process where that is the CPU.

  The process's peak has Python and its libraries in it, and what ran before in it.
  """
  used = [stats['peak_bytes_in_use'] for device in jax.local_devices()
          if (stats := device.memory_stats()) and 'peak_bytes_in_use' in stats]
  if used:
    return {'peak_bytes': max(used), 'peak_of': 'device'}
  unit = 1 if sys.platform == 'darwin' else 1024
  return {'peak_bytes': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
          'peak_of': 'process'}


def saved_bytes(path: pathlib.Path) -> int:
  """The size of a file, or of all files in a folder."""
  files = [path] if path.is_file() else path.rglob('*')
  return sum(file.stat().st_size for file in files if file.is_file())


def saved_parameters(path: pathlib.Path) -> int:
  """How many numbers a prompt file holds, or all weight files of a folder."""
  files = [path] if path.is_file() else sorted(path.glob('*.safetensors'))
  leaves = [leaf for file in files for leaf in safetensors_file.read_header(file).tensors.values()]
  return sum(math.prod(leaf.shape)
             for leaf in leaves or t5x_legacy.open_folder(str(path)).values())


def write(folder: pathlib.Path, report: Mapping[str, Any], name: str = FILE) -> None:
  """Writes MODEL_DIR/report.json, or another name, in one step."""
  with atomic_file(folder / name) as temporary:
    pathlib.Path(temporary).write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


def _bytes(tree: PyTree) -> int:
  return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

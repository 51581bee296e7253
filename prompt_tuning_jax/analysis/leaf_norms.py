"""How large trained leaves are: keys and values of a prefix, changes of weights, and others."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.prompts import weight_changes
from prompt_tuning_jax.types import Array


def of_prefix(leaves: Mapping[str, Array]) -> list[dict[str, Any]]:
  """{place: [L, 2, P, N, H]} -> the mean lengths of keys and values of each layer.

  A key or value is the vector [H] of one position and head.
  """
  rows = []
  for place, leaf in leaves.items():
    lengths = np.linalg.norm(np.asarray(leaf, np.float64), axis=-1).mean(axis=(2, 3))  # [L, 2]
    rows += [{'place': place, 'layer': layer, 'keys': float(keys), 'values': float(values)}
             for layer, (keys, values) in enumerate(lengths)]
  return rows


def of_leaves(leaves: Mapping[str, Array], base: Mapping[str, Array]) -> list[dict[str, Any]]:
  """{path: leaf} -> the Frobenius norm of each, `a @ b` being one; {} of a base is no base.

  Of a change of a kernel (LoRA), 'relative' is its norm by the kernel's; of scales (IA3), 'away' is
  their root mean square distance from 1, where nothing changes.
  """
  rows = []
  for path, leaf in sorted(leaves.items()):
    if path in (prompt_file.EMBEDDING, prompt_file.DEEP_EMBEDDING) or path.startswith('prefix/'):
      continue
    kind, _, rest = path.partition('/')
    if kind == 'lora' and path.endswith('/b'):
      continue
    row = {'path': path, 'shape': list(leaf.shape)}
    if kind == 'lora':
      b = leaves[path.removesuffix('/a') + '/b']
      changed = rest.removesuffix('/a')
      leaf = np.asarray(leaf, np.float64) @ np.asarray(b, np.float64)
      row = {'path': changed, 'shape': list(leaf.shape)}
      kernel = base.get(changed, weight_changes.tied_table(changed, base))
      if kernel is not None:
        row['relative'] = _norm(leaf) / _norm(kernel)
    elif kind in ('ia3', 'ia3_in'):
      row['away'] = _norm(np.asarray(leaf, np.float64) - 1) / np.sqrt(np.size(leaf))
    rows.append({**row, 'norm': _norm(leaf)})
  return rows


def _norm(leaf: Array) -> float:
  return float(np.linalg.norm(np.asarray(leaf).astype(np.float64)))

"""Small trained changes of frozen weights, as leaves beside the kernels that they change.

  lora/PATH/{a,b}  a [in, r], b [r, out]: the kernel at PATH is W + a b (Hu et al. 2022)
  ia3/PATH         [out]: the layer's outputs are scaled, its bias, if any, among them (Liu et al.
                   2022)
  ia3_in/PATH      [in]: its inputs are scaled, which for an MLP's last kernel is IA3's scaling of
                   the hidden activations

All together are ((x * ia3_in) (W + a b) + bias) * ia3. The kernel is never made: it stays as it is,
in eight bits too, and a change too small for its dtype is not lost (`networks.layers.Dense`).
Those of scanned layers have an axis more, [L, …]. Whatever else a tree of trained leaves holds
(`prompt/…`, `prefix/…`) stands beside the network's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.types import Array, PyTree

KINDS = ('lora', 'ia3', 'ia3_in')
TABLE = 'token_embedder/embedding'


def combined(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> PyTree:
  """The parameters that the model takes: all leaves, changes beside their kernels.

  Part of a change may be frozen (`b` of a LoRA whose `a` trains).

  Raises:
    ValueError: a change is of a kernel that the frozen tree lacks, or does not fit it.
  """
  leaves = param_paths.flatten(param_paths.merge(trained, frozen))
  changes = {path: leaves.pop(path) for path in list(leaves)
             if path.partition('/')[0] in KINDS}
  placed = {_beside(path): leaf for path, leaf in changes.items()}
  for kind, path in sorted({_changed(path)[:2] for path in changes}):
    table = tied_table(path, leaves) if kind == 'lora' else None
    if path not in leaves and table is None:
      raise ValueError(f'{kind} changes {path}, which the base does not have.')
    _check(kind, path, leaves[path].shape if table is None else table.shape[::-1], changes)
  return param_paths.unflatten({**leaves, **placed})


def tied_table(path: str, leaves: Mapping[str, Any]) -> Any | None:
  """The embedding table among a base's leaves, if it is the output layer whose kernel, of a network
  that has one, would be at `path` (`config.output`)."""
  decoder = any(name.startswith('decoder/') for name in leaves)
  if path in leaves or path != f'{"decoder" if decoder else "head"}/logits_dense/kernel':
    return None
  return next((leaf for name, leaf in leaves.items() if name.endswith(TABLE)), None)


def stacked(changes: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
  """K changes of the same kernels as one: {MODULE/NAME: [K, …]}, as `of_rows` takes them.

  Args:
    changes: K trees of trained leaves; what one of them does not change, or {}, stays the base's.

  Raises:
    ValueError: a leaf is none of such a change (a prompt, say): it has ways of its own to mix.
  """
  flat = [param_paths.flatten(tree) for tree in changes]
  collection = {}
  for path in sorted(set().union(*flat)):
    name, given = _beside(path), [tree.get(path) for tree in flat]
    shapes = [leaf.shape for leaf in given if leaf is not None]
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))  # Ranks may differ.
    neutral = jnp.zeros(shape) if path.startswith('lora/') else jnp.ones(shape)
    collection[name] = jnp.stack(
        [neutral if leaf is None else _padded(leaf, shape) for leaf in given])
  return collection


def of_rows(changes: Mapping[str, Array], rows: Array) -> PyTree:
  """The collection `changes` that gives every example of a batch its own change of the kernels.

  Args:
    changes: of `stacked`.
    rows: [B] int, which of the K each example has.

  Returns:
    What `model.apply({'params': frozen, 'changes': …})` takes beside the frozen leaves.
  """
  return param_paths.unflatten({path: leaf[rows] for path, leaf in changes.items()})


def _padded(leaf: Array, shape: tuple[int, ...]) -> Array:
  """A LoRA of a lower rank is one of a higher, with zeros."""
  return jnp.pad(leaf, [(0, size - own) for size, own in zip(shape, leaf.shape, strict=True)])


def _changed(path: str) -> tuple[str, str, str]:
  """'lora/MODULE/kernel/a' -> ('lora', 'MODULE/kernel', 'a'); ValueError for what is no change."""
  kind, _, kernel = path.partition('/')
  kernel, _, part = kernel.rpartition('/') if kind == 'lora' else (kernel, '', '')
  parts = ('a', 'b') if kind == 'lora' else ('',)
  if kind not in KINDS or not kernel.endswith('/kernel') or part not in parts:
    raise ValueError(f'{path} does not change a kernel, as lora/…/kernel/a, lora/…/kernel/b, '
                     'ia3/…/kernel and ia3_in/…/kernel do.')
  return kind, kernel, part


def _beside(path: str) -> str:
  """'lora/MODULE/kernel/a' -> 'MODULE/lora_a', where the module looks for it."""
  kind, kernel, part = _changed(path)
  return f'{kernel.removesuffix("kernel")}{kind}{part and f"_{part}"}'


def _check(kind: str, path: str, shape: tuple[int, ...], changes: Mapping[str, Array]) -> None:
  """Raises ValueError for a change that does not fit the kernel at `path`, of this shape."""
  if kind == 'lora':
    a, b = changes.get(f'lora/{path}/a'), changes.get(f'lora/{path}/b')
    if a is None or b is None:
      raise ValueError(f'lora of {path} needs both, a and b.')
    outer, inner = (*a.shape[:-1], *b.shape[-1:]), (*a.shape[:-2], *a.shape[-1:])
    if outer != shape or inner != b.shape[:-1]:
      raise ValueError(f'lora of {path}: {a.shape} and {b.shape} do not make {shape}.')
    return
  scale, axis = changes[f'{kind}/{path}'], -1 if kind == 'ia3' else -2
  if scale.shape != (*shape[:-2], shape[axis]):
    raise ValueError(f'{kind} of {path}: {scale.shape} does not scale axis {axis} of {shape}.')

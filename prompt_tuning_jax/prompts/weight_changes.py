"""Small trained changes of frozen weights, as a function of parameter trees.

  lora/PATH/{a,b}  a [in, r], b [r, out]: the kernel at PATH is W + a b (Hu et al. 2022)
  ia3/PATH         [out]: the kernel's outputs are scaled, W diag(l), and so is the bias beside it,
                   if there is one (Liu et al. 2022)
  ia3_in/PATH      [in]: its inputs are scaled, diag(l) W, which for an MLP's last kernel is IA3's
                   scaling of the hidden activations

The network is as it was: it is given other kernels. Whatever else a tree of trained leaves holds
(`prompt/…`, `prefix/…`) stands beside the network's own. So does a LoRA of an output layer that is
the embedding table, which has no kernel of its own (`networks.layers.TiedOutput`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.types import Array, PyTree

KINDS = ('lora', 'ia3', 'ia3_in')
TABLE = 'token_embedder/embedding'


def combined(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> PyTree:
  """The parameters that the model takes: frozen leaves with their changes, and new leaves.

  Part of a change may be frozen (`b` of a LoRA whose `a` trains).

  Raises:
    ValueError: a change is of a leaf that the frozen tree lacks, or does not fit it.
  """
  leaves = param_paths.flatten(frozen)
  changes, beside = {}, {}
  of_changes = {path: leaves.pop(path) for path in list(leaves)
                if path.partition('/')[0] in KINDS}
  for path, leaf in {**of_changes, **param_paths.flatten(trained)}.items():
    kind, _, rest = path.partition('/')
    (changes.setdefault(kind, {}) if kind in KINDS else beside)[
        rest if kind in KINDS else path] = leaf
  for kind, of in changes.items():
    paths = {path.rpartition('/')[0] for path in of} if kind == 'lora' else set(of)
    for path in sorted(paths):
      table = tied_table(path, leaves) if kind == 'lora' else None
      if table is not None:
        a, b = _lora(path, table.shape[::-1], of)
        layer = path.removesuffix('/kernel')
        beside.update({f'{layer}/lora_a': a, f'{layer}/lora_b': b})
        continue
      if path not in leaves:
        raise ValueError(f'{kind} changes {path}, which the base does not have.')
      leaves[path] = _changed(kind, path, leaves[path], of)
      bias = path.removesuffix('kernel') + 'bias'
      if kind == 'ia3' and bias in leaves:
        leaves[bias] = leaves[bias] * of[path].astype(leaves[bias].dtype)
  return param_paths.merge(param_paths.unflatten(leaves), param_paths.unflatten(beside))


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
    kind, _, rest = path.partition('/')
    module, kernel, name = rest.partition('/kernel')
    if kind not in KINDS or not kernel:
      raise ValueError(f'{path} does not change a kernel, so it is no per-example change of one.')
    given = [tree.get(path) for tree in flat]
    shapes = [leaf.shape for leaf in given if leaf is not None]
    shape = tuple(max(sizes) for sizes in zip(*shapes, strict=True))  # Ranks may differ.
    neutral = jnp.zeros(shape) if kind == 'lora' else jnp.ones(shape)
    collection[f'{module}/{kind}{name.replace("/", "_")}'] = jnp.stack(
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


def _changed(kind: str, path: str, kernel: Array, of: Mapping[str, Array]) -> Array:
  if not jax.tree_util.all_leaves([kernel]):  # values and their scales
    raise ValueError(f'{kind} changes {path}, which has eight bits: take the base in bfloat16 or '
                     'float32.')
  if kind == 'lora':
    a, b = _lora(path, kernel.shape, of)
    return kernel + jnp.matmul(a, b).astype(kernel.dtype)
  scale, axis = of[path], 1 if kind == 'ia3' else 0
  if scale.shape != (kernel.shape[axis],):
    raise ValueError(f'{kind} of {path}: {scale.shape} does not scale axis {axis} of '
                     f'{kernel.shape}.')
  return kernel * jnp.expand_dims(scale, 1 - axis).astype(kernel.dtype)


def _lora(path: str, shape: tuple[int, ...], of: Mapping[str, Array]) -> tuple[Array, Array]:
  """The two halves of a change of a kernel of this shape; ValueError where they are not."""
  a, b = of.get(f'{path}/a'), of.get(f'{path}/b')
  if a is None or b is None:
    raise ValueError(f'lora of {path} needs both, a and b.')
  if (a.shape[0], b.shape[1]) != shape or a.shape[1] != b.shape[0]:
    raise ValueError(f'lora of {path}: {a.shape} and {b.shape} do not make {shape}.')
  return a, b

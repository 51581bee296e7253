"""The layers of a stack, one after another: unrolled, or scanned.

Unrolled, each layer has leaves of its own, `layers_0/…`, `layers_1/…`: T5X's names, and those of
all files. Scanned, the layers are compiled once, whatever their number, and `layers/…` holds each
of their leaves with the layer's axis before its own: [L, …]. So it is for parameters and caches.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning

from prompt_tuning_jax.networks import fused_attention
from prompt_tuning_jax.networks.layers import check_settings
from prompt_tuning_jax.types import Array, PyTree


def _is_product(primitive: Any, *args: Any, **kwargs: Any) -> bool:
  """Whether a value is that of a product with weights, or of a GPU's attention.

  Of that, the backward pass needs an array no larger than a product's.
  """
  return (primitive.name.startswith('dot_product_attention_fwd') or
          primitive.name == 'pallas_call' or
          jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims(primitive, *args, **kwargs))


# What the forward pass keeps for the backward pass, under T5X's names: all that JAX would, the
# products with weights, or a layer's inputs alone. What is not kept is computed again.
REMAT_POLICIES = {'none': None, 'minimal': _is_product,
                  'full': jax.checkpoint_policies.nothing_saveable}
_SCANNED = ('params', 'cache', 'cross_cache', 'intermediates')
_ONE, _ALL = re.compile(r'(?<=/)layers_(\d+)(?=/)'), re.compile(r'(?<=/)layers(?=/)')


def check(config: Any) -> None:
  """Makes `mlp_activations` of a network a tuple; ValueError for a name that there is none of."""
  object.__setattr__(config, 'mlp_activations', tuple(config.mlp_activations))
  check_settings(config.mlp_activations, config.dtype)
  if config.attention not in fused_attention.IMPLEMENTATIONS:
    raise ValueError(f'attention must be one of {fused_attention.IMPLEMENTATIONS}, got '
                     f'{config.attention!r}.')
  if config.remat_policy not in REMAT_POLICIES:
    raise ValueError(f'remat_policy must be one of {tuple(REMAT_POLICIES)}, got '
                     f'{config.remat_policy!r}.')


def make(layer: type[nn.Module], config: Any, number: int, static: Sequence[int], shared: int,
         name: str | None = None) -> Any:
  """The layers of a stack, for `run`.

  Args:
    layer: a module of `config` alone, called with (x, own, *shared) -> (x, made): `own` is the
      layer's number (and what else is its own), `shared` the same for all layers.
    static: which arguments, x being 1, are Python values.
    shared: how many arguments follow `own`.
    name: 'layers', but in a `setup`, where it is that of the attribute.
  """
  if config.remat_policy != 'none':
    layer = nn.remat(layer, prevent_cse=not config.scan_layers, static_argnums=tuple(static),
                     policy=REMAT_POLICIES[config.remat_policy])
  if not config.scan_layers:
    return [layer(config, name=name and f'{name}_{i}') for i in range(number)]
  return partitioning.scan_with_axes(
      layer, variable_axes=dict.fromkeys(_SCANNED, 0),
      split_rngs={'params': True, 'dropout': True}, in_axes=(0, *(nn.broadcast,) * shared),
      length=number)(config, name=name)


def run(layers: Any, number: int, x: Array, own: Any, *shared: Any) -> tuple[Array, Any]:
  """x through `number` layers -> (x, what they made beside it).

  `own` is None or what a run before has made: a list, or {'layers': …} where they are scanned.
  """
  if not isinstance(layers, Sequence):
    x, made = layers(x, (jnp.arange(number), own and own['layers']), *shared)
    return x, {'layers': made}
  made = []
  for i, layer in enumerate(layers):
    x, of_layer = layer(x, (i, own and own[i]), *shared)
    made.append(of_layer)
  return x, made


def advance(stack: nn.Module, size: int) -> Array | None:
  """Where in its cache the next `size` positions go; None in the call that makes the cache."""
  if not stack.has_variable('cache', 'cache_index'):
    stack.put_variable('cache', 'cache_index', jnp.zeros((), jnp.int32))
    return None
  index = stack.get_variable('cache', 'cache_index')
  stack.put_variable('cache', 'cache_index', index + size)
  return index


def take_rows(kept: PyTree, rows: Array) -> PyTree:
  """These rows of what a network keeps of a batch: of an encoded input, or of its caches.

  Scalars are the same for all rows.
  """
  def take(path: Sequence[Any], leaf: Array) -> Array:
    if not jnp.ndim(leaf):
      return leaf
    return leaf[:, rows] if jax.tree_util.DictKey('layers') in path else leaf[rows]

  return jax.tree_util.tree_map_with_path(take, kept)


def scanned_path(path: str) -> str:
  """'encoder/layers_3/mlp/wo/kernel' -> 'encoder/layers/mlp/wo/kernel'; other paths as they are."""
  return _ONE.sub('layers', path)


def grouped(paths: Iterable[str]) -> dict[str, list[str]]:
  """{path in a scanned network: the paths of its layers, in their order}.

  Raises ValueError where a layer is missing: all layers have a leaf, or none has.
  """
  layers: dict[str, dict[int, str]] = {}
  for path in paths:
    match = _ONE.search(path)
    layers.setdefault(scanned_path(path), {})[int(match[1]) if match else 0] = path
  for path, of in layers.items():
    if sorted(of) != list(range(len(of))):
      raise ValueError(f'{path}: scanned layers have a leaf all of them or none, but only layers '
                       f'{", ".join(map(str, sorted(of)))} have this one.')
  return {path: [of[i] for i in range(len(of))] for path, of in layers.items()}


def scanned(leaves: Mapping[str, Array]) -> dict[str, Array]:
  """{path: leaf} of an unrolled network as those of a scanned one."""
  return {path: leaves[of[0]] if path in leaves else jnp.stack([leaves[each] for each in of])
          for path, of in grouped(leaves).items()}


def unrolled(leaves: Mapping[str, Array], part: Callable[[Array, int], Any] | None = None,
             ) -> dict[str, Any]:
  """{path: leaf} of a scanned network as those of an unrolled one.

  `part` takes a layer's leaf out of that of all; by default it is a `LayerOf`, no copy.
  """
  made, part = {}, part or LayerOf
  for path, leaf in leaves.items():
    if not _ALL.search(path):
      made[path] = leaf
      continue
    for i in range(leaf.shape[0]):
      made[_ALL.sub(f'layers_{i}', path)] = part(leaf, i)
  return made


@dataclasses.dataclass(frozen=True, eq=False)
class LayerOf:
  """A layer's part of a stacked leaf, copied only when it is asked for as a NumPy array."""

  stacked: Array
  layer: int

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.stacked.shape[1:])

  @property
  def dtype(self) -> Any:
    return self.stacked.dtype

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy  # It always is one.
    return np.asarray(self.stacked[self.layer], dtype)

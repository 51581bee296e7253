"""Leaves that lie in a file: checked all together, then loaded one by one onto their shards."""

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.networks import int8, layer_stack
from prompt_tuning_jax.types import Array, DType, PyTree, Shape

ShardingFor = Callable[[str, Shape], jax.sharding.Sharding]
CPU_ALIGNMENT = 64  # bytes, XLA's
FLOATS = ('float64', 'float32', 'float16', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
  """One parameter in a file, seen under its canonical shape.

  `read` takes one slice an axis and returns that part; `problem` says why there is nothing to
  read; `name` is what the file calls the parameter. `verify`, if there is one, raises ValueError
  where the file's bytes are not those that were written.
  """

  name: str
  shape: Shape
  dtype: str
  read: Callable[[tuple[slice, ...]], np.ndarray]
  problem: str | None = None
  verify: Callable[[], None] | None = None


def transposed(leaf: StoredLeaf) -> StoredLeaf:
  """A matrix seen with its axes exchanged."""
  return dataclasses.replace(leaf, shape=leaf.shape[::-1],
                             read=lambda index: leaf.read(index[::-1]).T)


def part_of_last_axis(leaf: StoredLeaf, k: int, parts: int) -> StoredLeaf:
  """The k-th of so many equal parts that stand side by side in one tensor."""
  size = leaf.shape[-1] // parts

  def read(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[-1].indices(size)
    return leaf.read((*index[:-1], slice(k * size + start, k * size + stop)))

  return dataclasses.replace(leaf, shape=(*leaf.shape[:-1], size), read=read)


def behind_zeros(leaf: StoredLeaf) -> StoredLeaf:
  """A tensor with a row of zeros before its own."""
  def read(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[0].indices(leaf.shape[0] + 1)
    own = leaf.read((slice(max(start - 1, 0), max(stop - 1, 0)), *index[1:]))
    return np.pad(own, ((int(start == 0 < stop), 0), *((0, 0),) * (own.ndim - 1)))

  return dataclasses.replace(leaf, shape=(leaf.shape[0] + 1, *leaf.shape[1:]), read=read)


def stacked(leaves: Sequence[StoredLeaf]) -> StoredLeaf:
  """The same leaf of several layers as one, the layer's axis first."""
  first = leaves[0]
  return dataclasses.replace(
      first, name=f'{first.name} and {len(leaves) - 1} more', shape=(len(leaves), *first.shape),
      read=lambda index: np.stack([leaf.read(index[1:]) for leaf in leaves[index[0]]]))


def cast(leaf: StoredLeaf, dtype: DType | None) -> StoredLeaf:
  """A leaf in another dtype; None is its own."""
  dtype = jnp.dtype(dtype or leaf.dtype)
  return dataclasses.replace(leaf, dtype=dtype.name, read=lambda index: np.asarray(
      leaf.read(index)).astype(dtype, copy=False))


def quantized(leaf: StoredLeaf) -> tuple[StoredLeaf, StoredLeaf]:
  """(values, scale) of `networks.int8`. A part of either is made from whole rows."""
  read = lambda index: int8.quantize(leaf.read((*index[:-1], slice(None))))
  return (dataclasses.replace(leaf, dtype='int8',
                              read=lambda index: read(index)[0][..., index[-1]]),
          dataclasses.replace(leaf, dtype='float32', shape=(*leaf.shape[:-1], 1),
                              read=lambda index: read(index)[1]))


def is_copy(leaf: StoredLeaf | None, other: StoredLeaf | None, rows: int = 4096) -> bool:
  """Whether two matrices are there and are the same; stops at the first difference."""
  if not (leaf and other) or leaf.problem or other.problem or len(leaf.shape) != 2:
    return False
  if (leaf.shape, leaf.dtype) != (other.shape, other.dtype):
    return False
  parts = [(slice(i, i + rows), slice(None)) for i in range(0, leaf.shape[0], rows)]
  return all(np.array_equal(leaf.read(part), other.read(part)) for part in parts)


def check(stored: Mapping[str, StoredLeaf], shapes: Mapping[str, Shape], where: str,
          name_of: Callable[[str], str] = lambda path: path):
  """Raises one ValueError naming every leaf that is missing, extra, misshaped or unreadable."""
  missing = [_named(path, name_of(path)) for path in shapes if path not in stored]
  extra = [_named(path, leaf.name) for path, leaf in stored.items() if path not in shapes]
  wrong, broken = [], []
  for path, leaf in stored.items():
    if path not in shapes:
      continue
    if leaf.problem or leaf.dtype not in FLOATS:
      broken.append(f'{_named(path, leaf.name)}: {leaf.problem or f"its dtype is {leaf.dtype}"}')
    elif leaf.shape != tuple(shapes[path]):
      wrong.append(f'{_named(path, leaf.name)} is {list(leaf.shape)}, '
                   f'expected {list(shapes[path])}')
  _raise(where, {'missing': missing, 'extra': extra, 'wrong shape': wrong, 'unreadable': broken})


def load(stored: Mapping[str, StoredLeaf], shapes: Mapping[str, Shape], where: str,
         dtype: DType | None = None, sharding_for: ShardingFor | None = None,
         name_of: Callable[[str], str] = lambda path: path, scan_layers: bool = False) -> PyTree:
  """A nested tree of jax Arrays: each leaf is read shard by shard, cast to `dtype` on the way.

  `dtype` None keeps each leaf's own; 'int8' makes `networks.int8.Quantized` of kernels and the
  embedding table, and float32 of the rest. `sharding_for(path, shape)` defaults to the first
  device. With `scan_layers` each leaf of all layers is one. An accelerator's leaves pass through
  host memory a few at a time. Raises as `check` does, also for leaves whose bytes are damaged.
  """
  check(stored, shapes, where, name_of)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  groups = layer_stack.grouped(shapes) if scan_layers else {path: [path] for path in shapes}

  def put(path: str, leaves: Sequence[StoredLeaf], exchanged: bool = False) -> jax.Array:
    leaf = leaves[0] if path in stored else stacked(leaves)
    sharding = device
    if sharding_for:
      sharding = sharding_for(path, int8.exchange(leaf.shape) if exchanged else leaf.shape)
      if exchanged:
        sharding = int8.exchanged_sharding(sharding, len(leaf.shape))
    if sharding.is_fully_addressable or sharding.is_fully_replicated:
      for each in filter(None, (leaf.verify for leaf in leaves)):
        each()  # Of many processes, each would read what the others need.
    return _load_leaf(leaf, sharding)

  def load_one(path: str) -> jax.Array | int8.Quantized | Exception:
    leaves = [stored[each] for each in groups[path]]
    exchanged = int8.is_kernel(path)
    try:
      if dtype != 'int8' or not int8.is_small(path):
        return put(path, [cast(leaf, 'float32' if dtype == 'int8' else dtype) for leaf in leaves])
      values, scale = zip(*(quantized(transposed(leaf) if exchanged else leaf)
                            for leaf in leaves), strict=True)
      return int8.Quantized(put(path, values, exchanged), put(path, scale, exchanged), exchanged)
    except (ValueError, OSError) as error:
      return error

  with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
    leaves = dict(zip(groups, pool.map(load_one, groups), strict=True))
  _raise(where, {'unreadable': [f'{_named(path, name_of(groups[path][0]))}: {error}'
                                for path, error in leaves.items()
                                if isinstance(error, Exception)]})
  return param_paths.unflatten(leaves)


def _load_leaf(leaf: StoredLeaf, sharding: jax.sharding.Sharding) -> jax.Array:
  parts = {}  # devices that hold the same part share one read

  def part(index: tuple[slice, ...]) -> np.ndarray:
    key = tuple((s.start, s.stop) for s in index)
    if key not in parts:
      # Always a copy: arrays on CPU keep this memory, and the file must not stay mapped.
      parts[key] = aligned_copy(leaf.read(index))
      if not _is_finite(parts[key]):
        raise ValueError(f'it has values that are NaN or infinite in {leaf.dtype}')
    return parts[key]

  # Waiting frees the host's copy, where the array is elsewhere, before the next leaf is read.
  return jax.make_array_from_callback(leaf.shape, sharding, part).block_until_ready()


def aligned_copy(array: np.ndarray) -> np.ndarray:
  """A copy in C order that all of a host's CPU devices can keep as it is, together.

  JAX does not copy memory of this alignment to a CPU device, so replicas of a leaf are one. Nobody
  may write to it then.
  """
  memory = np.empty(array.nbytes + CPU_ALIGNMENT, np.uint8)
  start = -memory.ctypes.data % CPU_ALIGNMENT
  copy = memory[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
  copy[...] = array
  return copy


def _is_finite(array: np.ndarray) -> bool:
  """Whether no value is NaN or infinite."""
  if array.dtype == jnp.bfloat16 and array.size:
    # Its exponent's bits tell it many times faster than NumPy's test, which knows no bfloat16.
    return int((array.view(np.uint16) & 0x7fff).max()) < 0x7f80
  return bool(np.isfinite(array).all())


def to_host(path: str, leaf: Array) -> np.ndarray:
  """One leaf as a NumPy array. Raises ValueError where this process holds only a part of it."""
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)
  if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
    raise ValueError(f'{path} is spread over several processes: only a checkpoint whose leaves '
                     'are whole in this process can be written.')
  # Of a copy: an Array keeps the NumPy value it once gave, which would add up to a second model.
  return np.asarray(jnp.copy(leaf) if leaf.is_fully_addressable else leaf)


def sha256(array: np.ndarray) -> str:
  """In hex, of an array's bytes in C order."""
  flat = np.ascontiguousarray(array).reshape(-1)
  return hashlib.sha256(flat.view(np.uint8).data).hexdigest()


def _named(path: str, name: str) -> str:
  return path if name == path else f'{path} ({name})'


def _raise(where: str, problems: Mapping[str, list[str]]):
  found = '; '.join(f'{kind}: {", ".join(sorted(leaves))}'
                    for kind, leaves in problems.items() if leaves)
  if found:
    raise ValueError(f'The weights in {where} do not fit the network. {found[0].upper()}'
                     f'{found[1:]}.')

"""The device mesh, and which mesh axis each logical axis is split over: from one device to a pod.

A mesh has two axes. Rows of a batch are split over `data`; what the devices along `model` compute
together is split over `model`, by Megatron's scheme (Shoeybi et al. 2019), which is T5X's: heads
and hidden units. Four settings follow, one for each file in gin/partitioning:

  data         a copy of the base on every device
  fsdp         the base in parts over `data`, gathered where it is used (Rajbhandari et al. 2020,
               ZeRO's third stage)
  tensor       every device computes a part of every layer
  fsdp_tensor  both: parts over both axes

What trains beside the base, a prompt's few rows, is whole on every device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax.linen import partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax import host_memory
from prompt_tuning_jax.types import PyTree

# (logical axis, mesh axis), the first come first served; what is not named is replicated. T5X's.
STANDARD_RULES = (
    ('batch', 'data'),
    ('vocab', 'model'),
    ('heads', 'model'),
    ('joined_kv', 'model'),
    ('mlp', 'model'),
)
KEPT_IN_PARTS = (('embed', 'data'),)  # of weights between their uses, with `fully_sharded`
# A line of HLO such as `%x = (f32[20,256]{1,0}, f32[]) all-reduce(…)`; of a kind that starts and is
# done elsewhere, the latter.
_COLLECTIVE = re.compile(r'= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
                         r'collective-permute|collective-broadcast)(?:-done)?\(')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """Splits batches over mesh axis `data`, and weights by the rules.

  Args:
    model_parallelism: devices along `model`, the others are along `data`; None is all of them.
    fully_sharded: weights are in parts over `data` too, and each is gathered when its layer is
      computed, forward and backward.
    rules: which logical axes of weights and activations are split, while they are computed with.
  """

  model_parallelism: int | None = 1
  fully_sharded: bool = False
  rules: tuple[tuple[str, str], ...] = STANDARD_RULES

  @functools.cached_property
  def mesh(self) -> Mesh:
    devices = jax.device_count()
    model = devices if self.model_parallelism is None else self.model_parallelism
    if type(model) is not int or model < 1 or devices % model:
      raise ValueError(f'model_parallelism must divide the {devices} devices, or be None for all '
                       f'of them, got {model!r}.')
    return jax.make_mesh((devices // model, model), ('data', 'model'),
                         axis_types=(AxisType.Auto, AxisType.Auto))

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def copies(self) -> int:
    """How many parts a batch is split into: its rows must be a multiple."""
    return self.mesh.shape['data']

  def sharding_for(self, logical_axes: Callable[[str], tuple[str, ...] | None]) -> Callable:
    """(path, shape) -> sharding, from a parameter path's logical axes.

    What has no axes is replicated, and so is a dimension that its mesh axis does not divide.
    """
    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
      axes = logical_axes(path) or (None,) * len(shape)
      # A norm's scale is too small to be worth a gathering of its own.
      in_parts = self.fully_sharded and len(set(axes) - {'layers'}) > 1
      spec = partitioning.logical_to_mesh_axes(
          axes, self.rules + (KEPT_IN_PARTS if in_parts else ()))
      return NamedSharding(self.mesh, PartitionSpec(*(
          name if name and size % self.mesh.shape[name] == 0 else None
          for name, size in zip(spec, shape, strict=True))))

    return sharding

  def jit(self, function: Callable, **options) -> Callable:
    """`jax.jit`, in which what networks say of their activations' and weights' axes holds.

    Without this their constraints do nothing. With `fully_sharded` it is they that gather a weight
    where it is used; `rematerialized` keeps the gathered one from waiting for the backward pass.
    """
    host_memory.give_back_after_compilations()

    @functools.wraps(function)
    def constrained(*args, **kwargs):
      with (jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh),
            partitioning.axis_rules(self.rules)):
        return function(*args, **kwargs)

    return jax.jit(constrained, **options)

  def rematerialized(self, loss: Callable) -> Callable:
    """A loss whose backward pass gathers weights anew, where they are `fully_sharded`."""
    return jax.checkpoint(loss, policy=_is_no_gathering) if self.fully_sharded else loss

  def replicate(self, tree: PyTree) -> PyTree:
    """The same leaves whole on every device. Every process gives the same ones."""
    def put(leaf) -> jax.Array:
      if isinstance(leaf, jax.Array) and leaf.sharding.device_set == self._devices:
        return jax.device_put(leaf, self.replicated)
      array = np.asarray(leaf)
      return jax.make_array_from_callback(array.shape, self.replicated, array.__getitem__)

    return jax.tree.map(put, tree)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> PyTree:
    """The rows of a whole batch -> global device arrays, split over `data`.

    Every process gives the whole batch; only the rows of its own devices are put on them.
    """
    split = NamedSharding(self.mesh, PartitionSpec('data'))
    rows = len(next(iter(batch.values())))
    if rows % self.copies:
      raise ValueError(f'A batch must be a multiple of the {self.copies} parts it is split into, '
                       f'got {rows} rows: change BATCH_SIZE.')
    return {name: jax.make_array_from_callback(array.shape, split, array.__getitem__)
            for name, array in batch.items()}

  @functools.cached_property
  def _devices(self) -> set[jax.Device]:
    return set(self.mesh.devices.flat)


def _is_no_gathering(primitive, *_, **__) -> bool:
  """Whether a value is kept for the backward pass: all are but weights as they were gathered.

  Those come out of a constraint, and perhaps a cast. Constraints and casts of activations cost
  next to nothing to be done again.
  """
  return primitive.name not in ('sharding_constraint', 'convert_element_type')


def collectives(program: str) -> dict[str, int]:
  """{kind: bytes} that devices give each other in a compiled program, of its text (`as_text()`).

  The bytes are those of the results on one device, such as the sum of an all-reduce or the whole
  of an all-gather. What stands in a loop counts once.
  """
  bits = {}
  for shapes, kind in _COLLECTIVE.findall(program):
    bits[kind] = bits.get(kind, 0) + sum(
        math.prod(map(int, filter(None, sizes.split(',')))) * _bits(name)
        for name, sizes in _ARRAY.findall(shapes))
  return {kind: count // 8 for kind, count in sorted(bits.items())}


def _bits(name: str) -> int:
  """Of one number of a type as HLO names it: f32, bf16, s32, pred."""
  return 8 if name == 'pred' else int(re.search(r'\d+', name)[0])

"""The device mesh, and which mesh axis each logical axis is split over."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax.types import PyTree

# (logical axis, mesh axis); what is not named is replicated. T5X's standard rules.
STANDARD_RULES = (
    ('batch', 'data'),
    ('vocab', 'model'),
    ('heads', 'model'),
    ('joined_kv', 'model'),
    ('mlp', 'model'),
)


@dataclasses.dataclass(frozen=True)
class Partitioner:
  """Splits batches over mesh axis `data` and weights over `model`.

  `model_parallelism` devices share one copy of the base; the rest is data parallelism.
  """

  model_parallelism: int = 1
  rules: tuple[tuple[str, str], ...] = STANDARD_RULES

  @functools.cached_property
  def mesh(self) -> Mesh:
    devices = jax.device_count()
    if devices % self.model_parallelism:
      raise ValueError(f'model_parallelism must divide the {devices} devices, '
                       f'got {self.model_parallelism}.')
    return jax.make_mesh((devices // self.model_parallelism, self.model_parallelism),
                         ('data', 'model'), axis_types=(AxisType.Auto, AxisType.Auto))

  @property
  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())

  def sharding_for(self, logical_axes: Callable[[str], tuple[str, ...] | None]) -> Callable:
    """(path, shape) -> sharding, from a parameter path's logical axes.

    What has no axes is replicated, and so is a dimension that its mesh axis does not divide.
    """
    mesh, rules = self.mesh, dict(self.rules)

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
      names = [rules.get(axis) for axis in logical_axes(path) or (None,) * len(shape)]
      spec = [name if name and size % mesh.shape[name] == 0 else None
              for name, size in zip(names, shape, strict=True)]
      return NamedSharding(mesh, PartitionSpec(*spec))

    return sharding

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> PyTree:
    """Rows of this process -> global device arrays, split over `data`."""
    split = NamedSharding(self.mesh, PartitionSpec('data'))
    parts = self.mesh.shape['data'] // jax.process_count()
    rows = len(next(iter(batch.values())))
    if rows % parts:
      raise ValueError(f'A batch must be a multiple of the {parts} devices it is split over, got '
                       f'{rows} rows: change BATCH_SIZE.')
    return {name: jax.make_array_from_process_local_data(split, array)
            for name, array in batch.items()}

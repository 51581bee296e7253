"""What the processes of one run do together. All compute alike; the first one writes.

Every process must come to each of these calls, in the same order. With one process they do nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prompt_tuning_jax.types import PyTree

PATIENCE = 24 * 3600  # seconds that the others wait while the first one makes something


def is_first() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def wait(name: str) -> None:
  """Waits until every process is here. A process that dies meanwhile ends the wait."""
  # Not by a computation of all devices: Gloo's wait for half a minute only.
  ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * PATIENCE)


def meet(mesh: Mesh) -> None:
  """Connects the devices of all processes, before any of them has something slow to do.

  Those of CPUs (Gloo) give up where one comes half a minute later than another to the first
  exchange along an axis.
  """
  if jax.process_count() == 1:
    return
  wait('mesh')
  multihost_utils.sync_global_devices('mesh')
  place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  ones = jax.jit(lambda: jnp.ones(mesh.devices.shape), out_shardings=place(*mesh.axis_names))()
  for axis, other in enumerate(reversed(mesh.axis_names)):
    jax.jit(lambda x, axis: jnp.sum(x, axis), static_argnums=1,
            out_shardings=place(other))(ones, axis).block_until_ready()
  jax.jit(jnp.sum, out_shardings=place())(ones).block_until_ready()


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
  """The first process goes through the body before the others do.

  So that what it leaves on a disk that they share is made once.
  """
  if not is_first():
    wait(name)
  yield
  if is_first():
    wait(name)


def of_the_first(values: Mapping[str, float]) -> dict[str, float]:
  """The first process's values in every process, bit for bit; all have the same names."""
  if jax.process_count() == 1:
    return dict(values)
  halves = np.array(list(values.values()), np.float64).view(np.uint32)  # devices have no float64
  given = np.asarray(multihost_utils.broadcast_one_to_all(halves)).view(np.float64)
  return dict(zip(values, given.tolist(), strict=True))


def whole(tree: PyTree) -> PyTree:
  """Leaves that may be in parts in several processes, whole: NumPy arrays of this process, one by
  one through its devices. In a single process the tree as it is."""
  if jax.process_count() == 1:
    return tree
  return jax.tree.map(lambda leaf: np.asarray(
      leaf if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, tiled=True)),
                      tree)

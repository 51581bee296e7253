"""What resumes a run: step, trainable leaves, optimizer state and the host's records (orbax)."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from prompt_tuning_jax import cloud_storage
from prompt_tuning_jax.types import PyTree


class TrainingStates:
  """The saved states of one run, in MODEL_DIR/checkpoints. The base is not among them.

  A save is written beside the others and renamed when whole, so a killed process leaves the
  previous state as it was.
  """

  def __init__(self, folder: pathlib.Path, keep: int = 2):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True,
                                           enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(_absolute(folder), options=options,
                                          item_names=('state', 'records'))

  def save(self, step: int, state: PyTree, records: dict[str, Any]) -> None:
    """Starts a save; arrays are copied off the device before this returns."""
    if self._manager.latest_step() == step:
      return
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), records=ocp.args.JsonSave(records)))

  def restore_latest(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """(state, records) of the newest save, of the shapes and shardings of `like`; None if none.

    Raises:
      ValueError: the newest save does not fit `like` or cannot be read.
    """
    step = self._manager.latest_step()
    if step is None:
      return None
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(shapes), records=ocp.args.JsonRestore()))
    except Exception as error:
      raise ValueError(
          f'The saved state {self._manager.directory / str(step)} cannot be resumed: '
          f'{str(error).splitlines()[0]} If the method, length or optimizer changed, choose '
          'another MODEL_DIR; if the files are damaged, remove that folder.') from error
    return restored.state, restored.records

  def wait(self) -> None:
    """Waits until every save is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and frees what the manager holds."""
    self.wait()
    self._manager.close()


def _absolute(folder: pathlib.Path | epath.Path) -> epath.Path:
  return epath.Path(folder if cloud_storage.is_remote(folder) else folder.absolute())

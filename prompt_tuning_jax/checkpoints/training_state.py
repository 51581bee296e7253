"""What resumes a run: step, trainable leaves, optimizer state and the host's records (orbax)."""

import concurrent.futures
import hashlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from prompt_tuning_jax import cloud_storage
from prompt_tuning_jax.checkpoints import processes
from prompt_tuning_jax.types import PyTree

logger = logging.getLogger(__name__)
ITEMS = ('state', 'records')
SUMS = 'sums.json'  # in a state's folder: {file: [bytes, SHA-256]} of its items


class TrainingStates:
  """The saved states of one run, in MODEL_DIR/checkpoints. The base is not among them.

  A save is written beside the others and renamed when whole, so a killed process leaves the
  previous state as it was. A run of one process writes in a thread, while the next steps are taken.
  On a disk a state holds the checksums of its files; one without them (of an earlier version, or in
  a bucket, which keeps its own) is read all the same.
  """

  def __init__(self, folder: pathlib.Path | epath.Path, keep: int = 2):
    self._folder = _absolute(folder)
    # Of a failed save orbax also writes pages to the log, from every thread.
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
        # Orbax tells its threads that a folder is there under a number that saves of several runs,
        # at the same time in one process, would take from each other: folders are made at once.
        async_options=ocp.AsyncOptions(post_finalization_callback=self._add_sums,
                                       create_directories_asynchronously=False))
    try:
      self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers={
          'state': ocp.StandardCheckpointHandler(), 'records': ocp.JsonCheckpointHandler()})
    except OSError as error:
      raise ValueError(f'{folder} cannot be written: {error.strerror}.') from error
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._writing: concurrent.futures.Future | None = None

  def save(self, step: int, state: PyTree, records: dict[str, Any],
           first: Callable[[PyTree], Any] = lambda state: None) -> None:
    """Starts a save; arrays are copied off the device before this returns.

    `first` is called with the state, and what it writes is there before the state is.

    Raises:
      ValueError: this save or the one before could not be written. The last whole one stays.
    """
    self.settle()
    if jax.process_count() > 1:  # all of them must come to the same points in the same order
      self._write(step, state, records, first)
      return
    # Copies, as the next step may write where these arrays are.
    self._writing = self._thread.submit(
        self._write, step, jax.tree.map(np.array, state), records, first)

  def _write(self, step: int, state: PyTree, records: dict[str, Any], first: Callable) -> None:
    first(state)
    if self._manager.latest_step() == step:
      return
    try:
      self._manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), records=ocp.args.JsonSave(records)))
      if jax.process_count() == 1:  # of two saves the first is whole before the second begins
        self._manager.wait_until_finished()
    except Exception as error:  # of many kinds: of the disk, of tensorstore
      raise ValueError(self._not_saved(error)) from error

  def settle(self) -> None:
    """Waits until what the last `save` was given is no longer needed; raises as it does."""
    if self._writing:
      writing, self._writing = self._writing, None
      writing.result()

  def restore_latest(self, like: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
    """(state, records) of the newest whole save, of the shapes and shardings of `like`.

    A save whose files are not what was written is passed over, with a warning, for the one before,
    and set aside as STEP.damaged. None if there is no save.

    Raises:
      ValueError: the save does not fit `like`, or none is whole.
    """
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    damaged = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      problem = _damage(self._folder / str(step))
      if problem:
        damaged[step] = f'{self._folder / str(step)} is damaged: {problem}.'
        continue
      for told in damaged.values():
        logger.warning('%s Going back to the state of step %d.', told, step)
      restored = self._restore(step, shapes)
      self._set_aside(damaged)
      return restored
    if damaged:
      raise ValueError(f'{" ".join(damaged.values())} There is no other saved state: remove '
                       f'{self._folder} to start over.')
    return None

  def _restore(self, step: int, shapes: PyTree) -> tuple[PyTree, dict[str, Any]]:
    where = self._folder / str(step)
    try:
      was, now = _shapes(self._manager.item_metadata(step).state), _shapes(shapes)
      changed = [f'{name} was {was.get(name, "not there")} and is {now.get(name, "not there")}'
                 for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
      restored = None if changed else self._manager.restore(step, args=ocp.args.Composite(
          state=ocp.args.StandardRestore(shapes), records=ocp.args.JsonRestore()))
    except Exception as error:
      reason = (str(error).splitlines() or [repr(error)])[0].rstrip('.')
      raise ValueError(f'The saved state {where} cannot be resumed: {reason}. If its files are '
                       'damaged, remove that folder.') from error
    if changed:
      raise ValueError(f'The saved state {where} cannot be resumed: {", ".join(changed[:3])}. If '
                       'the method, length or optimizer changed, choose another MODEL_DIR.')
    return restored.state, restored.records

  def _set_aside(self, steps: dict[int, str]) -> None:
    """Makes room for states of the same steps."""
    if not steps:
      return
    if processes.is_first():
      for step in steps:
        aside = self._folder / f'{step}.damaged'
        if aside.exists():
          aside.rmtree()
        (self._folder / str(step)).rename(aside)
    processes.wait('damaged states are set aside')
    self._manager.reload()

  def _add_sums(self) -> None:
    """Adds its checksums to a state that is written and not yet renamed."""
    if not processes.is_first():
      return
    for folder in self._folder.glob('*-tmp'):
      sums = {name: _sum(folder / name) for name in _files(folder)}
      (folder / SUMS).write_text(json.dumps(sums))

  def check(self) -> None:
    """Raises ValueError if a save has failed meanwhile."""
    if self._writing and self._writing.done():
      self.settle()
    try:
      self._manager.check_for_errors()
    except Exception as error:
      raise ValueError(self._not_saved(error)) from error

  def wait(self) -> None:
    """Waits until every save is on disk; ValueError if one could not be written."""
    self.settle()
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise ValueError(self._not_saved(error)) from error

  def close(self) -> None:
    """Waits, and frees what the manager holds."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._manager.close()

  def _not_saved(self, error: Exception) -> str:
    number = getattr(error, 'errno', None) or next(
        iter(re.findall(r"os_error_code='(\d+)'", str(error))), None)  # as tensorstore tells it
    reason = os.strerror(int(number)) if number else (str(error).splitlines() or [repr(error)])[0]
    last = max(self._manager.all_steps(), default=None)
    kept = 'no state' if last is None else f'the state of step {last}'
    return (f'{self._folder} cannot be written: {reason}. It holds {kept}: once it can be written, '
            'the same command goes on from there.')


def _damage(folder: epath.Path) -> str | None:
  """How a state's files differ from what was written, or None; also if there are no checksums."""
  if missing := [item for item in ITEMS if not (folder / item).exists()]:
    return f'{missing[0]} is missing'
  try:
    if not (folder / SUMS).exists():
      return None
    if not os.path.isfile(folder / SUMS):
      return f'{SUMS} is not what was written'
    sums = json.loads((folder / SUMS).read_text())
    for name, expected in sums.items():
      if not os.path.isfile(folder / name):
        return f'{name} is missing'
      size, digest = _sum(folder / name)
      if expected not in ([size, digest], [size, None]):  # None: of an earlier version
        return f'{name} is not what was written'
  except OSError as error:
    return f'{error.filename} cannot be read: {error.strerror}'
  except (ValueError, AttributeError):
    return f'{SUMS} is not what was written'
  return None


def _shapes(tree: PyTree) -> dict[str, list]:
  """{path: shape} of all leaves; of arrays, or of what orbax tells of them."""
  return {jax.tree_util.keystr(path, simple=True, separator='/'): list(leaf.shape)
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _sum(file: epath.Path) -> list:
  with file.open('rb') as stream:
    digest = hashlib.file_digest(stream, 'sha256').hexdigest()
  return [file.stat().length, digest]


def _files(folder: epath.Path) -> list[str]:
  """The names of all files of a state's items, relative to its folder."""
  return sorted(os.path.relpath(os.path.join(top, name), folder)
                for item in ITEMS for top, _, files in (folder / item).walk() for name in files)


def _absolute(folder: pathlib.Path | epath.Path) -> epath.Path:
  return epath.Path(folder if cloud_storage.is_remote(folder) else folder.absolute())

"""Files and folders that one process at a time may write. A killed process leaves no lock."""

import contextlib
import fcntl
import io
import os
import pathlib
from collections.abc import Iterator

import jax

from prompt_tuning_jax.checkpoints.atomic_write import told

LOCK = '.lock'


def locked(path: pathlib.Path, refusal: str) -> io.FileIO:
  """The file, made where it is missing, to append to; locked until it is closed.

  A file system without locks gives none. Raises ValueError, saying `refusal`, if another process
  has the lock.
  """
  while True:
    file = open(path, 'ab+', buffering=0)
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.close()
      raise ValueError(refusal) from None
    except OSError:
      pass
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
        return file
    file.close()  # its owner deleted it after we opened it


@contextlib.contextmanager
def only_writer(folder: pathlib.Path) -> Iterator[None]:
  """Holds a folder, made where it is missing, for this process; of several, the first one does.

  The files that a killed writer's `atomic_file` left in it, or one folder deeper, go.

  Raises ValueError if another process holds it, or it cannot be written to.
  """
  if jax.process_index():
    yield
    return
  with told(folder):
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / LOCK, f'Another run is writing {folder}: wait for it, or choose another '
                  'MODEL_DIR.')
  with lock:
    for left in (*folder.glob('.*.tmp'), *folder.glob('*/.*.tmp')):
      if left.is_file():  # a token cache in the making is a folder, and may be another process's
        left.unlink(missing_ok=True)
    try:
      yield
    finally:
      pathlib.Path(lock.name).unlink(missing_ok=True)

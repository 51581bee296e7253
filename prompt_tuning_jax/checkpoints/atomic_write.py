"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from prompt_tuning_jax import cloud_storage

Path = str | os.PathLike
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES,
               errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
  """Where a disk is full or refuses to be written, raises ValueError in one line."""
  try:
    yield
  except OSError as error:
    if error.errno not in OF_THE_DISK:
      raise
    raise ValueError(f'{path} cannot be written: {error.strerror}.') from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[pathlib.Path]:
  """Gives a temporary sibling to write; on success it replaces `path`, on an error it goes.

  A link stays, the file it names is replaced. What is no regular file, such as /dev/stdout, is
  given itself. Raises ValueError where it cannot be written; then `path` is as it was.
  """
  if cloud_storage.is_remote(path):
    with cloud_storage.new_file(path) as made:
      yield made
    return
  path = pathlib.Path(path)
  if path.exists() and not path.is_file():
    yield path
    return
  path = path.resolve()
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  with told(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield temporary
      sync(temporary)
      os.replace(temporary, path)
      sync(path.parent)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[pathlib.Path]:
  """Gives a temporary sibling folder to fill; on success it becomes `path`.

  Raises ValueError if `path` exists and is not an empty folder, unless told to `replace` it: then
  the old folder steps aside for the instant between two renames. In a bucket, files come one
  after another. Also where it cannot be written.
  """
  if cloud_storage.is_remote(path):
    with cloud_storage.new_folder(path, replace) as made:
      yield made
    return
  path = pathlib.Path(path)
  if path.exists() and not path.is_dir() or not replace and path.is_dir() and any(path.iterdir()):
    raise ValueError(f'{path} exists already: delete it or write to another folder.')
  with told(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
      temporary.chmod(0o777 & ~_umask())
      yield temporary
      for file in temporary.rglob('*'):
        sync(file)
      if replace and path.exists():
        old = temporary.with_name(temporary.name + '.old')
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
      else:
        os.replace(temporary, path)
      sync(path.parent)
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


def recover(path: Path):
  """Puts back the folder that stepped aside, if a kill came between the two renames.

  What else a killed `atomic_folder` left goes. For a folder that one process writes to.
  """
  path = pathlib.Path(path)
  aside = sorted(path.parent.glob(f'.{path.name}.*.old'))
  if aside and not path.exists():
    os.replace(aside[-1], path)
  for left in path.parent.glob(f'.{path.name}.*'):
    if left.is_dir():
      shutil.rmtree(left)


def sync(path: Path):
  """Waits until a file or folder has reached the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _umask() -> int:
  mask = os.umask(0)
  os.umask(mask)
  return mask

"""Files and folders in a bucket (gs://…), read from copies on this machine and written whole.

An object of a bucket is written whole or not at all, but it cannot grow, be renamed or be mapped
into memory. So nothing else here knows of buckets: what is read is copied first (`fetch`), what is
written is made on this machine and copied when it is whole (`put`, and `Mirror` for a folder).
T5X checkpoints and training states, which may be large, go to and from a bucket directly, by
tensorstore.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

logger = logging.getLogger(__name__)

PREFIX = 'gs://'
ENVIRONMENT = 'PROMPT_TUNING_JAX_CACHE'
READ = ('.json', '.jsonl', '.csv', '.tsv', '.gz', '.txt', '.model', '.npy', '.safetensors')
LARGE = 16 << 20  # bytes: larger files are copied anew only where the object has changed
PERIOD = 60.0  # seconds between copies of what a run only reports

# TensorFlow reads buckets too, but takes seconds and most of a gigabyte to import.
if importlib.util.find_spec('gcsfs'):
  os.environ.setdefault('EPATH_USE_TF', 'false')


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path leads into a bucket."""
  return os.fspath(path).startswith(PREFIX)


def fetch(path: str | os.PathLike) -> str:
  """The path itself, or the path of a copy where it leads into a bucket.

  Of a folder, files are copied that something here reads (`READ`): no pickles, and no links.
  Copies are in $PROMPT_TUNING_JAX_CACHE/gs or ~/.cache/prompt_tuning_jax/gs, where no other
  program should write. Raises ValueError where nothing is there or it cannot be read.
  """
  path = os.fspath(path)
  if not is_remote(path):
    return path
  target = _copies() / path.removeprefix(PREFIX).strip('/')
  with _told('read', path):
    found = _find(path)
    if not found:
      raise ValueError(f'There is nothing at {path}.')
    if '' in found:
      _copy(path, found[''], target)
    else:
      found = {name: about for name, about in found.items() if name.endswith(READ)}
      for name in _state(target).keys() - found.keys():  # of an older state of the folder
        (target / name).unlink()
      for name, about in found.items():
        _copy(f'{path}/{name}', about, target / name)
  return os.fspath(target)


def put(file: str | os.PathLike, path: str | os.PathLike) -> None:
  """Writes a file of this machine as one object. Raises ValueError where that is not allowed."""
  with _told('write', path):
    _bucket().put_file(os.fspath(file), _checked(path))


@contextlib.contextmanager
def new_file(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a file to write, which goes into the bucket when that has gone well."""
  with tempfile.TemporaryDirectory(prefix='prompt_tuning_jax.') as folder:
    file = pathlib.Path(folder) / 'file'
    yield file
    put(file, path)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, replace: bool) -> Iterator[pathlib.Path]:
  """Gives a folder to fill, which then goes into the bucket: its config.json last.

  Raises ValueError where there is one already, unless its files may be replaced.
  """
  path = _checked(path)
  with _told('read', path):
    if not replace and _find(path):
      raise ValueError(f'{path} exists already: delete it or write to another folder.')
  with tempfile.TemporaryDirectory(prefix='prompt_tuning_jax.') as folder:
    folder = pathlib.Path(folder)
    yield folder
    for name in sorted(_state(folder), key=_config_last):
      put(folder / name, f'{path}/{name}')


def beside(path: str | os.PathLike) -> pathlib.Path:
  """Where on this machine a file for a bucket is made, if that may take several runs."""
  target = _copies().with_name('unfinished') / os.fspath(path).removeprefix(PREFIX)
  target.parent.mkdir(parents=True, exist_ok=True)
  return target


class Mirror:
  """The folder that a run writes to: `folder` on this machine, kept in the bucket by `push`.

  A folder that is no bucket's is its own mirror: then nothing is copied. `place` is where training
  states go, which need no copy: the bucket's folder itself, or `folder`.
  """

  def __init__(self, path: str | os.PathLike):
    self._copied, self._pushed = {}, -PERIOD
    self._lock = threading.Lock()  # training states are saved in a thread
    self._path = os.fspath(path).rstrip('/')
    if not is_remote(path):
      self.folder = self.place = pathlib.Path(path).expanduser()
      return
    self.place = epath.Path(_checked(path))
    self._temporary = tempfile.TemporaryDirectory(prefix='prompt_tuning_jax.')
    self.folder = pathlib.Path(self._temporary.name)
    with _told('read', path):
      for name, about in _find(self._path).items():
        if not name.startswith(('checkpoints/', 'events.')):  # every start has events of its own
          _copy(f'{self._path}/{name}', about, self.folder / name)
    self._copied = _state(self.folder)

  def push(self, soon: bool = True) -> None:
    """Copies what has changed. Not `soon`: only if the last time was a minute ago."""
    if self.place == self.folder or not soon and time.monotonic() < self._pushed + PERIOD:
      return
    with self._lock:
      state = _state(self.folder)
      for name in sorted(state, key=_config_last):
        if state[name] != self._copied.get(name):
          put(self.folder / name, self.name(self.folder / name))
      with _told('write', self._path):
        for name in self._copied.keys() - state.keys():
          _bucket().rm_file(f'{self._path}/{name}')
      self._copied, self._pushed = state, time.monotonic()

  def name(self, file: pathlib.Path) -> str:
    """What a file of `folder` is called where users look for it."""
    if self.place == self.folder:
      return os.fspath(file)
    return f'{self._path}/{file.relative_to(self.folder).as_posix()}'


def _state(folder: pathlib.Path) -> dict[str, tuple]:
  """{name: what changes when the file does}; temporary files have names that begin with a dot."""
  found = {}
  for file in folder.rglob('*'):
    name = file.relative_to(folder)
    if file.is_file() and not any(part.startswith('.') for part in name.parts):
      stat = file.stat()
      found[name.as_posix()] = stat.st_ino, stat.st_size, stat.st_mtime_ns
  return found


def _config_last(name: str) -> tuple[bool, str]:
  return name.endswith('config.json'), name


def _bucket() -> Any:
  """What reads and writes gs://…"""
  import fsspec
  logging.getLogger('gcsfs').addFilter(_without_traceback)
  return fsspec.filesystem('gs')


def _without_traceback(record: logging.LogRecord) -> bool:
  """Lets a record pass; the error it tells of is raised as well, and so told (`_told`)."""
  record.exc_info = None
  return True


def _find(path: str) -> dict[str, Mapping[str, Any]]:
  """{name: what is known of it} of all objects in a folder, or {'': …} of an object."""
  bucket, path = _bucket(), _checked(path).removeprefix(PREFIX)
  bucket.invalidate_cache()
  found = bucket.find(path, detail=True)
  inside = {whole.removeprefix(path).lstrip('/'): about for whole, about in found.items()}
  return {name: about for name, about in inside.items() if '..' not in name.split('/')}


def _copy(source: str, about: Mapping[str, Any], target: pathlib.Path) -> None:
  """Copies one object, unless it is large and there already."""
  version = target.with_name(f'.{target.name}.version')
  known = str(about.get('generation') or about.get('mtime'))
  if (about['size'] > LARGE and target.is_file() and target.stat().st_size == about['size']
      and version.is_file() and version.read_text() == known):
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
  try:
    _bucket().get_file(source, os.fspath(temporary))
    os.replace(temporary, target)
  finally:
    temporary.unlink(missing_ok=True)
  if about['size'] > LARGE:
    version.write_text(known)


def _checked(path: str | os.PathLike) -> str:
  inside = os.fspath(path).removeprefix(PREFIX).strip('/')
  if not inside or '..' in inside.split('/'):
    raise ValueError(f'{path} names no bucket, or leads out of it: expected gs://BUCKET/PATH.')
  return PREFIX + inside


def _copies() -> pathlib.Path:
  root = os.environ.get(ENVIRONMENT) or '~/.cache/prompt_tuning_jax'
  return pathlib.Path(root).expanduser() / 'gs'


@contextlib.contextmanager
def _told(verb: str, path: str | os.PathLike) -> Iterator[None]:
  """Errors as ValueError in one line; they are of many kinds: the client's, the network's, …"""
  try:
    yield
  except ValueError:
    raise
  except Exception as error:
    reason = (str(error).splitlines() or [''])[0] or type(error).__name__
    hint = '' if importlib.util.find_spec('gcsfs') else (
        " Is it installed? pip install 'prompt_tuning_jax[gcs]'")
    raise ValueError(f'Cannot {verb} {path}: {reason.rstrip(".")}.{hint}') from error

"""Files written part by part: after a kill, the next run goes on where the last one ended.

TARGET.partial holds the parts so far. TARGET.partial.json has one line with the settings, then one
line a part: its number of rows, the SHA-256 of what it was made from, where it ends in
TARGET.partial, and the SHA-256 of what stands there. A part counts once its line is on the disk,
and what stands after the last such part is cut off: a kill at any moment, or a power cut, costs one
part at most.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from prompt_tuning_jax.checkpoints.atomic_write import sync
from prompt_tuning_jax.checkpoints.file_lock import locked

logger = logging.getLogger(__name__)

VERSION = 3  # Of the journal, and of how parts are made.


def beside(target: str | os.PathLike) -> pathlib.Path:
  """Where the parts of `target` stand until it is whole: beside the file that a link names."""
  path = pathlib.Path(target).resolve()
  return path.with_name(path.name + '.partial')


class PartialFile:
  """A target in the making, for one process at a time: `kept`, or else `add`, of every part, then
  `finish`.

  `settings` is what the parts depend on besides what they are made from, as JSON. Parts made under
  other settings are not taken; with None, none are. What is there and is not taken stays until the
  first new part is written, so that a mistyped flag can be taken back.
  """

  def __init__(self, target: str | os.PathLike, settings: Mapping[str, Any] | None):
    self._target, self._path = pathlib.Path(target).resolve(), beside(target)
    self._path.parent.mkdir(parents=True, exist_ok=True)
    for path in (self._path, pathlib.Path(f'{self._path}.json')):
      if path.exists() and not path.is_file():
        raise ValueError(f'{path} is no file: delete it, or name another target.')
    # The journal is the first file to appear and the last to go: so it holds the lock.
    self._journal = locked(pathlib.Path(f'{self._path}.json'), 'Another process is writing '
                           f'{self._path}: wait for it, or name another target.')
    self._file = open(self._path, 'ab+', buffering=0)
    self._old = open(self._journal.name, 'rb')
    self._header = _line(version=VERSION, settings=settings)
    self._rows = self._size = self._journal_size = 0  # of the parts that count
    self._is_cut = self._is_done = False
    self._is_resuming = settings is not None and _size(self._file) > 0 and self._begins_alike()

  def __enter__(self) -> 'PartialFile':
    return self

  def __exit__(self, *_) -> None:
    if not self._is_done:
      if self._rows:
        logger.info('%d rows are kept in %s: the same command goes on after them.', self._rows,
                    self._path)
      elif not _size(self._file):
        self._path.unlink()
        os.unlink(self._journal.name)
    for file in (self._old, self._file, self._journal):
      file.close()

  def _begins_alike(self) -> bool:
    """Whether the journal begins with our settings."""
    line = self._old.readline()
    if line == self._header:
      self._journal_size = len(line)
      return True
    was, now = (_parsed(text).get('settings') or {} for text in (line, self._header))
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if was:
      logger.info('Starting over: %s was made with another %s.', self._path, ', '.join(changed))
    return False

  def kept(self, rows: int, sha256: str) -> bytes | None:
    """A part that is there, after all the parts before it; None if it is not."""
    if not self._is_resuming:
      return None
    line = self._old.readline()
    end = _parsed(line).get('end')
    content = b''
    if type(end) is int and self._size <= end <= _size(self._file):
      content = os.pread(self._file.fileno(), end - self._size, self._size)
    if line != self._part_line(rows, sha256, content):
      if line.endswith(b'\n'):
        logger.info('The rows after row %d are not those that were answered before.', self._rows)
      self._stop_resuming()
      return None
    self._rows, self._size = self._rows + rows, end
    self._journal_size += len(line)
    return content

  def _stop_resuming(self) -> None:
    if self._is_resuming and self._rows:
      logger.info('Resuming after %d rows.', self._rows)
    self._is_resuming = False

  def add(self, rows: int, sha256: str, content: bytes) -> None:
    """Writes a part, then the line that makes it count; ValueError if the disk is full."""
    size = self._size + len(content)
    line = self._part_line(rows, sha256, content)
    if not self._journal_size:
      line = self._header + line
    try:
      self._cut()
      _write(self._file, content)
      _write(self._journal, line)
    except OSError as error:
      if self._is_cut:  # torn pieces give the space back
        with contextlib.suppress(OSError):
          self._file.truncate(self._size)
      raise ValueError(f'{self._path} cannot be written: {error.strerror}.') from error
    self._rows, self._size = self._rows + rows, size
    self._journal_size += len(line)

  def _part_line(self, rows: int, sha256: str, content: bytes) -> bytes:
    """The journal's line of the next part."""
    return _line(rows=rows, sha256=sha256, end=self._size + len(content),
                 content_sha256=hashlib.sha256(content).hexdigest())

  def _cut(self) -> None:
    """Cuts off, once, what does not count: its lines first, so that none outlives its part."""
    if not self._is_cut:
      self._journal.truncate(self._journal_size)
      os.fsync(self._journal)
      self._file.truncate(self._size)
      os.fsync(self._file)
      sync(self._path.parent)
      self._is_cut = True

  def finish(self, deliver: Callable[[pathlib.Path], None] | None = None) -> None:
    """Makes the partial file the target, in one step.

    Or gives it to `deliver`, after which it goes; where that raises, the next run can try again.
    """
    self._stop_resuming()
    self._cut()
    if deliver:
      deliver(self._path)
      self._path.unlink()
    else:
      os.replace(self._path, self._target)
    self._is_done = True
    sync(self._target.parent)
    os.unlink(self._journal.name)


class Stream:
  """What is no regular file, such as /dev/stdout: written to as it is."""

  def __init__(self, path: str | os.PathLike):
    self._file = open(path, 'wb')

  def __enter__(self) -> 'Stream':
    return self

  def __exit__(self, *_) -> None:
    self._file.close()

  def kept(self, rows: int, sha256: str) -> None:
    """Nothing is."""

  def add(self, rows: int, sha256: str, content: bytes) -> None:
    """Writes a part."""
    self._file.write(content)
    self._file.flush()

  def finish(self, deliver: None = None) -> None:
    """Nothing is left to do."""


def _line(**fields: Any) -> bytes:
  return (json.dumps(fields, sort_keys=True) + '\n').encode()


def _parsed(line: bytes) -> dict[str, Any]:
  """A line of the journal; {} for one that a kill or a power cut has broken."""
  try:
    value = json.loads(line)
  except (ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def _size(file: io.FileIO) -> int:
  return os.fstat(file.fileno()).st_size


def _write(file: io.FileIO, data: bytes) -> None:
  """Writes all of it to the disk. A nearly full one takes a piece before it refuses the rest."""
  view = memoryview(data)
  while view:
    view = view[file.write(view):]
  os.fsync(file)

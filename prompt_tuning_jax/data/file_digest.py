"""Digests of files, of which large ones are checked part by part, when a part is first read."""

import hashlib
import json
import pathlib
import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WHOLE = 64 << 20  # Larger files are checked in blocks: opening stays quick.
BLOCK = 1 << 20


def of_file(path: pathlib.Path) -> dict[str, Any]:
  """{'bytes', 'sha256'} of a file, and the CRC-32 of its `blocks` if it is large, as JSON."""
  size = path.stat().st_size
  digest, blocks = hashlib.sha256(), []
  with open(path, 'rb') as file:
    while block := file.read(BLOCK):
      digest.update(block)
      blocks.append(zlib.crc32(block))
  made = {'bytes': size, 'sha256': digest.hexdigest()}
  return {**made, 'blocks': blocks} if size > WHOLE else made


def of_json(value: Mapping[str, Any]) -> str:
  """SHA-256 of a JSON object, however it is written, without its own entry `sha256`."""
  others = {key: value[key] for key in value if key != 'sha256'}
  return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """{'files': {name: digest}, …, 'sha256': its own}; raises ValueError if it was changed."""
  if not path.is_file():
    raise ValueError(f'there is no file {path.name}')
  value = json.loads(path.read_text('utf-8'))
  # Older ones have no sum of their own.
  is_old = all('ends_sha256' in digest for digest in value['files'].values())
  if not is_old and value.get('sha256') != of_json(value):
    raise ValueError(f'{path.name} is not what was written')
  return value


class Blocks:
  """The blocks of a large file of `size` bytes, of which each is checked once."""

  def __init__(self, path: pathlib.Path, checksums: list[int]):
    self._path, self._checksums = path, checksums
    self._bytes = np.memmap(path, np.uint8, 'r')
    self.size = len(self._bytes)
    self._is_checked = np.zeros(len(checksums), bool)
    self._lock = threading.Lock()

  def check(self, begins: np.ndarray, ends: np.ndarray) -> None:
    """Raises ValueError where bytes in [begin, end) of any range, [n] int64 each, were changed."""
    first, last = begins // BLOCK, np.maximum(ends - 1, begins) // BLOCK
    if self._is_checked[first].all() and self._is_checked[last].all() and (last - first < 2).all():
      return
    touched = np.unique(np.concatenate([*map(np.arange, first, last + 1)]))
    with self._lock:
      for i in touched[~self._is_checked[touched]]:
        if zlib.crc32(self._bytes[i * BLOCK:(i + 1) * BLOCK]) != self._checksums[i]:
          raise ValueError(f'{self._path} is not what was written (block {i} of '
                           f'{len(self._checksums)}): delete its folder, it is built again.')
        self._is_checked[i] = True

  def check_all(self) -> None:
    """`check` of the whole file."""
    self.check(np.zeros(1, np.int64), np.array([self.size]))


def check_all(folder: pathlib.Path, digests: Mapping[str, Mapping[str, Any]],
              in_blocks: Sequence[str]) -> dict[str, Blocks]:
  """Raises ValueError where a file, {name: digest}, is not what `of_file` saw.

  Of large ones among those that `in_blocks` names, without their endings, only the size is
  checked: their blocks, yet to be checked, are returned.
  """
  found = {}
  for name, digest in digests.items():
    stem = name.partition('.')[0]
    if blocks := _check(folder / name, digest, stem in in_blocks):
      found[stem] = blocks
  return found


def _check(path: pathlib.Path, digest: Mapping[str, Any], in_blocks: bool) -> Blocks | None:
  if not path.is_file():
    raise ValueError(f'there is no file {path.name}')
  size = path.stat().st_size
  if size == digest['bytes'] and in_blocks and 'blocks' in digest:
    if len(digest['blocks']) != -(-size // BLOCK):
      raise ValueError(f'{path.name} has another number of blocks than was written')
    made = Blocks(path, digest['blocks'])
    made.check(np.zeros(1, np.int64), np.ones(1, np.int64))  # An array's header is read before it.
    return made
  with open(path, 'rb') as file:
    if size != digest['bytes'] or (
        hashlib.file_digest(file, 'sha256').hexdigest() != digest['sha256']):
      raise ValueError(f'{path.name} is not what was written')
  return None

"""The safetensors format: eight bytes of header length, a JSON header, the tensors' bytes.

Read here as memory maps, so that a shard reads only its slice and a damaged file can name the
tensors it lost; written tensor by tensor, so that a model is never held twice.

Files written here hold checksums in their metadata, where other readers let them lie:
`tensors_sha256`, a JSON object {tensor: SHA-256 of its bytes}, and `header_sha256`, of all else
that the header says. They find what a disk or a copy has changed, not what somebody has changed
together with them.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints.stored_leaf import sha256
from prompt_tuning_jax.types import Shape

DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16',
          'I64': 'int64', 'I32': 'int32', 'I16': 'int16', 'I8': 'int8', 'U8': 'uint8',
          'BOOL': 'bool'}
CODES = {name: code for code, name in DTYPES.items()}
MAX_SIZE = 2 ** 31  # of an axis, as in JAX
MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
METADATA, OF_TENSORS, OF_HEADER = '__metadata__', 'tensors_sha256', 'header_sha256'


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where a tensor lies: `begin` counts from the start of the file."""

  dtype: str
  shape: Shape
  begin: int
  end: int


@dataclasses.dataclass(frozen=True)
class Header:
  """What a file says it holds; `size` is the length it should have, `found` what it has.

  `checksums` is {tensor: SHA-256 of its bytes}, {} of a file without.
  """

  path: str
  tensors: dict[str, Entry]
  metadata: dict[str, str]
  size: int
  found: int
  checksums: dict[str, str]

  def problem(self, name: str) -> str | None:
    """Why a tensor cannot be read, or None."""
    if self.tensors[name].end > self.found:
      return f'truncated ({os.path.basename(self.path)} has {self.found} of {self.size} bytes)'
    return None

  def tensor(self, name: str) -> np.ndarray:
    """A read-only memory map of one tensor."""
    entry = self.tensors[name]
    dtype = jnp.dtype(entry.dtype)
    if not math.prod(entry.shape):
      return np.zeros(entry.shape, dtype)
    flat = np.memmap(self.path, np.uint8, 'r', entry.begin, (entry.end - entry.begin,))
    return flat.view(dtype).reshape(entry.shape)

  def read(self, name: str) -> np.ndarray:
    """A copy of one tensor; raises ValueError where it is cut off or was changed."""
    if problem := self.problem(name):
      raise ValueError(f'{self.path}: {name} is {problem}. Copy the file again.')
    tensor = np.array(self.tensor(name))
    try:
      self.check(name, tensor)
    except ValueError as error:
      raise ValueError(f'{self.path}: {name}: {error}.') from None
    return tensor

  def check(self, name: str, tensor: np.ndarray | None = None):
    """Raises ValueError where a tensor's bytes (of a copy, if given) are not those written."""
    expected = self.checksums.get(name)
    if expected and expected != sha256(self.tensor(name) if tensor is None else tensor):
      raise ValueError(f'its bytes in {os.path.basename(self.path)} are not those that were '
                       'written (SHA-256): copy the file again')


def read_header(path: str | os.PathLike) -> Header:
  """Reads and checks the header. A file whose tensors are cut off still has one.

  Raises ValueError, in one line, for anything that is not a safetensors header.
  """
  path = os.fspath(path)
  try:
    with open(path, 'rb') as file:
      found = os.fstat(file.fileno()).st_size
      length = int.from_bytes(file.read(8), 'little')
      if found < 8 or not 0 < length <= min(found - 8, MAX_HEADER_BYTES):
        raise ValueError(f'a header of {length} bytes does not fit in {found} bytes')
      header = json.loads(file.read(length).decode())
    metadata = header.get(METADATA, {})
    if not all(isinstance(text, str) for text in metadata.values()):
      raise ValueError('its metadata is not text')
    checksums = {}
    if OF_HEADER in metadata or OF_TENSORS in metadata:
      if metadata.get(OF_HEADER) != _header_sha256(header):
        raise ValueError('its header is not the one that was written (SHA-256): copy it again')
      checksums = dict(json.loads(metadata[OF_TENSORS]))
    header.pop(METADATA, None)
    tensors = {name: _entry(name, value, 8 + length) for name, value in header.items()}
    _check_overlap(tensors, 8 + length)
  except OSError as error:
    raise ValueError(f'Cannot read {path}: {error.strerror}.') from None
  except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f'{path} is not a safetensors file: {reason}.') from None
  size = max([8 + length, *(entry.end for entry in tensors.values())])
  if found > size:
    raise ValueError(f'{path} is not a safetensors file: {found - size} bytes follow its tensors.')
  return Header(path, tensors, metadata, size, found, checksums)


def _entry(name: str, value: Mapping[str, Any], start: int) -> Entry:
  dtype, shape, (begin, end) = value['dtype'], value['shape'], value['data_offsets']
  if not (name + dtype).isprintable():
    raise ValueError(f'it names a tensor {ascii(name)[:80]}')
  numbers = [*shape, begin, end]
  if not all(type(number) is int and number >= 0 for number in numbers) or any(
      size >= MAX_SIZE for size in shape):
    raise ValueError(f'{name} has impossible numbers {numbers}')
  # A float8 or another dtype that this package does not know is listed, and refused by name.
  known = DTYPES.get(dtype)
  expected = math.prod(shape) * jnp.dtype(known).itemsize if known else end - begin
  if end - begin != expected:
    raise ValueError(f'{name} {dtype}{shape} takes {expected} bytes, not {end - begin}')
  return Entry(known or str(dtype), tuple(shape), start + begin, start + end)


def _check_overlap(tensors: Mapping[str, Entry], start: int):
  at = start
  for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
    if entry.begin != at:
      raise ValueError(f'{name} starts at byte {entry.begin}, expected {at}')
    at = entry.end


def _header_sha256(header: Mapping[str, Any]) -> str:
  """Of a header without this entry, however its JSON is written."""
  about = {key: text for key, text in header[METADATA].items() if key != OF_HEADER}
  text = json.dumps({**header, METADATA: about}, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def write(path: str | os.PathLike, tensors: Mapping[str, tuple[str, Shape]],
          get: Callable[[str], np.ndarray], metadata: Mapping[str, str] | None = None):
  """Writes {name: (dtype name, shape)}, asking `get(name)` for one tensor after the other.

  The file is not atomic by itself: give a temporary path.
  """
  header: dict[str, Any] = {METADATA: {}}
  at = 0
  for name, (dtype, shape) in tensors.items():
    if dtype not in CODES:
      raise ValueError(f'{name}: safetensors has no dtype {dtype}.')
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    header[name] = {'dtype': CODES[dtype], 'shape': list(shape), 'data_offsets': [at, at + size]}
    at += size
  checksums = dict.fromkeys(tensors, '0' * 64)  # They take their place, until they are known.
  with open(path, 'wb') as file:
    file.write(_header_bytes(header, metadata, checksums))
    for name, (dtype, shape) in tensors.items():
      array = np.ascontiguousarray(get(name))
      assert array.dtype == jnp.dtype(dtype) and array.shape == tuple(shape), (name, array.dtype)
      file.write(array.reshape(-1).view(np.uint8).data)
      checksums[name] = sha256(array)
    file.seek(0)
    file.write(_header_bytes(header, metadata, checksums))


def _header_bytes(header: Mapping[str, Any], metadata: Mapping[str, str] | None,
                  checksums: Mapping[str, str]) -> bytes:
  """The start of the file; as long, whatever the checksums are."""
  about = {**(metadata or {}), OF_TENSORS: json.dumps(checksums, separators=(',', ':'))}
  header = {**header, METADATA: about}
  about[OF_HEADER] = _header_sha256(header)
  text = json.dumps(header, ensure_ascii=False, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text

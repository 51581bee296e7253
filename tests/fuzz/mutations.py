"""Ways to damage a file: seeded, and the same in every process."""

import copy
import json
import os
import pathlib
import shutil
import struct

import numpy as np
from flax import serialization

# What a number, a name or anything else in JSON may have become.
ODD = (None, True, False, 0, -1, 1, 2, 3, 7, 255, 2 ** 31, 2 ** 40, 2 ** 63, -2 ** 63, 10 ** 30,
       0.5, 1e308, float('nan'), float('inf'), '', 'x', '../../etc/passwd', '/etc/passwd', '..',
       '.', 'a\nb', '\x00', '\ud800', 'é' * 300, 'F16', 'BF16', 'I32', 'F8_E4M3', 'float32', '<i4',
       '>f4', '|O', [], {}, [[]], [None], [-1, 4], [2 ** 40, 2 ** 40],
       [2 ** 62, 0], [0], {'': {}}, {'a': [1, 2]})
TEXTS = (b'NaN', b'-Infinity', b'1e999', b'-1', b'0', b'1099511627776', b'9' * 5000, b'null',
         b'true', b'""', b'[]', b'{}', b'[' * 100_000, b'{"a":' * 50_000, b'\xff\xfe', b'\x00',
         b'\\ud800', b'\r', b'\n', b'\n\n', b'"', b',', b'}', b'\xe2\x80\xa8', b'../../etc/passwd',
         b'import os', b'__reduce__', b'cos\nsystem\n')


def mutate(folder: pathlib.Path, files: list[str], rng: np.random.Generator) -> str:
  """Damages one of the folder's `files` in one way; returns which and how."""
  name = files[rng.integers(len(files))]
  path = folder / name
  ways = [_bytes] * 12 + [_in_place_of] + ([_swap] if len(files) > 1 else [])
  if name.endswith(('.json', '.zarray')) and not name.endswith('.partial.json'):
    ways += [_json] * 10
  if name.endswith('.safetensors'):
    ways += [_safetensors] * 14
  if path.name == 'checkpoint':
    ways += [_msgpack] * 12
  way = ways[rng.integers(len(ways))]
  how = way(path, rng, [folder / other for other in files])
  return f'{name}: {way.__name__[1:]} {how}'


def _bytes(path: pathlib.Path, rng: np.random.Generator, _) -> str:
  """Bits and runs of bytes."""
  data = bytearray(path.read_bytes())
  size = len(data)
  at, run = (int(rng.integers(size + 1)) for _ in range(2))
  run = min(run, int(rng.integers(1, 64)))
  kinds = ('flip', 'flip', 'flip', 'flip', 'flips', 'overwrite', 'zero', 'ones', 'cut', 'append',
           'delete', 'repeat', 'insert', 'exchange', 'number', 'head')
  kind = kinds[rng.integers(len(kinds))]
  if kind in ('flip', 'flips') and size:
    for _ in range(1 if kind == 'flip' else int(rng.integers(2, 9))):
      data[rng.integers(size)] ^= 1 << rng.integers(8)
  elif kind == 'overwrite':
    data[at:at + run] = rng.bytes(len(data[at:at + run]))
  elif kind in ('zero', 'ones'):
    data[at:at + run] = (b'\0' if kind == 'zero' else b'\xff') * len(data[at:at + run])
  elif kind == 'cut':
    del data[at:]
  elif kind == 'append':
    data += rng.bytes(run) if rng.integers(2) else b'\0' * run
  elif kind == 'delete':
    del data[at:at + run]
  elif kind == 'repeat':
    data[at:at] = data[at:at + run]
  elif kind == 'insert':
    data[at:at] = TEXTS[rng.integers(len(TEXTS))]
  elif kind == 'exchange':
    other = int(rng.integers(size + 1))
    first, second = bytes(data[at:at + run]), bytes(data[other:other + run])
    data[at:at + run], data[other:other + run] = second, first
  elif kind == 'head':
    data[:8] = struct.pack('<Q', int(rng.choice([0, 1, 2 ** 20, 2 ** 40, 2 ** 60, 2 ** 63 - 1])))
  elif kind == 'number':
    digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if digits:
      at = digits[rng.integers(len(digits))]
      data[at:at + 1] = TEXTS[rng.integers(len(TEXTS))]
  path.write_bytes(data)
  return f'{kind} at {at}'


def _in_place_of(path: pathlib.Path, rng: np.random.Generator, _) -> str:
  """Something else under the file's name."""
  kinds = ('nothing', 'empty', 'folder', 'fifo', 'loop', 'zeros', 'dangling', 'pickle', 'itself')
  kind = kinds[rng.integers(len(kinds))]
  if kind == 'fifo' and path.name.startswith(('rows.', 'metrics')):
    kind = 'empty'  # Rows may come from a pipe; here nobody would write to it.
  content = path.read_bytes()
  path.unlink()
  if kind == 'empty':
    path.write_bytes(b'')
  elif kind == 'folder':
    path.mkdir()
  elif kind == 'fifo':
    os.mkfifo(path)
  elif kind in ('loop', 'zeros', 'dangling'):
    path.symlink_to({'loop': path.name, 'zeros': '/dev/zero', 'dangling': 'nowhere'}[kind])
  elif kind == 'pickle':
    path.write_bytes(b'cos\nsystem\n(S"touch ' + str(path.parent / 'EXECUTED').encode() + b'"\ntR.')
  elif kind == 'itself':  # A link to the file is as good as the file.
    (path.parent / 'moved').write_bytes(content)
    path.symlink_to('moved')
  return kind


def _swap(path: pathlib.Path, rng: np.random.Generator, files: list[pathlib.Path]) -> str:
  """Two files in each other's place, or one twice."""
  other = files[rng.integers(len(files))]
  contents = path.read_bytes(), other.read_bytes()
  path.write_bytes(contents[1])
  if rng.integers(2):
    other.write_bytes(contents[0])
  return other.as_posix()[-40:]


def _json(path: pathlib.Path, rng: np.random.Generator, _) -> str:
  value = json.loads(path.read_bytes())
  how = _change(value, rng)
  path.write_bytes(_dumped(value))
  return how


def _safetensors(path: pathlib.Path, rng: np.random.Generator, _) -> str:
  """The header changed as JSON, and written with its right length."""
  data = path.read_bytes()
  size = int.from_bytes(data[:8], 'little')
  header = json.loads(data[8:8 + size])
  names = [name for name in header if name != '__metadata__']
  kind = ('any', 'any', 'any', 'names', 'entries', 'shape', 'dtype', 'offsets', 'extra')[
      rng.integers(9)]
  first, second = (names[rng.integers(len(names))] for _ in range(2))
  if kind == 'any':
    kind = _change(header, rng)
  elif kind == 'names':
    header[first], header[second] = header[second], header[first]
  elif kind == 'entries':
    header[first] = dict(header[second])
  elif kind == 'shape':
    header[first]['shape'] = header[first]['shape'][::-1] if rng.integers(2) else [
        *header[first]['shape'], 1]
  elif kind == 'dtype':
    header[first]['dtype'] = str(rng.choice(['F16', 'BF16', 'I32', 'I16', 'F64', 'U8', 'Q7']))
  elif kind == 'offsets':
    header[first]['data_offsets'] = header[second]['data_offsets']
  else:
    header[first + 'x'] = header[first]
  text = _dumped(header)
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data[8 + size:])
  return kind


def _msgpack(path: pathlib.Path, rng: np.random.Generator, _) -> str:
  value = serialization.msgpack_restore(path.read_bytes())
  how = _change(value, rng)
  try:
    path.write_bytes(serialization.msgpack_serialize(value))
  except (ValueError, TypeError, OverflowError, AttributeError, UnicodeError) as error:
    how += f' (not written: {type(error).__name__})'
  return how


def _places(value, found):
  for key in list(value) if isinstance(value, dict) else range(len(value)):
    found.append((value, key))
    if isinstance(value[key], dict | list):
      _places(value[key], found)
  return found


def _change(value, rng: np.random.Generator) -> str:
  """Replaces, removes, exchanges, renames or doubles something somewhere in nested JSON."""
  found = _places(value, [])
  if not found:
    return 'nothing to change'
  where, key = found[rng.integers(len(found))]
  other, other_key = found[rng.integers(len(found))]
  kind = ('replace', 'replace', 'replace', 'remove', 'exchange', 'rename', 'copy', 'near')[
      rng.integers(8)]
  if kind == 'near' and type(where[key]) is int:
    where[key] += int(rng.choice([-1, 1, 8]))
  elif kind == 'near' and isinstance(where[key], str) and where[key]:
    i = int(rng.integers(len(where[key])))
    where[key] = where[key][:i] + where[key][i + 1:]
  elif kind == 'remove':
    del where[key]
  elif kind == 'exchange':
    # Of copies: what holds itself could not be written.
    one, two = copy.deepcopy(where[key]), copy.deepcopy(other[other_key])
    where[key], other[other_key] = two, one
  elif kind == 'rename' and isinstance(where, dict):
    where[str(other_key)] = where.pop(key)
  elif kind == 'copy':
    where[key] = copy.deepcopy(other[other_key])
  else:
    where[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
  return f'{kind} {str(key)[:60]!a}'


def _dumped(value) -> bytes:
  return json.dumps(value, ensure_ascii=True).encode('ascii')


def fresh(specimen: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """A copy of a specimen in the place of the last one."""
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(specimen, folder)
  return folder

"""The prompt files that a server has, as they come, change and go."""

import dataclasses
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from prompt_tuning_jax.checkpoints import peft_adapter, prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.predictor import check_positions
from prompt_tuning_jax.prompt_bank import PromptBank, activation_of

MAX_FILE_BYTES = 1 << 32
_NAME = re.compile(r'[\w.-]{1,200}', re.ASCII)
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stamp:
  """By what a changed file is known."""

  path: str
  modified: float  # seconds since 1970
  size: int
  inode: int


@dataclasses.dataclass(frozen=True)
class Changes:
  """What has changed; `refused` {name: why} says of all files that are left out."""

  added: Mapping[str, PromptFile]
  removed: tuple[str, ...]
  refused: Mapping[str, str]


class PromptFolder:
  """NAME.safetensors, NAME.npy and PEFT folders in `folder`, beside `files` {name: path}.

  A name has letters, digits, '_', '.' and '-', and is not `reserved`. Of a file that is refused the
  version before goes on to serve, if there was one.
  """

  def __init__(self, folder: str | None = None, files: Mapping[str, str] | None = None,
               reserved: str = ''):
    if folder is not None and not os.path.isdir(folder):
      raise ValueError(f'There is no folder of prompts {folder}.')
    self._folder, self._files, self._reserved = folder, dict(files or {}), reserved
    self._seen: dict[str, Stamp] = {}
    self._refused: dict[str, str] = {}

  def created(self, name: str) -> int:
    """When a file was last changed, in seconds since 1970; 0 if there is none."""
    return int(self._seen[name].modified) if name in self._seen else 0

  def changes(self, bank: PromptBank, inputs: int, targets: int = 1) -> Changes:
    """What to do to `bank` to have what is there now.

    Args:
      inputs, targets: tokens that a text may have, and what is written after it.
    """
    try:
      found, refused = self._scan()
    except OSError as error:  # a folder that cannot be read is no reason to forget what was in it
      self._refuse({self._folder: _one_line('', error)})
      return Changes({}, (), dict(self._refused))
    left = self._seen.keys() - found.keys()  # what was refused may fit without them
    fresh = {name: stamp for name, stamp in found.items()
             if self._seen.get(name) != stamp or left and name in self._refused}
    files = {}
    for name, stamp in fresh.items():
      try:
        files[name] = _read(stamp)
        bank.check(name, files[name])
        length = files[name].metadata.get('length') or 0
        check_positions(bank.base.config, [inputs + length], [targets])
      except Exception as error:  # noqa: BLE001 a file is never a reason to stop serving
        files.pop(name, None)
        refused[name] = _one_line(name, error)
    staying = [file for name, file in bank.files.items() if name in found and name not in files]
    added = _fitting(staying, files, refused)
    self._seen = found
    still = {name: why for name, why in self._refused.items()
             if name in found and name not in fresh}
    self._refuse(refused, still)
    gone = tuple(name for name in bank.files if name not in found)
    return Changes(added, gone, dict(self._refused))

  def give_up(self, names: Iterable[str], why: str) -> None:
    """Refuses files that `changes` found good, until they change or others go."""
    self._refuse(dict.fromkeys(names, why), self._refused)

  def _refuse(self, refused: Mapping[str, str], still: Mapping[str, str] | None = None) -> None:
    """Says what is new of it, once."""
    for name, why in refused.items():
      if self._refused.get(name) != why:
        logger.warning('Refused the prompt %s: %s', name, why)
    self._refused = {**(self._refused if still is None else still), **refused}

  def _scan(self) -> tuple[dict[str, Stamp], dict[str, str]]:
    """({name: stamp} of all files there are, {name: why} of those whose name cannot be)."""
    paths, refused = [*self._files.items()], {}
    for entry in sorted(os.listdir(self._folder) if self._folder else ()):
      path, (stem, end) = os.path.join(self._folder, entry), os.path.splitext(entry)
      if entry.startswith('.'):
        continue
      if os.path.isdir(path):
        paths += [(entry, path)] if peft_adapter.is_folder(path) else []
      elif end in ('.safetensors', '.npy'):
        paths.append((stem, path))
    found = {}
    serving = {(name, stamp.path) for name, stamp in self._seen.items()}
    for name, path in sorted(paths, key=lambda pair: pair not in serving):
      if not _NAME.fullmatch(name):
        refused[repr(name)[1:-1][:200]] = ("a name may have up to 200 letters, digits, '_', '.' "
                                           "and '-': rename the file.")
      elif name == self._reserved:
        refused[name] = 'this is the name of the base: rename the file.'
      elif name in found:
        refused[name] = f'{found[name].path} and {path} are two prompts of one name: rename one.'
      elif stamp := _stamp(path):
        found[name] = stamp
    return found, refused


def _stamp(path: str) -> Stamp | None:
  """None for what is gone meanwhile."""
  try:
    inside = ([os.path.join(path, entry) for entry in sorted(os.listdir(path))]
              if os.path.isdir(path) else [path])
    stats = list(map(os.stat, inside))
  except OSError:
    return None
  return Stamp(path, max(stat.st_mtime for stat in stats), sum(stat.st_size for stat in stats),
               hash(tuple((stat.st_ino, stat.st_mtime_ns) for stat in stats)))


def _read(stamp: Stamp) -> PromptFile:
  if stamp.size > MAX_FILE_BYTES:
    raise ValueError(f'{stamp.path} has {stamp.size} bytes, more than the {MAX_FILE_BYTES} that a '
                     'prompt file may have.')
  if not (os.path.isfile(stamp.path) or os.path.isdir(stamp.path)):
    raise ValueError(f'{stamp.path} is no file.')  # but a pipe, say, which would be waited for
  return prompt_file.load(stamp.path)


def _fitting(staying: Iterable[PromptFile], files: Mapping[str, PromptFile],
             refused: dict[str, str]) -> dict[str, PromptFile]:
  """Those of `files` that fit beside each other and those staying; the others go to `refused`."""
  kept = {}
  activation = next(filter(None, map(activation_of, staying)), None)
  for name, file in files.items():
    own = activation_of(file)
    activation = activation or own
    if own in (None, activation):
      kept[name] = file
    else:
      refused[name] = (f'its adapters have the activation {own}, but those already here '
                       f'{activation}, and a batch has one.')
  return kept


def _one_line(name: str, error: Exception) -> str:
  text = ' '.join(str(error).split()).removeprefix(f'{name}: ')
  if isinstance(error, ValueError | OSError) and text:
    return text[:1000]
  return f'it cannot be read ({type(error).__name__}: {text[:200]}).'


def labels_of(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
  """The labels that a prompt file names, if they can be used."""
  labels = metadata.get('labels')
  if not labels or not all(isinstance(label, str) and label for label in labels):
    return None
  return tuple(labels)

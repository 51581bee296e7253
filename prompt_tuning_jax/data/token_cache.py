"""Tokenised examples of one split in a folder: written once as a stream, read by memory map.

A folder holds `inputs.npy` (all rows' ids one after another, int32), `inputs_offsets.npy` (where
rows begin, [n + 1] int64), the same for `targets`, `rows.jsonl` where examples are evaluated (one
JSON object a row) and `meta.json`. It needs no TensorFlow to be read, and appears whole or not at
all. A row's ids end with EOS and are no longer than the task's lengths.
"""

import array
import contextlib
import dataclasses
import errno
import functools
import hashlib
import importlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.data import file_digest

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FEATURES = ('inputs', 'targets')
SENTINEL = '<extra_id_0>'  # Before every target where the task asks for it; metrics do not see it.
ENVIRONMENT = 'PROMPT_TUNING_JAX_CACHE'
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS,
               errno.ENOTDIR, errno.EEXIST)


class CacheWriter:
  """Appends rows to growing files, so that a corpus never has to fit into memory.

  Used by a task's `build`: `add` every row, then `close` with what `meta.json` should say:
  `metrics` (["module:qualname", …]), `postprocessor` ({"name", "kwargs"} or None), `num_cut`
  ({"inputs": rows cut, …}) and `first_hidden` (the first row whose label is hidden, or None).
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder)
    self.num_examples = 0
    self._rows = None
    self._offsets = {feature: array.array('q', [0]) for feature in FEATURES}
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._tokens = {}
      for feature in FEATURES:
        self._tokens[feature] = open(self.folder / f'{feature}.npy', 'wb')
        _write_header(self._tokens[feature], 0)
    except OSError as error:
      raise ValueError(_cannot_write(self.folder, error)) from error

  def add(self, inputs: Sequence[int], targets: Sequence[int],
          row: Mapping[str, Any] | None = None) -> None:
    """Appends a row.

    Args:
      inputs, targets: [n] ids with EOS; `inputs` may be empty.
      row: for evaluation: `inputs` and `targets` (texts), `choices` (label texts, if any),
        `target` (the postprocessed target), `example` (other fields). All rows have it, or none.
    """
    if len(targets) == 0:
      raise ValueError(f'Row {self.num_examples} has no target tokens: drop it from the task.')
    if (row is not None) != (self._rows is not None) and self.num_examples:
      raise ValueError(f'Row {self.num_examples}: give `row` for every row, or for none.')
    try:
      for feature, ids in zip(FEATURES, (inputs, targets), strict=True):
        self._tokens[feature].write(np.asarray(ids, np.int32).tobytes())
        self._offsets[feature].append(self._offsets[feature][-1] + len(ids))
      if row is not None:
        if self._rows is None:
          self._rows = open(self.folder / 'rows.jsonl', 'w', encoding='utf-8')
        self._rows.write(json.dumps(row, default=_plain) + '\n')
    except OSError as error:
      raise ValueError(_cannot_write(self.folder, error)) from error
    self.num_examples += 1

  def extend(self, folder: str | os.PathLike) -> None:
    """Appends all rows of another writer's folder."""
    part = open_cache(folder)
    if (part.folder / 'rows.jsonl').exists() != (self._rows is not None) and self.num_examples:
      raise ValueError(f'{folder}: either all parts of a cache have rows, or none.')
    try:
      for feature, tokens, offsets in (('inputs', part.input_tokens, part.input_offsets),
                                       ('targets', part.target_tokens, part.target_offsets)):
        tokens.tofile(self._tokens[feature])
        self._offsets[feature].extend((offsets[1:] + self._offsets[feature][-1]).tolist())
      if (part.folder / 'rows.jsonl').exists():
        if self._rows is None:
          self._rows = open(self.folder / 'rows.jsonl', 'w', encoding='utf-8')
        with open(part.folder / 'rows.jsonl', encoding='utf-8') as rows:
          shutil.copyfileobj(rows, self._rows)
    except OSError as error:
      raise ValueError(_cannot_write(self.folder, error)) from error
    self.num_examples += part.num_examples

  def close(self, **meta) -> None:
    """Finishes the files and writes `meta.json`."""
    try:
      for feature in FEATURES:
        file, offsets = self._tokens[feature], self._offsets[feature]
        file.seek(0)
        _write_header(file, offsets[-1])
        _close(file)
        with open(self.folder / f'{feature}_offsets.npy', 'wb') as file:
          np.save(file, np.frombuffer(offsets, np.int64))
          _close(file)
      if self._rows is not None:
        _close(self._rows)
      files = {path.name: file_digest.of_file(path) for path in sorted(self.folder.iterdir())
               if path.suffix in ('.npy', '.jsonl')}
      _write_meta(self.folder, {'metrics': [], 'postprocessor': None,
                                'num_cut': dict.fromkeys(FEATURES, 0), 'first_hidden': None, **meta,
                                'format_version': FORMAT_VERSION,
                                'num_examples': self.num_examples, 'files': files})
    except OSError as error:
      raise ValueError(_cannot_write(self.folder, error)) from error


@dataclasses.dataclass(frozen=True)
class TokenCache:
  """A cache that has been opened. Row i's inputs are `input_tokens[offsets[i]:offsets[i + 1]]`.

  `input_tokens` and `target_tokens` are memory maps ([total] int32), offsets are [n + 1] int64.
  `taken` are the folder's rows that a part of it has ([n] int64); None is all. `blocks` are those
  of large files, which are checked when they are read: {'inputs', 'targets', 'rows': Blocks}.
  """

  folder: pathlib.Path
  meta: dict[str, Any]
  input_tokens: np.ndarray
  input_offsets: np.ndarray
  target_tokens: np.ndarray
  target_offsets: np.ndarray
  taken: np.ndarray | None = None
  blocks: Mapping[str, file_digest.Blocks] = dataclasses.field(default_factory=dict)

  def check(self, rows: np.ndarray) -> None:
    """Raises ValueError where some rows' tokens are not what was written: [m] int64.

    Call it before you read them from `input_tokens` and `target_tokens`.
    """
    for feature, tokens, offsets in (('inputs', self.input_tokens, self.input_offsets),
                                     ('targets', self.target_tokens, self.target_offsets)):
      if feature in self.blocks and len(rows):
        start = self.blocks[feature].size - tokens.nbytes  # the array's header comes first
        self.blocks[feature].check(start + offsets[rows] * tokens.itemsize,
                                   start + offsets[rows + 1] * tokens.itemsize)

  def take(self, rows: np.ndarray) -> 'TokenCache':
    """The cache of some rows, in memory: [m] int64, rising."""
    self.check(rows)
    arrays = []
    for tokens, offsets in ((self.input_tokens, self.input_offsets),
                            (self.target_tokens, self.target_offsets)):
      parts = [tokens[offsets[i]:offsets[i + 1]] for i in rows]
      arrays += [np.concatenate([np.zeros(0, np.int32), *parts]),
                 np.cumsum([0, *map(len, parts)])]
    before = np.arange(self.num_examples) if self.taken is None else self.taken
    blocks = {name: self.blocks[name] for name in self.blocks if name == 'rows'}
    return TokenCache(self.folder, self.meta, *arrays, before[rows], blocks)

  @property
  def num_examples(self) -> int:
    return len(self.input_offsets) - 1

  @property
  def part(self) -> list:
    """Which examples these are: their number, and a hash of the files and what is taken of them."""
    taken = b'' if self.taken is None else self.taken.astype(np.int64).tobytes()
    digest = hashlib.sha256(file_digest.of_json(self.meta['files']).encode() + taken)
    return [self.num_examples, digest.hexdigest()[:16]]

  def inputs(self, i: int) -> np.ndarray:
    """[n] int32."""
    self.check(np.array([i]))
    return self.input_tokens[self.input_offsets[i]:self.input_offsets[i + 1]]

  def targets(self, i: int) -> np.ndarray:
    """[n] int32."""
    self.check(np.array([i]))
    return self.target_tokens[self.target_offsets[i]:self.target_offsets[i + 1]]

  @functools.cached_property
  def input_lengths(self) -> np.ndarray:
    """[n] int32."""
    return np.diff(self.input_offsets).astype(np.int32)

  @functools.cached_property
  def target_lengths(self) -> np.ndarray:
    """[n] int32."""
    return np.diff(self.target_offsets).astype(np.int32)

  @functools.cached_property
  def rows(self) -> list[dict[str, Any]]:
    """What evaluation needs of every row (see `CacheWriter.add`); empty if there is nothing."""
    return list(self.read_rows())

  def read_rows(self) -> Iterator[dict[str, Any]]:
    """The same, one after another: there may be too many to be kept."""
    if not (path := self.folder / 'rows.jsonl').exists():
      return
    if 'rows' in self.blocks:
      self.blocks['rows'].check_all()
    kept = None if self.taken is None else set(self.taken.tolist())
    with open(path, encoding='utf-8') as file:
      yield from (json.loads(line) for i, line in enumerate(file) if kept is None or i in kept)

  def metric_fns(self) -> list[Callable[[list, list], dict[str, float]]]:
    """The task's metrics, functions (targets, predictions) -> {name: value}."""
    return [_function(name) for name in self.meta['metrics']]

  def postprocess(self, text: str, row: Mapping[str, Any]) -> Any:
    """What the task's metrics compare with `row['target']`: the text itself by default."""
    text = without_sentinel(text) if self.meta.get('sentinel') else text
    if not (postprocessor := self.meta['postprocessor']):
      return text
    example = {**row.get('example', {}), **{k: row[k] for k in FEATURES if k in row}}
    return _function(postprocessor['name'])(
        text, example=example, is_target=False, **postprocessor.get('kwargs', {}))


def without_sentinel(text: str) -> str:
  """A target or an answer as the task knows it."""
  return text.strip().removeprefix(SENTINEL).strip() if SENTINEL in text else text


def open_or_build(task, split: str, vocabulary, lengths: Mapping[str, int],
                  cache_dir: str | os.PathLike | None = None) -> TokenCache:
  """Opens the cache of a task's split; builds it if there is none or it is damaged.

  Args:
    task: has `name`, `key_parts(split)` (what else its tokens depend on, as JSON) and
      `build(split, vocabulary, lengths, folder)`, which fills a folder through `CacheWriter`.
    lengths: {'inputs': n, 'targets': m}, in tokens with EOS.
    cache_dir: default $PROMPT_TUNING_JAX_CACHE/tokens or ~/.cache/prompt_tuning_jax/tokens.

  Raises ValueError where the split is empty, the disk is full, or the task says so.
  """
  if not all(int(lengths.get(feature, 0)) > 0 for feature in FEATURES):
    raise ValueError("Task feature lengths must be like {'inputs': 128, 'targets': 8}, got "
                     f'{dict(lengths)}.')
  what = {'format_version': FORMAT_VERSION, 'task': task.name, 'split': split,
          'key_parts': task.key_parts(split),
          'vocabulary': {'sha256': vocabulary.sha256, 'extra_ids': vocabulary.extra_ids},
          'lengths': {feature: int(lengths[feature]) for feature in FEATURES}}
  key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
  name = re.sub(r'[^\w.-]+', '_', f'{task.name}-{split}')[:80]
  folder = _cache_dir(cache_dir) / f'{name}-{key[:16]}'
  cache = _open_or_discard(folder, key)
  if cache is None:
    cache = _build(task, split, vocabulary, lengths, folder, {**what, 'key': key})
  cut = {feature: n for feature, n in cache.meta['num_cut'].items() if n}
  if cut:
    rows = ' and '.join(f'{n} {feature} (to {lengths[feature]})' for feature, n in cut.items())
    logger.warning('%s, %s: %s of %d examples were longer than the task feature lengths and cut.',
                   task.name, split, rows, cache.num_examples)
  return cache


def open_cache(folder: str | os.PathLike) -> TokenCache:
  """Opens a folder, checking its files against their sums, large ones when they are read.

  Raises ValueError where a file is missing, damaged, or of another format version.
  """
  folder = pathlib.Path(folder)
  try:
    meta = file_digest.read_json(folder / 'meta.json')
    if meta['format_version'] != FORMAT_VERSION:
      raise ValueError(f'format version {meta["format_version"]}, expected {FORMAT_VERSION}')
    blocks = file_digest.check_all(folder, meta['files'], (*FEATURES, 'rows'))
    arrays = [np.asarray(np.load(folder / f'{name}.npy', mmap_mode=mmap, allow_pickle=False))
              for each in FEATURES for name, mmap in ((each, 'r'), (f'{each}_offsets', None))]
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise ValueError(f'Token cache {folder} cannot be used: {error!r}.') from error
  return TokenCache(folder, meta, *arrays, blocks=blocks)


def _open_or_discard(folder: pathlib.Path, key: str) -> TokenCache | None:
  if not folder.exists():
    return None
  try:
    cache = open_cache(folder)
    if cache.meta.get('key') == key:
      return cache
    reason = 'it belongs to another task'
  except ValueError as error:
    reason = str(error)
  logger.warning('Rebuilding a token cache: %s', reason)
  aside = _temporary(folder)  # Renamed first: another process may put a good one there meanwhile.
  try:
    os.rename(folder, aside)
  except FileNotFoundError:
    return None
  shutil.rmtree(aside, ignore_errors=True)
  return None


def _build(task, split, vocabulary, lengths, folder: pathlib.Path, what: dict) -> TokenCache:
  start = time.monotonic()
  logger.info('Tokenising %s, %s, into %s (once).', task.name, split, folder)
  temporary = _temporary(folder)
  try:
    temporary.mkdir(parents=True)
    _remove_abandoned(folder.parent)
    task.build(split=split, vocabulary=vocabulary, lengths=lengths, folder=temporary)
    meta = json.loads((temporary / 'meta.json').read_text('utf-8'))
    if not meta['num_examples']:
      raise ValueError(f'Split {split} of task {task.name} has no examples: choose another split.')
    _write_meta(temporary, {**meta, **what})
    new = open_cache(temporary)
    assert new.input_lengths.max() <= lengths['inputs'], f'{task.name}: inputs not trimmed'
    assert new.target_lengths.max() <= lengths['targets'], f'{task.name}: targets not trimmed'
    try:
      os.rename(temporary, folder)
    except OSError:
      if not folder.exists():
        raise
      logger.info('Another process built %s first.', folder)
  except OSError as error:
    if error.errno not in DISK_ERRORS:  # The task could not read something: not ours to explain.
      raise
    raise ValueError(_cannot_write(folder, error)) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  logger.info('%d examples of %s, %s, in %.1f s.', meta['num_examples'], task.name, split,
              time.monotonic() - start)
  return open_cache(folder)


def _remove_abandoned(cache_dir: pathlib.Path) -> None:
  """Removes what killed processes left behind a week ago or earlier."""
  for temporary in cache_dir.glob('.*.tmp'):
    with contextlib.suppress(FileNotFoundError):  # its writer may just have finished
      if time.time() - temporary.stat().st_mtime > 7 * 24 * 3600:
        shutil.rmtree(temporary, ignore_errors=True)


def _cache_dir(cache_dir) -> pathlib.Path:
  if cache_dir:
    if '://' in str(cache_dir):  # it is read by memory map
      raise ValueError(f'cache_dir should be a folder of this machine, got {cache_dir}.')
    return pathlib.Path(cache_dir).expanduser()
  root = os.environ.get(ENVIRONMENT) or '~/.cache/prompt_tuning_jax'
  return pathlib.Path(root).expanduser() / 'tokens'


def _temporary(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f'.{folder.name}.{uuid.uuid4().hex[:8]}.tmp')


def _write_header(file, count: int) -> None:
  """NumPy keeps room for a growing first axis, so the header can be written again at the end."""
  np.lib.format.write_array_header_1_0(
      file, {'descr': '<i4', 'fortran_order': False, 'shape': (count,)})


def _close(file) -> None:
  file.flush()
  os.fsync(file.fileno())
  file.close()


def _write_meta(folder: pathlib.Path, meta: Mapping[str, Any]) -> None:
  meta = json.loads(json.dumps(meta, default=_plain))
  meta['sha256'] = file_digest.of_json(meta)
  with open(folder / 'meta.json', 'w', encoding='utf-8') as file:
    file.write(json.dumps(meta, indent=1) + '\n')
    _close(file)


def _plain(value):
  """What NumPy and TensorFlow datasets give, as JSON knows it."""
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, np.ndarray | np.generic):
    return value.tolist()
  raise TypeError(f'a row holds a {type(value).__name__}, which JSON cannot')


def _function(name: str) -> Callable:
  """'module:qualname' -> the function."""
  module, _, qualname = name.partition(':')
  return functools.reduce(getattr, qualname.split('.'), importlib.import_module(module))


def _cannot_write(folder: pathlib.Path, error: OSError) -> str:
  return (f'Cannot write the token cache {folder}: {error.strerror or error}; free the disk or set '
          f'{ENVIRONMENT} to a folder elsewhere.')

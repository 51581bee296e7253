"""A task made of a user's own file: JSON lines, CSV or TSV, compressed or not. No TensorFlow."""

import collections
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import json
import logging
import pathlib
import string
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from prompt_tuning_jax import cloud_storage
from prompt_tuning_jax.data.token_cache import CacheWriter

logger = logging.getLogger(__name__)

TRAIN, EVAL = 'train', 'validation'
FORMATS = {'.jsonl': 'JSON', '.json': 'JSON', '.ndjson': 'JSON', '.csv': 'CSV', '.tsv': 'TSV'}
MOST_LABELS = 20  # More different targets are texts, not labels.
HOLD_OUT = 10  # One row in ten.
BATCH = 1000  # Rows tokenised at a time.
MOST_BYTES = 64 << 20  # of a line, or characters of a cell: what is longer is no text.
VERSION = 1  # Of how rows become tokens; part of the cache's key.


@dataclasses.dataclass(frozen=True)
class TextFile:
  """Rows of files as examples.

  Files end in .jsonl (one object a line), .csv (quotes, first line names the fields) or .tsv (no
  quotes, first line names the fields), and may be compressed (.gz).

  Args:
    train_file: None if the task is only evaluated.
    eval_file: None holds out a tenth of the training rows, always the same.
    inputs: a template such as 'premise: {premise} hypothesis: {hypothesis}' (`{{` is a brace), a
      field's name, or several names: (a, b) is 'a: {a} b: {b}'.
    targets: a field's name or a template.
    labels: the texts that targets may be, or {what the file holds: text}. They are ranked in
      evaluation. () is free text, which is generated. None finds out: 20 or fewer different
      targets in the training file, each seen more than once, are labels.
    name: default is the file's name.
  """

  train_file: str | None
  eval_file: str | None = None
  inputs: str | Sequence[str] = '{text}'
  targets: str = 'label'
  labels: Sequence[str] | Mapping[str, str] | None = None
  name: str = ''

  def __post_init__(self):
    if not (self.train_file or self.eval_file):
      raise ValueError('A text file task needs a TRAIN_FILE (or, to be evaluated, an EVAL_FILE).')
    for field in ('train_file', 'eval_file'):
      path = getattr(self, field)
      if path:
        object.__setattr__(self, field, str(path))  # A path object is as good.
        _format(str(path))
        if not _local(path).is_file():
          raise ValueError(f'There is no file {path}.')
    if isinstance(self.labels, str):
      raise ValueError(f'labels must be a list of texts, got the text {self.labels!r}.')
    for template in (self._inputs, self._targets):
      _fields(template)
    if not self.name:
      path = pathlib.Path(self.train_file or self.eval_file)
      object.__setattr__(self, 'name', path.name.removesuffix('.gz').rpartition('.')[0])
    if not self.eval_file:
      logger.info('No evaluation file: one row in %d of %s is held out.', HOLD_OUT, self.train_file)

  @property
  def train_split(self) -> str:
    return TRAIN

  @property
  def eval_split(self) -> str:
    return EVAL

  def key_parts(self, split: str) -> dict[str, Any]:
    """What the tokens of a split depend on, the files' contents among it."""
    labels = None if self.labels is None else list(_label_map(self.labels).items())
    return {'version': VERSION, 'inputs': self._inputs, 'targets': self._targets,
            'labels': labels,
            'train': self.train_file and _fingerprint(self.train_file),
            'eval': self.eval_file and split == EVAL and _fingerprint(self.eval_file),
            'held_out': not self.eval_file}

  def build(self, split: str, vocabulary, lengths: Mapping[str, int], folder) -> None:
    """Writes a split's rows into `folder`; raises ValueError naming file and line of a bad row."""
    path = self._file(split)
    labels, members = self._labels_and_members(split)
    choices = list(dict.fromkeys(labels.values()))
    _check_labels(choices, vocabulary, lengths['targets'])
    writer, num_cut = CacheWriter(folder), dict.fromkeys(('inputs', 'targets'), 0)

    def write(texts: list[tuple[str, str]]) -> None:
      sources, targets = zip(*texts, strict=True)
      for source, target, *ids in zip(sources, targets, vocabulary.encode_many(sources),
                                      vocabulary.encode_many(targets), strict=True):
        framed = [vocabulary.framed(tokens, feature, lengths[feature])
                  for feature, tokens in zip(num_cut, ids, strict=True)]
        for feature, tokens, whole in zip(num_cut, framed, ids, strict=True):
          num_cut[feature] += len(tokens) < len(vocabulary.framed(whole, feature))
        row = {'inputs': source, 'targets': target, 'target': target}
        writer.add(*framed, {**row, 'choices': choices} if choices else row)

    waiting = []
    for i, (place, source, target) in enumerate(self._examples(path)):
      if members is not None and not members[i]:
        continue
      if labels and target not in labels:
        raise ValueError(f'{place}: the target {target!r} is none of {list(labels)}; correct it, '
                         'name it in `labels`, or set labels=() if targets are free text.')
      waiting.append((source, labels.get(target, target)))
      if len(waiting) == BATCH:
        write(waiting)
        waiting = []
    if waiting:
      write(waiting)
    metric = 'accuracy' if choices else 'exact_match'
    writer.close(metrics=[f'prompt_tuning_jax.metrics:{metric}'], num_cut=num_cut)

  def _labels_and_members(self, split: str) -> tuple[dict[str, str], np.ndarray | None]:
    """({target in the file: label}, [rows] bool: which belong to the split; None is all)."""
    path, hold_out = self.train_file or self.eval_file, not self.eval_file
    if self.labels is not None and not hold_out:
      return _label_map(self.labels), None
    seen, num_rows = collections.Counter(), 0
    for _, _, target in self._examples(path):
      num_rows += 1
      if len(seen) <= MOST_LABELS:
        seen[target] += 1
    labels = self.labels
    if labels is None:
      labels = labels_among(seen)
      logger.info('Labels found in %s: %s.', path, ', '.join(labels) or 'none, targets are text')
    if not hold_out:
      return _label_map(labels), None
    if num_rows < 2:
      raise ValueError(f'{path} has {num_rows} rows: too few to hold one out for evaluation; give '
                       'more rows or an EVAL_FILE.')
    held_out = np.zeros(num_rows, bool)
    order = np.random.default_rng(0).permutation(num_rows)
    held_out[order[:max(1, num_rows // HOLD_OUT)]] = True
    return _label_map(labels), held_out if split == EVAL else ~held_out

  def _file(self, split: str) -> str:
    path = {TRAIN: self.train_file, EVAL: self.eval_file or self.train_file}.get(split)
    if not path:
      raise ValueError(f'Task {self.name} has no split {split}: it has {TRAIN} if there is a '
                       f'TRAIN_FILE, and {EVAL}.')
    return path

  def _examples(self, path: str) -> Iterator[tuple[str, str, str]]:
    """(place, input, target) of every row."""
    inputs, targets = _fields(self._inputs), _fields(self._targets)
    for place, row in read_rows(path):
      target = _filled(targets, row, place).strip()
      if not target:
        raise ValueError(f'{place}: the target ({self._targets}) is empty: fill it in or drop the '
                         'row.')
      yield place, _filled(inputs, row, place), target

  @property
  def _inputs(self) -> str:
    if isinstance(self.inputs, str):
      return _template(self.inputs)
    if len(self.inputs) == 1:
      return _template(self.inputs[0])
    return ' '.join(f'{name}: {{{name}}}' for name in self.inputs)

  @property
  def _targets(self) -> str:
    return _template(self.targets)


def labels_among(counts: Mapping[str, int]) -> list[str]:
  """Targets that are labels: few, and each seen more than once; [] if they are free text."""
  found = 2 <= len(counts) <= MOST_LABELS and min(counts.values()) > 1
  return sorted(counts) if found else []


def read_rows(path: str, otherwise: str | None = None, file: BinaryIO | None = None,
              ) -> Iterator[tuple[str, dict[str, Any]]]:
  """('FILE, line N', fields) of every row of a JSON-lines, CSV or TSV file.

  Args:
    otherwise: 'JSON', 'CSV' or 'TSV' for a file whose name does not tell; None refuses it.
    file: `path`, opened already, for who wants to know how far it is read. It stays open.

  Raises:
    ValueError: naming the file and the line that cannot be read.
  """
  kind = _format(path, otherwise)
  lines = _lines(path, file)
  if kind == 'JSON':
    yield from _json_rows(path, lines)
    return
  options = {'strict': True} if kind == 'CSV' else {'delimiter': '\t', 'quoting': csv.QUOTE_NONE}
  csv.field_size_limit(MOST_BYTES)  # The module's own limit is 128 KiB, less than a long document.
  table = csv.reader(lines, **options)
  names = None
  while True:
    place = f'{path}, line {table.line_num + 1}'
    try:
      cells = next(table, None)
    except csv.Error as error:
      raise ValueError(f'{place}: not {kind}: {error}. Is a quotation mark not closed?') from None
    if cells is None:
      break
    if names is None:
      names = cells
      if len(set(names)) < len(names):
        raise ValueError(f'{place}: two fields have one name: {names}.')
    elif cells:
      if len(cells) != len(names):
        raise ValueError(f'{place}: expected {len(names)} columns ({", ".join(names)}), got '
                         f'{len(cells)}.')
      yield place, dict(zip(names, cells, strict=True))


def _json_rows(path: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits, too.
      raise ValueError(f'{path}, line {number}: not JSON ({error}); expected one object a line.'
                       ) from None
    if not isinstance(row, dict):
      raise ValueError(f'{path}, line {number}: expected a JSON object, got {line.strip()[:40]!r}.')
    yield f'{path}, line {number}', row


def _lines(path: str, file: BinaryIO | None = None) -> Iterator[str]:
  """Decoded lines with their ends."""
  number = 0
  try:
    with contextlib.ExitStack() as stack:
      file = file or stack.enter_context(open(_local(path), 'rb'))
      lines = gzip.GzipFile(fileobj=file) if path.endswith('.gz') else file
      # Not `in lines`: a damaged file, or a small one that unpacks to a large one, may have no end.
      for number, line in enumerate(iter(lambda: lines.readline(MOST_BYTES), b''), 1):
        if len(line) == MOST_BYTES:
          raise ValueError(f'{path}, line {number}: longer than {MOST_BYTES >> 20} MiB.')
        yield line.decode('utf-8-sig' if number == 1 else 'utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}); '
                     'convert the file.') from None
  except (EOFError, OSError, zlib.error) as error:
    raise ValueError(f'{path}, after line {number}: cannot be read: {error}.') from error


def _format(path: str, otherwise: str | None = None) -> str:
  kind = FORMATS.get(pathlib.Path(path.removesuffix('.gz')).suffix.lower(), otherwise)
  if kind is None:
    raise ValueError(f'{path}: expected a file ending in {", ".join(FORMATS)}, or one of these '
                     'and .gz.')
  return kind


def _template(text: str) -> str:
  """A field's name alone stands for the field."""
  return text if '{' in text else f'{{{text}}}'


def _fields(template: str) -> list[tuple[str, str | None]]:
  """[(text, name of the field after it or None), …]."""
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError as error:
    raise ValueError(f'The template {template!r} cannot be read: {error}.') from None
  for _, name, form, conversion in parts:
    if name == '' or form or conversion:
      raise ValueError(f'The template {template!r} may hold {{field}} only.')
  if not any(name for _, name, _, _ in parts):
    raise ValueError(f'The template {template!r} names no field, such as {{text}}.')
  return [(text, name) for text, name, _, _ in parts]


def _filled(fields: Sequence[tuple[str, str | None]], row: Mapping[str, Any], place: str) -> str:
  texts = []
  for text, name in fields:
    texts.append(text)
    if name is not None:
      value = row.get(name)
      if value is None or isinstance(value, list | dict):
        what = f'the field {name!r} is {json.dumps(value)[:40]}' if name in row else (
            f'there is no field {name!r}')
        raise ValueError(f'{place}: {what}, expected a text or a number; the fields are '
                         f'{", ".join(map(str, row))}.')
      texts.append(_text(value))
  filled = ''.join(texts)
  try:
    filled.encode('utf-8')
  except UnicodeEncodeError:
    raise ValueError(f'{place}: half a surrogate pair, which is no character.') from None
  return filled


def _text(value: Any) -> str:
  """Truth values as JSON writes them."""
  return json.dumps(value) if isinstance(value, bool) else str(value)


def _label_map(labels: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
  """{what the file holds: label}."""
  pairs = labels.items() if isinstance(labels, Mapping) else ((text, text) for text in labels)
  return {_text(value).strip(): _text(text).strip() for value, text in pairs}


def _check_labels(labels: Sequence[str], vocabulary, length: int) -> None:
  tokens = {label: tuple(vocabulary.encode(label)) for label in labels}
  for label, ids in tokens.items():
    if not ids or len(vocabulary.framed(ids, 'targets')) > length:
      raise ValueError(f'The label {label!r} has {len(ids)} tokens and an end, but '
                       f'TASK_FEATURE_LENGTHS lets targets have {length} tokens.')
  if len(set(tokens.values())) < len(labels):
    raise ValueError(f'The vocabulary writes two of the labels {labels} with the same tokens: '
                     'rename one.')


def _local(path: str) -> pathlib.Path:
  return pathlib.Path(cloud_storage.fetch(path)).expanduser()


def _fingerprint(path: str) -> str:
  with open(_local(path), 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()

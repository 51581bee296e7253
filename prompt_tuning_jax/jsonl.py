"""Files of one JSON object a line, read and answered in parts that fit in memory."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from tqdm import tqdm

from prompt_tuning_jax import cloud_storage
from prompt_tuning_jax.checkpoints import partial_file
from prompt_tuning_jax.data import text_file

logger = logging.getLogger(__name__)

# A part ends at so many rows, or as soon as it has so many bytes of text. Its rows are sorted into
# batches: were it 1,024 rows, batches of 128 short texts would be half padding. The first parts are
# short, each may have twice the rows of the one before: little is lost of a short file, and
# something is seen of a slow one.
FIRST, CHUNK, MOST_BYTES = 256, 4096, 16 << 20
DELAY, SECONDS = 2, 30  # until there is a bar; between lines of progress without a terminal
Row = dict[str, Any]
Placed = tuple[str, Row]


def rows(path: str) -> Iterator[Placed]:
  """('FILE, line N', fields) of every row of JSON lines (or CSV, TSV, .gz, as the name says).

  Raises:
    ValueError: naming the first row that cannot be read, or not be written again.
  """
  for place, row in text_file.read_rows(path, otherwise='JSON'):
    _line(place, row)
    yield place, row


def answer_file(source: str, target: str, answer: Callable[[list[Placed]], list[Row]], *,
                settings: Mapping[str, Any] | None = None,
                tell: Callable[[Row], Any] | None = None) -> int:
  """Writes to `target` the rows of `source`, each with what `answer` adds; returns their number.

  `answer` gets [(place, row), …] and returns one object a row. `target` appears when it is whole.
  Until then TARGET.partial grows; after a kill or an error, the next call keeps its parts up to the
  first whose rows in `source` have changed, and goes on from there. A target in a bucket is made on
  this machine, where the next call finds its parts.

  Args:
    settings: what the answers depend on besides the rows, as JSON; answers given under other
      settings are not kept. Without settings every call starts over.
    tell: is given every row as it was written, those of earlier calls too.

  Raises:
    ValueError: for a row that cannot be read, no rows at all, a full disk, a target that is the
      source, or one that another process is writing.
  """
  deliver, made = None, target
  if cloud_storage.is_remote(target):
    deliver, made = functools.partial(cloud_storage.put, path=target), cloud_storage.beside(target)
  path, count = pathlib.Path(cloud_storage.fetch(source)).expanduser(), 0
  with (open(path, 'rb') as file, _output(path, made, settings) as output,
        _progress(file) as show):
    for part, sha256 in _parts(source, file):
      content = output.kept(len(part), sha256)
      if is_new := content is None:
        answered = zip(part, answer(part), strict=True)
        content = b''.join(_line(place, {**row, **added}) for (place, row), added in answered)
        output.add(len(part), sha256, content)
      for line in content.splitlines() if tell else ():
        tell(json.loads(line))
      count += len(part)
      show(count, is_new)
    if not count:
      raise ValueError(f'{source} has no rows.')
    output.finish(deliver)
  return count


def _output(source: pathlib.Path, target: str | pathlib.Path, settings: Mapping[str, Any] | None,
            ) -> partial_file.PartialFile | partial_file.Stream:
  if os.path.exists(target) and not os.path.isfile(target):
    return partial_file.Stream(target)
  for path in (pathlib.Path(target), partial_file.beside(target)):
    if path.exists() and path.samefile(source):
      raise ValueError(f'{source} would be written over: name another target.')
  return partial_file.PartialFile(target, settings)


def _parts(source: str, file: BinaryIO) -> Iterator[tuple[list[Placed], str]]:
  """(rows, SHA-256 of all that their answers may depend on), none of them empty.

  That is the fields and the number of the line, but neither the file's name nor how it is written.
  Equal rows make equal parts: a resumed run has the batches of an uninterrupted one, and so its
  very digits.
  """
  part, digest, size, limit = [], hashlib.sha256(), 0, min(FIRST, CHUNK)
  for place, row in text_file.read_rows(source, otherwise='JSON', file=file):
    line = _line(place, row)
    digest.update(place.removeprefix(source).encode() + b':' + line)
    size += len(line)
    part.append((place, row))
    if len(part) == limit or size >= MOST_BYTES:
      yield part, digest.hexdigest()
      part, digest, size, limit = [], hashlib.sha256(), 0, min(2 * limit, CHUNK)
  if part:
    yield part, digest.hexdigest()


def _line(place: str, row: Row) -> bytes:
  try:
    return (json.dumps(row, ensure_ascii=False) + '\n').encode('utf-8')
  except UnicodeEncodeError:
    raise ValueError(f'{place}: half a surrogate pair, which is no character.') from None
  except RecursionError:
    raise ValueError(f'{place}: brackets are nested too deeply.') from None


@contextlib.contextmanager
def _progress(file: BinaryIO) -> Iterator[Callable[[int, bool], None]]:
  """Gives show(rows, is_new): a bar on a terminal, a line now and then elsewhere.

  What is left is told by the bytes of `file`, compressed ones too; a pipe does not tell.
  """
  total = os.fstat(file.fileno()).st_size if file.seekable() else 0
  start, last = (time.monotonic(), 0, 0), time.monotonic()  # rows and bytes when the work began
  form = '{percentage:3.0f}%|{bar}| {desc}' if total else '{desc}'
  with tqdm(total=total or None, bar_format=form, disable=None, delay=DELAY, miniters=0,
            leave=False) as bar:

    def show(rows: int, is_new: bool) -> None:
      nonlocal start, last
      now, position = time.monotonic(), file.tell() if total else 0
      if not is_new:
        start = now, rows, position
      seconds, text = max(now - start[0], 1e-9), f'{rows:,} rows'
      if rows > start[1]:
        rate = (rows - start[1]) / seconds
        text += f', {rate:,.0f} rows/s' if rate >= 10 else f', {rate:.2f} rows/s'
      if position > start[2]:
        left = (total - position) / (position - start[2]) * seconds
        text += f', {tqdm.format_interval(left)} left'
      bar.set_description_str(text, refresh=False)
      bar.update(position - bar.n)
      if bar.disable and now - last >= SECONDS:
        logger.info('%s', text)
        last = now

    yield show

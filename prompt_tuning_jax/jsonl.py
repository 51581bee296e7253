"""Files of one JSON object a line, read and answered in parts that fit in memory."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
from prompt_tuning_jax.data import text_file

CHUNK = 4096  # rows in memory at a time
Row = dict[str, Any]


def rows(path: str) -> Iterator[tuple[str, Row]]:
  """('FILE, line N', fields) of every row of JSON lines (or CSV, TSV, .gz, as the name says).

  Raises:
    ValueError: naming the first row that cannot be read, or not be written again.
  """
  for place, row in text_file.read_rows(path, otherwise='JSON'):
    _line(place, row)
    yield place, row


def answer_file(source: str, target: str,
                answer: Callable[[list[tuple[str, Row]]], list[Row]]) -> int:
  """Writes to `target` the rows of `source`, each with what `answer` adds; returns their number.

  `answer` gets [(place, row), …] and returns one object a row. `target` appears when it is whole.
  """
  count, part = 0, []
  with atomic_file(target) as temporary, open(temporary, 'w', encoding='utf-8') as file:

    def flush():
      for (place, row), added in zip(part, answer(part), strict=True):
        file.write(_line(place, {**row, **added}))
      file.flush()
      part.clear()

    for placed in rows(source):
      part.append(placed)
      count += 1
      if len(part) == CHUNK:
        flush()
    if part:
      flush()
    if not count:
      raise ValueError(f'{source} has no rows.')
  return count


def _line(place: str, row: Row) -> str:
  try:
    text = json.dumps(row, ensure_ascii=False) + '\n'
    text.encode('utf-8')
  except UnicodeEncodeError:
    raise ValueError(f'{place}: half a surrogate pair, which is no character.') from None
  except RecursionError:
    raise ValueError(f'{place}: brackets are nested too deeply.') from None
  return text

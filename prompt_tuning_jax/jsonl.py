"""Files of one JSON object a line, read and answered in parts that fit in memory."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from prompt_tuning_jax.checkpoints.atomic_write import atomic_file

CHUNK = 4096  # rows in memory at a time
Row = dict[str, Any]


def rows(path: str) -> Iterator[tuple[str, Row]]:
  """('FILE:LINE', object) of every line that is not blank; ValueError names the first bad one."""
  number = 0
  try:
    with open(path, encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          row = json.loads(line)
          if not isinstance(row, dict):
            raise ValueError(f'{path}:{number}: expected a JSON object, got {line.strip()[:40]!r}.')
          yield f'{path}:{number}', row
  except json.JSONDecodeError as error:
    raise ValueError(f'{path}:{number}: not JSON: {error.msg}.') from None
  except UnicodeDecodeError:
    raise ValueError(f'{path}:{number + 1}: not UTF-8.') from None
  except OSError as error:
    raise ValueError(f'Cannot read {path}: {error.strerror}.') from None


def answer_file(source: str, target: str,
                answer: Callable[[list[tuple[str, Row]]], list[Row]]) -> int:
  """Writes to `target` the rows of `source`, each with what `answer` adds; returns their number.

  `answer` gets [(place, row), …] and returns one object a row. `target` appears when it is whole.
  """
  count, part = 0, []
  with atomic_file(target) as temporary, open(temporary, 'w', encoding='utf-8') as file:

    def flush():
      for (_, row), added in zip(part, answer(part), strict=True):
        file.write(json.dumps({**row, **added}, ensure_ascii=False) + '\n')
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

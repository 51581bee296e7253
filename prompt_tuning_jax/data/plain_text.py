"""Lines of plain text files, compressed or not."""

import gzip
import lzma
import zlib
from collections.abc import Iterator

from prompt_tuning_jax import cloud_storage


def lines(paths: list[str], every: int = 1) -> Iterator[str]:
  """Every `every`-th line that is not blank, of text files that may be .gz or .xz."""
  number = 0
  for path in paths:
    path = cloud_storage.fetch(path)
    opener = {'gz': gzip.open, 'xz': lzma.open}.get(path.rsplit('.', 1)[-1], open)
    try:
      with opener(path, 'rt', encoding='utf-8') as file:
        for line in filter(None, map(str.strip, file)):
          if number % every == 0:
            yield line
          number += 1
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
      raise ValueError(f'Cannot read {path}: {error}.') from None

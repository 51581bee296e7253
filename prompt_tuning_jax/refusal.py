"""Errors of one line: which exceptions say all there is to say, and how they are told."""

import linecache
import pathlib
import sys

PACKAGE = pathlib.Path(__file__).resolve().parent


def is_ours(error: Exception) -> bool:
  """Whether a `raise` in our own files made it: such an error says all there is to say."""
  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  path = pathlib.Path(last.tb_frame.f_code.co_filename)
  line = linecache.getline(str(path), last.tb_lineno)
  ours = {PACKAGE, PACKAGE.parent / 'tasks'}  # in a checkout, tasks/ stands beside the package
  return bool(ours & set(path.resolve().parents)) and line.strip().startswith('raise ')


def refuse(error: Exception | str, status: int) -> int:
  """Prints one line on stderr (gin's note about the call is cut off); returns `status`."""
  message = ' '.join(str(error).split('\n  In call to configurable')[0].split())
  print(f'error: {message}', file=sys.stderr)
  return status

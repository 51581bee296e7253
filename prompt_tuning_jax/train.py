"""Trains a prompt: `python -m prompt_tuning_jax.train --gin_file=run/prompt_tuning.gin …`."""

import os
import sys
import traceback
from collections.abc import Sequence

from prompt_tuning_jax import launch


def main(argv: Sequence[str]) -> int:
  """Returns the exit status.

  One of several processes that fails ends here and now: on its way out it would wait for the
  others, and they for it.
  """
  try:
    status = launch.train(argv)
  except Exception:
    if not _is_one_of_several():
      raise
    traceback.print_exc()
    status = 1
  if status and _is_one_of_several():
    sys.stderr.flush()
    os._exit(status)
  return status


def _is_one_of_several() -> bool:
  jax = sys.modules.get('jax')
  return jax is not None and jax.distributed.is_initialized()


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

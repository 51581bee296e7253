"""Reads damaged files in a process of its own, which may run out of time or memory, or crash.

`python child.py make FOLDER FORMAT …` makes specimens; `python child.py read FOLDER FIRST LAST
FORMAT …` prints a JSON line before and after each case, the second with what came of it.
"""

import faulthandler
import json
import pathlib
import resource
import sys
import tempfile
import time
import zlib

import formats
import mutations
import numpy as np

SECONDS, BYTES = 20, 1 << 30  # that a case may take
PARTS = {'partial': ('out.partial', 'out.partial.json'), 'gzip': ('rows.jsonl.gz',),
         'peft_of_peft': ('adapter_config.json', 'adapter_model.safetensors'),
         't5_of_transformers': ('config.json', 'model.safetensors'),
         'gpt2_of_transformers': ('config.json', 'model.safetensors')}


def parts(name: str, specimen: pathlib.Path) -> list[str]:
  """The files of a specimen that are damaged."""
  return sorted(PARTS.get(name) or [
      path.relative_to(specimen).as_posix() for path in specimen.rglob('*')
      if path.is_file() and path.name != '_CHECKPOINT_METADATA'])  # which orbax reads for itself


def outcome(name: str, folder: pathlib.Path, expected: str) -> tuple[str, str]:
  """('equal', 'different', 'refused' or 'wrong', why)."""
  try:
    found = formats.digest(formats.FORMATS[name].read(folder))
  except (ValueError, OSError) as error:
    message = str(error)
    is_clear = '\n' not in message and (str(folder.name) in message or name == 'gin')
    return 'refused' if is_clear else 'wrong', f'{type(error).__name__}: {message}'
  except BaseException as error:  # What should never come: a Rust panic is no Exception.
    return 'wrong', f'{type(error).__name__}: {error}'
  return 'equal' if found == expected else 'different', ''


def clear_caches() -> None:
  """Forgets what was read under the same name before."""
  from prompt_tuning_jax.data import byte_level_bpe, tokenizer, vocabulary, word_piece
  for cached in (byte_level_bpe._added, tokenizer.file_of, tokenizer.loaded,
                 vocabulary._bytes_of_ids, vocabulary._read, vocabulary._sha256,
                 vocabulary._load_once, word_piece._appended):
    cached.cache_clear()


def read(specimens: pathlib.Path, name: str, first: int, last: int) -> None:
  """Damages and reads cases [first, last) of a format."""
  specimen = specimens / name
  with tempfile.TemporaryDirectory() as temporary:
    folder = mutations.fresh(specimen, pathlib.Path(temporary) / 'damaged')
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)  # not the last one's
    expected = formats.digest(formats.FORMATS[name].read(folder))
    files = parts(name, specimen)
    used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
    for case in range(first, last):
      rng = np.random.default_rng([zlib.crc32(name.encode()), case])
      folder = mutations.fresh(specimen, pathlib.Path(temporary) / 'damaged')
      how = mutations.mutate(folder, files, rng)
      about = {'format': name, 'case': case, 'how': how}
      print(json.dumps(about), flush=True)
      clear_caches()
      faulthandler.dump_traceback_later(SECONDS, exit=True)
      start = time.monotonic()
      result, why = outcome(name, folder, expected)
      faulthandler.cancel_dump_traceback_later()
      if (folder / 'EXECUTED').exists():
        result, why = 'wrong', 'code was executed'
      print(json.dumps({**about, 'result': result, 'why': why,
                        'seconds': round(time.monotonic() - start, 3)}), flush=True)


def main(argv: list[str]) -> None:
  command, folder, *rest = argv
  specimens = pathlib.Path(folder)
  if command == 'make':
    for name in rest:
      formats.FORMATS[name].make(specimens / name)
    return
  first, last, *names = rest
  for name in names:
    read(specimens, name, int(first), int(last))


if __name__ == '__main__':
  main(sys.argv[1:])

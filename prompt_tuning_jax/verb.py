"""What the verbs eval, infer and score have in common: flags, loading, errors of one line."""

import argparse
import os
import sys
from collections.abc import Callable

from prompt_tuning_jax import launch


def parser(name: str, description: str) -> argparse.ArgumentParser:
  """The shared flags."""
  made = argparse.ArgumentParser(prog=f'python -m prompt_tuning_jax.{name}', allow_abbrev=False,
                                 description=description)
  add = made.add_argument
  add('--base', required=True, metavar='NAME_OR_FOLDER',
      help='a bundled base (mini), or a T5X or Hugging Face folder')
  add('--prompt', metavar='FILE', help='a prompt file; without it the base answers unprompted')
  add('--network', metavar='NAME', help='such as t5_1_1_base, for a T5X folder')
  add('--vocabulary', metavar='FILE', help="the base's SentencePiece file, if it is not beside it")
  add('--dtype', default='float32', choices=('float32', 'bfloat16'))
  add('--batch_size', type=int, default=32, metavar='N')
  add('--max_input_length', type=int, default=512, metavar='TOKENS',
      help='longer inputs are cut (default 512)')
  add('--max_decode_length', type=int, default=64, metavar='TOKENS',
      help='longest generated text (default 64)')
  return made


def file_flags(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """The flags of verbs that answer a file."""
  made.add_argument('--input', required=True, metavar='FILE.jsonl', help='one JSON object a line')
  made.add_argument('--output', required=True, metavar='FILE.jsonl',
                    help='the same rows with the answers added')
  return made


def run(made: argparse.ArgumentParser, argv: list[str], body: Callable) -> int:
  """Parses `argv`, loads base and prompt, calls body(flags, prompted_base); the exit status."""
  flags = made.parse_args(argv)
  launch.set_up_process()
  try:
    for name in ('batch_size', 'max_input_length', 'max_decode_length'):
      if getattr(flags, name) < 1:
        raise ValueError(f'--{name} must be at least 1, got {getattr(flags, name)}.')
    from prompt_tuning_jax import prompted_base
    network = launch.network_named(flags.network) if flags.network else None
    loaded = prompted_base.load(
        flags.base, flags.prompt, network=network, vocabulary_file=flags.vocabulary,
        dtype=flags.dtype, batch_size=flags.batch_size, max_decode_length=flags.max_decode_length)
    body(flags, loaded)
  except (ValueError, OSError) as error:
    if os.environ.get('PROMPT_TUNING_JAX_TRACEBACK'):
      raise
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0

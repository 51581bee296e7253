"""What the verbs other than train have in common: flags, checks, loading, errors of one line."""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

from prompt_tuning_jax import __version__, cloud_storage, launch
from prompt_tuning_jax.refusal import is_ours, refuse

NAMED = 'each row names its own in "prompt"'
path = os.path.expanduser  # the type of a flag: a shell leaves `--output=~/file` alone


def bare_parser(name: str, description: str) -> argparse.ArgumentParser:
  """A parser without flags; a wrong command is one line and status 2."""
  made = argparse.ArgumentParser(prog=f'python -m prompt_tuning_jax.{name}', allow_abbrev=False,
                                 description=description)
  made.error = lambda message: sys.exit(refuse(message, 2))
  return made


def parser(name: str, description: str, bank: str = '') -> argparse.ArgumentParser:
  """The shared flags of verbs that load a base, with a prompt or, `bank` says how, many."""
  made = bare_parser(name, description)
  add = made.add_argument
  add('--base', required=True, metavar='NAME_OR_FOLDER',
      help='a bundled base (mini), or a T5X or Hugging Face folder')
  add('--prompt', type=path, metavar='FILE',
      help='a prompt file, .npy or PEFT folder; without it the base answers unprompted')
  if bank:
    add('--prompts', type=path, metavar='FOLDER',
        help='of prompt files: ' + bank)
  add('--network', metavar='NAME', help='such as t5_1_1_base, for a T5X folder')
  add('--vocabulary', type=path, metavar='FILE',
      help="the base's SentencePiece file, tokenizer.json or vocab.txt, if not beside it")
  dtype_flags(add)
  add('--batch_size', type=int, default=32, metavar='N')
  add('--model_parallelism', type=int, default=1, metavar='N',
      help='devices that share one copy of the base (default 1)')
  add('--max_input_length', type=int, default=512, metavar='TOKENS',
      help='longer inputs are cut (default 512)')
  add('--max_decode_length', type=int, default=64, metavar='TOKENS',
      help='longest generated text (default 64)')
  return made


def dtype_flags(add: Callable) -> None:
  """The flags for the dtypes of what is computed and of what is stored."""
  add('--dtype', default='float32', choices=('float32', 'bfloat16'))
  add('--parameter_dtype', choices=('float32', 'bfloat16', 'int8'),
      help="of the base's parameters, if not --dtype; int8 weights take a quarter of float32's "
           'memory')


def search_flags(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """The flags of beam search."""
  add = made.add_argument
  add('--num_beams', type=int, default=1, metavar='N', help='beam search of this width')
  add('--length_penalty', type=float, metavar='ALPHA',
      help="of beams, T5X's: log p / ((5 + n) / 6) ** ALPHA (default 0.6)")
  return made


def decoding_flags(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """The flags of verbs that generate text (`predictor.DecodingSettings`)."""
  add = search_flags(made).add_argument
  add('--temperature', type=float, default=0.0, metavar='T',
      help='draw tokens; 0 (default) takes the most probable')
  add('--top_k', type=int, default=0, metavar='K', help='draw from the K most probable tokens')
  add('--top_p', type=float, default=1.0, metavar='P', help='draw from the top P of probability')
  add('--num_samples', type=int, default=1, metavar='N', help='texts of each input')
  add('--stop', action='append', default=[], metavar='TEXT',
      help='ends a text, and is cut off; may be repeated')
  add('--seed', type=int, default=0, metavar='N', help='decides what is drawn')
  return made


def decoding(flags: argparse.Namespace):
  """What these flags say; raises ValueError."""
  from prompt_tuning_jax.predictor import DecodingSettings
  return DecodingSettings(**_of_decoding(flags))


def decodes_otherwise(flags: argparse.Namespace) -> bool:
  """Whether these flags say anything but the defaults."""
  from prompt_tuning_jax.predictor import DecodingSettings
  return _of_decoding(flags) != vars(DecodingSettings())


def _of_decoding(flags: argparse.Namespace) -> dict:
  import dataclasses

  from prompt_tuning_jax.predictor import DecodingSettings
  given = {field.name: getattr(flags, field.name) for field in dataclasses.fields(DecodingSettings)}
  return {**given, 'stop': tuple(flags.stop)}


def settings(flags: argparse.Namespace, prompted) -> dict:
  """What the answers to a row depend on, as JSON."""
  beside = ('base', 'prompt', 'prompts', 'network', 'vocabulary', 'input', 'output',
            'batch_size', 'dtype', 'parameter_dtype')
  return {'version': __version__, **prompted.identity,
          **{f'--{name}': value for name, value in vars(flags).items() if name not in beside}}


def file_flags(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
  """The flags of verbs that answer a file."""
  made.add_argument('--input', required=True, type=path, metavar='FILE.jsonl',
                    help='one JSON object a line (or .csv, .tsv; also .gz)')
  made.add_argument('--output', required=True, type=path, metavar='FILE.jsonl',
                    help='the same rows with the answers added')
  return made


def run(made: argparse.ArgumentParser, argv: list[str], body: Callable) -> int:
  """Parses `argv`, loads base and prompt, calls body(flags, prompted_base); the exit status."""
  flags = made.parse_args(argv)
  launch.set_up_process()

  def work() -> None:
    for name in ('batch_size', 'max_input_length', 'max_decode_length'):
      if getattr(flags, name) < 1:
        raise ValueError(f'--{name} must be at least 1, got {getattr(flags, name)}.')
    check_files([flags.input] if flags.input else [], flags.output,
                [file for file in (flags.prompt, flags.vocabulary) if file])
    if flags.output and flags.output.endswith(('.gz', '.csv', '.tsv', '.npy', '.safetensors')):
      raise ValueError(f'Answers are JSON lines, and {flags.output} would be read as something '
                       'else: name it FILE.jsonl.')
    from prompt_tuning_jax import prompted_base
    from prompt_tuning_jax.partitioning import Partitioner
    prompts = getattr(flags, 'prompts', None)
    if prompts and flags.prompt:
      raise ValueError('Give --prompt (one for all rows) or --prompts (each row names its own).')
    network = launch.network_named(flags.network) if flags.network else None
    body(flags, prompted_base.load(
        flags.base, flags.prompt, prompts=prompts, network=network,
        vocabulary_file=flags.vocabulary, dtype=flags.dtype,
        parameter_dtype=flags.parameter_dtype, batch_size=flags.batch_size,
        max_decode_length=flags.max_decode_length,
        partitioner=Partitioner(flags.model_parallelism)))

  return exit_status(work)


def exit_status(work: Callable[[], None]) -> int:
  """0, or 1 and one line on stderr for an error that we raised or that a file made.

  Any other exception keeps its traceback, and so does every one under
  $PROMPT_TUNING_JAX_TRACEBACK.
  """
  try:
    _check_texts(sys.argv)
    work()
  except (ValueError, OSError) as error:
    is_told = isinstance(error, OSError) or is_ours(error)
    if not is_told or os.environ.get('PROMPT_TUNING_JAX_TRACEBACK'):
      raise
    return refuse(error, 1)
  return 0


def _check_texts(argv: Sequence[str]) -> None:
  """Raises ValueError for an argument that is not UTF-8, which Python gives as half characters.

  The name of a file may be what it is.
  """
  for text in argv:
    is_text = text.encode('utf-8', 'replace').decode() == text
    if not is_text and not os.path.exists(text.partition('=')[2] or text):
      raise ValueError(f'This is no text in UTF-8: {ascii(text)}.')


def check_files(inputs: list[str], output: str | None, others: Sequence[str] = ()) -> None:
  """Raises ValueError, before anything slow, for a file that cannot be read or written.

  The output may not be an input, or one of the `others` that are read.
  """
  for name in inputs:
    file = pathlib.Path(cloud_storage.fetch(name))
    if not file.exists():
      raise ValueError(f'There is no file {name}.')
    if file.is_dir() or not os.access(file, os.R_OK):
      raise ValueError(f'Cannot read {name}: it is a folder, or you may not.')
  if output is None or cloud_storage.is_remote(output):
    return
  is_stream = os.path.exists(output) and not os.path.isfile(output)
  if not is_stream and os.path.realpath(output) in map(os.path.realpath, (*inputs, *others)):
    raise ValueError(f'{output} is read, and would be written over: name another --output.')
  file = pathlib.Path(output)
  if file.is_dir():
    raise ValueError(f'Cannot write {output}: it is a folder.')
  place = file
  if file.is_file() or not file.exists():  # it is made in its folder, which may be made as well
    place = next(parent for parent in file.resolve().parents if parent.exists())
    if not place.is_dir():
      raise ValueError(f'Cannot write {output}: {place} is no folder.')
  if not os.access(place, os.W_OK):
    raise ValueError(f'Cannot write {output}: you may not write to {place}.')

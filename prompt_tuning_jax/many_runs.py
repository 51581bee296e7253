"""Several command lines of `train`, trained together: what the verbs for many runs share."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prompt_tuning_jax import cloud_storage, launch

MODEL_DIR, SEED = '--gin.MODEL_DIR=', '--gin.run.train.seed='
AT_ONCE = 8


def flags_of(made: argparse.ArgumentParser, seeds: str, required: bool) -> argparse.ArgumentParser:
  """The flags that these verbs share, added to a parser."""
  default = {} if required else {'default': [0]}
  made.add_argument('--seeds', type=int, nargs='+', required=required, metavar='N', help=seeds,
                    **default)
  made.add_argument('--at_once', type=int, default=AT_ONCE, metavar='K',
                    help=f'runs whose steps are taken together, at most (default {AT_ONCE}); fewer '
                         'need less memory')
  return made


def parsed(made: argparse.ArgumentParser, argv: Sequence[str],
           ) -> tuple[argparse.Namespace, list[str]]:
  """(the flags of the parser, those of `train`).

  To argparse an unknown flag with a space in its value is no flag, but one value more of the flag
  before it: so names without a space stand for those of gin.
  """
  given = {f'--gin:{i}': arg for i, arg in enumerate(argv)
           if arg.startswith('--gin') and '=' in arg}
  names = {arg: name for name, arg in given.items()}
  flags, rest = made.parse_known_args([names.get(arg, arg) for arg in argv])
  return flags, [given.get(arg, arg) for arg in rest]


def folder_of(argv: Sequence[str]) -> tuple[str, list[str]]:
  """(MODEL_DIR that `argv` gives, the other flags); raises ValueError unless given once."""
  given = [arg.removeprefix(MODEL_DIR).strip('\'"') for arg in argv if arg.startswith(MODEL_DIR)]
  if len(given) != 1 or any(arg.startswith(SEED) for arg in argv):
    raise ValueError(f'Several runs need {MODEL_DIR}FOLDER once; --seeds alone say the seeds.')
  if cloud_storage.is_remote(given[0]):
    raise ValueError(f'The MODEL_DIR of several runs is a folder of this machine, got {given[0]}.')
  return given[0], [arg for arg in argv if not arg.startswith(MODEL_DIR)]


def configured(argv: Sequence[str]) -> dict[str, Any]:
  """The arguments of `run.train` that a command line of `train` gives.

  Raises ValueError for a command that no run of several can have, and where `launch` refuses it.
  """
  flags = launch.parse_flags(argv)
  if flags.dry_run or flags.multiprocess or flags.coordinator_address:
    raise ValueError('Several runs are trained by one process: leave out --dry_run, --multiprocess '
                     'and --coordinator_address.')
  launch.set_up_process()
  from prompt_tuning_jax.training import run
  launch.read_config(launch.find_files(flags.gin_file, flags.gin_search_paths),
                     flags.gin_bindings, run.train)
  arguments, text = launch.resolve(run.train, config_text=None)
  return {**arguments, 'config_text': text}


def train(commands: Mapping[str, Sequence[str]], at_once: int,
          check: Callable[[dict[str, Any]], Any] = lambda arguments: None) -> dict[str, Any]:
  """Trains {name: command line of `train`}, up to `at_once` of them together.

  `check` sees the arguments of each before any is trained.

  Returns the report of each, or the `loop.Diverged` that ended it. Raises ValueError where one is
  refused, SystemExit after a signal: the same command goes on.
  """
  if at_once < 1:
    raise ValueError(f'--at_once must be at least 1, got {at_once}.')
  arguments = {name: configured(argv) for name, argv in commands.items()}
  for given in arguments.values():
    check(given)
  from prompt_tuning_jax.training import loop, population
  outcomes, groups = {}, population.groups(population.prepared(arguments), at_once)
  with loop.stop_requested() as stop:
    for group in groups:
      print(f'Together: {", ".join(group)}', file=sys.stderr)
      outcomes |= population.train(group, stop)
      if stop(0):
        raise SystemExit(0)
  return {name: outcomes[name] for name in commands}

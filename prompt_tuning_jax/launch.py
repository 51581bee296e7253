"""From a command line to a running training: flags, gin, processes, logging, compilation cache.

The one file that imports gin. JAX and gin are imported when they are needed, so `--help` is quick.

Gin is read in T5X's conventions, with three rules of our own. Files that include others are read
before those that do not, so the order of --gin_file does not matter for ours. What nothing uses is
dropped, so an axis file may replace the one a run file includes. And a name that nothing uses,
that does not exist or has no value is one line on stderr and exit status 2.
"""

import argparse
import difflib
import functools
import inspect
import logging
import os
import pathlib
import pkgutil
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.refusal import is_ours, refuse

PACKAGE = pathlib.Path(__file__).resolve().parent
CACHE = os.path.expanduser('~/.cache/prompt_tuning_jax')
EXAMPLE = """
Any gin name can be set on the command line; text need not be quoted again:
  --gin.MODEL_DIR=/tmp/model   --gin.BATCH_SIZE=8   --gin.optimizers.adafactor.learning_rate=0.1

Gin files are looked for in the current folder, in --gin_search_paths, then among our own:
  run/ method/ prompt/ prefix/ task/ batching/ subset/ vocabulary/ network/ partitioning/
and at most one of each is named.

Example:
  python -m prompt_tuning_jax.train --gin_file=run/quick_start.gin --gin.MODEL_DIR=/tmp/model
"""

MACRO, CONSTANT = 'gin.macro', 'gin.constant'

_LOCATION = re.compile(r'\n  In (?:file "(.*?)",|bindings string) line (\d+)\n')
_BOUND = re.compile(r'^([\w./]+)\s*=', re.MULTILINE)
_REFERENCED = re.compile(r'%([\w./]+)')
_INCLUDE = re.compile(r'^\s*include\b', re.MULTILINE)
_GIN_ERRORS = (ValueError, NameError, AttributeError, TypeError, LookupError, RuntimeError,
               ImportError, OSError, SyntaxError, tokenize.TokenError)


def train(argv: Sequence[str]) -> int:
  """The verb `train`: returns the exit status (0, 1 for a refused run, 2 for a wrong command)."""
  flags = parse_flags(argv)
  if not flags.gin_file:
    return refuse('no --gin_file: try --gin_file=run/quick_start.gin, or see --help.', 2)
  set_up_process()
  try:
    files = find_files(flags.gin_file, flags.gin_search_paths)
    from prompt_tuning_jax.training import dry_run, run  # takes seconds
    read_config(files, flags.gin_bindings, run.train)
    start_processes(flags)
  except ValueError as error:
    return refuse(error, 2)
  try:
    arguments, text = resolve(run.train, config_text=None)
    if flags.dry_run:
      print(text, dry_run.table(**arguments), sep='\n')
    else:
      run.train(**{**arguments, 'config_text': text})
  except ValueError as error:
    if not is_ours(error) or os.environ.get('PROMPT_TUNING_JAX_TRACEBACK'):
      raise
    return refuse(error, 1)
  return 0


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
  """Flags of `train`. `--gin.NAME=VALUE` joins `gin_bindings`, in the order given."""
  parser = argparse.ArgumentParser(
      prog='python -m prompt_tuning_jax.train', allow_abbrev=False, epilog=EXAMPLE,
      usage='%(prog)s --gin_file=FILE … --gin.NAME=VALUE …',
      description='Trains a prompt (or a whole model) as gin files say.',
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--gin_file', action='append', default=[], metavar='FILE', help='a gin file; may be repeated')
  add('--gin_bindings', action='append', default=[], metavar="'NAME = VALUE'",
      help='a line of gin, read after the files; may be repeated')
  add('--gin_search_paths', action='append', default=[], metavar='FOLDER,…',
      help='folders to look for gin files in')
  add('--tfds_data_dir', metavar='FOLDER', help='prepared TFDS data; default $TFDS_DATA_DIR')
  add('--dry_run', action='store_true', help='print configuration and sizes, and stop')
  add('--multiprocess', action='store_true',
      help='one of several processes (found by JAX on a TPU pod, under Slurm or Open MPI)')
  add('--coordinator_address', metavar='HOST:PORT', help='of process 0; with the next two')
  add('--num_processes', type=int, metavar='N')
  add('--process_id', type=int, metavar='I')
  parser.error = lambda message: sys.exit(refuse(message, 2))
  flags, unknown = parser.parse_known_args([_gin_flag_as_binding(arg) for arg in argv])
  for arg in unknown:
    name = arg.split('=')[0]
    if name.startswith('--gin.'):
      parser.error(f'{name} needs a value: {name}=VALUE.')
    parser.error(f'{name} is not a flag.{_nearest(name, parser._option_string_actions)}')
  flags.gin_search_paths = ','.join(flags.gin_search_paths).split(',')
  if flags.tfds_data_dir:
    os.environ['TFDS_DATA_DIR'] = flags.tfds_data_dir
  return flags


def _gin_flag_as_binding(arg: str) -> str:
  """--gin.NAME=VALUE -> --gin_bindings=NAME = VALUE, with text put in quotes."""
  match = re.fullmatch(r'--gin\.([^=\s]+)=(.*)', arg, re.DOTALL)
  return f'--gin_bindings={match[1]} = {_gin_value(match[2])}' if match else arg


def _gin_value(value: str) -> str:
  """What gin can read stays; anything else is text (a path, a task's name, a template)."""
  from gin import config_parser
  if value.startswith(('@', '%')):
    return value
  try:
    reader = config_parser.ConfigParser(f'x = {value}', None)
    if reader.parse_statement() and reader.parse_statement() is None:
      return value
  except (SyntaxError, tokenize.TokenError, ValueError, AttributeError):
    # Surely meant as gin: let gin say what is wrong. A template may begin with [MASK].
    if re.match(r'(?!\[[A-Z]+\])[\[(\'"]|\{\s*\w+\s*:', value):
      return value
  return repr(value)


def set_up_process() -> None:
  """Our log lines on stderr, other libraries' warnings only, and XLA's compilation cache on disk.

  Call it before the first computation. $JAX_COMPILATION_CACHE_DIR says where the cache is.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
  os.environ.setdefault('GRPC_VERBOSITY', 'ERROR')
  if not CACHE.startswith('~'):  # There is a home.
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', f'{CACHE}/xla')
  os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
  if jax := sys.modules.get('jax'):  # it has read its environment already
    jax.config.update('jax_compilation_cache_dir', os.environ.get('JAX_COMPILATION_CACHE_DIR'))
  logging.basicConfig(level=logging.WARNING, format='%(message)s', stream=sys.stderr)
  logging.getLogger('absl').setLevel(logging.WARNING)
  # gin calls every folder in which a file is not, before the one in which it is, an error.
  logging.getLogger().addFilter(lambda record: record.module != 'resource_reader')
  logging.getLogger(__package__).setLevel(logging.INFO)


def start_processes(flags: argparse.Namespace) -> None:
  """Joins the other processes, if the flags or $JAX_COORDINATOR_ADDRESS ask for it."""
  env = os.environ
  address = flags.coordinator_address or env.get('JAX_COORDINATOR_ADDRESS')
  if not (address or flags.multiprocess):
    return
  count, index = (int(env[name]) if flag is None and name in env else flag for flag, name in (
      (flags.num_processes, 'JAX_NUM_PROCESSES'), (flags.process_id, 'JAX_PROCESS_ID')))
  if (count is None or index is None) and not flags.multiprocess:
    raise ValueError('--coordinator_address needs --num_processes and --process_id as well.')
  import jax
  jax.distributed.initialize(address, count, index)
  if jax.process_index():
    logging.getLogger(__package__).setLevel(logging.WARNING)  # process 0 reports for all


def gin_folders() -> list[pathlib.Path]:
  """Where our gin files are: in the installed package, or beside it in a checkout."""
  return [folder for folder in (PACKAGE / 'gin', PACKAGE.parent / 'gin')
          if (folder / 'run').is_dir()]


def find_files(names: Iterable[str], search_paths: Iterable[str] = ()) -> list[pathlib.Path]:
  """Gin files in reading order. Raises ValueError for one that does not exist or is one too many.

  Later `include` statements look in the same folders.
  """
  from gin import config
  ours = gin_folders()
  config._LOCATION_PREFIXES[:] = ['.', *filter(None, search_paths), *map(str, ours),
                                  *(str(folder.parent) for folder in ours)]
  return _in_reading_order([_find(name) for name in names])


def read_config(files: Iterable[pathlib.Path], bindings: Iterable[str], entry: Callable) -> None:
  """Reads gin files, then bindings, and checks that `entry` can be called.

  Raises:
    ValueError: one line that says what is wrong, where, and the nearest right name.
  """
  import gin
  gin.clear_config()
  if gin.config._inverse_lookup(entry) is None:
    gin.external_configurable(entry, module=entry.__module__)
  bindings = [text.strip() for text in bindings]
  from_command_line = [name for text in bindings for name in _BOUND.findall(text)]
  texts = list(bindings)
  for path in files:
    texts += _texts(_parse(gin.parse_config_file, str(path), str(path)))
  for binding in bindings:
    _parse(gin.parse_config, binding, f'--gin.{binding}')
  _check_and_prune(entry, from_command_line, set(_REFERENCED.findall('\n'.join(texts))))
  gin.finalize()


def resolve(entry: Callable, **given) -> tuple[dict[str, Any], str]:
  """Builds what the configuration names: (arguments of `entry`, the configuration as gin).

  The text holds defaults too, and reading it gives the same arguments again. `given` arguments
  are the caller's: they are not in the text.
  """
  import gin
  defaults = gin.config._get_default_configurable_parameter_values(entry, None, list(given))
  settings = _settings(gin.config._inverse_lookup(entry).selector, defaults)
  return {**settings, **given}, gin.operative_config_str()


def _settings(selector: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
  """The arguments that are bound, with which gin's operative configuration is told.

  What is named without being called, as `@batches.TrainBatches` is, gets its own settings here:
  gin would look for them at the call, when the configuration may be another run's.
  """
  import gin
  gin.config._OPERATIVE_CONFIG['', selector] = {
      **defaults, **gin.get_bindings(selector, resolve_references=False)}
  arguments = gin.get_bindings(selector)
  for name, value in arguments.items():
    for other, known in gin.config._REGISTRY.items():
      if known.wrapper is value:
        bound = functools.partial(known.wrapped, **_settings(other, {}))
        arguments[name] = functools.update_wrapper(bound, known.wrapped, updated=())
  return arguments


def network_named(name: str):
  """The configuration in gin/network/NAME.gin; raises ValueError with the nearest name."""
  import gin

  from prompt_tuning_jax.training import run
  files = {path.stem: path for path in _our_files() if path.parent.name == 'network'}
  if name not in files:
    raise ValueError(f'There is no network {name}.{_nearest(name, files)} Networks: '
                     f'{", ".join(files)}.')
  gin.clear_config()
  gin.parse_config_file(str(files[name]))
  return gin.get_bindings(run.train)['network']


def _find(name: str) -> pathlib.Path:
  from gin import config
  for folder in config._LOCATION_PREFIXES:
    path = pathlib.Path(folder) / name
    if path.is_file():
      return path.resolve()
  raise ValueError(_no_such_file(name))


def _no_such_file(name: str) -> str:
  from gin import config
  ours = [f'{path.parent.name}/{path.name}' for path in _our_files()]
  near = _nearest(name, ours) or _nearest(f'run/{pathlib.Path(name).name}', ours)
  return f'No gin file {name} in {", ".join(config._LOCATION_PREFIXES)}.{near}'


def _in_reading_order(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """Files that include others first; two of our own files on one axis would depend on order."""
  paths = list(dict.fromkeys(paths))
  axes = {}
  for path in paths:
    if any(folder in path.parents for folder in gin_folders()):
      other = axes.setdefault(path.parent, path)
      if other != path:
        axis = path.parent.name
        raise ValueError(f'Two files of one kind: {axis}/{other.name} and {axis}/{path.name}; '
                         'name one of them.')
  return sorted(paths, key=lambda path: not _INCLUDE.search(path.read_text('utf-8', 'replace')))


def _texts(read) -> list[str]:
  """The text of a gin file just read and of all that it includes."""
  texts = [_find(read.filename).read_text('utf-8')]
  return texts + [text for included in read.includes for text in _texts(included)]


def _parse(parse: Callable, text: str, origin: str):
  try:
    return parse(text)
  except _GIN_ERRORS as error:
    message, line = str(error), None
    if isinstance(error, SyntaxError):
      message, origin, line = error.msg, error.filename or origin, error.lineno
    elif isinstance(error, tokenize.TokenError):
      message, line = error.args[0], error.args[1][0]
    elif match := _LOCATION.search(message):
      message, origin, line = message[:match.start()], match[1] or origin, match[2]
    where = f'{origin}:{line}' if line and not origin.startswith('--') else origin
    raise ValueError(f'{where}: {_explained(" ".join(message.split()))}') from None


def _explained(message: str) -> str:
  """Gin's message with the nearest right name."""
  from gin import config
  if match := re.search(r'Unable to open file: (.*?)\. Searched', message):
    return _no_such_file(match[1])
  if match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message):
    names = [name for selector in config._REGISTRY.matching_selectors(match[1].split('.')[-1])
             for name in inspect.signature(config._REGISTRY[selector].wrapped).parameters]
    return f'{match[1]} has no argument {match[2]}.{_nearest(match[2], names)}'
  if match := re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", message):
    depth = match[1].count('.') + 1
    names = ['.'.join(name.split('.')[-depth:]) for name, _ in config._REGISTRY.items()]
    return f'There is no {match[1]}.{_nearest(match[1], names)}'
  if match := re.search(r"selector ([\w.]+); <module '([\w.]+)'.*attribute (\w+)", message):
    names = [name for name in dir(sys.modules[match[2]]) if not name.startswith('_')]
    return f'There is no {match[1]}: {match[2]} has no {match[3]}.{_nearest(match[3], names)}'
  if match := re.search(r"No module named '([\w.]+)\.(\w+)'", message):
    parent = sys.modules.get(match[1])
    names = [module.name for module in pkgutil.iter_modules(getattr(parent, '__path__', []))]
    return f'{message}.{_nearest(match[2], names)}'
  if 'was not provided by an import statement' in message:
    return f'{message} Import its module in that gin file.'
  return message


def _check_and_prune(entry: Callable, from_command_line: Iterable[str], named: set[str]) -> None:
  """Refuses names that nothing uses and values that are missing; drops what nothing uses."""
  from gin import config
  bound, root = config._CONFIG, config._inverse_lookup(entry)
  used = _used(root.selector)
  macros = [scope for scope, selector in used if selector == MACRO]
  ours = {name for path in _our_files() for name in _BOUND.findall(path.read_text('utf-8'))}
  for name in from_command_line:
    key = config.ParsedBindingKey.parse(name).config_key if '.' in name else (name, MACRO)
    if key not in used:
      near = _nearest(name, macros if key[1] == MACRO else ())
      raise ValueError(f'Nothing in this configuration uses {name}.{near}')
  for key in bound:
    if key[1] == MACRO and key[0] not in named | ours:
      raise ValueError(f'Nothing in this configuration uses {key[0]}.{_nearest(key[0], macros)}')
  missing = _missing(used, root.selector)
  if missing:
    raise ValueError(f'Not set: {"; ".join(missing)}.')
  for key in set(bound) - used:
    del bound[key]


def _used(root: str) -> set[tuple[str, str]]:
  """(scope, selector) of everything that `root` reaches through references."""
  from gin import config
  used, queue = set(), [('', root)]
  while queue:
    key = queue.pop()
    if key not in used:
      used.add(key)
      queue += [ref.config_key for ref in config.iterate_references(config._CONFIG.get(key, {}))]
      if key[1] not in (MACRO, CONSTANT):
        queue += [other for other in config._CONFIG if other[1] == key[1]]
  return used


def _missing(used: Iterable[tuple[str, str]], root: str) -> list[str]:
  """Macros and arguments without a value, each with how to give it one."""
  from gin import config
  called = {ref.configurable.selector for ref in config.iterate_references(config._CONFIG)
            if ref.evaluate} | {root}
  missing = set()
  for scope, selector in used:
    if selector == CONSTANT or selector not in called:
      continue
    args = [config._CONFIG[key] for key in config._CONFIG if key[1] == selector]
    if selector == MACRO:
      args = [config._CONFIG.get((scope, selector), {})]
    unset = {name for values in args for name, value in values.items()
             if getattr(value, 'config_key', None) == ('gin.REQUIRED', CONSTANT)}
    parameters = inspect.signature(config._REGISTRY[selector].wrapped).parameters.values()
    unset |= {parameter.name for parameter in parameters
              if (parameter.default is parameter.empty or parameter.default is config.REQUIRED)
              and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
              and not any(parameter.name in values for values in args)}
    short = '.'.join(selector.split('.')[-2:])
    missing |= {scope if selector == MACRO else f'{short}.{name}' for name in unset}
  return [f'{name} ({_how_to_set(name)})' for name in sorted(missing)]


def _how_to_set(name: str) -> str:
  files = [f'{path.parent.name}/{path.name}' for path in _our_files()
           if '.' in name and name in _BOUND.findall(path.read_text('utf-8'))]
  return f'add a file such as --gin_file={files[0]}' if files else f'add --gin.{name}=VALUE'


def _our_files() -> list[pathlib.Path]:
  return sorted(path for folder in gin_folders() for path in folder.rglob('*.gin'))


def _nearest(name: str, names: Iterable[str]) -> str:
  """' Did you mean NAME?', or nothing when no name is near. Case does not matter."""
  by_lower = {other.lower(): other for other in names}
  near = difflib.get_close_matches(name.lower(), by_lower, 1)
  return f' Did you mean {by_lower[near[0]]}?' if near else ''

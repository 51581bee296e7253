"""Serves prompts: `python -m prompt_tuning_jax.serve --base=… --prompts=FOLDER`."""

import os
import sys

from prompt_tuning_jax import cloud_storage, launch, verb

ABOUT = ("Answers over HTTP with many prompts of one base, batched together: OpenAI's completions, "
         "whose model is a prompt's name, and classification. Prompts that are put into the "
         'folder, changed or deleted there come and go while it runs.')
KEY = 'PROMPT_TUNING_JAX_API_KEY'


def numbers(text: str) -> tuple[int, ...]:
  """'1,8,32' as numbers: the type of a flag."""
  return tuple(int(part) for part in text.split(',') if part.strip())


def parser():
  """The flags of this verb."""
  made = verb.bare_parser('serve', ABOUT)
  add = made.add_argument
  add('--base', required=True, metavar='NAME_OR_FOLDER',
      help='a bundled base (mini), or a T5X or Hugging Face folder')
  add('--prompts', nargs='+', type=verb.path, default=[], metavar='FOLDER|FILE',
      help='a folder of prompt files (.safetensors, .npy, PEFT folders), or such files; a prompt '
           'is named as its file')
  add('--network', metavar='NAME', help='such as t5_1_1_base, for a T5X folder')
  add('--vocabulary', type=verb.path, metavar='FILE',
      help="the base's SentencePiece file, tokenizer.json or vocab.txt, if not beside it")
  verb.dtype_flags(add)
  add('--host', default='127.0.0.1', help='default 127.0.0.1: this machine alone')
  add('--port', type=int, default=8000, help='default 8000; 0 takes a free one')
  add('--max_input_length', type=int, default=512, metavar='TOKENS',
      help='longest text; longer ones are refused (default 512)')
  add('--max_decode_length', type=int, default=64, metavar='TOKENS',
      help='longest generated text (default 64)')
  add('--batch_sizes', type=numbers, default=(1, 8, 32), metavar='N,N,…',
      help='rows that batches are padded to (default 1,8,32)')
  add('--widths', type=numbers, default=(), metavar='N,N,…',
      help='tokens that inputs with their prompts are padded to (default 64,128,… to the longest)')
  add('--max_active', type=int, default=4, metavar='N',
      help='batches of texts on the device at one time: its memory bounds them (default 4)')
  add('--max_queue', type=int, default=1024, metavar='N',
      help='texts that may wait; more are told to come again (default 1024)')
  add('--max_delay_ms', type=float, default=2.0, metavar='MS',
      help='how long a text waits for others when there is nothing else to do (default 2)')
  add('--request_timeout', type=float, default=60.0, metavar='SECONDS', help='default 60')
  add('--max_body_bytes', type=int, default=1 << 20, metavar='N', help='default 1 MiB')
  add('--api_key_file', type=verb.path, metavar='FILE',
      help=f'a key a line, one of which every request must bring (or ${KEY})')
  add('--poll_seconds', type=float, default=2.0, metavar='SECONDS',
      help='how often the folder is looked at (default 2); 0 only on POST /v1/reload')
  add('--shutdown_seconds', type=float, default=30.0, metavar='SECONDS',
      help='how long requests may take to finish after SIGTERM (default 30)')
  return made


def serve(flags) -> None:
  """Serves until SIGTERM or SIGINT."""
  import signal
  app, listener = _http()
  listening = bound(flags.host, flags.port)
  settings = app.Settings(
      api_keys=api_keys(flags), allowed_hosts=hosts(flags.host, listening.getsockname()[0]),
      max_body_bytes=flags.max_body_bytes, request_seconds=flags.request_timeout,
      shutdown_seconds=flags.shutdown_seconds)
  made = engine(flags)
  served = made.prepare()
  listening.listen(2048)  # From here on clients may come; until now they are turned away.
  host, port = listening.getsockname()[:2]
  server = listener.server(app.create_app(made, settings), settings, host, port)
  shown = f'[{host}]' if ':' in host else host
  count = len(served.bank.files)
  print(f'Serving {count} prompt{"s" * (count != 1)} of {served.bank.base.name} on '
        f'http://{shown}:{port} (compiled {served.programs.fresh} programs in '
        f'{served.programs.seconds:.0f} s)', flush=True)
  for name in (signal.SIGTERM, signal.SIGINT):
    signal.signal(name, lambda *_: None)  # The server raises them once more when it has finished.
  server.run(sockets=[listening])


def engine(flags):
  """The engine, not yet compiled. Raises ValueError for a prompt file that was named and is bad."""
  import dataclasses

  from prompt_tuning_jax.checkpoints import base_checkpoint
  from prompt_tuning_jax.data.vocabulary import Vocabulary
  from prompt_tuning_jax.prompt_bank import PromptBank
  from prompt_tuning_jax.prompted_model import PromptedModel
  from prompt_tuning_jax.serving.engine import Engine, EngineSettings
  from prompt_tuning_jax.serving.prompt_folder import PromptFolder
  settings = EngineSettings(**{name: getattr(flags, name) for name in (
      'batch_sizes', 'widths', 'max_input_length', 'max_decode_length', 'max_active',
      'max_queue', 'max_delay_ms', 'poll_seconds', 'shutdown_seconds')})
  folder, files = prompts([cloud_storage.fetch(path) for path in flags.prompts])
  network = launch.network_named(flags.network) if flags.network else None
  base = base_checkpoint.load_base(flags.base, config=network, vocabulary_file=flags.vocabulary,
                                   dtype=flags.parameter_dtype or flags.dtype)
  vocabulary = Vocabulary.of_base(base)
  watched = PromptFolder(folder, files, reserved=base.name)
  bank = PromptBank(base)
  changes = watched.changes(bank, settings.max_input_length, settings.max_decode_length)
  for name, path in files.items():
    if why := changes.refused.get(name):
      raise ValueError(why if path in why else f'{path}: {why}')
  config = dataclasses.replace(base.config, dtype=flags.dtype)
  return Engine(PromptedModel(config.network()), base.params, vocabulary,
                bank.replaced(changes.added), settings, watched)


def prompts(paths: list[str]) -> tuple[str | None, dict[str, str]]:
  """(the folder among these paths, {name: path} of the files). Raises ValueError."""
  from prompt_tuning_jax.checkpoints import peft_adapter, prompt_file
  folders = [path for path in paths if os.path.isdir(path) and not peft_adapter.is_folder(path)]
  if len(folders) > 1:
    raise ValueError(f'--prompts takes one folder, and any files; got {" and ".join(folders)}.')
  files = {}
  for path in paths:
    if path in folders:
      continue
    if not os.path.exists(path):
      raise ValueError(f'There is no prompt file or folder {path}.')
    name = prompt_file.name_of(path)
    if name in files:
      raise ValueError(f'{files[name]} and {path} are two prompts of one name: rename one.')
    files[name] = path
  return (folders or [None])[0], files


def api_keys(flags) -> tuple[str, ...]:
  """Those of the file and of the environment; warns where everyone in a network may ask."""
  import logging
  keys = [os.environ[KEY].strip()] if os.environ.get(KEY, '').strip() else []
  if flags.api_key_file:
    try:
      with open(flags.api_key_file, encoding='utf-8') as file:
        found = [line.strip() for line in file if line.strip()]
    except FileNotFoundError:
      raise ValueError(f'There is no file {flags.api_key_file}.') from None
    except UnicodeDecodeError:
      raise ValueError(f'{flags.api_key_file} is no text in UTF-8: write a key a line.') from None
    if not found:
      raise ValueError(f'{flags.api_key_file} has no key: write one a line.')
    keys += found
  if not keys and flags.host not in ('127.0.0.1', 'localhost', '::1'):
    logging.getLogger(__name__).warning(
        'Everyone who reaches %s may ask this server: give --api_key_file.', flags.host)
  return tuple(keys)


def hosts(given: str, address: str) -> tuple[str, ...]:
  """The names by which a server is asked for that only its own machine reaches; else (), any."""
  import ipaddress
  if not ipaddress.ip_address(address.partition('%')[0]).is_loopback:
    return ()
  known = ('localhost', '127.0.0.1', '[::1]', f'[{given}]' if ':' in given else given.lower())
  return tuple(dict.fromkeys(known))


def bound(host: str, port: int):
  """A socket that has the port, before anything slow. Raises ValueError."""
  import errno
  import socket
  if not 0 <= port < 1 << 16:
    raise ValueError(f'--port must be 0 to 65535, got {port}.')
  try:
    [(family, kind, _, _, address), *_] = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
  except OSError as error:
    if error.errno == errno.EADDRINUSE:
      raise ValueError(f'Port {port} of {host} is taken: stop what listens there, or choose '
                       'another with --port.') from None
    raise ValueError(f'Cannot listen on {host}, port {port}: {error.strerror or error}.') from None
  return made


def _http():
  """The modules that need the extra `serve`. Raises ValueError without it."""
  try:
    from prompt_tuning_jax.serving import app, listener
  except ModuleNotFoundError as error:
    if error.name.partition('.')[0] == __package__:
      raise
    raise ValueError(f'Serving needs the package {error.name}: pip install '
                     "'prompt_tuning_jax[serve]'.") from None
  return app, listener


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  flags = parser().parse_args(argv)
  launch.set_up_process()
  return verb.exit_status(lambda: serve(flags))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

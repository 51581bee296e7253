"""launch: gin read in T5X's conventions; a wrong command is one line and exit status 2."""

import importlib
import itertools
import socket
import subprocess
import sys
import time

import pytest

from prompt_tuning_jax import launch, refusal

HOUSE = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Roof:
  color: str
  pitch: float = 0.5

@dataclasses.dataclass(frozen=True)
class Flat:
  color: str

def build(roof, folder, storeys=1, title=None):
  if storeys < 0:
    raise ValueError('storeys must be at least 0.')
  return roof, folder, storeys, title
"""
IMPORTS = 'from __gin__ import dynamic_registration\nimport house_of_tests as house\n'
FILES = {
    'run.gin': "include 'roof.gin'\nhouse.build.storeys = %STOREYS\nSTOREYS = 2\n"
               'house.build.folder = %FOLDER\n',
    'roof.gin': "house.build.roof = @house.Roof()\nhouse.Roof.color = %COLOR\nCOLOR = 'red'\n",
    'flat.gin': 'house.build.roof = @house.Flat()\nhouse.Flat.color = %PAINT\n',
    'title.gin': "house.build.title = 'Home'\n",
}


@pytest.fixture(scope='module')
def module(tmp_path_factory):
  folder = tmp_path_factory.mktemp('modules')
  (folder / 'house_of_tests.py').write_text(HOUSE)
  sys.path.insert(0, str(folder))
  yield importlib.import_module('house_of_tests')
  sys.path.remove(str(folder))


@pytest.fixture
def house(module, tmp_path, monkeypatch):
  for name, text in FILES.items():
    (tmp_path / name).write_text(IMPORTS + text)
  monkeypatch.chdir(tmp_path)
  return module


def _read(house, argv):
  flags = launch.parse_flags(argv)
  files = launch.find_files(flags.gin_file, flags.gin_search_paths)
  launch.read_config(files, flags.gin_bindings, house.build)


def _build(house):
  return house.build(**launch.resolve(house.build)[0])


def _error(house, *argv):
  with pytest.raises(ValueError) as caught:
    _read(house, ['--gin_file=run.gin', '--gin.FOLDER=/tmp/x', *argv])
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_files_then_bindings_and_later_wins(house):
  _read(house, ['--gin_file=run.gin', '--gin.FOLDER=/tmp/x', '--gin.STOREYS=3',
                '--gin_bindings=STOREYS = 4', '--gin.Roof.pitch=1.5'])
  assert _build(house) == (house.Roof('red', 1.5), '/tmp/x', 4, None)


@pytest.mark.parametrize('written, meant', [
    ('/tmp/x', '/tmp/x'), ('"quoted"', 'quoted'), ("'/tmp/x'", '/tmp/x'), ('gs://b/x-1', 'gs://b/x-1'),
    ('sst2', 'sst2'), ('8', 8), ('-1e-3', -1e-3), ('True', True), ('None', None), ('', ''),
    ('8 rooms', '8 rooms'), ('2026-11-23', '2026-11-23'), ("it's", "it's"), ('a=b', 'a=b'),
    ('{text}', '{text}'), ('[MASK] : {text}', '[MASK] : {text}'), ('{a}: {b}', '{a}: {b}'),
    ('["a", "b"]', ['a', 'b']),
    ('{"inputs": 128}', {'inputs': 128}), ('%COLOR', 'red'), ('a\nb', 'a\nb'), ('-', '-')])
def test_values_need_no_second_quotes(house, written, meant):
  _read(house, ['--gin_file=run.gin', f'--gin.FOLDER={written}'])
  assert _build(house)[1] == meant


@pytest.mark.parametrize('order', itertools.permutations(['run.gin', 'flat.gin', 'title.gin']))
def test_the_order_of_files_does_not_matter(house, order):
  _read(house, [*(f'--gin_file={name}' for name in order), '--gin.FOLDER=x', '--gin.PAINT=blue'])
  assert _build(house) == (house.Flat('blue'), 'x', 2, 'Home')
  assert 'COLOR' not in launch.resolve(house.build)[1]  # nothing uses the replaced roof


def test_an_argument_may_be_bound_over_its_macro(house):
  _read(house, ['--gin_file=run.gin', '--gin.FOLDER=x', '--gin.Roof.color=blue'])
  assert _build(house)[0] == house.Roof('blue')


def test_config_text_round_trips(house, tmp_path):
  _read(house, ['--gin_file=run.gin', '--gin.FOLDER=/tmp/x', '--gin.STOREYS=7'])
  first, text = launch.resolve(house.build)
  assert 'house.Roof.pitch = 0.5' in text and 'title = None' in text  # defaults as well
  (tmp_path / 'config.gin').write_text(text)
  _read(house, ['--gin_file=config.gin'])
  again, text_again = launch.resolve(house.build)
  assert house.build(**again) == house.build(**first) and text_again == text


def test_search_paths(house, tmp_path, monkeypatch):
  (tmp_path / 'deep').mkdir()
  monkeypatch.chdir(tmp_path / 'deep')
  _read(house, [f'--gin_search_paths=nowhere,{tmp_path}', '--gin_file=run.gin', '--gin.FOLDER=x'])
  assert _build(house)[2] == 2


@pytest.mark.parametrize('argv, parts', [
    (['--gin.STORYS=3'], ['uses STORYS', 'mean STOREYS?']),
    (['--gin.storeys=3'], ['uses storeys', 'mean STOREYS?']),
    (['--gin.build.story=3'], ['build has no argument story', 'mean storeys?']),
    (['--gin.biuld.storeys=3'], ['no biuld', 'mean build?']),
    (['--gin.Rof.pitch=3'], ['no Rof', 'mean Roof?']),
    (['--gin.build.roof=@Roff()'], ['no Roff', 'mean Roof?']),
    (['--gin_file=flat.gin', '--gin.PAINT=x', '--gin.COLOR=blue'], ['uses COLOR']),
    (['--gin_file=flat.gin'], ['Not set: PAINT', '--gin.PAINT=VALUE']),
    (['--gin.Roof.color=%gin.REQUIRED'], ['Not set: ', 'Roof.color']),
    (['--gin.build.roof=%ROOF'], ['Not set: ROOF']),
    (['--gin_file=flatt.gin'], ['No gin file flatt.gin']),
    (['--gin_file=run/promt_tuning.gin'], ['mean run/prompt_tuning.gin?']),
    (['--gin_file=quickstart.gin'], ['mean run/quick_start.gin?']),
    (['--gin_file=network/mini.gin', '--gin_file=network/tiny.gin'],
     ['Two files of one kind: network/mini.gin and network/tiny.gin']),
    (['--gin.FOLDER=[a, b]'], ['--gin.FOLDER = [a, b]: ', "'a'"]),
    (['--gin_bindings=FOLDER'], ['--gin.FOLDER: ']),
])
def test_a_wrong_name_is_one_line_with_the_nearest_right_one(house, argv, parts):
  message = _error(house, *argv)
  for part in parts:
    assert part in message


@pytest.mark.parametrize('text, parts', [
    ('house.build.storeys = = 3', ['bad.gin:3: ']),
    ('house.build.title = [1,\n', ['bad.gin']),
    ('house.biuld.storeys = 3', ['bad.gin:3: ', 'mean build?']),
    ('house.build.story = 3', ['bad.gin:3: ', 'mean storeys?']),
    ('house.build.roof = @house.Rof()', ['bad.gin:3: ', 'mean Roof?']),
    ('home.build.storeys = 3', ['bad.gin:3: ', "'home' was not provided"]),
    ('import house_of_test', ['bad.gin:3: ', 'house_of_test']),
    ('from prompt_tuning_jax.prompts import initializer', ['bad.gin:3: ', 'mean initializers?']),
    ("include 'roff.gin'", ['bad.gin:3: ', 'No gin file roff.gin']),
    ('STORYES = 3', ['uses STORYES', 'mean STOREYS?']),
])
def test_a_wrong_gin_file_is_one_line_with_its_place(house, tmp_path, text, parts):
  (tmp_path / 'bad.gin').write_text(IMPORTS + text + '\n')
  message = _error(house, '--gin_file=bad.gin')
  for part in parts:
    assert part in message


def test_missing_arguments_and_macros_are_all_named(house):
  with pytest.raises(ValueError, match=r'Not set: FOLDER \(.*\)\.'):
    _read(house, ['--gin_file=run.gin'])
  with pytest.raises(ValueError, match=r'Not set: house_of_tests\.build\.folder .*build\.roof'):
    _read(house, [])


@pytest.mark.parametrize('argv, parts', [
    (['--gin_fil=run.gin'], ['--gin_fil is not a flag', 'mean --gin_file?']),
    (['--gin.MODEL_DIR'], ['--gin.MODEL_DIR needs a value']),
    (['model'], ['model is not a flag']),
    (['--gin_file'], ['expected one argument']),
])
def test_wrong_flags(argv, parts, capsys):
  with pytest.raises(SystemExit) as caught:
    launch.parse_flags(argv)
  assert caught.value.code == 2
  printed = capsys.readouterr().err
  assert printed.count('\n') == 1
  for part in parts:
    assert part in printed


def test_our_refusals_are_one_line_and_others_keep_their_traceback(house, capsys):
  _read(house, ['--gin_file=run.gin', '--gin.FOLDER=x', '--gin.STOREYS=-1'])
  with pytest.raises(ValueError) as caught:
    _build(house)
  assert not refusal.is_ours(caught.value)  # raised by a file that is not in the package
  assert refusal.refuse(caught.value, 1) == 1
  assert capsys.readouterr().err == 'error: storeys must be at least 0.\n'
  with pytest.raises(ValueError) as caught:
    launch._find('no_such.gin')
  assert refusal.is_ours(caught.value)


def test_a_lone_coordinator_is_refused():
  flags = launch.parse_flags(['--coordinator_address=localhost:1'])
  with pytest.raises(ValueError, match='--num_processes'):
    launch.start_processes(flags)


@pytest.mark.slow
def test_two_processes_join():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  code = ('import sys, jax; from prompt_tuning_jax import launch; '
          'launch.start_processes(launch.parse_flags(sys.argv[1:])); '
          'print(jax.process_index(), jax.process_count(), jax.device_count())')
  running = [subprocess.Popen(
      [sys.executable, '-c', code, f'--coordinator_address={address}', '--num_processes=2',
       f'--process_id={i}'], stdout=subprocess.PIPE, text=True) for i in range(2)]
  said = [process.communicate(timeout=120)[0].split() for process in running]
  assert [line[:2] for line in said] == [['0', '2'], ['1', '2']]


def _run(*argv):
  return subprocess.run([sys.executable, '-m', 'prompt_tuning_jax.train', *argv],
                        capture_output=True, text=True, check=False)


def test_help_is_quick():
  seconds = []
  for _ in range(2):  # the first may have to write .pyc files
    start = time.perf_counter()
    done = _run('--help')
    seconds.append(time.perf_counter() - start)
  assert done.returncode == 0 and '--gin_file' in done.stdout
  assert min(seconds) < 1.0


def test_a_command_without_files_says_where_to_begin():
  done = _run()
  assert done.returncode == 2 and 'run/quick_start.gin' in done.stderr


def test_a_wrong_command_has_status_2_and_no_traceback():
  done = _run('--gin_file=run/quick_star.gin')
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert 'Did you mean run/quick_start.gin?' in done.stderr

"""The house's rules: who may import whom, who may import what, and how long things may be."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'prompt_tuning_jax'
TASKS = ROOT / 'tasks'
FILES = sorted([*PACKAGE.rglob('*.py'), *TASKS.rglob('*.py')])

FLOORS = (
    {'types', 'host_memory', 'refusal'},
    {'param_paths', 'tokenizer_file', 'cloud_storage'},
    {'networks', 'prompts', 'decoding', 'objectives', 'metrics', 'partitioning', 'optimizers',
     'ranking'},
    {'prompted_model', 'methods', 'data', 'checkpoints'},
    {'prompt_bank', 'jsonl'},
    {'controlled'},
    {'predictor', 'analysis'},
    {'training', 'prompted_base', 'serving', 'steering', 't5x_bridge'},
    {'launch'},
    {'verb', 'many_runs'},
    {'train', 'train_ensemble', 'train_vocabulary', 'eval', 'infer', 'score', 'serve', 'export',
     'similarity', 'inspect', 'sweep', 'steer', 'label_words', 'warm_start'},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TENSORFLOW = {'tensorflow', 'tensorflow_text', 'tensorflow_datasets', 'seqio', 't5', 'clu'}
WITHOUT_TENSORFLOW = {f'tasks/{name}.py' for name in (
    'answers', 'denoising', 'metrics', 'noise', 'postprocessors', 'prepared', 'sentences',
    'text_metrics')}
# Outside library -> the files that may import it, by the start of their path.
MAY_IMPORT = {
    **dict.fromkeys(TENSORFLOW, ('tasks/', 'prompt_tuning_jax/data/seqio_builder.py',
                                 'prompt_tuning_jax/data/vocabulary.py',
                                 'prompt_tuning_jax/t5x_bridge.py')),
    'orbax': ('prompt_tuning_jax/checkpoints/',),
    'gin': ('prompt_tuning_jax/launch.py',),
    't5x': ('prompt_tuning_jax/t5x_bridge.py',),
    **dict.fromkeys(('starlette', 'uvicorn', 'prometheus_client'), ('prompt_tuning_jax/serving/',)),
    **dict.fromkeys(('pickle', 'cloudpickle', 'dill', 'joblib'), ()),
}


def _name(path: pathlib.Path) -> str:
  return path.relative_to(ROOT).as_posix()


def _imports(path: pathlib.Path, nodes=ast.walk) -> set[str]:
  """Full names of the modules (or their members) that a file imports, lazily too."""
  names = set()
  for node in nodes(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{_name(path)}: relative import'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def _room(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_imports_point_down_and_the_package_and_tasks_do_not_meet(path):
  in_tasks = TASKS in path.parents
  for name in _imports(path):
    top, *rest = name.split('.')
    if top != 'prompt_tuning_jax' or not rest or rest[0] == '__version__':
      continue
    if in_tasks or rest[0] == 'tasks':
      assert in_tasks and rest[0] == 'tasks', f'{_name(path)} imports {name}'
    elif rest[0] != _room(path):
      assert FLOOR_OF[rest[0]] < FLOOR_OF[_room(path)], f'{_name(path)} imports {name}'


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_outside_libraries_stay_in_their_rooms(path):
  for name in _imports(path):
    top = name.split('.')[0]
    if top in MAY_IMPORT:
      assert _name(path).startswith(MAY_IMPORT[top] or '-'), f'{_name(path)} imports {name}'
      assert _name(path) not in WITHOUT_TENSORFLOW or top not in TENSORFLOW
  assert 'allow_pickle=' + 'True' not in path.read_text(encoding='utf-8')


def test_the_vocabulary_imports_seqio_lazily():
  path = PACKAGE / 'data' / 'vocabulary.py'
  at_top = {name.split('.')[0] for name in _imports(path, nodes=ast.iter_child_nodes)}
  assert not at_top & TENSORFLOW


@pytest.mark.parametrize('path', FILES, ids=_name)
def test_files_and_functions_are_short(path):
  text = path.read_text(encoding='utf-8')
  assert len(text.splitlines()) <= 400
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      assert length <= 80, f'{node.name} has {length} lines'


def test_every_room_is_a_package_and_gin_is_not():
  for path in FILES:
    assert (path.parent / '__init__.py').exists(), f'{_name(path.parent)}: not in the wheel'
    assert path.is_relative_to(TASKS) or _room(path) == '__init__' or _room(path) in FLOOR_OF
  assert not list((ROOT / 'gin').rglob('*.py'))


def test_importing_loads_no_tensorflow():
  modules = ['.'.join(path.relative_to(ROOT).with_suffix('').parts) for path in FILES
             if PACKAGE in path.parents and path.stem not in ('t5x_bridge', 'seqio_builder')]
  modules += [f'prompt_tuning_jax.{name[:-3].replace("/", ".")}' for name in WITHOUT_TENSORFLOW]
  code = (f'import importlib, sys; [importlib.import_module(m) for m in {modules}]; '
          f'print(sorted({TENSORFLOW} & set(sys.modules)))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '[]'


def test_importing_the_package_is_light():
  code = ("import sys, prompt_tuning_jax, prompt_tuning_jax.train; "
          "print(sorted({'jax', 'numpy', 'gin', 'flax'} & set(sys.modules)))")
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'

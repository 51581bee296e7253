"""What a user installs: the wheel holds every file, and what it imports is declared."""

import ast
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from prompt_tuning_jax import launch

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ('prompt_tuning_jax', 'tasks', 'gin', 'setup.py', 'pyproject.toml', 'LICENSE',
           'README.md')
# tensorflow-datasets imports the first without declaring it, fsspec the second by name.
FOR_OTHERS = {'importlib-resources', 'gcsfs'}


def _imported() -> set[str]:
  names = set()
  for path in [*(ROOT / 'prompt_tuning_jax').rglob('*.py'), *(ROOT / 'tasks').rglob('*.py')]:
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.Import):
        names |= {alias.name.split('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        names.add(node.module.split('.')[0])
  return names - set(sys.stdlib_module_names) - {'prompt_tuning_jax', 't5x', 'clu'}  # an extra


def _declared() -> set[str]:
  tree = ast.parse((ROOT / 'setup.py').read_text(encoding='utf-8'))
  values = {node.arg: node.value for node in ast.walk(tree) if isinstance(node, ast.keyword)}
  extras = ast.literal_eval(values['extras_require'])
  lists = [ast.literal_eval(values['install_requires']), extras['serve'], extras['gcs']]
  return {_normal(re.match(r'[\w-]+', text)[0]) for texts in lists for text in texts}


def _normal(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


def test_imports_and_declared_dependencies_are_the_same():
  distributions = importlib.metadata.packages_distributions()
  needed = {name: {_normal(dist) for dist in distributions[name]} for name in _imported()}
  declared = _declared()
  undeclared = {name for name, dists in needed.items() if not dists & declared}
  assert not undeclared
  assert declared - set().union(*needed.values()) <= FOR_OTHERS


def test_a_checkout_finds_its_gin_files():
  assert launch.gin_folders() == [ROOT / 'gin']


def _files(folder: pathlib.Path) -> set[str]:
  return {path.relative_to(folder).as_posix() for path in folder.rglob('*')
          if path.is_file() and path.suffix != '.md' and '__pycache__' not in path.parts}


@pytest.fixture(scope='module')
def installed(tmp_path_factory) -> pathlib.Path:
  """A clean environment's site-packages, with our wheel in it and everyone else's beside it."""
  tmp = tmp_path_factory.mktemp('wheel')
  source = tmp / 'source'
  source.mkdir()
  for name in SOURCES:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    elif (ROOT / name).exists():
      shutil.copy(ROOT / name, source)
  code = 'from setuptools import build_meta; print(build_meta.build_wheel("."))'
  subprocess.run([sys.executable, '-c', code], cwd=source, check=True, capture_output=True)
  [wheel] = source.glob('*.whl')
  venv.create(tmp / 'venv', with_pip=False, symlinks=True)
  site = pathlib.Path(sysconfig.get_path(
      'purelib', 'venv', {'base': str(tmp / 'venv'), 'platbase': str(tmp / 'venv')}))
  zipfile.ZipFile(wheel).extractall(site)
  # As a plain folder: an editable install in it stays asleep, its .pth file is not read.
  (site / 'others.pth').write_text(sysconfig.get_path('purelib') + '\n')
  return site


def _run(site: pathlib.Path, *argv: str) -> str:
  env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  done = subprocess.run([site.parents[2] / 'bin' / 'python', *argv], cwd=site.parents[2], env=env,
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_tasks_gin_files_and_bases(installed):
  package = installed / 'prompt_tuning_jax'
  expected = _files(ROOT / 'prompt_tuning_jax')
  expected |= {f'tasks/{name}' for name in _files(ROOT / 'tasks')}
  expected |= {f'gin/{name}' for name in _files(ROOT / 'gin')}
  assert _files(package) == expected
  others = {path.name for path in installed.iterdir()} - {'prompt_tuning_jax', 'others.pth'}
  assert [re.sub(r'-.*\.', '.', name) for name in others] == ['prompt_tuning_jax.dist-info']


@pytest.mark.slow
def test_the_installed_package_imports_its_tasks_and_finds_its_gin_files(installed):
  code = ('import gin, prompt_tuning_jax.tasks.metrics as metrics; '
          'from prompt_tuning_jax import launch; '
          'print(metrics.__file__, gin.__file__, *launch.gin_folders(), sep="\\n")')
  metrics, gin, folder = _run(installed, '-c', code).splitlines()
  assert pathlib.Path(metrics).is_relative_to(installed)
  assert not pathlib.Path(gin).is_relative_to(installed)
  assert pathlib.Path(folder) == (installed / 'prompt_tuning_jax' / 'gin').resolve()


@pytest.mark.slow
def test_the_installed_package_reads_its_quick_start(installed):
  text = _run(installed, '-m', 'prompt_tuning_jax.train', '--gin_file=run/quick_start.gin',
              '--gin.MODEL_DIR=model', '--dry_run')
  assert "MODEL_DIR = 'model'" in text

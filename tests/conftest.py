"""What every test starts from: the CPU, one process, a compilation cache, and found test data."""

import os
import pathlib

import pytest

# Read when JAX is imported, which comes later. JAX_PLATFORMS=cuda runs the tests on a GPU.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(
    pathlib.Path('~/.cache/prompt_tuning_jax/test_xla').expanduser()))
for _name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
  os.environ.pop(_name, None)


def _folder(variable: str, content: str) -> pathlib.Path:
  value = os.environ.get(variable)
  if not value:
    pytest.skip(f'{variable} is not set: it should name {content}.')
  path = pathlib.Path(value)
  if not path.is_dir():
    pytest.skip(f'{variable}={value} is not a folder: it should be {content}.')
  return path


@pytest.fixture(scope='session')
def tfds_data_dir() -> pathlib.Path:
  """The folder of prepared TFDS data, or a skip with the reason."""
  return _folder('TFDS_DATA_DIR', 'a folder of prepared TFDS data (glue/sst2 and others)')


@pytest.fixture(scope='session')
def test_assets() -> pathlib.Path:
  """The folder of vocabularies and small public checkpoints, or a skip with the reason."""
  return _folder('PROMPT_TUNING_TEST_ASSETS', 'a folder of vocabularies and small checkpoints')

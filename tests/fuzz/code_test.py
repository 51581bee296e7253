"""Reading a file never runs code: no pickle, no eval, and what tries to is refused."""

import ast
import os
import pathlib
import pickle

import jax
import msgpack
import numpy as np
import pytest
from flax import serialization

from prompt_tuning_jax.checkpoints import base_checkpoint, hf_config, prompt_file, t5x_legacy

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ('prompt_tuning_jax', 'tasks', 'benchmarks')
               for path in (ROOT / folder).rglob('*.py'))
MODULES = {'pickle', 'cPickle', '_pickle', 'cloudpickle', 'dill', 'joblib', 'marshal', 'shelve',
           'yaml', 'code', 'codeop'}
BUILTINS = {'eval', 'exec', 'compile', '__import__'}


def forbidden(source: str) -> list[str]:
  """What in a file's source could run code that lies in data."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names if alias.name.split('.')[0] in MODULES]
    elif isinstance(node, ast.ImportFrom):
      found += [node.module] if node.module.split('.')[0] in MODULES else []
    if not isinstance(node, ast.Call):
      continue
    called, values = ast.unparse(node.func), {
        keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in BUILTINS:
      found.append(called)
    if called in ('np.load', 'numpy.load', 'jnp.load') and values.get('allow_pickle') != 'False':
      found.append(f'{called} without allow_pickle=False')
    if values.get('allow_pickle', 'False') != 'False' or values.get('shell', 'False') != 'False':
      found.append(f'{called}({values})')
    if called in ('torch.load', 'yaml.load', 'pd.read_pickle', 'os.system', 'os.popen'):
      found.append(called)
  return found


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_can_run_what_it_reads(path):
  assert forbidden(path.read_text(encoding='utf-8')) == []


@pytest.mark.parametrize('source', [
    'import pickle', 'from pickle import loads', 'eval(x)', 'exec(x)', 'np.load(f)',
    'np.load(f, allow_pickle=True)', 'np.load(f, None, True)', 'torch.load(f)', 'yaml.load(f)',
    'jnp.load(f)', 'np.save(f, a, allow_pickle=1)', 'subprocess.run(x, shell=True)'])
def test_the_check_sees_what_is_forbidden(source):
  assert forbidden(source)


class Evil:
  """Its pickle makes a folder when it is read."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __reduce__(self):
    return os.mkdir, (str(self._path),)


@pytest.fixture
def executed(tmp_path):
  """Where a folder appears if code was run; it is looked for at the end."""
  path = tmp_path / 'EXECUTED'
  yield path
  assert not path.exists()


@pytest.mark.parametrize('name, read', [
    ('a.safetensors', lambda folder: prompt_file.load(folder / 'a.safetensors')),
    ('a.npy', lambda folder: prompt_file.load(folder / 'a.npy')),
    ('adapter_model.bin', prompt_file.load),
    ('adapter_model.safetensors', prompt_file.load),
    ('pytorch_model.bin', base_checkpoint.load_base),
    ('model.safetensors', base_checkpoint.load_base),
    ('checkpoint', base_checkpoint.load_base)])
def test_a_pickle_under_any_name_is_refused(tmp_path, executed, name, read):
  folder = tmp_path / 'x'
  folder.mkdir()
  hf_config.write_json(folder / 'config.json', {'model_type': 't5'})
  if name.startswith('adapter'):
    hf_config.write_json(folder / 'adapter_config.json', {
        'peft_type': 'PROMPT_TUNING', 'task_type': 'SEQ_2_SEQ_LM', 'num_virtual_tokens': 2,
        'token_dim': 2, 'num_transformer_submodules': 1})
  (folder / name).write_bytes(pickle.dumps(Evil(executed)))
  with pytest.raises(ValueError) as error:
    read(folder)
  assert '\n' not in str(error.value) and str(folder) in str(error.value)


def _ndarray(dtype: str, shape, data: bytes) -> msgpack.ExtType:
  """As flax writes an array."""
  return msgpack.ExtType(1, msgpack.packb((shape, dtype, data), use_bin_type=True))


@pytest.mark.parametrize('leaf', [
    lambda evil: _ndarray('O', [1], evil), lambda evil: _ndarray('object', [1], evil),
    lambda evil: _ndarray('float32', [2 ** 40], evil[:4]),
    lambda evil: _ndarray('float32', [-1], evil), lambda evil: _ndarray('V8', [1], evil[:8]),
    lambda evil: msgpack.ExtType(1, evil), lambda evil: msgpack.ExtType(2, evil),
    lambda evil: msgpack.ExtType(3, evil), lambda evil: msgpack.ExtType(77, evil),
    lambda evil: evil, lambda evil: evil.decode('latin-1')],
    ids=['O', 'object', 'huge', 'negative', 'void', 'ndarray', 'complex', 'scalar', 'unknown',
         'bytes', 'text'])
def test_types_of_msgpack_run_nothing(tmp_path, executed, leaf):
  params = {'decoder': {'decoder_norm': {'scale': np.ones(4, np.float32)}}}
  t5x_legacy.write(tmp_path / 'x', params)
  target = {'decoder': {'decoder_norm': {'scale': leaf(pickle.dumps(Evil(executed)))}}}
  (tmp_path / 'x/checkpoint').write_bytes(msgpack.packb(
      {'version': 3, 'optimizer': {'state': {}, 'target': target}}, use_bin_type=True))
  with pytest.raises(ValueError) as error:
    base_checkpoint.load_base(tmp_path / 'x')
  assert '\n' not in str(error.value) and str(tmp_path / 'x') in str(error.value)


def test_the_index_of_t5x_is_what_the_check_above_builds(tmp_path):
  rows = np.arange(4, dtype=np.float32)
  written = serialization.msgpack_serialize({'a': rows})
  assert msgpack.unpackb(written)['a'] == _ndarray('float32', (4,), rows.tobytes())
  assert jax.tree.all(jax.tree.map(np.array_equal, serialization.msgpack_restore(written),
                                   {'a': rows}))

"""Bases: found by name or folder, sharded as asked, of one fingerprint in every format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import (
  base_checkpoint,
  hf_safetensors,
  safetensors_file,
  stored_leaf,
  t5x_legacy,
)
from prompt_tuning_jax.checkpoints.base_checkpoint import fingerprint, load_base
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.networks import gpt, parameters, t5

CONFIG = t5.T5Config(1500, 4, 2, 1, 1, 2, 8)
GPT2 = gpt.GPTConfig(20, 4, 2, 1, 2, 8, ('gelu',), max_positions=4, use_bias=True,
                     scale_queries=True, logits_via_embedding=True, scale_logits=False,
                     has_padding_row=False)


def random_params(config=CONFIG):
  rng = np.random.default_rng(0)
  return param_paths.unflatten({
      path: jnp.asarray(rng.normal(size=spec.shape), jnp.float32)
      for path, spec in parameters.parameter_specs(config).items()})


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """The same weights as T5X, as Hugging Face, and each in bfloat16."""
  root = tmp_path_factory.mktemp('bases')
  params = random_params()
  for dtype in ('float32', 'bfloat16'):
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)  # noqa: B023
    t5x_legacy.write(root / f't5x_{dtype}', cast)
    hf_safetensors.write(root / f'hf_{dtype}', CONFIG, cast)
  return root


def test_every_copy_has_the_same_fingerprint(folders):
  found = {load_base(folder, dtype=dtype).fingerprint
           for folder in folders.iterdir() for dtype in ('float32', 'bfloat16', None)}
  assert found == {fingerprint(random_params())} and len(found.pop()) == 64


def test_a_sibling_has_another_fingerprint():
  params = random_params()
  known = fingerprint(params)
  flat = param_paths.flatten(params)
  for path, where in [('token_embedder/embedding', (1023, 0)), ('encoder/encoder_norm/scale', 0)]:
    assert fingerprint(param_paths.unflatten(
        flat | {path: flat[path].at[where].multiply(1.01)})) != known
  shape = flat['decoder/logits_dense/kernel'].shape
  assert fingerprint(param_paths.unflatten(
      flat | {'decoder/logits_dense/kernel': jnp.zeros((shape[1], shape[0]))})) != known


def test_fingerprint_of_numpy_is_that_of_jax():
  params = random_params()
  assert fingerprint(jax.tree.map(np.asarray, params)) == fingerprint(params)


def test_t5x_and_hugging_face_load_the_same_tree(folders):
  a, b = (param_paths.flatten(load_base(folders / f'{kind}_float32').params)
          for kind in ('t5x', 'hf'))
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path])


def test_dtype_and_overrides(folders, tmp_path):
  base = load_base(folders / 'hf_float32', dtype='bfloat16')
  assert all(leaf.dtype == jnp.bfloat16 for leaf in param_paths.flatten(base.params).values())
  (tmp_path / 'words.model').write_bytes(b'pieces')
  config = dataclasses.replace(CONFIG, dropout_rate=0.0, dtype='bfloat16')
  for kind in ('hf', 't5x'):
    base = load_base(folders / f'{kind}_float32', config=config,
                     vocabulary_file=str(tmp_path / 'words.model'))
    assert base.config == config
    assert base.vocabulary == VocabularyFile(str(tmp_path / 'words.model'), 100)
    with pytest.raises(ValueError, match='wrong shape|Wrong shape'):
      load_base(folders / f'{kind}_float32', config=dataclasses.replace(CONFIG, mlp_dim=9))
    with pytest.raises(ValueError, match='no vocabulary file'):
      load_base(folders / f'{kind}_float32', vocabulary_file='absent.model')
  assert load_base(folders / 't5x_float32', vocabulary_file='bytes').vocabulary.extra_ids == 125


class Reads:
  """Counts what a leaf's `read` was asked for."""

  def __init__(self, array):
    self.array, self.asked = array, []

  def __call__(self, index):
    self.asked.append(index)
    return self.array[index]


def test_a_replicated_leaf_is_read_once_and_each_shard_reads_its_slice():
  devices = jax.devices()
  mesh = jax.make_mesh((len(devices),), ('model',), axis_types=(jax.sharding.AxisType.Auto,))
  array = np.arange(len(devices) * 6, dtype=np.float32).reshape(-1, 3)
  for spec, reads in [(PartitionSpec(), 1), (PartitionSpec('model'), len(devices))]:
    read = Reads(array)
    leaf = stored_leaf.StoredLeaf('a', array.shape, 'float32', read)
    sharding = NamedSharding(mesh, spec)
    tree = stored_leaf.load({'a': leaf}, {'a': array.shape}, 'here', 'bfloat16',
                            lambda path, shape: sharding)  # noqa: B023
    assert tree['a'].sharding == sharding and tree['a'].dtype == jnp.bfloat16
    np.testing.assert_array_equal(tree['a'].astype(jnp.float32), array)
    assert len(read.asked) == reads


@pytest.mark.parametrize('array', [
    np.arange(12, dtype=np.float32).reshape(3, 4).T, np.zeros((0, 3), np.float32),
    np.float32(2.5), jnp.arange(5, dtype=jnp.bfloat16)[::-1], np.arange(7, dtype=np.int8)[1::2],
], ids=['transposed', 'empty', 'scalar', 'bfloat16', 'strided'])
def test_aligned_copies_are_equal_and_lie_where_a_processor_keeps_them(array):
  array = np.asarray(array)
  copy = stored_leaf.aligned_copy(array)
  assert (copy.dtype, copy.shape) == (array.dtype, array.shape) and copy.flags.c_contiguous
  np.testing.assert_array_equal(copy, array)
  assert copy.ctypes.data % stored_leaf.CPU_ALIGNMENT == 0 or not copy.size
  assert not np.shares_memory(copy, array)


def test_loaded_leaves_do_not_depend_on_the_file(folders, tmp_path):
  hf_safetensors.write(tmp_path / 'x', CONFIG, random_params())
  base = load_base(tmp_path / 'x')
  path = tmp_path / 'x/model.safetensors'
  with open(path, 'r+b') as file:
    file.seek(-1000, 2)
    file.write(b'\0' * 1000)
  assert fingerprint(base.params) == fingerprint(random_params())
  assert np.asarray(base.params['token_embedder']['embedding'])[-1].all()


def test_names(folders, tmp_path, monkeypatch):
  monkeypatch.setattr(base_checkpoint, 'BUNDLED', tmp_path)
  with pytest.raises(ValueError, match="'mini' is no folder, and no bundled base: those are none"):
    load_base('mini')
  hf_safetensors.write(tmp_path / 'mini', CONFIG, random_params())
  assert load_base('mini').name == 'mini'
  with pytest.raises(ValueError, match='those are mini'):
    load_base('maxi')
  assert load_base(folders / 'hf_bfloat16').name == 'hf_bfloat16'
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file').write_text('')
  t5x_legacy.write(tmp_path / 'run/checkpoint_900', random_params())
  t5x_legacy.write(tmp_path / 'run/checkpoint_1000', random_params())
  for name, reason in [('empty', 'neither the file'), ('file', 'a file, not a folder'),
                       ('run', 'Did you mean .*checkpoint_1000')]:
    with pytest.raises(ValueError, match=reason):
      load_base(tmp_path / name)


@pytest.mark.parametrize('settings', [{}, {'logits_via_embedding': True, 'mlp_activations':
                                           ('relu',), 'relative_attention_num_buckets': 8}])
def test_a_network_that_hugging_face_lacks_is_a_t5x_folder(tmp_path, tiny_base, settings):
  words = base_checkpoint.load_base(str(tiny_base)).vocabulary
  config = gpt.GPTConfig(192, 8, 2, 2, 4, 16, **settings)
  base = base_checkpoint.random_base(config, words.file)
  for _ in range(2):
    base_checkpoint.write(tmp_path / 'last', config, base.params, vocabulary=words, replace=True)
  assert (tmp_path / 'last' / 'checkpoint').is_file()
  read = base_checkpoint.load_base(str(tmp_path / 'last'))
  assert (read.config, read.fingerprint, read.vocabulary.sha256, read.vocabulary.extra_ids) == (
      config, base.fingerprint, words.sha256, words.extra_ids)
  for path, leaf in param_paths.flatten(base.params).items():
    np.testing.assert_array_equal(leaf, param_paths.flatten(read.params)[path])
  with pytest.raises(ValueError, match='last'):
    base_checkpoint.write(tmp_path / 'last', config, base.params)


def flip(path, at: int, bit: int = 1):
  """Changes one bit of a file."""
  with open(path, 'r+b') as file:
    file.seek(at)
    byte = file.read(1)[0]
    file.seek(at)
    file.write(bytes([byte ^ bit]))


@pytest.mark.parametrize('name', base_checkpoint.bundled_bases())
def test_a_bundled_base_holds_a_checksum_of_every_tensor(name):
  header = safetensors_file.read_header(base_checkpoint.BUNDLED / name / 'model.safetensors')
  assert header.checksums.keys() == header.tensors.keys()
  for tensor in header.tensors:
    header.check(tensor)


@pytest.mark.parametrize('config', [CONFIG, GPT2], ids=['t5', 'gpt2'])
def test_a_flipped_bit_is_told_with_the_leaf(tmp_path, config):
  hf_safetensors.write(tmp_path / 'x', config, random_params(config))
  path = tmp_path / 'x/model.safetensors'
  header = safetensors_file.read_header(path)
  for name, entry in header.tensors.items():
    flip(path, entry.end - 4)
    with pytest.raises(ValueError) as error:
      load_base(tmp_path / 'x')
    assert name.removeprefix('transformer.') in str(error.value)
    assert 'SHA-256' in str(error.value) and '\n' not in str(error.value)
    flip(path, entry.end - 4)
  load_base(tmp_path / 'x')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('value', [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('write', [
    lambda folder, params: hf_safetensors.write(folder, CONFIG, params), t5x_legacy.write])
def test_a_base_that_is_not_finite_is_refused_with_the_leaf(tmp_path, write, value, dtype):
  params = jax.tree.map(lambda leaf: np.array(leaf, dtype), random_params())
  params['decoder']['decoder_norm']['scale'][1] = -jnp.finfo(dtype).max
  params['encoder']['layers_0']['mlp']['wo']['kernel'][1, 2] = value
  write(tmp_path / 'x', params)
  with pytest.raises(ValueError, match='nreadable: encoder/layers_0/mlp/wo/kernel[^,]* it has '
                                       'values that are NaN or infinite'):
    load_base(tmp_path / 'x', config=CONFIG, dtype=dtype)


def test_a_number_too_large_for_a_dtype_is_refused(tmp_path):
  params = jax.tree.map(np.array, random_params())
  params['token_embedder']['embedding'][1, 2] = 1e6
  hf_safetensors.write(tmp_path / 'x', CONFIG, params)
  load_base(tmp_path / 'x', dtype='bfloat16')
  with pytest.raises(ValueError, match='token_embedder/embedding .*infinite in float16'):
    load_base(tmp_path / 'x', dtype='float16')

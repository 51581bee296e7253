"""The same base, its layers unrolled or scanned, in float32 or in eight bits: one fingerprint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint, stored_leaf, t5x_legacy
from prompt_tuning_jax.networks import gpt, int8, layer_stack, parameters, t5

CONFIGS = {
    't5': t5.T5Config(vocab_size=192, emb_dim=8, num_heads=2, num_encoder_layers=3,
                      num_decoder_layers=2, head_dim=4, mlp_dim=16),
    'gpt': gpt.GPTConfig(vocab_size=192, emb_dim=8, num_heads=2, num_layers=3, head_dim=4,
                         mlp_dim=16)}


@pytest.fixture(scope='module', params=CONFIGS)
def folder(request, tmp_path_factory, tiny_base):
  """A base of several layers: T5's as Hugging Face has it, the decoder's as T5X has."""
  path = tmp_path_factory.mktemp(request.param) / 'base'
  vocabulary = base_checkpoint.load_base(tiny_base).vocabulary
  base = base_checkpoint.random_base(CONFIGS[request.param], vocabulary.file)
  base_checkpoint.write(path, base.config, base.params, vocabulary=vocabulary)
  return path


def flat(base):
  return param_paths.flatten(base.params)


def test_scanned_is_the_same_base(folder):
  plain = base_checkpoint.load_base(folder)
  scanned = base_checkpoint.load_base(folder, scan_layers=True)
  assert scanned.fingerprint == plain.fingerprint == base_checkpoint.fingerprint(plain.params)
  assert scanned.config == dataclasses.replace(plain.config, scan_layers=True)
  wanted = layer_stack.scanned(flat(plain))
  assert flat(scanned).keys() == wanted.keys()
  for path, leaf in flat(scanned).items():
    np.testing.assert_array_equal(leaf, wanted[path])


def test_scanned_is_written_under_canonical_names(folder, tmp_path):
  scanned = base_checkpoint.load_base(folder, scan_layers=True)
  base_checkpoint.write(tmp_path / 'again', scanned.config, scanned.params,
                        vocabulary=scanned.vocabulary)
  again, plain = (base_checkpoint.load_base(path) for path in (tmp_path / 'again', folder))
  assert again.fingerprint == plain.fingerprint
  for path, leaf in flat(again).items():
    np.testing.assert_array_equal(leaf, flat(plain)[path])


@pytest.mark.parametrize('scan_layers', [False, True], ids=['unrolled', 'scanned'])
def test_eight_bits_are_of_the_weights_in_the_file(folder, scan_layers):
  plain = base_checkpoint.load_base(folder)
  small = base_checkpoint.load_base(folder, dtype='int8', scan_layers=scan_layers)
  assert small.fingerprint == plain.fingerprint
  describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)
  assert describe(small.params) == describe(parameters.shapes(small.config, 'int8'))
  whole = layer_stack.scanned(flat(plain)) if scan_layers else flat(plain)
  for path, leaf in flat(small).items():
    if isinstance(leaf, int8.Quantized):
      axis = -2 if int8.is_kernel(path) else -1
      assert np.all(np.abs(leaf.dequantized() - whole[path])
                    <= np.max(np.abs(whole[path]), axis=axis, keepdims=True) / 254 * (1 + 1e-5))
    else:
      np.testing.assert_array_equal(leaf, whole[path])
  assert small.embedding.dtype == jnp.float32 and small.embedding.shape == plain.embedding.shape


def test_parts_of_a_leaf_in_eight_bits_are_those_of_the_whole():
  """Whatever devices it is spread over."""
  weights = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  leaf = stored_leaf.StoredLeaf('w', (6, 4), 'float32', lambda index: weights[index])
  whole = (slice(None), slice(None))
  for seen in (leaf, stored_leaf.transposed(leaf)):
    values, scale = stored_leaf.quantized(seen)
    assert values.shape == seen.shape and scale.shape == (seen.shape[0], 1)
    for part in ((slice(2, 4), slice(None)), (slice(None), slice(1, 3)),
                 (slice(0, 3), slice(2, 4))):
      np.testing.assert_array_equal(values.read(part), values.read(whole)[part])
      np.testing.assert_array_equal(scale.read((part[0], slice(None))),
                                    scale.read(whole)[part[0]])


@pytest.mark.parametrize('scan_layers', [False, True], ids=['unrolled', 'scanned'])
def test_weights_in_eight_bits_lie_where_the_others_do(folder, scan_layers):
  """A kernel's outputs are split as its axis says, though they are the first axis of what lies."""
  mesh, asked = jax.make_mesh((1, 1), ('data', 'model'), (AxisType.Auto, AxisType.Auto)), {}

  def sharding_for(path, shape):
    asked.setdefault(path, shape)
    layers = (None,) * ('/layers/' in path)
    return NamedSharding(mesh, PartitionSpec(*(*layers, 'data', 'model')[:len(shape)]))

  load = functools.partial(base_checkpoint.load_base, folder, scan_layers=scan_layers,
                           sharding_for=sharding_for)
  plain = {path: (leaf.shape, leaf.sharding.spec) for path, leaf in flat(load()).items()}
  for path, leaf in flat(load(dtype='int8')).items():
    assert asked[path] == leaf.shape == plain[path][0]
    if isinstance(leaf, int8.Quantized) and leaf.exchanged:
      assert tuple(leaf.values.sharding.spec) == int8.exchange(tuple(plain[path][1]))
      assert leaf.scale.sharding.spec == leaf.values.sharding.spec
    else:
      assert leaf.sharding.spec == plain[path][1]


def test_a_layer_that_is_missing_is_told_by_its_name(folder):
  plain = base_checkpoint.load_base(folder)
  leaves = flat(plain)
  lost = next(path for path in leaves if 'layers_1/mlp/wo' in path)
  del leaves[lost]
  broken = folder.parent / 'broken'
  t5x_legacy.write(broken, param_paths.unflatten(leaves))
  with pytest.raises(ValueError, match=f'Missing: {lost}'):
    base_checkpoint.load_base(broken, config=plain.config, scan_layers=True)

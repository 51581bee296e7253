"""Meshes, shardings and batches; what the devices of a compiled training step tell each other."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning as logical
from jax.sharding import PartitionSpec

from prompt_tuning_jax import partitioning
from prompt_tuning_jax.networks import parameters
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.partitioning import Partitioner

SCRIPT = pathlib.Path(__file__).resolve().parent / 'several_devices.py'
CONFIG = T5Config(192, 64, 8, 2, 2, 8, 128)  # of the script, as are the next
LENGTH = 5
PRESETS = {'data': (1, False), 'fsdp': (1, True), 'tensor': (None, False), 'fsdp_tensor': (2, True)}
LAYER = {'encoder/layers_0/attention/query/kernel': ('embed', 'joined_kv'),
         'encoder/layers_0/attention/out/kernel': ('joined_kv', 'embed'),
         'encoder/layers_0/mlp/wi_0/kernel': ('embed', 'mlp'),
         'encoder/layers_0/pre_mlp_layer_norm/scale': ('embed',),
         'token_embedder/embedding': ('vocab', 'embed')}


def test_weights_are_split_by_their_logical_axes():
  kept = {False: {'joined_kv': 'model', 'mlp': 'model', 'vocab': 'model'}}
  kept[True] = {**kept[False], 'embed': 'data'}
  for whole, names in kept.items():
    place = Partitioner(1, whole).sharding_for(parameters.logical_axes)
    for path, axes in LAYER.items():
      assert parameters.logical_axes(path) == axes
      expected = [names.get(axis) if len(axes) > 1 else None for axis in axes]
      assert place(path, (64,) * len(axes)).spec == PartitionSpec(*expected), path
  assert place('prompt/embedding', (5, 64)).spec == PartitionSpec(None, None)
  scanned = {path.replace('layers_0', 'layers'): axes for path, axes in LAYER.items()
             if 'layers_0' in path}
  for path, axes in scanned.items():  # as the layers alone
    alone = place(path.replace('layers', 'layers_0'), (64,) * len(axes)).spec
    assert place(path, (3,) + (64,) * len(axes)).spec == PartitionSpec(None, *alone)


def test_a_number_of_devices_that_does_not_divide_is_told():
  for wrong in (jax.device_count() + 1, 0, 'two'):
    with pytest.raises(ValueError, match='model_parallelism must divide'):
      _ = Partitioner(wrong).mesh
  assert Partitioner(None).mesh.shape == {'data': 1, 'model': jax.device_count()}


def test_constraints_hold_within_jit_and_nowhere_else():
  """Outside they are silently nothing, so the programs that matter are traced by `jit`."""
  constrain = lambda x: logical.with_sharding_constraint(x, ('batch', 'length', 'mlp'))
  x = jnp.ones((4, 2, 8))
  inside = Partitioner().jit(constrain).lower(x).as_text()
  assert 'sharding_constraint' in inside and 'data' in inside and 'model' in inside
  assert 'sharding_constraint' not in jax.jit(constrain).lower(x).as_text()


def test_what_is_put_is_what_was_given():
  partitioner = Partitioner()
  batch = {'tokens': np.arange(24, dtype=np.int32).reshape(8, 3)}
  put = partitioner.put_batch(batch)['tokens']
  np.testing.assert_array_equal(put, batch['tokens'])
  assert put.sharding.spec == PartitionSpec('data')
  tree = {'a': np.ones(3, np.float32), 'b': jnp.arange(2)}
  again = partitioner.replicate(tree)
  assert all(leaf.sharding == partitioner.replicated for leaf in jax.tree.leaves(again))
  jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_collectives_are_read_from_a_programs_text():
  program = """
  %a.1 = (f32[20,256]{1,0}, f32[]) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add
  ROOT %b = bf16[4,3]{1,0} all-gather(bf16[2,3]{1,0} %z), dimensions={0}
  %c-start = (f32[8]{0}, f32[64]{0}) all-gather-start(f32[8]{0} %w), dimensions={0}
  %c = f32[64]{0} all-gather-done(%c-start)
  %d = pred[7]{0} collective-permute(pred[7]{0} %p)
  %e = f32[9]{0} add(f32[9]{0} %all-reduce.3, f32[9]{0} %q)
  """
  assert partitioning.collectives(program) == {
      'all-reduce': 4 * 20 * 256 + 4, 'all-gather': 2 * 12 + 4 * 64, 'collective-permute': 7}


@pytest.fixture(scope='module')
def steps():
  """What `several_devices.py step` tells of each preset."""
  done = subprocess.run([sys.executable, str(SCRIPT), 'step'], text=True, capture_output=True,
                        input=json.dumps(list(PRESETS.values())), check=False)
  assert done.returncode == 0, done.stderr
  return dict(zip(PRESETS, json.loads(done.stdout), strict=True))


def bytes_of_weights(parts: dict[str, int]) -> int:
  """Of the weights that are in parts."""
  specs = parameters.parameter_specs(CONFIG)
  return sum(4 * math.prod(specs[path].shape) for path, count in parts.items() if count > 1)


@pytest.mark.slow
def test_data_parallel_steps_exchange_the_prompts_gradient_alone(steps):
  """And three numbers: sums of the loss, of the right tokens and of all tokens."""
  assert steps['data']['collectives'] == {'all-reduce': 4 * (LENGTH * CONFIG.emb_dim + 3)}
  assert set(steps['data']['parts'].values()) == {1}


@pytest.mark.slow
def test_weights_in_parts_are_gathered_and_activations_are_not(steps):
  found = steps['fsdp']
  assert found['collectives']['all-reduce'] == steps['data']['collectives']['all-reduce']
  weights = bytes_of_weights(found['parts'])
  embeddings = 4 * CONFIG.vocab_size * CONFIG.emb_dim  # looked up, so never needed backward
  assert set(found['collectives']) == {'all-reduce', 'all-gather'}
  gathered = found['collectives']['all-gather']
  assert weights < gathered <= 2 * weights - embeddings
  matrices = {path for path in found['parts'] if not path.endswith(('scale', 'rel_embedding'))}
  assert {path for path, count in found['parts'].items() if count == 8} == matrices


@pytest.mark.slow
def test_tensor_parallel_steps_gather_no_weights(steps):
  found = steps['tensor']
  assert found['collectives'].get('all-gather', 0) < bytes_of_weights(found['parts']) / 20
  assert set(steps['fsdp_tensor']['parts'].values()) == {1, 2, 8}

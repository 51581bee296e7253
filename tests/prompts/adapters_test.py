"""The adapters' parameters: names, axes, how many, and where they start."""

import types

import jax
import numpy as np
import pytest
from flax.linen import partitioning

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.prompts.adapters import BottleneckAdapters
from prompt_tuning_jax.prompts.places import layers_at

CONFIG = types.SimpleNamespace(sublayers={'encoder_mlp': 2, 'decoder_mlp': 3})
MODULE = BottleneckAdapters(3, 16, CONFIG.sublayers)


def test_parameters_axes_and_start():
  variables = MODULE.init(jax.random.key(0))
  leaves = param_paths.flatten(variables['params'])
  assert {path: leaf.shape for path, leaf in leaves.items()} == {
      f'{place}_mlp/{name}': (layers, *shape) for place, layers in (('encoder', 2), ('decoder', 3))
      for name, shape in (('down', (16, 3)), ('down_bias', (3,)), ('up', (3, 16)),
                          ('up_bias', (16,)))}
  # 2 D r + D + r of an adapter (Houlsby et al. 2019, section 2.1)
  assert param_paths.count(variables['params']) == 5 * (2 * 16 * 3 + 16 + 3)
  axes = param_paths.flatten(partitioning.get_axis_names(variables['params_axes']))
  assert axes.keys() == leaves.keys()
  assert tuple(axes['encoder_mlp/down']) == ('layers', 'embed', 'bottleneck')
  assert all(len(axes[path]) == leaf.ndim for path, leaf in leaves.items())
  assert {path for path, leaf in leaves.items() if np.any(leaf)} == {
      'encoder_mlp/down', 'decoder_mlp/down'}
  down = np.asarray(leaves['decoder_mlp/down'])
  assert np.any(down[0] != down[1]) and 0.5 < 16 * down.var() < 2
  returned = MODULE.apply({'params': variables['params']})
  assert param_paths.flatten(returned).keys() == leaves.keys()


def test_places():
  assert layers_at(None, CONFIG.sublayers) == CONFIG.sublayers
  assert layers_at(('decoder_mlp',), CONFIG.sublayers) == {'decoder_mlp': 3}
  with pytest.raises(ValueError, match=r"places \('encoder_mlp', 'decoder_mlp'\).*got mlp"):
    layers_at(('mlp',), CONFIG.sublayers)

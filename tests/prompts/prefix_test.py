"""The modules that own a prefix: shapes, and the MLP as it is defined."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.networks import t5
from prompt_tuning_jax.prompts.places import layers_at
from prompt_tuning_jax.prompts.prefix import DirectPrefix, ReparameterizedPrefix

LAYERS = {'encoder': 3, 'decoder': 2, 'cross': 2}


def test_a_direct_prefix_is_its_parameters():
  module = DirectPrefix(4, LAYERS, 2, 5)
  variables = module.init(jax.random.key(0))
  for place, layers in LAYERS.items():
    assert variables['params'][place].shape == (layers, 2, 4, 2, 5)
    np.testing.assert_array_equal(module.apply(variables)[place], variables['params'][place])


def test_a_reparameterized_prefix_is_an_mlp_of_each_position():
  module = ReparameterizedPrefix(4, LAYERS, 2, 5, features=6, width=9)
  variables = module.init(jax.random.key(0))
  flat = param_paths.flatten(variables['params'])
  assert flat['decoder/embedding'].shape == (4, 6)
  assert flat['decoder/wi/kernel'].shape == (6, 9)
  assert flat['decoder/wo/kernel'].shape == (9, 2 * 2 * 2 * 5)
  made = module.apply(variables)
  for place, layers in LAYERS.items():
    p = {name: np.asarray(flat[f'{place}/{name}'], np.float64)
         for name in ('embedding', 'wi/kernel', 'wi/bias', 'wo/kernel', 'wo/bias')}
    out = np.tanh(p['embedding'] @ p['wi/kernel'] + p['wi/bias']) @ p['wo/kernel'] + p['wo/bias']
    for position in range(4):
      expected = out[position].reshape(layers, 2, 2, 5)
      np.testing.assert_allclose(made[place][:, :, position], expected, atol=1e-5)


def test_places_and_their_layers():
  config = t5.T5Config(8, 4, 1, 3, 2, 4, 4)
  assert layers_at(('cross', 'encoder'), config.attentions) == {'encoder': 3, 'cross': 2}


@pytest.mark.parametrize('module', [
    DirectPrefix(4, LAYERS, 2, 5), ReparameterizedPrefix(4, LAYERS, 2, 5, 6, 9)])
def test_every_parameter_has_axes(module):
  variables = jax.eval_shape(module.init, jax.random.key(0))
  assert len(param_paths.flatten(variables['params'])) == len(
      jax.tree.leaves(variables['params_axes'], is_leaf=lambda x: hasattr(x, 'names')))

"""Changed kernels are what the papers define, and nothing is changed by ones and zeros."""

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.prompts.weight_changes import combined

RNG = np.random.default_rng(0)
FROZEN = {'encoder': {'query': {'kernel': RNG.normal(size=(4, 6))},
                      'wo': {'kernel': RNG.normal(size=(5, 4))}}}
X = RNG.normal(size=(3, 4))


def test_lora_adds_a_product():
  a, b = RNG.normal(size=(4, 2)), RNG.normal(size=(2, 6))
  tree = combined({'lora': {'encoder': {'query': {'kernel': {'a': a, 'b': b}}}}}, FROZEN)
  expected = X @ FROZEN['encoder']['query']['kernel'] + (X @ a) @ b
  np.testing.assert_allclose(X @ tree['encoder']['query']['kernel'], expected, atol=1e-5)
  np.testing.assert_array_equal(tree['encoder']['wo']['kernel'], FROZEN['encoder']['wo']['kernel'])
  assert param_paths.flatten(tree).keys() == param_paths.flatten(FROZEN).keys()


def test_ia3_scales_outputs_or_inputs():
  scale, scale_in = RNG.normal(size=6), RNG.normal(size=5)
  hidden = RNG.normal(size=(3, 5))
  tree = combined({'ia3': {'encoder': {'query': {'kernel': scale}}},
                   'ia3_in': {'encoder': {'wo': {'kernel': scale_in}}}}, FROZEN)
  np.testing.assert_allclose(X @ tree['encoder']['query']['kernel'],
                             scale * (X @ FROZEN['encoder']['query']['kernel']), atol=1e-5)
  np.testing.assert_allclose(hidden @ tree['encoder']['wo']['kernel'],
                             (scale_in * hidden) @ FROZEN['encoder']['wo']['kernel'], atol=1e-5)


def test_without_changes_it_is_merge():
  beside = {'prompt': {'embedding': np.ones((2, 4))}}
  tree, expected = combined(beside, FROZEN), param_paths.merge(beside, FROZEN)
  assert param_paths.flatten(tree).keys() == param_paths.flatten(expected).keys()
  ones = combined({'ia3': {'encoder': {'query': {'kernel': jnp.ones(6)}}}}, FROZEN)
  np.testing.assert_allclose(ones['encoder']['query']['kernel'],
                             FROZEN['encoder']['query']['kernel'], rtol=1e-6)


@pytest.mark.parametrize(('trained', 'message'), [
    ({'ia3': {'decoder': np.ones(6)}}, 'ia3 changes decoder, which the base does not have'),
    ({'ia3': {'encoder': {'query': {'kernel': np.ones(4)}}}}, 'does not scale axis 1'),
    ({'lora': {'encoder': {'query': {'kernel': {'a': np.ones((4, 2)), 'b': np.ones((3, 6))}}}}},
     'do not make'),
    ({'encoder': {'query': {'kernel': 1}}}, 'Both trees have')])
def test_changes_that_do_not_fit_are_refused(trained, message):
  with pytest.raises(ValueError, match=message):
    combined(trained, FROZEN)

"""A prompt's module is its table."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import partitioning

from prompt_tuning_jax.prompts.soft_prompt import LayeredPrompt, SoftPrompt


def test_the_parameter_its_axes_and_its_value():
  variables = SoftPrompt(3, 4).init(jax.random.key(0))
  assert jax.tree.map(jnp.shape, variables['params']) == {'embedding': (3, 4)}
  assert tuple(partitioning.get_axis_names(variables['params_axes'])['embedding']) == (
      'prompt', 'embed')
  table = np.arange(12, dtype=np.float32).reshape(3, 4)
  np.testing.assert_array_equal(SoftPrompt(3, 4).apply({'params': {'embedding': table}}), table)


def test_an_empty_prompt_has_no_rows():
  assert SoftPrompt(0, 4).apply({'params': {'embedding': np.zeros((0, 4))}}).shape == (0, 4)


def test_a_table_for_each_layer():
  variables = LayeredPrompt(2, 3, 4).init(jax.random.key(0))
  assert jax.tree.map(jnp.shape, variables['params']) == {'deep_embedding': (2, 3, 4)}
  assert tuple(partitioning.get_axis_names(variables['params_axes'])['deep_embedding']) == (
      'layers', 'prompt', 'embed')
  table = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  returned = LayeredPrompt(2, 3, 4).apply({'params': {'deep_embedding': table}})
  np.testing.assert_array_equal(returned, table)

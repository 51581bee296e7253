"""Laws of weights in eight bits: how far off they are, and what is computed with them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prompt_tuning_jax import param_paths, prompted_model
from prompt_tuning_jax.networks import int8, layer_stack, parameters, t5
from prompt_tuning_jax.prompted_model import Added, PromptedModel

pytestmark = pytest.mark.usefixtures('exact_products')

RNG = np.random.default_rng(0)
CONFIG = t5.T5Config(vocab_size=40, emb_dim=24, num_heads=2, num_encoder_layers=2,
                     num_decoder_layers=2, head_dim=8, mlp_dim=32)


def random(*shape):
  return RNG.normal(size=shape).astype(np.float32)


quantized = functools.partial(int8.quantized, kernel=True)


def test_a_weight_is_at_most_half_a_step_off():
  weights = random(50, 30) * np.exp(random(30))
  leaf = quantized(weights)
  assert leaf.values.dtype == jnp.int8 and leaf.scale.shape == (30, 1)
  assert leaf.values.shape == (30, 50) and leaf.shape == weights.shape
  largest = np.abs(weights).max(axis=0)
  np.testing.assert_array_equal(np.abs(leaf.values).max(axis=1), 127)
  assert np.all(np.abs(leaf.dequantized() - weights) <= largest / 254 * (1 + 1e-5))


def test_what_is_all_zeros_stays_so():
  weights = random(6, 3)
  weights[:, 1] = 0
  made = np.asarray(quantized(weights).dequantized())
  assert np.all(made[:, 1] == 0) and np.all(np.isfinite(made))


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-6), (jnp.bfloat16, 2 ** -7)],
                         ids=['float32', 'bfloat16'])
def test_products_are_those_of_the_dequantized_weights(dtype, tolerance):
  """Forward, with a wider result, and backward: the scale is outside of the product."""
  kernel, x = quantized(random(16, 8)), jnp.asarray(random(3, 5, 16), dtype)
  whole = kernel.dequantized()
  wide = int8.dot(x, kernel, jnp.float32)
  assert int8.dot(x, kernel).dtype == dtype and wide.dtype == jnp.float32
  ask = lambda kernel: jax.grad(lambda x: jnp.sum(jnp.sin(int8.dot(x, kernel, jnp.float32))))
  # In float32 throughout, so that only the product under test is rounded.
  exact = jnp.sin(x.astype(jnp.float32) @ whole)
  np.testing.assert_allclose(jnp.sin(wide), exact, atol=10 * tolerance)
  gradient, wanted = ask(kernel)(x), ask(whole)(x.astype(jnp.float32))
  assert gradient.dtype == dtype
  assert np.max(np.abs(gradient - wanted)) <= 10 * tolerance * np.max(np.abs(wanted))


@pytest.mark.parametrize('rows', [1, 2, int8.FEW_ROWS, int8.FEW_ROWS + 1])
def test_few_rows_are_multiplied_as_many_are(rows):
  kernel, x = quantized(random(16, 8)), random(rows, 1, 16)
  np.testing.assert_allclose(int8.dot(x, kernel), x @ kernel.dequantized(), atol=1e-5)
  assert int8.dot(x.astype(jnp.bfloat16), kernel, jnp.float32).dtype == jnp.float32


def test_a_table_is_no_kernel_before_it_is_exchanged():
  table = quantized(random(5, 5), kernel=False)
  with pytest.raises(ValueError, match='got a table'):
    int8.dot(random(2, 5), table)
  np.testing.assert_allclose(int8.dot(np.eye(5, dtype=np.float32), table.T),
                             table.dequantized().T, atol=1e-6)


@pytest.mark.parametrize('rows', [1, 4])
def test_a_loop_keeps_no_wider_kernel_of_one_row_and_one_of_few(rows):
  """In memory beside the weights: next to nothing, or the kernel in float32 once."""
  size = 256
  kernel = quantized(random(size, size))

  def loop(kernel, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(int8.dot(x, kernel)), None), x, length=20)[0]

  # As compiled for use: the tests' settings leave most of the compiler out.
  options = {'xla_backend_optimization_level': 3}
  lowered = jax.jit(loop, compiler_options=options).lower(kernel, jnp.ones((rows, 1, size)))
  used = lowered.compile().memory_analysis().temp_size_in_bytes
  assert used < 4 * size * size * (0.25 if rows == 1 else 1.25)


def test_weights_are_split_as_their_shape_is():
  mesh = jax.make_mesh((1, 1), ('data', 'model'), (AxisType.Auto, AxisType.Auto))
  values = jax.device_put(jnp.ones((6, 4), jnp.int8), NamedSharding(mesh, PartitionSpec('model')))
  leaf = int8.Quantized(values, jnp.ones((6, 1)), exchanged=True)
  assert leaf.shape == (4, 6) and tuple(leaf.sharding.spec) == (None, 'model')
  assert tuple(leaf.T.sharding.spec) == ('model',)


def test_rows_of_a_table_and_none():
  table = random(7, 4)
  leaf = quantized(table, kernel=False)
  rows = int8.take(leaf, jnp.array([[3, 0], [6, 7]]), jnp.float32)
  np.testing.assert_array_equal(rows[0], leaf.dequantized()[jnp.array([3, 0])])
  assert np.all(np.isnan(rows[1, 1])) and np.all(np.isfinite(rows[1, 0]))


def quantized_params(params):
  return param_paths.unflatten({
      path: int8.quantized(leaf, int8.is_kernel(path)) if int8.is_small(path) else leaf
      for path, leaf in param_paths.flatten(params).items()})


@pytest.mark.parametrize('tied', [True, False], ids=['tied', 'untied'])
def test_a_network_computes_with_the_dequantized_weights(tied):
  """Logits and the prompt's gradient, unrolled and scanned; the shapes are as foretold."""
  config = dataclasses.replace(CONFIG, logits_via_embedding=tied)
  params = param_paths.unflatten({
      path: random(*spec.shape) * (spec.shape[0] ** -0.5 if len(spec.shape) > 1 else 1)
      for path, spec in parameters.parameter_specs(config).items()})
  small = quantized_params(params)
  whole = jax.tree.map(lambda x: x.dequantized() if isinstance(x, int8.Quantized) else x, small,
                       is_leaf=lambda x: isinstance(x, int8.Quantized))
  scanned = dataclasses.replace(config, scan_layers=True)
  stacked = quantized_params(param_paths.unflatten(
      layer_stack.scanned(param_paths.flatten(params))))
  describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), tree)
  assert describe(parameters.shapes(config, 'int8')) == describe(small)
  assert describe(parameters.shapes(scanned, 'int8')) == describe(stacked)

  tokens, targets = (RNG.integers(2, 40, (2, size)).astype(np.int32) for size in (7, 4))
  tokens[:, :3] = 40 + np.arange(3)
  batch = {'encoder_input_tokens': tokens, 'decoder_input_tokens': targets,
           'decoder_target_tokens': targets}

  def run(config, params):
    def loss(rows):
      outputs = prompted_model.logits(PromptedModel(config.network()), params, batch,
                                      added=Added(rows))
      return jnp.sum(jnp.sin(outputs)), outputs
    gradient, outputs = jax.jit(jax.grad(loss, has_aux=True))(rows)
    return np.concatenate([np.ravel(gradient), np.ravel(outputs)])

  rows = random(3, 24)
  wanted = run(config, whole)
  for made in (run(config, small), run(scanned, stacked)):
    assert np.max(np.abs(made - wanted)) <= 1e-5 * np.max(np.abs(wanted))

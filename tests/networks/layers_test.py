"""Each layer against its definition in NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.networks import layers

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(7, 4)).astype(np.float32)
ROWS = RNG.normal(size=(3, 4)).astype(np.float32)
TOKENS = np.array([[0, 6, 7, 9], [8, 1, 0, 0]], np.int32)


def embed(tokens, rows=None, table=TABLE, dtype=jnp.float32):
  return layers.Embed(*TABLE.shape, dtype).apply({'params': {'embedding': table}}, tokens, rows)


def test_virtual_ids_embed_as_the_rows_after_the_table():
  np.testing.assert_array_equal(embed(TOKENS, ROWS), np.concatenate([TABLE, ROWS])[TOKENS])


def test_words_embed_the_same_with_and_without_virtual_rows():
  words = np.array([[0, 3, 6]], np.int32)
  for rows in (None, ROWS, ROWS[:0]):
    np.testing.assert_array_equal(embed(words, rows), TABLE[words])


def test_an_id_without_a_row_is_not_a_number():
  for rows in (None, ROWS[:0]):
    assert np.isnan(embed(np.array([[6, 7]]), rows)[0]).tolist() == [[False] * 4, [True] * 4]
  assert np.isnan(embed(np.array([[9, 10]]), ROWS)[0]).tolist() == [[False] * 4, [True] * 4]


def test_the_gradient_reaches_only_the_rows_that_are_used():
  total = lambda table, rows: jnp.sum(embed(np.array([[0, 8, 8, 2]]), rows, table))
  words, rows = jax.grad(total, (0, 1))(TABLE, ROWS)
  np.testing.assert_array_equal(words[:, 0], [1, 0, 1, 0, 0, 0, 0])
  np.testing.assert_array_equal(rows[:, 0], [0, 2, 0])


class Tied(nn.Module):
  """The output layer alone of a network whose table it shares."""

  @nn.compact
  def __call__(self, x):
    return layers.TiedOutput(layers.Embed(*TABLE.shape, jnp.bfloat16, name='words'))(x)


def test_the_tied_output_is_a_product_with_the_table():
  x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
  apply = functools.partial(Tied().apply, {'params': {'words': {'embedding': TABLE}}})
  exact = apply(x)
  np.testing.assert_allclose(exact, x @ TABLE.T, rtol=1e-5, atol=1e-5)
  rounded = apply(x.astype(jnp.bfloat16))
  assert rounded.dtype == jnp.float32
  np.testing.assert_allclose(rounded, exact, atol=0.1)


def test_layer_norm_divides_by_the_root_mean_square():
  x = RNG.normal(size=(2, 3, 8), loc=5).astype(np.float32)
  scale = RNG.normal(size=8).astype(np.float32)
  expected = x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale
  apply = lambda x, dtype: layers.LayerNorm(dtype).apply({'params': {'scale': scale}}, x)
  np.testing.assert_allclose(apply(x, jnp.float32), expected, rtol=1e-5)
  tiny = x * np.float32(1e-4)  # the epsilon counts
  np.testing.assert_allclose(
      apply(tiny, jnp.float32),
      tiny / np.sqrt(np.mean(tiny ** 2, -1, keepdims=True) + 1e-6) * scale, rtol=1e-5)
  assert not np.any(apply(np.zeros_like(x), jnp.float32))


def test_layer_norm_of_bfloat16_rounds_nothing_but_its_result():
  x = RNG.normal(size=(2, 3, 8)).astype(jnp.bfloat16)
  apply = lambda x, dtype: layers.LayerNorm(dtype).apply({'params': {'scale': np.ones(8)}}, x)
  exact = apply(x.astype(np.float32), jnp.float32)
  np.testing.assert_array_equal(apply(x, jnp.float32), exact)
  np.testing.assert_array_equal(apply(x, jnp.bfloat16), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize('names, function', [
    (('relu',), lambda a, b: np.maximum(a, 0)),
    (('gelu', 'linear'), lambda a, b: b * a / 2 * (
        1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a ** 3)))),
    (('silu', 'linear'), lambda a, b: b * a / (1 + np.exp(-a))),
], ids=lambda value: '_'.join(value) if isinstance(value, tuple) else '')
def test_feed_forward(names, function):
  x = RNG.normal(size=(2, 3, 4)).astype(np.float32)
  module = layers.MlpBlock(5, names, dropout_rate=0.5)
  params = module.init(jax.random.key(0), x, True)['params']
  wi = [name for name in sorted(params) if name.startswith('wi')]
  assert wi == (['wi'] if len(names) == 1 else ['wi_0', 'wi_1'])
  hidden = [x @ np.asarray(params[name]['kernel']) for name in wi]
  expected = function(hidden[0], hidden[-1]) @ np.asarray(params['wo']['kernel'])
  np.testing.assert_allclose(module.apply({'params': params}, x, True), expected, rtol=1e-4,
                             atol=1e-5)


def test_activations_are_computed_again_and_not_kept():
  """What six layers have in memory is little more than their parts."""
  shape, names = (256, 64), ('gelu', 'linear')
  x, *kernels = (RNG.normal(size=shape).astype(np.float32) / 8 for _ in range(4))

  def gradient(product):
    def total(x):
      for _ in range(6):
        x += product(names, *(x @ kernel.T for kernel in kernels[:2])) @ kernels[2]
      return jnp.sum(jnp.sin(x))
    return jax.jit(jax.grad(total))

  np.testing.assert_allclose(gradient(layers._units)(x), gradient(layers._product)(x), rtol=1e-4,
                             atol=1e-4)
  memory = lambda product: (
      gradient(product).lower(x).compile().memory_analysis().temp_size_in_bytes)
  parts = 6 * 2 * 256 * 256 * 4
  assert parts < memory(layers._units) < 1.3 * parts < 2 * parts < memory(layers._product)
  # A GPU makes both gradients in one kernel, and so do TPUs as far as we know.
  barriers = lambda platform: gradient(layers._units).trace(x).lower(
      lowering_platforms=(platform,)).as_text().count('optimization_barrier')
  assert [barriers(platform) / 6 for platform in ('cpu', 'cuda', 'tpu')] == [3, 2, 2]


class TwoDrops(nn.Module):
  """One dropout called twice, as the layers of T5 do."""

  @nn.compact
  def __call__(self, x, rate, broadcast):
    drop = functools.partial(layers.dropout(rate, broadcast), deterministic=False)
    return drop(x), drop(x)


def dropped(rate, key, broadcast=True, shape=(64, 5, 64)):
  apply = functools.partial(TwoDrops().apply, {}, np.ones(shape, np.float32), rate, broadcast)
  return apply(rngs={'dropout': jax.random.key(key)})


def test_dropout_drops_a_feature_at_every_position_and_keeps_the_mean():
  first, second = dropped(0.25, key=0)
  assert set(np.unique(first)) == {0, np.float32(1 / 0.75)}
  np.testing.assert_array_equal(first, np.broadcast_to(first[:, :1], first.shape))
  # 4,096 draws: the standard error of the mean is 0.009.
  np.testing.assert_allclose([np.mean(first), np.mean(second)], 1, atol=0.04)
  assert np.any(first != second)
  single, _ = dropped(0.25, key=0, broadcast=False)
  assert np.any(single != single[:, :1])


def test_dropout_is_a_function_of_its_key():
  np.testing.assert_array_equal(dropped(0.5, key=3), dropped(0.5, key=3))
  assert np.any(dropped(0.5, key=3)[0] != dropped(0.5, key=4)[0])
  np.testing.assert_array_equal(dropped(0.0, key=3), np.ones((2, 64, 5, 64)))


def test_centred_layer_norm_is_that_of_torch_in_float32():
  torch = pytest.importorskip('torch')
  x, scale, bias = (5 + 3 * RNG.normal(size=shape).astype(np.float32)
                    for shape in ((2, 3, 16), (16,), (16,)))
  params = {'params': {'scale': scale, 'bias': bias}}
  theirs = torch.nn.functional.layer_norm(torch.tensor(x), (16,), torch.tensor(scale),
                                          torch.tensor(bias), 1e-5).numpy()
  np.testing.assert_allclose(layers.CentredLayerNorm().apply(params, x), theirs, rtol=1e-5,
                             atol=1e-5)
  rounded = layers.CentredLayerNorm(jnp.bfloat16).apply(params, x)
  assert rounded.dtype == jnp.bfloat16
  np.testing.assert_allclose(rounded.astype(np.float32), theirs, rtol=0.01, atol=0.01)


def test_a_bias_is_added_and_starts_at_zero():
  x = RNG.normal(size=(2, 4)).astype(np.float32)
  module = layers.Dense(3, ('embed', 'mlp'), use_bias=True)
  params = module.init(jax.random.key(0), x)['params']
  assert not np.any(params['bias'])
  params['bias'] = np.array([1, 2, 3], np.float32)
  np.testing.assert_allclose(module.apply({'params': params}, x),
                             x @ np.asarray(params['kernel']) + params['bias'], rtol=1e-5,
                             atol=1e-6)


def test_the_gradient_of_a_prompts_rows_is_that_of_looking_them_up():
  """Summed up in float32, whatever the network computes in."""
  rng = np.random.default_rng(0)
  rows = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
  places, wanted = rng.integers(0, 5, (3, 200)), rng.normal(size=(3, 200, 4)).astype(np.float32)
  ours = lambda rows, dtype: jnp.sum(layers._rows_at(rows, places, dtype) * wanted)
  plain = lambda rows: jnp.sum(jnp.take(rows, places, axis=0) * wanted)
  exact = jax.grad(plain)(rows)
  np.testing.assert_allclose(jax.grad(ours)(rows, jnp.float32), exact, atol=1e-4)
  found = jax.grad(ours)(rows, jnp.bfloat16)
  assert found.dtype == jnp.float32
  rounded = np.zeros((5, 4))
  np.add.at(rounded, places, np.asarray(wanted.astype(jnp.bfloat16), float))
  np.testing.assert_allclose(found, rounded, atol=1e-4)

"""Attention against its definition, and its two caches against no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.networks import attention, masks

B, N, T, S, H, D = 2, 3, 4, 6, 5, 8
pytestmark = pytest.mark.usefixtures('exact_products')

RNG = np.random.default_rng(0)


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def softmax(x):
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


def test_attend_is_softmax_of_unscaled_products_plus_bias():
  query, key, value, bias = draw(B, N, T, H), draw(B, N, H, S), draw(B, N, S, H), draw(1, N, T, S)
  mask = RNG.random((B, 1, T, S)) < 0.6
  mask[..., 0] = True
  logits = np.where(mask, np.einsum('bnth,bnhs->bnts', query, key) + bias, -np.inf)
  expected = np.einsum('bnts,bnsh->bnth', softmax(logits), value)
  np.testing.assert_allclose(attention.attend(query, key, value, bias, mask), expected, atol=1e-5)


def test_a_query_that_may_see_nothing_is_finite_and_so_is_its_gradient():
  query, key, value = draw(B, N, T, H), draw(B, N, H, S), draw(B, N, S, H)
  mask = np.zeros((B, 1, T, S), bool)
  total = lambda *args: jnp.sum(attention.attend(*args, None, mask))
  assert all(np.all(np.isfinite(g)) for g in jax.grad(total, (0, 1, 2))(query, key, value))


def test_masked_keys_and_values_change_nothing():
  query, key, value = draw(B, N, T, H), draw(B, N, H, S), draw(B, N, S, H)
  mask = np.ones((B, 1, T, S), bool)
  mask[..., 4:] = False
  other_key, other_value = key.copy(), value.copy()
  other_key[..., 4:], other_value[:, :, 4:] = 1e4, -1e4
  np.testing.assert_array_equal(attention.attend(query, key, value, None, mask),
                                attention.attend(query, other_key, other_value, None, mask))


def test_logits_and_softmax_are_float32_under_bfloat16():
  query, key, value = (x.astype(jnp.bfloat16) for x in (
      draw(B, N, T, H), draw(B, N, H, S), draw(B, N, S, H)))
  closed = jax.make_jaxpr(lambda *args: attention.attend(*args, None, None))(query, key, value)
  own, = (eqn.params['call_jaxpr'] for eqn in closed.eqns if 'call_jaxpr' in eqn.params)
  types = {eqn.primitive.name: eqn.outvars[0].aval.dtype for eqn in own.eqns}
  assert types['exp'] == jnp.float32
  assert attention.attend(query, key, value, None, None).dtype == jnp.bfloat16


@pytest.mark.parametrize('rows', [1, B])
@pytest.mark.parametrize('masked', [False, True])
def test_the_derivative_of_attend_is_that_of_its_definition(rows, masked):
  """A query that may see nothing included: what it gives depends on values alone."""
  arguments = draw(B, N, T, H), draw(B, N, H, S), draw(B, N, S, H), draw(rows, N, T, S)
  direction, mask = draw(B, N, T, H), None
  if masked:
    mask = RNG.random((B, 1, T, S)) < 0.6
    mask[0, 0, 1] = False

  def plain(query, key, value, bias):
    logits = query @ key + bias
    logits = logits if mask is None else jnp.where(mask, logits, masks.MASKED)
    return jnp.sum(direction * (jax.nn.softmax(logits) @ value))

  ours = lambda *args: jnp.sum(direction * attention.attend(*args, mask))
  for made, expected in zip(jax.grad(ours, (0, 1, 2, 3))(*arguments),
                            jax.grad(plain, (0, 1, 2, 3))(*arguments), strict=True):
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)


def module_and_params(x, **kwargs):
  module = attention.MultiHeadAttention(N, H, dropout_rate=0.0)
  return module, module.init(jax.random.key(0), x, x, **kwargs)['params']


def test_multi_head_attention_is_its_definition():
  x, y = draw(B, T, D), draw(B, S, D)
  module, params = module_and_params(x)
  assert {k: v['kernel'].shape for k, v in params.items()} == {
      'query': (D, N * H), 'key': (D, N * H), 'value': (D, N * H), 'out': (N * H, D)}
  heads = lambda name, z: (z @ np.asarray(params[name]['kernel'])).reshape(*z.shape[:2], N, H)
  weights = softmax(np.einsum('btnh,bsnh->bnts', heads('query', x), heads('key', y)))
  mixed = np.einsum('bnts,bsnh->btnh', weights, heads('value', y)).reshape(B, T, N * H)
  np.testing.assert_allclose(module.apply({'params': params}, x, y),
                             mixed @ np.asarray(params['out']['kernel']), atol=1e-5)


def test_initial_scale_of_the_queries_stands_in_for_scaled_logits():
  x = np.ones((1, 1, 256), np.float32)
  module = attention.MultiHeadAttention(16, 64, dropout_rate=0.0)
  params = module.init(jax.random.key(0), x, x)['params']
  deviation = {name: float(jnp.std(leaf['kernel'])) for name, leaf in params.items()}
  expected = {'query': (256 * 64) ** -0.5, 'key': 256 ** -0.5, 'value': 256 ** -0.5,
              'out': 1024 ** -0.5}
  for name, value in expected.items():
    np.testing.assert_allclose(deviation[name], value, rtol=0.02)


def test_cached_self_attention_in_steps_of_any_size_is_causal_attention():
  length = 9
  x = draw(B, length, D)
  module, params = module_and_params(x)
  at = np.arange(length)
  whole = module.apply({'params': params}, x, x, mask=masks.causal(at, at))
  apply = jax.jit(functools.partial(module.apply, cache_length=length, mutable=['cache']))
  _, state = apply({'params': params}, x[:, :1], x[:, :1])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))
  start, pieces = 0, []
  for size in (1, 4, 4):
    step = x[:, start:start + size]
    out, state = apply({'params': params, **state}, step, step, cache_index=np.int32(start),
                       mask=masks.causal(start + np.arange(size), at))
    pieces.append(out)
    start += size
  np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-5)


def test_cross_cache_holds_what_the_encoded_input_gives():
  x, encoded = draw(B, T, D), draw(B, S, D)
  module, params = module_and_params(x)
  whole = module.apply({'params': params}, x, encoded)
  fresh = functools.partial(module.apply, {'params': params}, x, cross=True)
  first, made = fresh(encoded, mutable=['cross_cache'])
  np.testing.assert_array_equal(first, whole)
  np.testing.assert_array_equal(fresh(encoded), whole)
  # Once there it is used, and what `inputs_kv` holds no longer matters.
  cached = module.apply({'params': params, **made}, x, np.zeros_like(encoded), cross=True)
  np.testing.assert_allclose(cached, whole, atol=1e-6)


def cross_attention(dropout_rate=0.0, queries=2):
  """(parameters, inputs, a function that attends to the 9 inputs with and without their keys)."""
  x, encoded = draw(B, queries, D), draw(B, 9, D)
  module = attention.MultiHeadAttention(N, H, dropout_rate)
  params = module.init(jax.random.key(0), x, encoded)['params']
  mask = RNG.random((B, 1, queries, 9)) < 0.6
  mask[..., 0] = True

  def apply(params, encoded, with_keys, **settings):
    return module.apply({'params': params}, x, encoded, mask=mask, cross=True, **settings,
                        method='with_keys_values', mutable=['intermediates'] * with_keys)[0]

  return params, encoded, apply


def test_attention_that_goes_without_keys_and_values_is_attention():
  params, encoded, apply = cross_attention()
  direction = draw(B, 2, D)

  def total(params, encoded, with_keys):
    out, (key, value) = apply(params, encoded, with_keys)
    assert (key is None, value is None) == (not with_keys,) * 2
    return jnp.sum(direction * out)

  for ours, expected in zip(
      *(jax.tree.leaves(jax.value_and_grad(total, (0, 1))(params, encoded, with_keys))
        for with_keys in (False, True)), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_keys_are_made_where_there_are_many_queries():
  params, encoded, apply = cross_attention(queries=4)  # 4 * (9 + 5) > 9 * 5 > 2 * (9 + 5)
  assert apply(params, encoded, False)[1][0].shape == (B, N, H, 9)


def test_a_change_of_a_kernel_has_keys_and_values_made():
  x, encoded = draw(B, 2, D), draw(B, 9, D)
  module, params = module_and_params(x)
  changes = {'value': {'ia3': jnp.array([[1.0], [2.0]]) * jnp.ones(N * H)}}
  out = functools.partial(module.apply, inputs_q=x, inputs_kv=encoded, cross=True)
  np.testing.assert_allclose(out({'params': params, 'changes': changes}),
                             np.array([1, 2])[:, None, None] * out({'params': params}), atol=1e-5)
  changed = {**params, 'value': {**params['value'], 'ia3': 2 * jnp.ones(N * H)}}
  np.testing.assert_allclose(out({'params': changed}), 2 * out({'params': params}), atol=1e-5)


def test_dropout_of_weights_is_the_same_with_and_without_keys_and_keeps_the_mean():
  params, encoded, apply = cross_attention(dropout_rate=0.25)
  whole, _ = apply(params, encoded, True)
  drop = lambda seed, with_keys: apply(
      params, encoded, with_keys, deterministic=False, rngs={'dropout': jax.random.key(seed)})[0]
  with_keys, without = (jax.vmap(functools.partial(drop, with_keys=each))(np.arange(4000))
                        for each in (True, False))
  assert np.any(without[0] != whole)
  np.testing.assert_allclose(without, with_keys, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(np.mean(without, 0), whole, atol=0.1)


def test_a_context_is_more_keys_under_one_softmax():
  """Biases and masks included."""
  query, key, value, bias = draw(B, N, T, H), draw(B, N, H, S), draw(B, N, S, H), draw(B, N, T, S)
  mask = RNG.random((B, 1, T, S)) < 0.6
  mask[..., 0] = True
  context = attention.Context(key[..., 4:], value[:, :, 4:], bias[..., 4:], mask[..., 4:])
  parts = attention.attend(query, key[..., :4], value[:, :, :4], bias[..., :4], mask[..., :4],
                           context=context)
  np.testing.assert_allclose(parts, attention.attend(query, key, value, bias, mask), atol=1e-5)


def test_biases_and_scaled_logits_are_their_definition():
  x, y = draw(B, T, D), draw(B, S, D)
  module = attention.MultiHeadAttention(N, H, dropout_rate=0.0, use_bias=True, scale=True)
  params = jax.tree.map(lambda leaf: draw(*leaf.shape), module.init(
      jax.random.key(0), x, x)['params'])
  affine = lambda name, z: z @ params[name]['kernel'] + params[name]['bias']
  heads = lambda name, z: affine(name, z).reshape(*z.shape[:2], N, H)
  logits = np.einsum('btnh,bsnh->bnts', heads('query', x), heads('key', y)) / np.sqrt(H)
  mixed = np.einsum('bnts,bsnh->btnh', softmax(logits), heads('value', y)).reshape(B, T, N * H)
  out, (key, value) = module.apply({'params': params}, x, y, method='with_keys_values')
  np.testing.assert_allclose(out, affine('out', mixed), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(key.transpose(0, 3, 1, 2), heads('key', y), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(value.transpose(0, 2, 1, 3), heads('value', y), rtol=1e-4, atol=1e-4)

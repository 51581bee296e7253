"""Attention against its definition, and its two caches against no cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.networks import attention, layers, masks

B, N, T, S, H, D = 2, 3, 4, 6, 5, 8
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
  types = {eqn.primitive.name: eqn.outvars[0].aval.dtype for eqn in closed.jaxpr.eqns}
  assert types['exp'] == jnp.float32
  assert attention.attend(query, key, value, None, None).dtype == jnp.bfloat16


def test_dropout_of_weights_keeps_the_mean():
  query, key, value = draw(1, N, T, H), draw(1, N, H, S), draw(1, N, S, H)
  whole = attention.attend(query, key, value, None, None)

  def dropped(seed):
    return attention.attend(query, key, value, None, None, drop=functools.partial(
        lambda weights, deterministic, key: layers.dropout(0.25).apply(
            {}, weights, deterministic=deterministic, rngs={'dropout': key}),
        key=jax.random.key(seed)), deterministic=False)

  many = jax.vmap(dropped)(np.arange(4000))
  assert np.any(many[0] != whole)
  np.testing.assert_allclose(np.mean(many, 0), whole, atol=0.1)


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

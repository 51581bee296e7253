"""Fused attention computes what plain attention does.

Our kernels and the TPU's are interpreted here, on the CPU; of cuDNN's only the wrapper is run.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas import tpu as pltpu

from prompt_tuning_jax.networks import (
    attention,
    flash_attention,
    fused_attention,
    layers,
    prefix,
    t5,
)

pytestmark = pytest.mark.usefixtures('exact_products')

RNG = np.random.default_rng(0)
CONFIG = t5.T5Config(vocab_size=40, emb_dim=16, num_heads=2, num_encoder_layers=1,
                     num_decoder_layers=1, head_dim=8, mlp_dim=32, dtype='bfloat16')


def random(*shape):
  return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def example(queries, keys, dim=8):
  """query, key, value, bias, mask of 2 rows, 3 heads; every query sees something."""
  mask = jnp.asarray(RNG.random((2, 1, queries, keys)) < 0.7).at[..., 0].set(True)
  return (random(2, 3, queries, dim), random(2, 3, dim, keys), random(2, 3, keys, dim),
          random(1, 3, queries, keys), mask)


@pytest.fixture
def cudnn_is_xla(monkeypatch):
  """JAX's own computation in the place of cuDNN's, with the same arguments."""
  real = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda *args, implementation, **kwargs: real(
      *args, implementation={'cudnn': 'xla'}[implementation], **kwargs))


@pytest.fixture
def interpreted(monkeypatch):
  """Our kernels as JAX operations, in small blocks, so that these sizes take several."""
  monkeypatch.setattr(flash_attention, 'INTERPRET', True)
  for name, (queries, keys) in {'FORWARD': (32, 16), 'BACKWARD_QUERIES': (16, 32),
                                'BACKWARD_KEYS': (32, 16)}.items():
    monkeypatch.setattr(flash_attention, name, flash_attention.Blocks(queries, keys, 4, 2))


def both(implementation, arrays, **kwargs):
  """Output and gradients of plain and of fused attention."""
  def run(implementation, query, key, value):
    total = lambda *x: jnp.sum(jnp.sin(attention.attend(
        *x, *arrays[3:], implementation=implementation, **kwargs)))
    return (attention.attend(query, key, value, *arrays[3:], implementation=implementation,
                             **kwargs), jax.grad(total, (0, 1, 2))(query, key, value))
  run = jax.jit(run, static_argnums=0)
  return run('xla', *arrays[:3]), run(implementation, *arrays[:3])


def assert_close(a, b, tolerance=2e-5):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=tolerance * float(jnp.max(jnp.abs(x))))


@pytest.mark.parametrize('missing', ['', 'bias', 'mask'], ids=lambda name: name or 'all')
def test_the_wrapper_of_cudnn(cudnn_is_xla, missing):
  """Also of odd lengths, for which it adds positions."""
  arrays = list(example(5, 7))
  if missing:
    arrays[3 if missing == 'bias' else 4] = None
  assert_close(*both('cudnn', arrays))


@pytest.mark.parametrize('implementation', ['cudnn', 'triton'])
def test_a_context_is_seen(cudnn_is_xla, interpreted, implementation):
  arrays = example(4, 6)
  _, key, value, bias, mask = example(4, 3)
  assert_close(*both(implementation, arrays, context=attention.Context(key, value, bias, mask)))


@pytest.mark.parametrize('queries, keys, masked, biased', [
    (5, 7, 'pairs', True), (33, 70, 'pairs', True), (33, 70, 'keys', True),
    (33, 70, 'nothing', False), (2, 40, 'keys', False), (33, 70, 'nothing', True)])
def test_our_kernels(interpreted, queries, keys, masked, biased):
  """Lengths within a block and over several, the last of them with room to spare."""
  arrays = list(example(queries, keys))
  if masked != 'pairs':
    arrays[4] = arrays[4][:, :, :1] if masked == 'keys' else None
  if not biased:
    arrays[3] = None
  assert_close(*both('triton', arrays))


def test_keys_behind_the_last_have_no_weight(interpreted):
  """Also where all logits are far below what a product with nothing gives."""
  query, key, value, *_ = example(5, 7)
  assert_close(*both('triton', (jnp.abs(query), key - 30, value, None, None)), 1e-4)


def test_gradients_under_dropout(interpreted):
  arrays = example(9, 20)

  def of_all(implementation):
    drop = layers.dropout(0.5).bind({}, rngs={'dropout': jax.random.key(3)})
    total = lambda *x: jnp.sum(jnp.sin(attention.attend(
        *x, arrays[4], drop, False, implementation=implementation)))
    return jax.grad(total, (0, 1, 2, 3))(*arrays[:4])

  assert_close(of_all('xla'), of_all('triton'))


def test_bfloat16_stays_bfloat16(interpreted):
  """But for a bias in float32, as of a table that is trained."""
  *arrays, bias, mask = example(9, 20)
  rounded = [x.astype(jnp.bfloat16) for x in arrays]
  total = lambda *x: jnp.sum(attention.attend(*x, mask, implementation='triton'))
  found = jax.grad(total, (0, 1, 2, 3))(*rounded, bias)
  assert [x.dtype for x in found] == [jnp.bfloat16] * 3 + [jnp.float32]


def test_a_bias_that_is_trained_has_its_gradient(interpreted):
  """A network's own table, in model tuning; and a query that may see nothing gets no NaN."""
  query, key, value, bias, mask = example(9, 20)
  mask = mask.at[0, 0, 3].set(False)

  def of_bias(implementation):
    def total(bias):
      out = attention.attend(query, key, value, bias, mask, implementation=implementation)
      return jnp.sum(jnp.sin(out[1])) + jnp.sum(jnp.sin(out[0, :, 4:]))
    return jax.grad(total)(bias)

  assert_close(of_bias('xla'), of_bias('triton'))
  total = lambda *x: jnp.sum(jnp.sin(attention.attend(*x, bias, mask, implementation='triton')))
  assert np.all(np.isfinite(total(query, key, value)))
  of_query = jax.grad(total)(query, key, value)
  assert not np.any(of_query[0, :, 3]) and np.all(np.isfinite(of_query)) and np.any(of_query[0])


def test_only_a_bias_that_is_trained_has_all_logits_in_memory(interpreted):
  arrays = example(9, 20)
  total = lambda query, bias: jnp.sum(attention.attend(query, *arrays[1:3], bias, None,
                                                       implementation='triton'))
  largest = lambda of: '[2,3,9,20]' in str(jax.make_jaxpr(jax.grad(total, of))(*arrays[::3]))
  assert not largest(0) and largest((0, 1))


@pytest.mark.parametrize('implementation', ['cudnn', 'triton'])
def test_dropped_values_are_dropped_weights(cudnn_is_xla, interpreted, implementation):
  arrays = example(4, 6)

  def run(implementation):
    # A module of its own, so that both draw from the same place.
    drop = layers.dropout(0.5).bind({}, rngs={'dropout': jax.random.key(3)})
    return attention.attend(*arrays, drop=drop, deterministic=False,
                            implementation=implementation)

  assert_close(run('xla'), run(implementation))
  assert np.any(run('xla') != attention.attend(*arrays))


@pytest.mark.slow
def test_the_kernel_of_tpus():
  with pltpu.force_tpu_interpret_mode():
    plain, fused = both('pallas', example(9, 130))
  assert_close(plain, fused, 1e-4)


@pytest.mark.parametrize('implementation', ['cudnn', 'triton'])
@pytest.mark.parametrize('queries, keys', [(5, 7), (33, 130)])
def test_the_kernel_of_gpus(implementation, queries, keys):
  """Itself, in bfloat16, as near to float32 arithmetic as plain attention in bfloat16 is."""
  if jax.default_backend() != 'gpu':
    pytest.skip('needs an NVIDIA GPU: JAX_PLATFORMS=cuda pytest …')
  rounded = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.bfloat16),
                         example(queries, keys, dim=16))
  exact = both('xla', jax.tree.map(lambda x: x if x.dtype == bool else x.astype(jnp.float32),
                                   rounded))[0]
  plain, fused = both(implementation, rounded)
  assert_close(exact, plain, 0.05)
  assert_close(exact, fused, 0.05)


def test_a_step_of_decoding_is_not_fused():
  """There is no cuDNN here: it would have been told."""
  arrays = example(1, 6)
  plain = attention.attend(*arrays)
  np.testing.assert_array_equal(attention.attend(*arrays, implementation='cudnn'), plain)


@pytest.mark.parametrize('backend, dtype, devices, wanted', [
    ('cpu', 'bfloat16', 1, 'xla'), ('gpu', 'bfloat16', 8, 'cudnn'), ('gpu', 'float32', 1, 'xla'),
    ('gpu', 'bfloat16', 1, 'triton'),
    ('tpu', 'float32', 1, 'pallas'), ('tpu', 'bfloat16', 4, 'xla')])
def test_the_best_is_chosen(backend, dtype, devices, wanted):
  config = dataclasses.replace(CONFIG, dtype=dtype, head_dim=16)
  assert fused_attention.chosen('auto', config, backend, devices) == wanted


@pytest.mark.parametrize('attention, change, backend, devices, message', [
    ('cudnn', {}, 'cpu', 1, 'needs an NVIDIA GPU'), ('pallas', {}, 'gpu', 1, 'needs a TPU'),
    ('cudnn', {'dtype': 'float32'}, 'gpu', 1, "needs ACTIVATION_DTYPE='bfloat16'"),
    ('cudnn', {'head_dim': 20}, 'gpu', 1, 'multiple of 8 up to 128, got 20'),
    ('pallas', {}, 'tpu', 4, 'runs on one device, got 4'),
    ('triton', {'head_dim': 64}, 'gpu', 4, 'runs on one device, got 4'),
    ('triton', {'head_dim': 48}, 'gpu', 1, 'needs a head_dim of 16, 32 or 64, got 48'),
    ('flash', {}, 'gpu', 1,
     "must be one of .'auto', 'xla', 'triton', 'cudnn', 'pallas'., got 'flash'")])
def test_what_does_not_fit_is_one_line(attention, change, backend, devices, message):
  with pytest.raises(ValueError, match=message) as error:
    fused_attention.chosen(attention, dataclasses.replace(CONFIG, **change), backend, devices)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('platform, implementation, remat_policy, kernels', [
    ('cuda', 'cudnn', 'none', 3), ('cuda', 'cudnn', 'minimal', 3), ('cuda', 'cudnn', 'full', 6),
    ('cuda', 'triton', 'none', 3), ('cuda', 'triton', 'minimal', 3), ('cuda', 'triton', 'full', 6),
    ('tpu', 'pallas', 'none', 3)])
def test_a_network_is_lowered_with_the_kernel(platform, implementation, remat_policy, kernels,
                                              monkeypatch):
  """Forward and backward, for an accelerator that is not here: a kernel for each attention, cross
  attention too, which the backward pass runs again only where it is to keep nothing."""
  monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
  config = dataclasses.replace(CONFIG, attention=implementation, scan_layers=True,
                               remat_policy=remat_policy)
  token = jax.ShapeDtypeStruct((2, 12), jnp.int32)
  apply = functools.partial(config.network().apply, enable_dropout=False)
  params = jax.eval_shape(functools.partial(config.network().init, enable_dropout=False),
                          jax.random.key(0), token, token, token)['params']
  loss = lambda rows, params, *tokens: jnp.sum(apply({'params': params}, *tokens,
                                                     virtual_embeddings=rows))
  disabled = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (
      '__cudnn$fmhaScaleBiasSoftmax', '__cudnn$fmhaScaleBiasSoftmaxBackward',
      '__gpu$xla.gpu.triton')]
  made = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform], disabled_checks=disabled)(
      jax.ShapeDtypeStruct((3, 16), jnp.float32), params, token, token, token)
  module = made.mlir_module()
  if platform == 'tpu':
    assert module.count('custom_call @tpu_custom_call') >= kernels
  elif implementation == 'triton':  # each backward pass is two kernels
    assert module.count('@__gpu$xla.gpu.triton(') == kernels + 6
  else:
    assert module.count('@__cudnn$fmhaScaleBiasSoftmax(') == kernels
    assert module.count('@__cudnn$fmhaScaleBiasSoftmaxBackward(') == 3


def test_a_mask_within_the_bias_is_as_good():
  """Also behind a prefix, whose positions it does not hide, and which may hide some of its own."""
  query, key, value, bias, mask = example(4, 4)
  merged = fused_attention.with_mask('cudnn', bias, mask)
  assert merged[1] is None and fused_attention.with_mask('xla', bias, mask) == (bias, mask)
  assert_close(attention.attend(query, key, value, bias, mask),
               attention.attend(query, key, value, *merged))
  for visible in (None, jnp.asarray([[True, False], [True, True]])):
    before = prefix.LayerPrefix(random(2, 2, 3, 8), random(2, 2, 3, 8), visible)
    assert_close(attention.attend(query, *before.prepend(key, value, bias, mask)),
                 attention.attend(query, *before.prepend(key, value, *merged)))

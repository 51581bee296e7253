"""Relative positions fall into Hugging Face's and Mesh TensorFlow's buckets, on any device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.networks import relative_position

SIZES = [(32, 128), (8, 20), (4, 8), (64, 256)]
DISTANCES = np.arange(-700, 701, dtype=np.int32)[None]


def exact_bucket(distance, bidirectional, num_buckets, max_distance):
  """The definition, in exact arithmetic: of integers, and of powers compared as integers."""
  if bidirectional:
    num_buckets //= 2
    if distance > 0:
      return num_buckets + exact_bucket(-distance, False, num_buckets, max_distance)
  distance = max(-distance, 0) if not bidirectional else abs(distance)
  exact = num_buckets // 2
  if distance < exact:
    return distance
  steps, far = num_buckets - exact, exact
  # Bucket exact + k starts at exact * (max_distance / exact) ** (k / steps).
  for k in range(1, steps):
    if distance ** steps * exact ** k >= exact ** steps * max_distance ** k:
      far = exact + k
  return far


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('num_buckets, max_distance', SIZES)
def test_buckets_are_the_definition(bidirectional, num_buckets, max_distance):
  settings = dict(bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
  expected = [exact_bucket(int(d), **settings) for d in DISTANCES[0]]
  compiled = jax.jit(lambda d: relative_position.bucket(d, **settings))
  for function in (compiled, lambda d: relative_position.bucket(jnp.asarray(d), **settings)):
    np.testing.assert_array_equal(function(DISTANCES)[0], expected)
  assert 0 <= min(expected) and max(expected) < num_buckets


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize('num_buckets, max_distance', SIZES)
def test_buckets_are_those_of_hugging_face(bidirectional, num_buckets, max_distance):
  torch = pytest.importorskip('torch')
  modeling = pytest.importorskip('transformers.models.t5.modeling_t5')
  ours = relative_position.bucket(
      jnp.asarray(DISTANCES), bidirectional=bidirectional, num_buckets=num_buckets,
      max_distance=max_distance)
  theirs = modeling.T5Attention._relative_position_bucket(
      torch.tensor(DISTANCES), bidirectional, num_buckets, max_distance)
  np.testing.assert_array_equal(ours, theirs.numpy())


def test_bias_is_the_table_at_the_bucket_of_the_distance():
  module = relative_position.RelativePositionBias(3, 32, 128, bidirectional=True)
  table = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
  queries, keys = np.array([5, 40]), np.arange(60)
  bias = module.apply({'params': {'rel_embedding': table}}, queries, keys)
  assert bias.shape == (1, 3, 2, 60)
  for i, query in enumerate(queries):
    for key in keys:
      number = exact_bucket(int(key - query), True, 32, 128)
      np.testing.assert_array_equal(bias[0, :, i, key], table[:, number])


def test_bias_depends_on_distances_alone():
  module = relative_position.RelativePositionBias(2, 32, 128, bidirectional=False)
  variables = module.init(jax.random.key(0), jnp.arange(2), jnp.arange(2))
  near = module.apply(variables, jnp.arange(20), jnp.arange(20))
  shifted = module.apply(variables, 1000 + jnp.arange(20), 1000 + jnp.arange(20))
  np.testing.assert_array_equal(near, shifted)


def test_a_new_table_is_drawn_uniformly():
  module = relative_position.RelativePositionBias(16, 32, 128, bidirectional=True)
  table = module.init(jax.random.key(0), jnp.arange(1), jnp.arange(1))['params']['rel_embedding']
  limit = math.sqrt(3 / ((16 + 32) / 2))
  assert 0.9 * limit < float(jnp.max(jnp.abs(table))) <= limit


def test_positions_of_each_row_give_the_bias_of_each_row_alone():
  module = relative_position.RelativePositionBias(3, 8, 20, bidirectional=False)
  rng = np.random.default_rng(0)
  queries, keys = rng.integers(0, 60, (4, 5)), rng.integers(0, 60, (4, 7))
  variables = module.init(jax.random.key(0), jnp.arange(1), jnp.arange(1))
  bias = module.apply(variables, queries, keys)
  assert bias.shape == (4, 3, 5, 7)
  for row, query, key in zip(bias, queries, keys, strict=True):
    np.testing.assert_array_equal(row[None], module.apply(variables, query, key))

"""Adafactor and AdamW against twenty hand-written steps; schedules; no state for the frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax import optimizers

STEPS = 20


def gradients(shape):
  """Gradients whose size differs by row, by column and by step."""
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 1)
          * np.exp(rng.normal(size=(shape[0], 1))) * np.exp(rng.normal(size=(1, shape[1])))
          for _ in range(STEPS)]


def trajectory(optimizer, start, grads):
  """The parameter after each step, [steps, ...]."""
  param = {'prompt': jnp.asarray(start, jnp.float32)}
  state, path = optimizer.init(param), []

  @jax.jit
  def step(param, state, grad):
    updates, state = optimizer.update({'prompt': grad}, state, param)
    return optax.apply_updates(param, updates), state

  for grad in grads:
    param, state = step(param, state, jnp.asarray(grad, jnp.float32))
    path.append(np.asarray(param['prompt']))
  return np.stack(path)


def reference_adafactor(param, grads, rate=0.3, decay=0.8, weight_decay=1e-5, clip=1.0,
                        factored=False, scaled=False):
  """Shazeer & Stern 2018, algorithms 2 and 4 (unfactored or factored), without momentum."""
  v = np.zeros_like(param)
  rows, columns = np.zeros(param.shape[0]), np.zeros(param.shape[1])
  path = []
  for t, grad in enumerate(grads, 1):
    beta = 1 - t ** -decay
    squared = grad ** 2 + 1e-30
    if factored:
      rows = beta * rows + (1 - beta) * squared.mean(1)
      columns = beta * columns + (1 - beta) * squared.mean(0)
      v = np.outer(rows, columns) / rows.mean()
    else:
      v = beta * v + (1 - beta) * squared
    update = grad / np.sqrt(v)
    update /= max(1, np.sqrt(np.mean(update ** 2)) / clip)
    size = max(1e-3, np.sqrt(np.mean(param ** 2))) if scaled else 1
    param = param - rate * size * update - weight_decay * param
    path.append(param)
  return np.stack(path)


@pytest.mark.parametrize('shape, factored', [((5, 16), False), ((127, 140), False),
                                             ((128, 140), True), ((150, 130), True)])
def test_adafactor_is_the_paper_s(shape, factored):
  start, grads = np.random.default_rng(1).normal(size=shape), gradients(shape)
  np.testing.assert_allclose(
      trajectory(optimizers.adafactor(), start, grads),
      reference_adafactor(start, grads, factored=factored), rtol=1e-4, atol=2e-5)


def test_adafactor_s_settings():
  start, grads = np.random.default_rng(1).normal(size=(5, 16)), gradients((5, 16))
  np.testing.assert_allclose(
      trajectory(optimizers.adafactor(0.01, decay_rate=0.6, weight_decay_rate=None,
                                      multiply_by_parameter_scale=True, clipping_threshold=2.0),
                 start, grads),
      reference_adafactor(start, grads, 0.01, 0.6, 0, 2.0, scaled=True), rtol=1e-4, atol=2e-5)


def test_weight_decay_is_not_scaled_by_the_learning_rate():
  start = np.ones((2, 3))
  after = trajectory(optimizers.adafactor(0.3, weight_decay_rate=0.1), start,
                     [np.zeros((2, 3))] * 2)
  np.testing.assert_allclose(after[:, 0, 0], [0.9, 0.81], rtol=1e-6)


def test_adamw_after_clipping_the_global_norm():
  start, grads = np.random.default_rng(1).normal(size=(5, 16)), gradients((5, 16))
  rate, b1, b2, decay, bound = 0.01, 0.8, 0.95, 0.1, 0.5
  param, m, v, expected = start, 0, 0, []
  for t, grad in enumerate(grads, 1):
    grad = grad * min(1, bound / np.linalg.norm(grad))
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad ** 2
    step = m / (1 - b1 ** t) / (np.sqrt(v / (1 - b2 ** t)) + 1e-8)
    param = param - rate * (step + decay * param)
    expected.append(param)
  ours = trajectory(optimizers.adamw(rate, b1, b2, decay, bound), start, grads)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('make, times', [(optimizers.adafactor, 1), (optimizers.adamw, 2)])
def test_state_is_for_the_given_leaves_alone(make, times):
  given = {'prompt': {'embedding': jnp.zeros((100, 64))}}
  state = jax.eval_shape(make().init, given)
  numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
  assert times * 6400 <= numbers <= times * 6400 + 8  # besides moments: counters, placeholders
  updates, _ = make().update(given, make().init(given), given)
  assert jax.tree.map(jnp.shape, updates) == {'prompt': {'embedding': (100, 64)}}


def test_a_schedule_is_a_learning_rate():
  for make in (optimizers.adafactor, lambda rate: optimizers.adamw(rate, weight_decay=0.0)):
    halving = trajectory(make(lambda step: 0.5 ** step), np.zeros((2, 3)), [np.ones((2, 3))] * 3)
    steps = np.diff(np.concatenate([np.zeros((1, 2, 3)), halving]), axis=0)[:, 0, 0]
    np.testing.assert_allclose(steps, [-1, -0.5, -0.25], rtol=1e-3)


def test_linear_decay():
  at = lambda schedule, steps: [round(float(schedule(step)), 6) for step in steps]
  assert at(optimizers.linear_decay(1.0, 10, 4), [0, 2, 4, 7, 10, 12]) == [0, 0.5, 1, 0.5, 0, 0]
  assert at(optimizers.linear_decay(2.0, 4), [0, 1, 4]) == [2, 1.5, 0]
  assert at(optimizers.linear_decay(1.0, 0, 4), [0, 1]) == [0, 0]  # nothing trains
  with pytest.raises(ValueError, match=r'steps \(4\) must be more than warmup_steps \(4\)'):
    optimizers.linear_decay(1.0, 4, 4)

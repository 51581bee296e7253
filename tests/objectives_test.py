"""Losses against torch, against T5X's definition, and by their laws."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax import objectives

RNG = np.random.default_rng(0)
V = 11
LOGITS = RNG.normal(size=(2, 5, V), scale=4).astype(np.float32)
TARGETS = RNG.integers(0, V, (2, 5)).astype(np.int32)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.6])
def test_cross_entropy_is_that_of_torch(smoothing):
  torch = pytest.importorskip('torch')
  ours = objectives.cross_entropy(LOGITS, TARGETS, label_smoothing=smoothing)
  # torch shares the smoothed mass among all words, the target included, and keeps the entropy.
  theirs = torch.nn.functional.cross_entropy(
      torch.tensor(LOGITS).double().reshape(-1, V), torch.tensor(TARGETS).long().reshape(-1),
      label_smoothing=smoothing * V / (V - 1), reduction='none').reshape(2, 5).numpy()
  soft = np.full(V, smoothing / (V - 1))
  soft[0] = 1 - smoothing
  entropy = -np.sum(soft[soft > 0] * np.log(soft[soft > 0]))
  np.testing.assert_allclose(ours, theirs - entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize('z_loss', [0.0, 0.3])
def test_the_definition_of_t5x(z_loss, smoothing):
  low, high = smoothing / (V - 1), 1 - smoothing
  soft = np.where(np.arange(V) == TARGETS[..., None], high, low)
  constant = -(high * np.log(high) + (V - 1) * low * np.log(low + 1e-20))
  log_z = np.log(np.exp(LOGITS.astype(np.float64)).sum(-1))
  expected = -np.sum(soft * log_softmax(LOGITS), -1) - constant + z_loss * log_z ** 2
  loss = objectives.cross_entropy(LOGITS, TARGETS, z_loss, smoothing)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_perfect_prediction_costs_nothing():
  smoothing = 0.2
  soft = np.where(np.arange(V) == TARGETS[..., None], 1 - smoothing, smoothing / (V - 1))
  np.testing.assert_allclose(
      objectives.cross_entropy(np.log(soft), TARGETS, label_smoothing=smoothing), 0, atol=1e-5)


@pytest.mark.parametrize('possible', [0, 1])
def test_there_is_nothing_to_smooth_where_no_other_word_is_possible(possible):
  """Behind BERT's last mask a text ends for certain; a label may have no place there."""
  logits = np.where(np.arange(V) < possible, 0, -1e10).astype(np.float32)
  smooth = lambda logits: objectives.cross_entropy(logits, np.int32(0), label_smoothing=0.1)
  loss, gradient = jax.value_and_grad(smooth)(logits)
  np.testing.assert_array_equal(loss, objectives.cross_entropy(logits, np.int32(0)))
  assert np.isfinite(loss) and np.all(np.isfinite(gradient))
  assert possible == 0 or loss == 0


def test_z_loss_pulls_the_normaliser_to_one():
  total = lambda shift: objectives.cross_entropy(
      log_softmax(LOGITS).astype(np.float32) + shift, TARGETS, z_loss=0.5).sum()
  slope = jax.grad(total)
  assert slope(-2.0) < -1 and slope(2.0) > 1
  np.testing.assert_allclose(slope(0.0), 0, atol=1e-3)


def test_log_likelihood_is_the_log_probability():
  expected = np.take_along_axis(log_softmax(LOGITS), TARGETS[..., None], -1)[..., 0]
  np.testing.assert_allclose(objectives.token_log_likelihood(LOGITS, TARGETS), expected,
                             rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('scale', [0.0, 1e4, 1e8])
def test_loss_and_gradient_are_finite_at_extremes(scale):
  logits = LOGITS * np.float32(scale)
  total = lambda logits: objectives.cross_entropy(logits, TARGETS, 1e-4, 0.1).sum()
  loss, gradient = jax.value_and_grad(total)(logits)
  assert np.isfinite(loss) and np.all(np.isfinite(gradient))
  # Without z-loss the gradient is a difference of two distributions.
  plain = jax.grad(lambda logits: objectives.cross_entropy(logits, TARGETS).sum())(logits)
  np.testing.assert_allclose(np.sum(plain, -1), 0, atol=1e-5)
  assert np.all(np.abs(plain) <= 1)

"""Similarities: those of other libraries, and what scaling, order and length do not change."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist, cosine
from sklearn.metrics.pairwise import cosine_similarity

from prompt_tuning_jax.analysis import similarity

MEASURES = (similarity.cosine_of_means, similarity.mean_of_cosines)


def random_prompts(*lengths, width=8, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(0.3, 1, (length, width)).astype(np.float32) for length in lengths]


def test_other_libraries_give_the_same_numbers():
  prompts = random_prompts(3, 5, 1)
  means, tokens = (measure(prompts) for measure in MEASURES)
  for i, one in enumerate(prompts):
    for j, other in enumerate(prompts):
      np.testing.assert_allclose(means[i, j], 1 - cosine(one.mean(0), other.mean(0)), rtol=1e-5)
      np.testing.assert_allclose(tokens[i, j], cosine_similarity(one, other).mean(), rtol=1e-5)
      np.testing.assert_allclose(tokens[i, j], 1 - cdist(one, other, 'cosine').mean(), rtol=1e-5)
  # Of a single row both measures are the plain cosine.
  assert means[2, 2] == pytest.approx(1) and tokens[2, 2] == pytest.approx(1)
  assert tokens[0, 0] < 0.9


@pytest.mark.parametrize('measure', MEASURES)
def test_scale_and_order_change_nothing_and_a_sign_changes_the_sign(measure):
  one, other = random_prompts(4, 6)
  expected = measure([one, other])[0, 1]
  assert abs(expected) < 0.99
  changed = measure([1e-3 * one[::-1], 1e3 * np.roll(other, 2, axis=0), -other,
                     np.tile(one, (3, 1))])
  np.testing.assert_allclose(changed[0, 1], expected, rtol=1e-5)
  np.testing.assert_allclose(changed[0, 2], -expected, rtol=1e-5)
  np.testing.assert_allclose(changed[3, 1], expected, rtol=1e-5)
  np.testing.assert_allclose(changed, changed.T)


def test_only_the_mean_of_cosines_is_blind_to_the_scale_of_a_row():
  one, other = random_prompts(4, 6)
  scaled = one * np.array([[1], [20], [1], [1]])
  means, tokens = (measure([one, scaled, other]) for measure in MEASURES)
  np.testing.assert_allclose(tokens[0, 2], tokens[1, 2], rtol=1e-6)
  assert abs(means[0, 2] - means[1, 2]) > 0.01


def test_a_rotation_of_the_space_changes_nothing():
  prompts = random_prompts(4, 6, 5)
  rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))
  for measure in MEASURES:
    np.testing.assert_allclose(measure([prompt @ rotation for prompt in prompts]),
                               measure(prompts), atol=1e-6)


def test_zeros_are_like_nothing():
  one, = random_prompts(3)
  for measure in MEASURES:
    assert not measure([np.zeros((2, 8), np.float32), one])[0].any()


def test_weights_are_in_proportion_and_average_as_numpy_does():
  weights = similarity.transfer_weights([0.6, 0.3, 0.1])
  np.testing.assert_allclose(weights, [0.6, 0.3, 0.1])
  np.testing.assert_allclose(similarity.transfer_weights([0.2, 0.6]), [0.25, 0.75])
  prompts = random_prompts(4, 4, 4)
  found = similarity.weighted_average(prompts, weights)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, np.average(prompts, axis=0, weights=weights), rtol=1e-5)
  np.testing.assert_array_equal(similarity.weighted_average(prompts[:1], [1.0]), prompts[0])
  np.testing.assert_allclose(similarity.weighted_average([prompts[0]] * 3, weights), prompts[0],
                             rtol=1e-6)


@pytest.mark.parametrize('values', [[], [0.5, 0.0], [0.5, -0.1], [-0.5, -0.5]])
def test_a_source_that_points_away_has_no_weight(values):
  with pytest.raises(ValueError, match='positive'):
    similarity.transfer_weights(values)


def test_prompts_of_other_lengths_are_not_averaged():
  with pytest.raises(ValueError, match=r'\[\[3, 8\], \[4, 8\]\]'):
    similarity.weighted_average(random_prompts(3, 4), [0.5, 0.5])

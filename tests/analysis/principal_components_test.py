"""Principal components: scikit-learn's, and what they do not depend on."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from prompt_tuning_jax.analysis import principal_components


def rows(count=30, width=6, seed=0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(count, width)) * rng.uniform(.5, 4, width) + 3).astype(np.float32)


@pytest.mark.parametrize('shape', [(30, 6), (5, 40), (2, 2)])
def test_scikit_learn_has_the_same(shape):
  theirs = PCA(2, svd_solver='full')
  expected = theirs.fit_transform(rows(*shape).astype(np.float64))
  places, shares = principal_components.project(rows(*shape))
  assert (places.max(axis=0) >= -places.min(axis=0) - 1e-9).all()
  np.testing.assert_allclose(np.abs(places), np.abs(expected), atol=1e-7)
  np.testing.assert_allclose(places @ places.T, expected @ expected.T, atol=1e-6)
  np.testing.assert_allclose(shares, theirs.explained_variance_ratio_, atol=1e-10)


def test_moving_all_rows_changes_nothing_and_order_follows():
  places, shares = principal_components.project(rows())
  moved, same = principal_components.project(rows().astype(np.float64) - 7)
  np.testing.assert_allclose(moved, places, atol=1e-5)
  np.testing.assert_allclose(same, shares, atol=1e-6)
  np.testing.assert_allclose(principal_components.project(rows()[::-1])[0][::-1], places, atol=1e-9)


def test_rows_that_are_all_alike_have_no_variance():
  places, shares = principal_components.project(np.ones((4, 3)))
  assert not places.any() and not shares.any()


def test_too_few_are_refused():
  with pytest.raises(ValueError, match='2 components'):
    principal_components.project(np.ones((1, 8)))

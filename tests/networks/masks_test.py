"""Masks say which query sees which key."""

import numpy as np

from prompt_tuning_jax.networks import masks


def test_pairwise_is_the_outer_product():
  query, key = np.array([[True, False]]), np.array([[True, True, False]])
  np.testing.assert_array_equal(
      masks.pairwise(query, key), [[[[True, True, False], [False, False, False]]]])


def test_same_segment():
  np.testing.assert_array_equal(
      masks.same_segment(np.array([[1, 2]]), np.array([[1, 1, 2]])),
      [[[[True, True, False], [False, False, True]]]])


def test_causal_compares_positions_not_indices():
  np.testing.assert_array_equal(masks.causal(np.array([2]), np.arange(4)),
                                [[[[True, True, True, False]]]])


def test_positions_count_live_tokens_from_the_start_of_each_segment():
  live = np.array([[0, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1]], bool)
  np.testing.assert_array_equal(masks.positions(live), [[0, 0, 1, 2, 3, 0], [0, 0, 1, 2, 0, 3]])
  segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 3, 3]])
  np.testing.assert_array_equal(masks.positions(live, segments),
                                [[0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]])
  assert masks.positions(live[:, :0], segments[:, :0]).shape == (2, 0)

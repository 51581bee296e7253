"""Nearest words: as scikit-learn finds them, and a prompt made of words is near just these."""

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from prompt_tuning_jax.analysis import nearest_words


def table(rows=40, width=8):
  return np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)


def test_scikit_learn_finds_the_same_rows():
  prompt = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
  ids, cosines = nearest_words.nearest_rows(prompt, table(), 5)
  distances, expected = NearestNeighbors(metric='cosine').fit(table()).kneighbors(prompt, 5)
  np.testing.assert_array_equal(ids, expected)
  np.testing.assert_allclose(cosines, 1 - distances, atol=1e-6)


def test_rows_of_the_table_at_any_scale_are_nearest_to_themselves():
  chosen = np.array([3, 39, 0, 3])
  scaled = table()[chosen] * np.array([[1e-3], [50], [1], [7]], np.float32)
  ids, cosines = nearest_words.nearest_rows(scaled, table(), 2)
  np.testing.assert_array_equal(ids[:, 0], chosen)
  np.testing.assert_allclose(cosines[:, 0], 1, rtol=1e-6)
  np.testing.assert_array_equal(  # a table in another dtype, on the device
      nearest_words.nearest_rows(scaled, jnp.asarray(table(), jnp.bfloat16), 1)[0][:, 0], chosen)


def test_all_rows_come_once_in_falling_order():
  ids, cosines = nearest_words.nearest_rows(table()[:3] + 0.1, table(), 40)
  assert all(sorted(row) == list(range(40)) for row in ids.tolist())
  assert (np.diff(cosines) <= 0).all()


def test_zeros_are_near_nothing_and_ties_take_the_lower_id():
  words = table(5)
  words[1], words[4] = 0, 2 * words[2]
  ids, cosines = nearest_words.nearest_rows(np.stack([np.zeros(8), words[2]]), words, 2)
  np.testing.assert_array_equal(cosines[0], [0, 0])
  np.testing.assert_array_equal(ids, [[0, 1], [2, 4]])


def test_words_are_counted():
  found = nearest_words.most_frequent(np.array([[7, 3], [3, 9], [7, 3]]), lambda i: f'▁{i}')
  assert found == [('▁3', 3), ('▁7', 2), ('▁9', 1)]


@pytest.mark.parametrize('count, width, message', [
    (0, 8, 'from 1 to 40'), (41, 8, 'from 1 to 40'), (1, 4, '4 wide')])
def test_what_does_not_fit_is_refused(count, width, message):
  with pytest.raises(ValueError, match=message):
    nearest_words.nearest_rows(np.ones((2, width), np.float32), table(), count)

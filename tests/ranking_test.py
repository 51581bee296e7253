"""From scores to answers."""

import numpy as np

from prompt_tuning_jax import ranking


def test_probabilities_are_shares_and_need_no_constant():
  scores = np.log([[.1, .3], [.2, .2]]) - 1000
  np.testing.assert_allclose(ranking.probabilities(scores), [[.25, .75], [.5, .5]])
  assert ranking.probabilities([-np.inf, -5.]).tolist() == [0, 1]


def test_a_prior_and_lengths_are_taken_off():
  scores, prior = np.log([.1, .3]), np.log([.1, .6])
  np.testing.assert_allclose(ranking.probabilities(scores, prior), [2 / 3, 1 / 3])
  np.testing.assert_allclose(ranking.probabilities([-2., -3.], lengths=[1, 3]),
                             np.exp([-2, -1]) / np.sum(np.exp([-2, -1])))


def test_the_mean_of_probabilities_is_not_that_of_scores():
  sure, doubtful = np.log([.999, .001]), np.log([.4, .6])
  np.testing.assert_allclose(ranking.mean_probability([sure, doubtful, doubtful]),
                             [.599667, .400333], rtol=1e-5)


def test_the_majority_wins_and_weights_break_a_tie():
  assert ranking.majority_vote(['a', 'b', 'b']) == 'b'
  assert ranking.majority_vote(['a', 'b'], [.6, .9]) == 'b'
  assert ranking.majority_vote(['a', 'b']) == 'a'
  assert ranking.majority_vote(['a', 'b', 'b'], [.9, .1, .1]) == 'b'

"""Metrics against what scikit-learn and a look at the list say."""

import random

import numpy as np
import pytest

from prompt_tuning_jax import metrics


@pytest.mark.parametrize('seed', range(3))
def test_accuracy_is_that_of_scikit_learn(seed):
  reference = pytest.importorskip('sklearn.metrics')
  draw = random.Random(seed)
  targets, predictions = ([draw.choice(['yes', 'no', 'maybe']) for _ in range(31)] for _ in 'ab')
  expected = 100 * reference.accuracy_score(targets, predictions)
  assert metrics.accuracy(targets, predictions)['accuracy'] == pytest.approx(expected)
  assert metrics.exact_match(targets, predictions)['exact_match'] == pytest.approx(expected)


def test_class_numbers_and_arrays_are_as_good_as_texts():
  targets, predictions = np.array([0, 1, 2, 1]), np.array([0, 1, 1, 1])
  assert metrics.accuracy(targets, predictions) == {'accuracy': 75.}
  assert metrics.accuracy(targets.tolist(), predictions.tolist()) == {'accuracy': 75.}


def test_order_does_not_matter_and_bounds_are_reached():
  targets, predictions = ['a', 'b', 'c', 'd'], ['a', 'x', 'c', 'y']
  backwards = metrics.accuracy(targets[::-1], predictions[::-1])
  assert metrics.accuracy(targets, predictions) == backwards == {'accuracy': 50.}
  assert metrics.accuracy(targets, targets) == {'accuracy': 100.}
  assert metrics.accuracy(targets, ['z'] * 4) == {'accuracy': 0.}


def test_exact_match_overlooks_white_space_only():
  assert metrics.exact_match(['a  b\n', 'A'], [' a b', 'a']) == {'exact_match': 50.}
  assert metrics.accuracy(['a  b'], ['a b']) == {'accuracy': 0.}


@pytest.mark.parametrize('metric', [metrics.accuracy, metrics.exact_match])
def test_lists_that_do_not_fit_are_refused(metric):
  for targets, predictions in ((['a'], ['a', 'b']), ([], [])):
    with pytest.raises(ValueError, match='as many predictions as targets'):
      metric(targets, predictions)

"""Metrics equal scikit-learn's, and need neither SeqIO nor TensorFlow."""

import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning_jax.tasks import metrics
from prompt_tuning_jax.tasks.postprocessors import label_to_class_id

sklearn_metrics = pytest.importorskip('sklearn.metrics')


@pytest.fixture(params=range(4))
def answers(request):
  rng = np.random.default_rng(request.param)
  return rng.integers(0, 2, 60), np.where(rng.random(60) < 0.1, -1, rng.integers(0, 2, 60))


def test_accuracy(answers):
  targets, predictions = answers
  assert metrics.accuracy(targets, predictions)['accuracy'] == pytest.approx(
      100 * sklearn_metrics.accuracy_score(targets, predictions))
  assert metrics.accuracy(['a', 'b'], ['a', 'c']) == {'accuracy': 50.0}


def test_f1(answers):
  targets, predictions = answers
  expected = sklearn_metrics.f1_score(targets == 1, predictions == 1)
  assert metrics.f1(targets, predictions)['f1'] == pytest.approx(100 * expected)
  assert metrics.f1([0, 0], [0, 0]) == {'f1': 0.0}


@pytest.mark.parametrize('wrong', [0.0, 0.2])
def test_mean_f1(wrong):
  rng = np.random.default_rng(7)
  targets, predictions = rng.integers(0, 3, 80), rng.integers(0, 3, 80)
  predictions[rng.random(80) < wrong] = -1
  expected = sklearn_metrics.f1_score(targets, predictions, average='macro', labels=[0, 1, 2])
  assert metrics.mean_f1(targets, predictions)['mean_f1'] == pytest.approx(100 * expected)


@pytest.mark.parametrize('classes', [2, 3])
def test_matthews_correlation(classes):
  rng = np.random.default_rng(8)
  targets = rng.integers(0, classes, 90)
  predictions = np.where(rng.random(90) < 0.5, targets, rng.integers(0, classes, 90))
  name = 'matthews_correlation'
  value = metrics.matthews_correlation(targets, predictions)[name]
  assert value == pytest.approx(100 * sklearn_metrics.matthews_corrcoef(targets, predictions))
  assert metrics.matthews_correlation(targets, np.ones(90, int))[name] == 0.0
  assert metrics.matthews_correlation([0, 1, 1], [0, 1, 1])[name] == pytest.approx(100)
  assert metrics.matthews_correlation([0, 1, 0, 1], [1, 0, 1, 0])[name] == pytest.approx(-100)


def test_lengths_must_agree():
  for metric in (metrics.accuracy, metrics.f1, metrics.mean_f1, metrics.matthews_correlation):
    with pytest.raises(ValueError, match='as many predictions'):
      metric([1, 0], [1])
    with pytest.raises(ValueError, match='at least one'):
      metric([], [])


def test_labels_are_told_exactly():
  labels = ['entailment', 'not_entailment']
  assert [label_to_class_id(text, labels) for text in (
      'entailment', 'not_entailment', ' entailment\n', 'Entailment', 'not', '')] == [
          0, 1, 0, -1, -1, -1]


def test_no_seqio():
  code = ('import sys, prompt_tuning_jax.tasks.metrics, prompt_tuning_jax.tasks.postprocessors, '
          'prompt_tuning_jax.tasks.noise, prompt_tuning_jax.tasks.sentences; '
          "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 'jax')))")
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0

"""Metrics equal scikit-learn's and SciPy's, and need neither SeqIO nor TensorFlow."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning_jax.tasks import answers as answer_texts
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
  guesses = [1 - target if guess == -1 else guess
             for target, guess in zip(targets, predictions, strict=True)]
  expected = sklearn_metrics.f1_score(targets, guesses)
  assert expected < sklearn_metrics.f1_score(targets, predictions == 1)
  assert metrics.f1(targets, predictions)['f1'] == pytest.approx(100 * expected)
  assert metrics.f1([0, 0], [0, 0]) == {'f1': 0.0}
  assert metrics.f1([1, 1, 0, 0], [1, -1, -1, 0]) == {'f1': 50.0}


@pytest.mark.parametrize('wrong', [0.0, 0.2])
def test_mean_f1(wrong):
  rng = np.random.default_rng(7)
  targets, predictions = rng.integers(0, 3, 80), rng.integers(0, 3, 80)
  predictions[rng.random(80) < wrong] = -1
  expected = sklearn_metrics.f1_score(targets, predictions, average='macro', labels=[0, 1, 2])
  assert metrics.mean_f1(targets, predictions)['mean_f1'] == pytest.approx(100 * expected)


def test_mean_f1_is_always_over_three_classes():
  rng = np.random.default_rng(6)
  targets, predictions = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
  for _ in range(2):
    expected = sklearn_metrics.f1_score(targets, predictions, average='macro', labels=[0, 1, 2],
                                        zero_division=0)
    assert metrics.mean_f1(targets, predictions)['mean_f1'] == pytest.approx(100 * expected)
    predictions[:5] = 2
  assert metrics.mean_f1([0, 1], [0, 1])['mean_f1'] == pytest.approx(200 / 3)


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


@pytest.mark.parametrize('rounded', [False, True])
def test_correlations(rounded):
  stats = pytest.importorskip('scipy.stats')
  rng = np.random.default_rng(9)
  targets = rng.uniform(0, 5, 70)
  predictions = np.clip(targets + rng.normal(0, 2, 70), 0, 5)
  if rounded:  # Many equal ranks.
    targets, predictions = np.round(targets), np.round(predictions)
  for name in ('pearson', 'spearman'):
    value = getattr(metrics, f'{name}_correlation')(targets.tolist(), predictions.tolist())
    expected = getattr(stats, f'{name}r')(targets, predictions)[0]
    assert value == {f'{name}_correlation': pytest.approx(100 * expected)}


def test_correlations_without_an_answer_or_a_difference():
  stats = pytest.importorskip('scipy.stats')
  targets, predictions = [0.2, 4.0, 3.0, 1.0, 2.5], [-1.0, 4.0, -1.0, 1.2, 7.0]
  for function, expected in ((metrics.pearson_correlation, stats.pearsonr),
                             (metrics.spearman_correlation, stats.spearmanr)):
    (value,) = function(targets, predictions).values()
    assert value == pytest.approx(100 * expected(targets, predictions)[0])
    assert [*function(targets, [3.1] * 5).values(), *function([3.1] * 5, targets).values()] == [
        0, 0]
    assert list(function(targets, targets).values()) == [pytest.approx(100)]
    assert list(function(targets, [5 - score for score in targets]).values()) == [
        pytest.approx(-100)]


@pytest.mark.parametrize('seed', range(3))
def test_multirc(seed):
  rng = np.random.default_rng(seed)
  # Questions have numbers within their paragraph only, and their answers stand far apart.
  groups = [[int(i) for i in rng.integers(0, 4, 2)] for _ in range(60)]
  targets = rng.integers(0, 2, 60)
  predictions = np.where(rng.random(60) < 0.8, targets, rng.integers(-1, 2, 60))
  sides = [[{'label': int(label), 'group': group}
            for label, group in zip(side, groups, strict=True)] for side in (targets, predictions)]
  assert -1 in predictions[targets == 0]
  guesses = np.where(predictions == -1, 1 - targets, predictions)
  expected = sklearn_metrics.f1_score(targets, guesses)
  assert metrics.f1_of_answers(*sides) == {'f1a': pytest.approx(100 * expected)}
  right = []
  for question in itertools.product(range(4), range(4)):
    rows = [i for i, group in enumerate(groups) if tuple(group) == question]
    if rows:
      right.append(all(targets[i] == predictions[i] for i in rows))
  assert 0 < sum(right) < len(right)
  assert metrics.exact_match_of_questions(*sides) == {
      'exact_match': pytest.approx(100 * sum(right) / len(right))}


def test_gender_parity():
  def sides(*labels):
    return [{'label': label, 'group': group} for group, label in labels]

  targets = sides((0, 1), (1, 0), (0, 1), (1, 0), (2, 1), (3, 1), (3, 1))
  predictions = sides((0, 0), (1, 0), (0, 0), (1, 1), (2, 1), (3, -1), (3, -1))
  # 0: equal, though wrong; 1: not; 2: one alone; 3: no answers.
  assert metrics.gender_parity(targets, predictions) == {'gender_parity': pytest.approx(100 / 3)}
  assert metrics.gender_parity(targets[:2], predictions[:2]) == {}


def _overlap(prediction, answer):
  """The F1 of words as another implementation: words are struck out one by one."""
  sides = [[word for word in re.sub(r'[^\w\s]|_', '', text.lower()).split()
            if word not in ('a', 'an', 'the')] for text in (prediction, answer)]
  left, same = list(sides[1]), 0
  for word in sides[0]:
    if word in left:
      left.remove(word)
      same += 1
  precision, recall = same / max(1, len(sides[0])), same / max(1, len(sides[1]))
  return sides[0] == sides[1], 2 * precision * recall / (precision + recall) if same else 0.0


def test_record():
  rng = np.random.default_rng(3)
  words = ['the', 'A', 'U.S.', 'Bob', 'bob', "Ann's", '(Ann)', 'Manson', 'family', 'an,', '_x']
  texts = [' '.join(rng.choice(words, rng.integers(1, 6))) for _ in range(400)]
  targets = [texts[i:i + 1 + i % 3] for i in range(0, 300, 3)]
  predictions = [side[0].upper() if i % 4 == 0 else texts[300 + i]
                 for i, side in enumerate(targets)]
  pairs = [[_overlap(text, answer) for answer in side]
           for side, text in zip(targets, predictions, strict=True)]
  assert metrics.record_em_f1(targets, predictions) == {
      'exact_match': pytest.approx(100 * np.mean([any(e for e, _ in some) for some in pairs])),
      'f1': pytest.approx(100 * np.mean([max(f for _, f in some) for some in pairs]))}
  assert metrics.record_em_f1([['The Manson Family', 'Manson'], ['x'], []], [
      'manson family!', 'y', 'x']) == {
          'exact_match': pytest.approx(100 / 3), 'f1': pytest.approx(100 / 3)}


def test_answers_by_hand():
  assert answer_texts.normalize_answer(' The U.S.  Army,\n an "a.b" theatre_') == (
      'us army ab theatre')
  assert answer_texts.token_f1('the black cat', 'A black, black dog!') == pytest.approx(0.4)
  assert answer_texts.token_f1('black black cat', 'black black dog') == pytest.approx(2 / 3)
  assert answer_texts.token_f1('', 'cat') == answer_texts.token_f1('the', 'a') == 0


def test_lengths_must_agree():
  for metric in (metrics.accuracy, metrics.f1, metrics.mean_f1, metrics.matthews_correlation,
                 metrics.pearson_correlation, metrics.spearman_correlation, metrics.f1_of_answers,
                 metrics.exact_match_of_questions, metrics.gender_parity, metrics.record_em_f1):
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
          'prompt_tuning_jax.tasks.noise, prompt_tuning_jax.tasks.sentences, '
          'prompt_tuning_jax.tasks.answers; '
          "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 'jax')))")
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0

"""The benchmarks' metrics, functions (targets, predictions) -> percents.

They compare what a task's postprocessor gives: class ids, unless they say something else. Plain
NumPy, without SeqIO or TensorFlow: evaluation finds them by name. A prediction that is no class
(-1) is wrong whatever the target. All are larger when better, in percent.
"""

from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.tasks.answers import normalize_answer, token_f1

NUM_CB_CLASSES = 3


def accuracy(targets: Sequence, predictions: Sequence) -> dict[str, float]:
  """Share of predictions equal to their targets."""
  _check(targets, predictions)
  equal = [target == prediction for target, prediction in zip(targets, predictions, strict=True)]
  return {'accuracy': 100.0 * float(np.mean(equal))}


def f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """F1 of class 1 of the classes 0 and 1 (MRPC, QQP).

  As in T5, a prediction that is neither counts as the wrong one of them.
  """
  _check(targets, predictions)
  return {'f1': 100.0 * _binary_f1(np.asarray(targets), np.asarray(predictions))}


def mean_f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """F1 of the classes 0, 1 and 2, averaged without weights (CommitmentBank).

  A class that does not occur counts as 0; a prediction that is no class is one of none of them.
  """
  _check(targets, predictions)
  targets, predictions = np.asarray(targets), np.asarray(predictions)
  return {'mean_f1': 100.0 * float(np.mean([_f1_of_class(targets, predictions, c)
                                            for c in range(NUM_CB_CLASSES)]))}


def matthews_correlation(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """Matthews' correlation of two or more classes (CoLA, AX-b); 0 where one side is constant."""
  _check(targets, predictions)
  targets, predictions = np.asarray(targets), np.asarray(predictions)
  classes = np.union1d(targets, predictions)
  true = (targets[:, None] == classes).astype(np.float64)
  guess = (predictions[:, None] == classes).astype(np.float64)
  # Gorodkin (2004): the covariance of the two indicator matrices over both deviations.
  true -= true.mean(0)
  guess -= guess.mean(0)
  deviations = np.sqrt((true * true).sum() * (guess * guess).sum())
  value = (true * guess).sum() / deviations if deviations > 0 else 0.0
  return {'matthews_correlation': 100.0 * float(value)}


def pearson_correlation(targets: Sequence[float],
                        predictions: Sequence[float]) -> dict[str, float]:
  """Pearson's correlation of scores (STS-B); 0 where one side is constant."""
  _check(targets, predictions)
  scores = (np.asarray(side, np.float64) for side in (targets, predictions))
  return {'pearson_correlation': 100.0 * _correlation(*scores)}


def spearman_correlation(targets: Sequence[float],
                         predictions: Sequence[float]) -> dict[str, float]:
  """The same for ranks, equal scores sharing the mean of theirs (STS-B)."""
  _check(targets, predictions)
  return {'spearman_correlation': 100.0 * _correlation(_ranks(targets), _ranks(predictions))}


def f1_of_answers(targets: Sequence[dict], predictions: Sequence[dict]) -> dict[str, float]:
  """F1 of label 1 over all answers of all questions (MultiRC's F1a); as `f1`."""
  _check(targets, predictions)
  labels = ([side['label'] for side in sides] for sides in (targets, predictions))
  return {'f1a': 100.0 * _binary_f1(*map(np.asarray, labels))}


def exact_match_of_questions(targets: Sequence[dict],
                             predictions: Sequence[dict]) -> dict[str, float]:
  """Share of groups, the questions, whose answers all have the right label (MultiRC's EM)."""
  _check(targets, predictions)
  right = {}
  for target, prediction in zip(targets, predictions, strict=True):
    question = str(target['group'])
    right[question] = right.get(question, True) and target['label'] == prediction['label']
  return {'exact_match': 100.0 * float(np.mean(list(right.values())))}


def gender_parity(targets: Sequence[dict], predictions: Sequence[dict]) -> dict[str, float]:
  """Share of pairs whose two predictions are the same label, right or wrong (AX-g).

  Examples whose partner is missing do not count; without any pair there is no such metric.
  """
  _check(targets, predictions)
  groups = {}
  for prediction in predictions:
    groups.setdefault(str(prediction['group']), []).append(prediction['label'])
  same = [labels[0] == labels[1] != -1 for labels in groups.values() if len(labels) == 2]
  return {'gender_parity': 100.0 * float(np.mean(same))} if same else {}


def record_em_f1(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
  """Exact match and F1 of words with the best of an example's answers (ReCoRD)."""
  _check(targets, predictions)
  pairs = list(zip(targets, predictions, strict=True))
  exact = [any(normalize_answer(answer) == normalize_answer(text) for answer in answers)
           for answers, text in pairs]
  best = [max((token_f1(text, answer) for answer in answers), default=0.0)
          for answers, text in pairs]
  return {'exact_match': 100.0 * float(np.mean(exact)), 'f1': 100.0 * float(np.mean(best))}


def _ranks(values: Sequence[float]) -> np.ndarray:
  _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[place]


def _correlation(xs: np.ndarray, ys: np.ndarray) -> float:
  if len({*xs.tolist()}) == 1 or len({*ys.tolist()}) == 1:
    return 0.0
  xs, ys = xs - xs.mean(), ys - ys.mean()
  return float((xs * ys).sum() / np.sqrt((xs * xs).sum() * (ys * ys).sum()))


def _binary_f1(targets: np.ndarray, predictions: np.ndarray) -> float:
  is_class = (predictions == 0) | (predictions == 1)
  return _f1_of_class(targets, np.where(is_class, predictions, 1 - targets), 1)


def _f1_of_class(targets: np.ndarray, predictions: np.ndarray, positive: int) -> float:
  hits = np.sum((targets == positive) & (predictions == positive))
  total = np.sum(targets == positive) + np.sum(predictions == positive)
  return float(2 * hits / total) if total else 0.0


def _check(targets: Sequence, predictions: Sequence) -> None:
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(f'Metrics need as many predictions as targets and at least one, got '
                     f'{len(predictions)} for {len(targets)}.')

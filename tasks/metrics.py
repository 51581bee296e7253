"""The benchmarks' metrics, on class ids or texts; functions (targets, predictions) -> percents.

Plain NumPy, without SeqIO or TensorFlow: evaluation finds them by name. A prediction that is no
class (-1) is wrong. All are larger when better, in percent.
"""

from collections.abc import Sequence

import numpy as np


def accuracy(targets: Sequence, predictions: Sequence) -> dict[str, float]:
  """Share of predictions equal to their targets."""
  _check(targets, predictions)
  equal = [target == prediction for target, prediction in zip(targets, predictions, strict=True)]
  return {'accuracy': 100.0 * float(np.mean(equal))}


def f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """F1 of class 1 against everything else (MRPC, QQP)."""
  _check(targets, predictions)
  return {'f1': 100.0 * _f1_of_class(np.asarray(targets), np.asarray(predictions), 1)}


def mean_f1(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """F1 of each class, averaged without weights (CommitmentBank)."""
  _check(targets, predictions)
  targets, predictions = np.asarray(targets), np.asarray(predictions)
  # As SuperGLUE does, over the classes that occur; a prediction that is no class counts as none.
  classes = sorted({*targets.tolist(), *predictions.tolist()} - {-1})
  return {'mean_f1': 100.0 * float(np.mean([_f1_of_class(targets, predictions, c)
                                            for c in classes]))}


def matthews_correlation(targets: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
  """Matthews' correlation of two or more classes (CoLA); 0 where one side is constant."""
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


def _f1_of_class(targets: np.ndarray, predictions: np.ndarray, positive: int) -> float:
  hits = np.sum((targets == positive) & (predictions == positive))
  total = np.sum(targets == positive) + np.sum(predictions == positive)
  return float(2 * hits / total) if total else 0.0


def _check(targets: Sequence, predictions: Sequence) -> None:
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(f'Metrics need as many predictions as targets and at least one, got '
                     f'{len(predictions)} for {len(targets)}.')

"""Metrics of texts and labels, in percent. A task's cache names them; no SeqIO, no TensorFlow."""

from collections.abc import Sequence
from typing import Any


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> dict[str, float]:
  """The share of predictions equal to their targets."""
  return {'accuracy': _percent_equal(targets, predictions)}


def exact_match(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
  """The share of texts equal to their targets but for white space."""
  return {'exact_match': _percent_equal([' '.join(text.split()) for text in targets],
                                        [' '.join(text.split()) for text in predictions])}


def _percent_equal(targets: Sequence[Any], predictions: Sequence[Any]) -> float:
  if len(targets) != len(predictions) or len(targets) == 0:
    raise ValueError('A metric needs as many predictions as targets and at least one, got '
                     f'{len(predictions)} and {len(targets)}.')
  equal = sum(bool(t == p) for t, p in zip(targets, predictions, strict=True))
  return 100 * equal / len(targets)

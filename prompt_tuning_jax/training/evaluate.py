"""Evaluation of a task's split with the task's own metrics."""

from collections import Counter

import numpy as np

from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.types import PyTree


class Evaluator:
  """Predicts every example of a split and computes the task's metrics.

  Examples that list their possible answers are answered by rank classification, others by
  decoding; a split without metrics is measured by its loss per target token. `metric` names the
  number that chooses the best (default: the task's first); `loss` and `perplexity` are better
  when smaller, everything else when larger.
  """

  def __init__(self, predictor: Predictor, cache: TokenCache, metric: str | None = None,
               max_examples: int | None = None):
    self._predictor, self._cache = predictor, cache
    self._functions = cache.metric_fns()
    self._count = min(cache.num_examples, max_examples or cache.num_examples)
    self._rows = [cache.row(i) for i in range(self._count)] if self._functions else []
    self._texts: list[str] = []
    self.metric = metric or (None if self._functions else 'loss')

  @property
  def labels(self) -> list[str] | None:
    """The answers of a task whose examples all have the same; None for any other."""
    kinds = {tuple(row.get('choices') or ()) for row in self._rows}
    return list(kinds.pop()) or None if len(kinds) == 1 else None

  def majority(self) -> dict[str, float]:
    """The metrics of always giving the most frequent answer; {} where there are no labels."""
    if not self.labels:
      return {}
    target = Counter(row['targets'] for row in self._rows).most_common(1)[0][0]
    return self._metrics([target] * self._count)

  def __call__(self, params: PyTree) -> tuple[float, dict[str, float]]:
    """(the value that chooses the best, larger being better; all metrics)."""
    inputs = [self._cache.inputs(i) for i in range(self._count)]
    if not self._functions:
      values = self._loss(params, inputs)
    else:
      self._texts = self._answers(params, inputs)
      values = self._metrics(self._texts)
    self.metric = self.metric or next(iter(values))
    if self.metric not in values:
      raise ValueError(f'The metric {self.metric!r} is not among those of this task: '
                       f'{", ".join(values)}.')
    smaller_is_better = self.metric in ('loss', 'perplexity')
    return (-1 if smaller_is_better else 1) * values[self.metric], values

  def answered(self) -> list[dict[str, str]]:
    """Inputs, targets and the last prediction of every example, as text."""
    return [{'inputs': row['inputs'], 'targets': row['targets'], 'prediction': text}
            for row, text in zip(self._rows, self._texts, strict=False)]

  def _metrics(self, texts: list[str]) -> dict[str, float]:
    predictions = [self._cache.postprocess(text, row)
                   for text, row in zip(texts, self._rows, strict=True)]
    targets = [row['target'] for row in self._rows]
    return {name: float(value) for function in self._functions
            for name, value in function(targets, predictions).items()}

  def _loss(self, params: PyTree, inputs: list[np.ndarray]) -> dict[str, float]:
    targets = [self._cache.targets(i) for i in range(self._count)]
    total = float(np.sum(self._predictor.score(params, inputs, targets)))
    loss = -total / sum(map(len, targets))
    return {'loss': loss, 'perplexity': float(np.exp(min(loss, 700.0)))}

  def _answers(self, params: PyTree, inputs: list[np.ndarray]) -> list[str]:
    if all(row.get('choices') for row in self._rows):
      choices = [row['choices'] for row in self._rows]
      ranked = self._predictor.rank(params, inputs, choices)
      return [options[int(np.argmax(scores))]
              for options, scores in zip(choices, ranked, strict=True)]
    return self._predictor.generate(params, inputs)

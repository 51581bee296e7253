"""Evaluation of a task's split with the task's own metrics."""

import dataclasses
import difflib
from collections import Counter

import numpy as np

from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.types import PyTree

SMALLER_IS_BETTER = ('loss', 'perplexity')


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """All metrics of an evaluation, and the name of the one that chooses the best."""

  metric: str
  values: dict[str, float]

  @property
  def value(self) -> float:
    """The metric that chooses the best, as the user sees it."""
    return self.values[self.metric]

  @property
  def rank(self) -> float:
    """The same, larger being better."""
    return -self.value if self.metric in SMALLER_IS_BETTER else self.value


class Evaluator:
  """Predicts every example of a split and computes the task's metrics.

  Examples that list their possible answers are answered by rank classification, others by
  decoding; a split without metrics is measured by its loss per target token. `metric` names the
  number that chooses the best (default: the task's first); `loss` and `perplexity` are better
  when smaller, everything else when larger. A metric that the task lacks is a ValueError.
  """

  def __init__(self, predictor: Predictor, cache: TokenCache, metric: str | None = None,
               max_examples: int | None = None):
    self._predictor, self._cache = predictor, cache
    self._functions = cache.metric_fns()
    self._count = min(cache.num_examples, max_examples or cache.num_examples)
    self._rows = [cache.row(i) for i in range(self._count)] if self._functions else []
    self._texts: list[str] = []
    names = list(self._metrics([row['targets'] for row in self._rows])) or [*SMALLER_IS_BETTER]
    self.metric = metric or names[0]
    if self.metric not in names:
      near = difflib.get_close_matches(self.metric, names, 1)
      hint = f' Did you mean {near[0]}?' if near else ''
      raise ValueError(f'The task {cache.meta["task"]} has the metrics {", ".join(names)}, not '
                       f'{self.metric!r}.{hint}')

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

  def __call__(self, params: PyTree) -> Evaluation:
    """Evaluates the model with these parameters."""
    inputs = [self._cache.inputs(i) for i in range(self._count)]
    if not self._functions:
      return Evaluation(self.metric, self._loss(params, inputs))
    self._texts = self._answers(params, inputs)
    return Evaluation(self.metric, self._metrics(self._texts))

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

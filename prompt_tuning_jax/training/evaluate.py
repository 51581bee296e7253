"""Evaluation of a task's split with the task's own metrics."""

import dataclasses
import difflib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints import processes
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.prompted_model import Choices
from prompt_tuning_jax.training import ensemble
from prompt_tuning_jax.types import PyTree

LOSSES = ('targets', 'labels', 'both')
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
    smaller = self.metric.rpartition('/')[2] in SMALLER_IS_BETTER  # 'TASK/loss' in a mixture
    return -self.value if smaller else self.value


def alike(evaluation: Evaluation) -> Evaluation:
  """The first process's evaluation in every one, so that all decide alike what follows.

  They have the same answers, but a metric may draw at random.
  """
  return dataclasses.replace(evaluation, values=processes.of_the_first(evaluation.values))


def check_labelled(cache: TokenCache) -> None:
  """Raises ValueError where the benchmark hides a label: there is nothing to learn or measure."""
  row = cache.meta.get('first_hidden')
  if row is not None:
    raise ValueError(f'{cache.meta["task"]}, {cache.meta["split"]}, row {row}: the label is hidden '
                     '(-1), so nothing can be learnt or measured: choose another split, or predict '
                     'with `infer`.')


def labels_of(rows: Iterable[Mapping[str, Any]]) -> list[str] | None:
  """The possible answers that all rows of a cache share; None where they do not."""
  kinds = set()
  for row in rows:
    kinds.add(tuple(row.get('choices') or ()))
    if len(kinds) > 1 or () in kinds:
      return None
  return list(kinds.pop()) if kinds else None


def first_pieces(caches: Sequence[TokenCache], vocabulary: Any,
                 ) -> tuple[tuple[int, ...], ...]:
  """The ids of each label of a task up to the first piece that tells which label it is.

  Before that piece stands what all targets begin with, such as BART's <s> or a sentinel: [C, K]
  ids, K from 1.

  Raises ValueError where there are several tasks, no labels, or some labels that begin alike or are
  longer than targets may be.
  """
  labels = labels_of(caches[0].rows) if len(caches) == 1 else None
  if not labels:
    raise ValueError('Expected one task whose targets are labels.')
  every = _uncut(caches[0], labels, vocabulary)
  most = len(os.path.commonprefix(every)) + 1
  ids = tuple(tuple(label[:most]) for label in every)
  if len(set(ids)) < len(ids):
    raise ValueError(f'Labels need first pieces of their own, got {", ".join(labels)}: `python -m '
                     'prompt_tuning_jax.label_words` finds words for them.')
  return ids


def _uncut(cache: TokenCache, labels: Sequence[str], vocabulary: Any) -> list[list[int]]:
  """The ids of each label; ValueError where targets have no room for them."""
  every = [vocabulary.framed(vocabulary.encode(label), 'targets') for label in labels]
  most = cache.meta['lengths']['targets']
  longest, label = max((len(ids), label) for ids, label in zip(every, labels, strict=True))
  if longest > most:
    raise ValueError(f'The label {label!r} takes {longest} tokens, its end included, and the '
                     f"targets' length is {most}: raise 'targets' of TASK_FEATURE_LENGTHS.")
  return every


def choices(loss: str, caches: Sequence[TokenCache], vocabulary: Any,
            rank_labels: bool) -> Choices | None:
  """What a loss needs: one of 'targets', 'labels' (among the task's), or 'both'.

  Raises ValueError for others, where labels are trained to be ranked and are not ranked, and where
  labels would be trained without their end, while ranking asks for all of them.
  """
  if loss not in LOSSES:
    raise ValueError(f'The loss must be one of {", ".join(LOSSES)}, got {loss!r}.')
  if loss == 'labels' and not rank_labels:
    raise ValueError("The loss 'labels' trains labels to be ranked: leave rank_labels True, or "
                     "take 'both'.")
  if loss != 'targets':
    return Choices(first_pieces(caches, vocabulary), loss == 'both')
  for cache in caches:
    if cache.meta['num_cut']['targets'] and (labels := labels_of(cache.read_rows())):
      _uncut(cache, labels, vocabulary)
  return None


def evaluator(predictors: Sequence[Predictor], caches: Sequence[TokenCache],
              metric: str | None = None, max_examples: int | None = None,
              rank_labels: bool = True) -> 'Evaluator | MixtureEvaluator | None':
  """The evaluation of one task, or of each of several; None where there is nothing to evaluate."""
  if not caches:
    return None
  made = [Evaluator(predictor, cache, None if len(caches) > 1 else metric, max_examples,
                    rank_labels) for predictor, cache in zip(predictors, caches, strict=True)]
  return made[0] if len(made) == 1 else MixtureEvaluator(made, metric)


class Evaluator:
  """Predicts every example of a split and computes the task's metrics.

  Examples that list their possible answers are answered by rank classification, unless
  `rank_labels` is False, and others by decoding; a split without metrics is measured by its loss
  per target token. `metric` names the number that chooses the best (default: the task's first);
  `loss` and `perplexity` are better when smaller, everything else when larger. Raises ValueError
  for a metric that the task lacks, and where the network has no room for an example.
  """

  def __init__(self, predictor: Predictor, cache: TokenCache, metric: str | None = None,
               max_examples: int | None = None, rank_labels: bool = True):
    self._rank_labels = rank_labels
    self._predictor, self._cache = predictor, cache
    self._functions = cache.metric_fns()
    self._count = min(cache.num_examples, max_examples or cache.num_examples)
    self._rows = cache.rows[:self._count] if self._functions else []
    self._texts: list[str] = []
    check_labelled(cache)
    self.task = cache.meta['task']
    self.names = list(self._metrics([row['targets'] for row in self._rows])) or [*SMALLER_IS_BETTER]
    self.metric = _known(metric, self.names, self.task)
    if predictor.is_limited:
      self._check_room()

  def _check_room(self) -> None:
    targets = None
    if not self._functions:
      targets = [[self._cache.targets(i)] for i in range(self._count)]
    elif self.choices:
      targets = self._predictor.choice_ids(self.choices)
    self._predictor.check(self._inputs, targets)

  @property
  def _inputs(self) -> list[np.ndarray]:
    return [self._cache.inputs(i) for i in range(self._count)]

  @property
  def part(self) -> list:
    """Which examples are evaluated."""
    return [*self._cache.part, self._count]

  @property
  def labels(self) -> list[str] | None:
    """The answers of a task whose examples all have the same; None for any other."""
    return labels_of(self._rows)

  def of_tasks(self, values: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """{task: (name, value) of its own metric} from the values of an evaluation."""
    return {self.task: (self.metric, values[self.metric])}

  def majority(self) -> dict[str, float]:
    """The metrics of always giving the most frequent answer; {} where there are no labels."""
    if not self.labels:
      return {}
    target = Counter(row['targets'] for row in self._rows).most_common(1)[0][0]
    return self._metrics([target] * self._count)

  def __call__(self, params: PyTree) -> Evaluation:
    """Evaluates the model with these parameters."""
    if not self._functions:
      return Evaluation(self.metric, self._loss(params, self._inputs))
    self._texts = self._answers(params, self._inputs)
    return Evaluation(self.metric, self._metrics(self._texts))

  def ensemble(self, params: PyTree, bank: PromptBank) -> tuple[ensemble.Answers, dict[str, Any]]:
    """What the prompts of a bank answer, and how well: each, and together (`ensemble.report`)."""
    if not self._functions:
      raise ValueError(f'{self.task} is measured by its loss: an ensemble needs answers.')
    given = ensemble.answers(self._predictor, params, bank, self._inputs, self.choices)
    self._texts = given.majority_vote
    return given, ensemble.report(given, self._metrics,
                                  lambda values: Evaluation(self.metric, values).rank)

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

  @property
  def choices(self) -> list[list[str]] | None:
    """What is ranked for each example; None where texts are generated."""
    choices = [row.get('choices') for row in self._rows]
    return choices if self._rank_labels and all(choices) else None

  @property
  def generates(self) -> bool:
    """Whether answers are generated texts; else labels are ranked or the loss is measured."""
    return bool(self._functions) and self.choices is None

  def _answers(self, params: PyTree, inputs: list[np.ndarray]) -> list[str]:
    if choices := self.choices:
      ranked = self._predictor.rank(params, inputs, choices)
      return [options[int(np.argmax(scores))]
              for options, scores in zip(choices, ranked, strict=True)]
    return self._predictor.generate(params, inputs)


class MixtureEvaluator:
  """Evaluates every task of a mixture; `mean`, of each task's own metric, chooses the best.

  Where every task is measured by its loss, `loss` is their mean.
  """

  def __init__(self, evaluators: Sequence[Evaluator], metric: str | None = None):
    self._evaluators = evaluators
    smaller = {part.metric in SMALLER_IS_BETTER for part in evaluators}
    if len(smaller) > 1 and not metric:
      raise ValueError('Some tasks of the mixture have metrics and some only a loss, and no mean '
                       'of them chooses a best: name one as `metric` (TASK/METRIC), or set '
                       'EVAL_PERIOD=0.')
    self._mean = 'loss' if smaller == {True} else 'mean' if smaller == {False} else None
    names = [f'{part.task}/{name}' for part in evaluators for name in part.names]
    names = [self._mean, *names] if self._mean else names
    self.metric = _known(metric, names, '+'.join(part.task for part in evaluators))

  labels = None  # A mixture's tasks have different ones.

  @property
  def part(self) -> list:
    """Which examples are evaluated."""
    return [part.part for part in self._evaluators]

  def of_tasks(self, values: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """As `Evaluator.of_tasks`, for every task that is evaluated."""
    return {part.task: (part.metric, values[f'{part.task}/{part.metric}'])
            for part in self._evaluators}

  def majority(self) -> dict[str, float]:
    """As `Evaluator.majority`, for every task; {} where one has no labels."""
    each = [part.majority() for part in self._evaluators]
    return self._named(each) if all(each) else {}

  def __call__(self, params: PyTree) -> Evaluation:
    """Evaluates the model with these parameters."""
    return Evaluation(self.metric, self._named([part(params).values for part in self._evaluators]))

  def _named(self, each: Sequence[dict[str, float]]) -> dict[str, float]:
    own = [values[part.metric] for part, values in zip(self._evaluators, each, strict=True)]
    return {**({self._mean: float(np.mean(own))} if self._mean else {}),
            **{f'{part.task}/{name}': value
               for part, values in zip(self._evaluators, each, strict=True)
               for name, value in values.items()}}


def _known(metric: str | None, names: list[str], task: str) -> str:
  """The metric that is asked for, or the first; raises ValueError with the nearest name."""
  if metric is None or metric in names:
    return metric or names[0]
  near = difflib.get_close_matches(metric, names, 1)
  hint = f' Did you mean {near[0]}?' if near else ''
  raise ValueError(f'The task {task} has the metrics {", ".join(names)}, not {metric!r}.{hint}')

"""From the scores of choices to an answer: probabilities, and what several prompts say together."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from prompt_tuning_jax.types import Array


def check_distinct(labels: Sequence[str], ids: Iterable[Sequence[int]]) -> None:
  """Raises ValueError where two of some labels have the same ids, or there is one alone."""
  if len(set(map(tuple, ids))) < max(len(labels), 2):
    raise ValueError('Labels should be two or more that the vocabulary writes differently, got '
                     f'{list(labels)}.')


def probabilities(log_likelihoods: Array, prior: Array | None = None,
                  lengths: Array | None = None) -> np.ndarray:
  """What part each of C choices has of all: [..., C] nats -> [..., C] float64 that sum to 1.

  Args:
    prior: [C], log p of each choice before the input is seen, which is taken off: a choice that is
      likely whatever the input gains nothing by that (Zhao et al. 2021; Holtzman et al. 2021).
    lengths: [C], tokens of each choice: a score is then a mean over them, and long choices are not
      less likely for being long.
  """
  scores = np.asarray(log_likelihoods, np.float64)
  scores = scores if prior is None else scores - np.asarray(prior, np.float64)
  scores = scores if lengths is None else scores / np.asarray(lengths, np.float64)
  shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return shares / shares.sum(axis=-1, keepdims=True)


def mean_probability(log_likelihoods: Array) -> np.ndarray:
  """The mean of N members' probabilities of C choices: [N, C] nats -> [C] float64.

  One of the two ways to join an ensemble of prompts (Lester et al. 2021, section 6).
  """
  return np.mean(probabilities(log_likelihoods), axis=0)


def majority_vote(answers: Sequence[str], weights: Sequence[float] | None = None) -> str:
  """The answer that most members give, which is how Lester et al. (2021, section 6) join them.

  Of equally many votes the one whose voters have the larger sum of `weights` (their probability of
  it, say) wins, and then the one that was given first.
  """
  votes, support = Counter(answers), Counter()
  for answer, weight in zip(answers, weights or [0.0] * len(answers), strict=True):
    support[answer] += weight
  return max(votes, key=lambda answer: (votes[answer], support[answer]))

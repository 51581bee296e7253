"""Words for labels, chosen from data: a frozen model tells labels apart by how probable they are.

After Shin et al. (2020, section 2.3), who take from a trained layer the words that go with a label,
and Gao et al. (2021, section 5.1), who ask the model itself how probable words are. Of the words
that the model thinks of at all, a label's candidates are those that its examples make more probable
than the others' do. Words are then changed label by label, as long as the right ones gain by it.
"""

import numpy as np

from prompt_tuning_jax.types import Array


def candidates(log_p: Array, labels: Array, words: Array, most: int = 20,
               considered: int = 1000) -> np.ndarray:
  """The words that go best with each label.

  Args:
    log_p: [n, V], of every next word after each example, in nats.
    labels: [n] int, from 0 to C - 1.
    words: [W], ids to choose from; only the `considered` most probable on average are.

  Returns:
    [C, most] ids, best first.
  """
  means = np.stack([log_p[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
  words = np.asarray(words)[np.argsort(-means.mean(axis=0)[words], kind='stable')[:considered]]
  others = (means.sum(axis=0) - means) / max(len(means) - 1, 1)
  order = np.argsort(-(means - others)[:, words], axis=1, kind='stable')
  return words[order[:, :most]]


def choose(log_p: Array, labels: Array, found: Array) -> list[int]:
  """A word for each label out of its candidates `found` [C, K], all of them different.

  Starts from the first candidates and takes whatever raises the mean log probability of the right
  label among all, one label after another, until nothing does.
  """
  chosen: list[int] = []
  for row in found:
    chosen.append(next((int(word) for word in row if word not in chosen), -1))
  if -1 in chosen:
    raise ValueError('Labels have no words of their own: raise --candidates, or give more rows.')
  best, improved = likelihood(log_p, labels, chosen), True
  while improved:
    improved = False
    for label, row in enumerate(found):
      for word in map(int, row):
        other = [*chosen[:label], word, *chosen[label + 1:]]
        if word not in chosen and (value := likelihood(log_p, labels, other)) > best:
          chosen, best, improved = other, value, True
  return chosen


def likelihood(log_p: Array, labels: Array, chosen: list[int]) -> float:
  """The mean log probability of the right label's word among the chosen ones."""
  scores = log_p[:, chosen]
  right = scores[np.arange(len(labels)), labels]
  return float(np.mean(right - np.logaddexp.reduce(scores, axis=1)))


def accuracy(log_p: Array, labels: Array, chosen: list[int]) -> float:
  """Percent of examples whose label's word is the most probable of the chosen ones."""
  return 100.0 * float(np.mean(np.argmax(log_p[:, chosen], axis=1) == labels))

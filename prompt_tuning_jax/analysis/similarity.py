"""How alike trained prompts are, and what a target starts from (SPoT, Vu et al. 2022).

A prompt trained on a task is also an embedding of that task: the more alike two prompts of one base
are, the better one transfers to the other's task. All sums are in float64.
"""

from collections.abc import Sequence

import numpy as np

from prompt_tuning_jax.types import Array


def cosine_of_means(prompts: Sequence[Array]) -> np.ndarray:
  """K prompts [P_k, D] -> [K, K], 'cosine similarity of average tokens'.

  cos(mean_i a_i, mean_j b_j). Scaling a prompt or permuting its rows changes nothing; lengths may
  differ. A mean of zero has cosine 0 with everything.
  """
  means = unit_rows(np.stack([np.mean(prompt, axis=0, dtype=np.float64) for prompt in prompts]))
  return means @ means.T


def mean_of_cosines(prompts: Sequence[Array]) -> np.ndarray:
  """K prompts [P_k, D] -> [K, K], 'per-token average cosine similarity'.

  mean_ij cos(a_i, b_j). Scaling any row or permuting rows changes nothing; lengths may differ. The
  diagonal is below 1 unless all rows of a prompt point one way. A row of zeros has cosine 0 with
  everything.
  """
  # The mean over pairs of products is the product of the means: no [P, P] is made.
  means = np.stack([np.mean(unit_rows(prompt), axis=0) for prompt in prompts])
  return means @ means.T


def transfer_weights(similarities: Array) -> np.ndarray:
  """Similarities [K] of K sources to a target -> weights [K] that sum to 1, in proportion.

  For the 'top-k weighted average'. Raises ValueError unless all are positive: a source that points
  away from the target would be subtracted.
  """
  similarities = np.asarray(similarities, np.float64)
  if not similarities.size or (similarities <= 0).any():
    raise ValueError('A weighted average needs sources whose similarity to the target is positive, '
                     f'got {np.round(similarities, 4).tolist()}: take fewer of the best ones.')
  return similarities / similarities.sum()


def weighted_average(prompts: Sequence[Array], weights: Array) -> np.ndarray:
  """K prompts [P, D] and weights [K] -> their weighted sum [P, D] float32.

  Raises ValueError where shapes differ: row i of one prompt is averaged with row i of the others.
  """
  shapes = {tuple(prompt.shape) for prompt in prompts}
  if len(shapes) != 1:
    raise ValueError('Only prompts of one length can be averaged, got the shapes '
                     f'{sorted(map(list, shapes))}: leave out those of other lengths.')
  stacked = np.stack(prompts).astype(np.float64)
  return np.einsum('k,kpd->pd', np.asarray(weights, np.float64), stacked).astype(np.float32)


def unit_rows(rows: Array) -> np.ndarray:
  """Rows [P, D] scaled to length 1, in float64; rows of zeros stay."""
  rows = np.asarray(rows, np.float64)
  lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
  return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)

"""The plane in which rows of vectors differ most."""

import numpy as np

from prompt_tuning_jax.types import Array


def project(rows: Array, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
  """Rows [n, D] on their first principal components, in float64.

  Returns (coordinates [n, count], each component's share of the variance [count]). A component's
  sign is that with which the row farthest out is positive. Raises ValueError for fewer than `count`
  rows or columns.
  """
  rows = np.asarray(rows, np.float64)
  if min(rows.shape) < count:
    raise ValueError(f'{count} components need as many rows and columns, got {list(rows.shape)}.')
  centred = rows - rows.mean(axis=0)
  # Of both products, which have the same eigenvalues, the smaller one: few rows may be wide.
  if len(rows) <= rows.shape[1]:
    variances, left = np.linalg.eigh(centred @ centred.T)
    places = left * np.sqrt(np.maximum(variances, 0))
  else:
    variances, components = np.linalg.eigh(centred.T @ centred)
    places = centred @ components
  places, variances = places[:, :-count - 1:-1], variances[:-count - 1:-1]
  farthest = np.argmax(np.abs(places), axis=0)
  places = places * np.where(places[farthest, np.arange(count)] < 0, -1, 1)
  whole = (centred ** 2).sum()
  return places, variances / whole if whole else np.zeros(count)

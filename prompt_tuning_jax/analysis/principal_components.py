"""The plane in which rows of vectors differ most."""

import numpy as np

from prompt_tuning_jax.types import Array


def project(rows: Array, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
  """Rows [n, D] on their first principal components, in float64.

  Returns (coordinates [n, count], each component's share of the variance [count]). The largest
  entry of a component is positive, as scikit-learn has it. Raises ValueError for fewer than `count`
  rows or columns.
  """
  rows = np.asarray(rows, np.float64)
  if min(rows.shape) < count:
    raise ValueError(f'{count} components need as many rows and columns, got {list(rows.shape)}.')
  centred = rows - rows.mean(axis=0)
  _, sizes, components = np.linalg.svd(centred, full_matrices=False)
  components = components[:count]
  largest = np.argmax(np.abs(components), axis=1)
  components = components * np.sign(components[np.arange(count), largest])[:, None]
  variances = sizes ** 2
  whole = variances.sum()
  shares = variances[:count] / whole if whole else np.zeros(count)
  return centred @ components.T, shares

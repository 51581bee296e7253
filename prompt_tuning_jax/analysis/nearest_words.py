"""The words of the base that a prompt lies near (Lester et al. 2021, section 7)."""

import collections
from collections.abc import Callable

import numpy as np

from prompt_tuning_jax.types import Array


def nearest_rows(prompt: Array, table: Array, count: int = 5) -> tuple[np.ndarray, np.ndarray]:
  """The `count` rows of an embedding table that point most nearly as each row of a prompt.

  prompt: [P, D]; table: [V, D] of any float dtype. Returns (ids [P, count] int, their cosines
  [P, count] float32), the nearest first, the lower id first where two are equally near. Rows of
  zeros have cosine 0. Raises ValueError where widths differ or the table has fewer rows.
  """
  prompt, table = (np.asarray(rows).astype(np.float32) for rows in (prompt, table))
  if prompt.shape[-1] != table.shape[-1]:
    raise ValueError(f'The prompt is {prompt.shape[-1]} wide, but the embedding table '
                     f'{table.shape[-1]}: compare it with the base it was trained on.')
  if not 1 <= count <= len(table):
    raise ValueError(f'The number of nearest words must be from 1 to {len(table)}, got {count}.')
  lengths = np.outer(np.linalg.norm(prompt, axis=-1), np.linalg.norm(table, axis=-1))
  products = np.einsum('pd,vd->pv', prompt, table, optimize=True)
  cosines = np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)
  ids = np.argsort(-cosines, axis=-1, kind='stable')[:, :count]
  return ids, np.take_along_axis(cosines, ids, axis=-1)


def most_frequent(ids: Array, piece: Callable[[int], str]) -> list[tuple[str, int]]:
  """Ids of any shape -> [(how `piece` writes an id, how often it occurs), …], most frequent first.

  Among equally frequent ones, the one seen first comes first.
  """
  counts = collections.Counter(np.asarray(ids).ravel().tolist())
  return [(piece(token), times) for token, times in counts.most_common()]

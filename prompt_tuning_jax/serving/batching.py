"""Which of the rows that wait are computed together: the oldest, and those that fit beside it."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.prompt_bank import Slot
from prompt_tuning_jax.serving.programs import Shapes

GENERATE = 0  # the kind of rows that are decoded; others are the width of their labels


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
  """One row of a batch to be: a text to continue once, or to score the labels of.

  Attributes:
    owner: whose it is, and `index` its number there.
    served: the bank and programs of when it was accepted: what comes later does not change it.
    slot: its prompt's place in that bank.
    tokens: its ids, prompt and all.
    kind: GENERATE, or the width of its labels.
    width: what it is padded to, at least.
    since: the time.monotonic() at which it was accepted.
    labels: the ids of each label.
    choice: its (temperature, top_k, top_p, seed).
    limit: most tokens of its text.
    stops: its stop strings.
  """

  owner: Any
  index: int
  served: Any
  slot: Slot
  tokens: np.ndarray
  kind: int
  width: int
  since: float
  labels: tuple[tuple[int, ...], ...] = ()
  choice: tuple[float, int, float, int] = (0.0, 0, 1.0, 0)
  limit: int = 0
  stops: tuple[str, ...] = ()


def next_batch(rows: Sequence[Row], shapes: Shapes, kinds: Collection[int]) -> list[Row]:
  """The oldest row of these kinds and its company, of the same kind and version.

  Rows of its width go with it up to the largest batch. Narrower ones only take places that would
  be padding, so they make a batch no slower.
  """
  first = next((row for row in rows if row.kind in kinds), None)
  if first is None:
    return []
  alike = [row for row in rows if row.kind == first.kind and row.served is first.served]
  taken = [row for row in alike if row.width == first.width][:shapes.batch_sizes[-1]]
  room = shapes.batch_size(len(taken)) - len(taken)
  return taken + [row for row in alike if row.width < first.width][:room]


def is_full(rows: Sequence[Row], shapes: Shapes) -> bool:
  """Whether waiting longer would bring the oldest row no more company."""
  kinds = {row.kind for row in rows[:1]}
  return len(next_batch(rows, shapes, kinds)) >= shapes.batch_sizes[-1]


def padded(rows: Sequence[Row], shapes: Shapes) -> tuple[np.ndarray, list[Slot]]:
  """Ids [B, T] int32, and the slots of B rows; B and T are the smallest that have room.

  Rows that are not there have one token, and no prompt.
  """
  tokens = np.zeros((shapes.batch_size(len(rows)), max(row.width for row in rows)), np.int32)
  tokens[len(rows):, 0] = 1
  for places, row in zip(tokens, rows, strict=False):
    places[:len(row.tokens)] = row.tokens
  return tokens, [row.slot for row in rows] + [Slot()] * (len(tokens) - len(rows))

"""Which rows go together: the oldest first, nothing mixed that may not be, no useless padding."""

import numpy as np

from prompt_tuning_jax.prompt_bank import Slot
from prompt_tuning_jax.serving.batching import GENERATE, Row, is_full, next_batch, padded
from prompt_tuning_jax.serving.programs import Shapes, widths_up_to

SHAPES = Shapes((1, 4, 8), (16, 32, 64), (32, 256), 8)


def random_rows(rng) -> list[Row]:
  versions = [object(), object()]
  return [Row(None, 0, versions[rng.integers(2)], Slot(), np.arange(1, rng.integers(2, 17)),
              int(rng.choice([GENERATE, 32, 256])), int(rng.choice(SHAPES.widths)), float(i))
          for i in range(rng.integers(1, 60))]


def test_a_batch_is_the_oldest_row_and_its_like():
  rng = np.random.default_rng(0)
  for _ in range(200):
    rows = random_rows(rng)
    kinds = {GENERATE} if rng.integers(2) else {32, 256}
    batch = next_batch(rows, SHAPES, kinds)
    oldest = next((row for row in rows if row.kind in kinds), None)
    assert (oldest is None) == (batch == [])
    if oldest is None:
      continue
    assert batch[0] is oldest and len({id(row) for row in batch}) == len(batch) <= 8
    assert {(row.kind, row.served) for row in batch} == {(oldest.kind, oldest.served)}
    assert max(row.width for row in batch) == oldest.width
    like = [row for row in rows if (row.kind, row.served, row.width)
            == (oldest.kind, oldest.served, oldest.width)]
    assert batch[:len(like)] == like[:8]
    # The narrower ones made it no larger.
    assert SHAPES.batch_size(len(batch)) == SHAPES.batch_size(min(len(like), 8))
    left_out = [row for row in rows if (row.kind, row.served) == (oldest.kind, oldest.served)
                and row.width < oldest.width and row not in batch]
    assert not left_out or len(batch) in SHAPES.batch_sizes


def test_all_that_waits_is_taken_in_the_end():
  rows = random_rows(np.random.default_rng(1))
  while rows:
    batch = next_batch(rows, SHAPES, {GENERATE, 32, 256})
    assert is_full(rows, SHAPES) == (len(batch) == 8)
    rows = [row for row in rows if row not in batch]


def test_padding_has_a_token_and_no_prompt():
  rows = [Row(None, 0, None, Slot(prefix=2), np.arange(1, n + 1), GENERATE, 16, 0.0)
          for n in (3, 16, 1, 2, 5)]
  tokens, slots = padded(rows, SHAPES)
  assert tokens.shape == (8, 16) and tokens.dtype == np.int32
  assert [np.count_nonzero(row) for row in tokens] == [3, 16, 1, 2, 5, 1, 1, 1]
  assert slots == [Slot(prefix=2)] * 5 + [Slot()] * 3


def test_widths_double_and_the_last_holds_the_longest():
  for longest in (1, 64, 95, 96, 576, 5000):
    widths = widths_up_to(longest)
    assert widths[-1] == longest and list(widths) == sorted(set(widths))
    assert all(wide <= 2 * narrow for narrow, wide in zip(widths, widths[1:-1], strict=False))
  assert widths_up_to(576) == (64, 128, 256, 576)

"""Where the ids of a prompt stand, for every placement."""

import numpy as np
import pytest

from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens

TEXT = np.array([5, 6, 7, 8, 1], np.int32)


@pytest.mark.parametrize('placement, expected', [
    ('before', [100, 101, 5, 6, 7, 8, 1]),
    ('after_first', [5, 100, 101, 6, 7, 8, 1]),
    ('infix', [5, 6, 100, 101, 7, 8, 1]),
    ('end', [5, 6, 7, 8, 1, 100, 101]),
])
def test_placements(placement, expected):
  assert placement in PLACEMENTS
  placed = VirtualTokens(100, 2, placement).place(TEXT)
  assert placed.dtype == np.int32
  assert placed.tolist() == expected


@pytest.mark.parametrize('placement', PLACEMENTS)
@pytest.mark.parametrize('size', range(4))
@pytest.mark.parametrize('length', [0, 1, 7])
def test_placing_keeps_the_text_and_the_prompt_in_order(placement, size, length):
  tokens = VirtualTokens(100, length, placement, offset=3)
  placed = tokens.place(TEXT[:size])
  assert placed[placed < 100].tolist() == TEXT[:size].tolist()
  assert placed[placed >= 100].tolist() == tokens.ids.tolist() == list(range(103, 103 + length))
  assert len(placed) == size + length
  at = np.flatnonzero(placed >= 100)
  assert length == 0 or at[-1] - at[0] == length - 1, 'the prompt stands together'


def test_a_list_of_ids_is_placed_like_an_array():
  tokens = VirtualTokens(100, 2, 'infix')
  np.testing.assert_array_equal(tokens.place(TEXT.tolist()), tokens.place(TEXT))
  assert tokens.place([]).tolist() == [100, 101]


def test_a_bank_of_prompts_has_no_id_twice():
  ids = [VirtualTokens(100, length, offset=offset).ids for length, offset in
         ((4, 0), (2, 4), (5, 6))]
  assert np.concatenate(ids).tolist() == list(range(100, 111))


@pytest.mark.parametrize('arguments, message', [
    (dict(placement='middle'), r"placement must be one of \('before', .*got 'middle'\.$"),
    (dict(length=-1), r'length must be a whole number of at least 0, got -1\.$'),
    (dict(offset=-2), r'offset must be a whole number of at least 0, got -2\.$'),
])
def test_errors_are_one_line(arguments, message):
  with pytest.raises(ValueError, match=message) as error:
    VirtualTokens(**{'num_embeddings': 100, 'length': 5, **arguments})
  assert '\n' not in str(error.value)

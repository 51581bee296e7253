"""Stop strings: where they are, and what is left of the text before them."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax.decoding import sample, stop_strings, token_choice

# 0 and 1 (the end) append nothing.
END = '</s>'
PIECES = ['', END, ' the', ' cat', 's', 'ab', 'b', 'c', ' ', '\n', 'é', 'abcabd', ' a']
TABLE = np.zeros((len(PIECES), 6), np.uint8)
SIZES = np.array([0 if piece == END else len(piece.encode()) for piece in PIECES], np.int32)
for _row, _piece, _size in zip(TABLE, PIECES, SIZES, strict=True):
  _row[:_size] = list(_piece.encode())[:_size]
LENGTH = 12


@jax.jit
def follow(texts, stops):
  """A language in which each row has a text of its own, [B, LENGTH] ids, and nothing else."""
  next_logits = lambda cache, tokens: (jax.nn.one_hot(texts[:, cache], len(PIECES)), cache + 1)
  return sample.advance(next_logits, sample.start(0, len(texts), LENGTH, stops),
                        token_choice.Greedy())


def generated(texts, stops, leading_spaces=0):
  """The ids that each row has in the end."""
  rows = np.stack([np.pad([PIECES.index(piece) for piece in text], (0, LENGTH - len(text)),
                          constant_values=1) for text in texts])
  state = follow(rows, stop_strings.of_rows(stops, TABLE, SIZES, leading_spaces, most=2, width=5))
  return [[PIECES[i] for i in row if i > 1] for row in np.asarray(state.tokens)]


def test_across_tokens_within_a_token_and_at_its_end():
  text = [' the', ' cat', 's', 'ab', 'b', 'c', 'é', 'c']
  stops = [['cat'], ['ts'], ['hec'], ['bb'], ['sabbc'], ['éc'], ['x', 'cats'], []]
  ends = [2, 3, 8, 5, 6, 8, 3, 8]
  assert generated([text] * 8, stops) == [text[:end] for end in ends]


def test_all_texts_and_strings_as_python_finds_them():
  """Random pieces of few letters, against `in`: each row stops with the first token that does."""
  rng = np.random.default_rng(0)
  ids = [PIECES.index(piece) for piece in ('ab', 'b', 'c', 'abcabd', ' a', 'é')]
  texts = [[PIECES[i] for i in rng.choice(ids, LENGTH)] for _ in range(200)]
  stops = [[''.join(rng.choice(list('abc dé'), rng.integers(1, 4)))
            for _ in range(rng.integers(0, 3))] for _ in texts]
  early = 0
  for text, mine, made in zip(texts, stops, generated(texts, stops), strict=True):
    end = next((n for n in range(1, LENGTH) if any(s in ''.join(text[:n]) for s in mine)), LENGTH)
    assert made == text[:end]
    early += end < LENGTH
  assert 50 < early < 190


def test_nothing_is_found_behind_the_end_or_before_the_first_token():
  assert generated([['ab', END, 'c'], ['ab']], [['bc'], ['abx']]) == [['ab'], ['ab']]
  rows = np.ones((1, LENGTH), int)
  state = follow(rows, stop_strings.of_rows([['\0', '\0\0']], TABLE, SIZES, width=5))
  assert state.tokens.tolist() == [[1] + [0] * (LENGTH - 1)]


def test_spaces_that_a_text_does_not_begin_with_are_not_found():
  texts = [[' ', ' cat', 's', ' a', 'ab']] * 3
  stops = [[' c'], ['  c'], [' a']]
  for spaces, ends in ((0, (2, 2, 4)), (1, (2, 5, 4)), (2, (5, 5, 4))):
    assert generated(texts, stops, spaces) == [texts[0][:end] for end in ends]


def test_without_stop_strings_none_are_looked_for():
  assert jax.tree.leaves(sample.start(0, 2, 3).stops) == []
  assert generated([['ab', 'c']], [[]]) == [['ab', 'c']]


def test_rows_are_repeated_with_their_stop_strings():
  stops = stop_strings.of_rows([['c'], ['b']], TABLE, SIZES)
  text = np.tile([PIECES.index('ab'), PIECES.index('c'), *[1] * (LENGTH - 2)], (4, 1))
  tokens = np.asarray(follow(text, stop_strings.repeated(stops, 2)).tokens)
  assert np.sum(tokens > 1, axis=1).tolist() == [2, 2, 1, 1]
  assert stop_strings.repeated(None, 2) is None


def test_a_text_is_cut_before_the_first():
  assert stop_strings.cut('a cat sat', ['sat', 'at', 'x']) == ('a c', 'at')
  assert stop_strings.cut('a cat sat', ['at', 'at s']) == ('a c', 'at s')
  assert stop_strings.cut('a cat', ['dog']) == ('a cat', None) == stop_strings.cut('a cat', [])


def test_errors_say_what_to_do():
  with pytest.raises(ValueError, match='empty'):
    stop_strings.of_rows([['a'], ['']], TABLE, SIZES)
  with pytest.raises(ValueError, match='2 of up to 2 bytes'):
    stop_strings.of_rows([['é', 'a']], TABLE, SIZES, most=1)
  with pytest.raises(ValueError, match='5 bytes in UTF-8, got 1 of up to 6 bytes'):
    stop_strings.of_rows([['abcdéf'[:5]]], TABLE, SIZES, width=5)

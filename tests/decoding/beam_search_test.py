"""Beam search over a table language: against exhaustive search, greedy decoding and each row alone.
"""

import functools
import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.decoding import beam_search as beams
from prompt_tuning_jax.decoding import sample, token_choice

V, LENGTH = 4, 3
PENALTIES = [beams.BrevityPenalty(alpha) for alpha in (0.6, 0.0, 2.0, -1.0)]


def language(seed, size=V, scale=1.5):
  """Logits [row, tokens so far as a number mod 97, V] of three rows."""
  return scale * np.random.default_rng(seed).normal(size=(3, 97, size)).astype(np.float32)


def next_logits(table, cache, tokens):
  """The cache holds, of each beam, its row and all of its tokens as a number."""
  row, number = cache['row'], (cache['number'] * 5 + tokens + 1) % 97
  cache = {'row': row, 'number': number, 'index': cache['index'] + 1}
  return jnp.asarray(table)[row, number], cache


def empty(rows, times):
  return {'row': jnp.repeat(jnp.asarray(rows), times),
          'number': jnp.zeros(len(rows) * times, jnp.int32), 'index': jnp.zeros((), jnp.int32)}


@functools.partial(jax.jit, static_argnames=('count', 'length'))
def search(table, rows, count, length, penalty):
  return beams.beam_search(functools.partial(next_logits, table), empty(rows, count), len(rows),
                           length, count, penalty)


def log_p(table, row, text):
  """log p of a text's tokens by itself, without a cache."""
  total, number = 0.0, 0
  for given, token in zip((0, *text), text, strict=False):
    number = (number * 5 + given + 1) % 97
    total += jax.nn.log_softmax(table[row, number])[token]
  return float(total)


def all_texts():
  """Those that end, and those that have reached the limit."""
  words = [token for token in range(V) if token != 1]
  for n in range(1, LENGTH + 1):
    for head in itertools.product(words, repeat=n - 1):
      yield (*head, 1)
  yield from itertools.product(words, repeat=LENGTH)


@pytest.fixture(scope='module')
def exhaustive():
  """{text: log p} of each row."""
  table = language(0)
  return [{text: log_p(table, row, text) for text in all_texts()} for row in range(3)]


@pytest.mark.parametrize('penalty', PENALTIES, ids=str)
def test_many_beams_are_exhaustive_search(penalty, exhaustive):
  """16 beams hold all that is alive."""
  tokens, scores = search(language(0), np.arange(3), 16, LENGTH, penalty)
  assert tokens.shape == (3, 16, LENGTH) and scores.shape == (3, 16)
  for row, texts in enumerate(exhaustive):
    expected = sorted(((float(penalty.score(value, len(text))), text)
                       for text, value in texts.items()), reverse=True)[:16]
    np.testing.assert_allclose(scores[row], [score for score, _ in expected], rtol=1e-4)
    made = [tuple(text) for text in np.asarray(tokens[row]).tolist()]
    assert made == [text + (0,) * (LENGTH - len(text)) for _, text in expected]


def test_where_there_are_fewer_texts_than_beams_none_is_made_up():
  """Of one token there are four texts, and eight beams."""
  tokens, scores = search(language(0), np.arange(3), 8, 1, beams.BrevityPenalty())
  assert np.all(np.isfinite(scores[:, :V])) and np.all(np.isneginf(scores[:, V:]))
  assert not np.any(tokens[:, V:])


def test_one_beam_is_greedy_whatever_the_penalty():
  table, length = language(1, size=7), 9
  table[..., 1] += 1
  state = jax.jit(lambda: sample.advance(
      functools.partial(next_logits, table), sample.start(empty(np.arange(3), 1), 3, length),
      token_choice.Greedy()))()
  assert 0 < np.sum(np.any(np.asarray(state.tokens) == 1, 1))
  for penalty in PENALTIES:
    tokens, scores = search(table, np.arange(3), 1, length, penalty)
    np.testing.assert_array_equal(tokens[:, 0], state.tokens)
    lengths = [list(row).index(1) + 1 if 1 in row else length for row in state.tokens.tolist()]
    np.testing.assert_allclose(scores[:, 0], penalty.score(state.log_likelihood,
                                                           np.array(lengths)), rtol=1e-5)


def test_a_mixed_batch_is_each_row_alone_and_scores_are_those_of_the_texts():
  table, penalty = language(2, size=9), beams.BrevityPenalty(1.5)
  table[..., 1] += 1
  run = functools.partial(search, table, count=4, length=12, penalty=penalty)
  tokens, scores = run(np.arange(3))
  for row in range(3):
    alone = run(np.array([row]))
    np.testing.assert_array_equal(alone[0][0], tokens[row])
    np.testing.assert_array_equal(alone[1][0], scores[row])
  assert np.all(np.diff(scores) <= 0)
  for row, beam in itertools.product(range(3), range(4)):
    text = np.asarray(tokens[row, beam]).tolist()
    size = text.index(1) + 1 if 1 in text else 12
    assert not any(text[size:])
    np.testing.assert_allclose(
        scores[row, beam], log_p(table, row, text[:size]) / ((5 + size) / 6) ** 1.5, rtol=1e-4)


@flax.struct.dataclass
class Bounded:
  """A penalty with another bound: what a beam has now, or none."""

  penalty: beams.BrevityPenalty
  none: jax.Array | bool

  def score(self, log_likelihood, length):
    return self.penalty.score(log_likelihood, length)

  def bound(self, log_likelihood, length, limit):
    return jnp.where(self.none, jnp.inf, self.score(log_likelihood, length))


@pytest.mark.parametrize('penalty', [beams.BrevityPenalty(2.0), beams.BrevityPenalty(3.0)], ids=str)
def test_the_search_stops_when_nothing_better_can_come_and_not_sooner(penalty):
  """Never stopping finds no other texts; stopping at what the live beams have now does."""
  table = language(3, size=9)
  table[..., 1] += 1.5
  run = functools.partial(search, table, np.arange(3), 3, 20)
  tokens, scores = run(penalty)
  never, hasty = run(Bounded(penalty, True)), run(Bounded(penalty, False))
  np.testing.assert_array_equal(never[0], tokens)
  np.testing.assert_array_equal(never[1], scores)
  assert np.any(hasty[0] != tokens)

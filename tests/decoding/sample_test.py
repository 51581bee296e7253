"""The decoding loop against a next-token function that is a table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.decoding import sample, token_choice

V = 9


def follow(successor):
  """A language in which `successor[row, token]` always comes after `token`."""
  def next_logits(cache, tokens):
    assert tokens.shape == (2,) and tokens.dtype == jnp.int32
    return jax.nn.one_hot(jnp.take_along_axis(successor, tokens[:, None], 1)[:, 0], V), cache + 1
  return next_logits


def greedy(successor, max_length, **arguments):
  return sample.advance(follow(successor), sample.start(0, 2, max_length), token_choice.Greedy(),
                        **arguments)


def test_starts_from_the_start_id_and_ends_each_row_at_its_end():
  successor = np.zeros((2, V), np.int32)
  successor[0, [0, 5, 6]] = [5, 6, 1]
  successor[1, [0, 3, 4, 7, 8]] = [3, 4, 7, 8, 1]
  state = greedy(successor, 8)
  assert state.tokens.tolist() == [[5, 6, 1, 0, 0, 0, 0, 0], [3, 4, 7, 8, 1, 0, 0, 0]]
  # Of each token log p is 1 - log(e + 8), of the end too, and of nothing behind it.
  np.testing.assert_allclose(state.log_likelihood,
                             np.array([3, 5]) * (1 - np.log(np.e + V - 1)), rtol=1e-5)
  assert np.all(state.ended) and state.cache == state.position == 5


def test_stops_at_max_length_and_each_row_at_its_limit():
  successor = np.full((2, V), 4, np.int32)
  assert greedy(successor, 3).tokens.tolist() == [[4, 4, 4], [4, 4, 4]]
  state = greedy(successor, 3, limits=jnp.array([2, 9]))
  assert state.tokens.tolist() == [[4, 4, 0], [4, 4, 4]] and np.all(state.ended)
  state = greedy(successor, 4, limits=jnp.array([0, 1]))
  assert state.tokens.tolist() == [[0] * 4, [4, 0, 0, 0]] and state.position == 1


def test_padding_that_the_model_says_is_not_the_end():
  successor = np.zeros((2, V), np.int32)
  successor[1, 0] = 1
  assert greedy(successor, 3).tokens.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_the_loop_ends_when_every_row_has_ended():
  calls = []

  def next_logits(cache, tokens):
    jax.debug.callback(lambda: calls.append(1))
    return jax.nn.one_hot(jnp.where(tokens == 0, 4, 1), V), cache

  state = sample.advance(next_logits, sample.start(0, 2, 100), token_choice.Greedy())
  jax.effects_barrier()
  assert state.tokens.shape == (2, 100) and len(calls) == 2
  sample.advance(next_logits, state, token_choice.Greedy())  # There is nothing to do.
  jax.effects_barrier()
  assert len(calls) == 2


ROWS = dict(
    temperature=np.array([1.0, 0.0, 2.5, 0.7], np.float32), top_k=np.array([0, 0, 5, 3], np.int32),
    top_p=np.array([1, 1, 0.9, 1], np.float32), seed=np.array([4, 0, 2 ** 32 - 1, 4], np.uint32))
LIMITS = np.array([40, 40, 17, 40], np.int32)


@functools.cache
def language():
  """Each token's successors' logits; the end comes after a while."""
  return 2 * np.random.default_rng(0).normal(size=(30, 30)).astype(np.float32)


@jax.jit
def draw(state, choose, limits, steps):
  # The cache is the sum of what the row has been given, so that an error there would be seen.
  next_logits = lambda cache, tokens: (jnp.take(language(), (tokens + cache) % 30, axis=0),
                                       cache + tokens)
  return sample.advance(next_logits, state, choose, limits, steps)


def whole(rows=slice(None), length=40):
  choose = token_choice.Sampling(**{name: value[rows] for name, value in ROWS.items()})
  state = sample.start(jnp.zeros(len(choose.seed), jnp.int32), len(choose.seed), length)
  return choose, state, draw(state, choose, LIMITS[rows], length)


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_mixed_batch_is_each_row_alone_in_any_order():
  _, _, state = whole()
  order = np.array([3, 0, 2, 1])
  turned = whole(order)[2]
  assert_same((turned.tokens, turned.log_likelihood),
              (state.tokens[order], state.log_likelihood[order]))
  alone = [whole(slice(i, i + 1))[2] for i in range(4)]
  assert_same(np.concatenate([one.tokens for one in alone]), state.tokens)
  assert_same(np.concatenate([one.log_likelihood for one in alone]), state.log_likelihood)
  sizes = np.sum(np.asarray(state.tokens) > 0, axis=1)
  assert len(set(sizes.tolist())) > 2, 'rows should end at different places'


def test_chunks_are_all_at_once_bit_for_bit():
  choose, state, expected = whole()
  for sizes in ([1] * 40, [3] * 14, [5, 0, 40]):
    made = state
    for size in sizes:
      made = draw(made, choose, LIMITS, size)
    assert_same(made, expected)
  assert not np.all(draw(state, choose, LIMITS, 3).ended)


def test_log_likelihood_is_that_of_the_network_whatever_the_choice():
  _, _, state = whole()
  log_p = np.asarray(jax.nn.log_softmax(language()))
  for tokens, total in zip(np.asarray(state.tokens), state.log_likelihood, strict=True):
    size = list(tokens).index(1) + 1 if 1 in tokens else int(np.max(np.nonzero(tokens))) + 1
    given = np.pad(tokens, (1, 0))[:size]
    expected = log_p[np.cumsum(given) % 30, tokens[:size]]  # the row's tokens so far
    np.testing.assert_allclose(total, np.sum(expected), rtol=1e-4)


def test_seeds_and_positions_have_draws_of_their_own():
  flat = lambda cache, tokens: (jnp.zeros((64, V)).at[:, :2].set(-jnp.inf), cache)
  rows = lambda value, dtype: jnp.full(64, value, dtype)
  choose = token_choice.Sampling(rows(1, jnp.float32), rows(0, jnp.int32), rows(1, jnp.float32),
                                 jnp.arange(64, dtype=jnp.uint32))
  tokens = np.asarray(sample.advance(flat, sample.start(0, 64, 40), choose).tokens)
  counts = np.bincount(tokens.ravel(), minlength=V)[2:]
  assert np.all(np.abs(counts - 64 * 40 / 7) < 5 * np.sqrt(64 * 40 / 7))
  agree = np.mean(tokens[:, None] == tokens[None], axis=2)[~np.eye(64, dtype=bool)]
  assert abs(np.mean(agree) - 1 / 7) < 0.01 and np.max(agree) < 0.7
  again = np.mean(tokens[:, 1:] == tokens[:, :-1])
  assert abs(again - 1 / 7) < 0.04

"""The decoding loop against a next-token function that is a table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.decoding import sample, token_choice

V = 9
KEY = jax.random.key(0)


def follow(successor):
  """A language in which `successor[row, token]` always comes after `token`."""
  def next_logits(cache, tokens):
    assert tokens.shape == (2,) and tokens.dtype == jnp.int32
    return jax.nn.one_hot(jnp.take_along_axis(successor, tokens[:, None], 1)[:, 0], V), cache + 1
  return next_logits


def greedy(successor, max_length):
  run = functools.partial(sample.sample, follow(successor), batch=2, max_length=max_length,
                          choose=token_choice.Greedy())
  return run(0, KEY)


def test_starts_from_the_start_id_and_ends_each_row_at_its_end():
  successor = np.zeros((2, V), np.int32)
  successor[0, [0, 5, 6]] = [5, 6, 1]
  successor[1, [0, 3, 4, 7, 8]] = [3, 4, 7, 8, 1]
  assert greedy(successor, 8).tolist() == [[5, 6, 1, 0, 0, 0, 0, 0], [3, 4, 7, 8, 1, 0, 0, 0]]


def test_stops_at_max_length():
  successor = np.full((2, V), 4, np.int32)
  assert greedy(successor, 3).tolist() == [[4, 4, 4], [4, 4, 4]]


def test_padding_that_the_model_says_is_not_the_end():
  successor = np.zeros((2, V), np.int32)
  successor[1, 0] = 1
  assert greedy(successor, 3).tolist() == [[0, 0, 0], [1, 0, 0]]


def test_the_loop_ends_when_every_row_has_ended():
  calls = []

  def next_logits(cache, tokens):
    jax.debug.callback(lambda: calls.append(1))
    return jax.nn.one_hot(jnp.where(tokens == 0, 4, 1), V), cache

  tokens = sample.sample(next_logits, 0, KEY, 2, 100, token_choice.Greedy())
  jax.effects_barrier()
  assert tokens.shape == (2, 100) and len(calls) == 2


def test_every_step_has_a_key_of_its_own_and_the_same_key_gives_the_same_tokens():
  flat = lambda cache, tokens: (jnp.zeros((2, V)), cache)
  choose = lambda key, logits: 2 + jax.random.categorical(key, logits[:, 2:])
  draw = jax.jit(lambda seed: sample.sample(flat, 0, jax.random.key(seed), 2, 40, choose))
  first = np.asarray(draw(0))
  assert first.dtype == np.int32
  np.testing.assert_array_equal(first, draw(0))
  assert np.any(first != draw(1))
  assert len(np.unique(first[0])) == V - 2

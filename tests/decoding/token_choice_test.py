"""How a token is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.decoding import token_choice

V = 12
LOGITS = 2 * np.random.default_rng(0).normal(size=V).astype(np.float32)


def sampling(rows, temperature=1.0, top_k=0, top_p=1.0, seed=0):
  full = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (rows,))
  return token_choice.Sampling(full(temperature, jnp.float32), full(top_k, jnp.int32),
                               full(top_p, jnp.float32), full(seed, jnp.uint32))


@jax.jit
def choose(choice, logits, position=0):
  return choice(logits, position)


def test_greedy_takes_the_most_probable_and_of_equals_the_lowest():
  logits = np.array([[0, 3, 1], [2, 1, 2], [-np.inf, -1, -2]], np.float32)
  chosen = token_choice.Greedy()(logits, 0)
  assert chosen.dtype == np.int32
  assert chosen.tolist() == [1, 0, 1]


@pytest.mark.parametrize('settings', [
    dict(temperature=0.0), dict(temperature=2e-38), dict(top_k=1), dict(top_p=1e-6),
    dict(top_p=0.0), dict(temperature=5.0, top_k=3, top_p=1e-3)], ids=str)
def test_the_narrowest_sampling_is_greedy(settings):
  """Of equals too, but for a temperature that is small and not 0."""
  logits = 9 * np.random.default_rng(1).normal(size=(200, V)).astype(np.float32)
  if settings != dict(temperature=2e-38):
    logits = np.round(logits)
  logits[0, 0] = -1e10
  seeds = np.arange(200, dtype=np.uint32)
  np.testing.assert_array_equal(choose(sampling(200, **settings, seed=seeds), logits),
                                np.argmax(logits, -1))


def filtered(temperature, top_k, top_p):
  """Probabilities by the definition, one token after another from the most probable on."""
  probabilities = np.exp(LOGITS.astype(np.float64) / temperature)
  order = np.argsort(-probabilities)
  kept = order[:top_k or V]
  share, until = 0.0, []
  for token in kept:
    until.append(token)
    share += probabilities[token] / np.sum(probabilities[kept])
    if share >= top_p:
      break
  result = np.zeros(V)
  result[until] = probabilities[until] / np.sum(probabilities[until])
  return result


@pytest.mark.parametrize('first', [V, 3], ids='of {} first'.format)
@pytest.mark.parametrize('temperature, top_k, top_p', [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.8), (3.0, 6, 0.6), (1.0, 100, 0.99)])
def test_frequencies_are_those_of_the_filtered_softmax(temperature, top_k, top_p, first,
                                                       monkeypatch):
  """20,000 seeds; Pearson's sum is chi-square distributed, here below its mean + 5 deviations."""
  n = 20_000
  monkeypatch.setattr(token_choice, 'FIRST', first)  # Mostly all have to be sorted after 3.
  choice = sampling(n, temperature, top_k, top_p, np.arange(n, dtype=np.uint32))
  logits = np.tile(LOGITS, (n, 1))
  drawn = np.bincount(jax.jit(lambda choice: choice(logits, 3))(choice), minlength=V)
  expected = n * filtered(temperature, top_k, top_p)
  assert not np.any(drawn[expected == 0])
  live = expected > 0
  freedom = np.sum(live) - 1
  pearson = np.sum((drawn - expected)[live] ** 2 / expected[live])
  assert pearson < freedom + 5 * np.sqrt(2 * freedom)


def test_a_row_is_drawn_as_alone():
  """Next to greedy rows, rows that are cut, and rows for which all tokens have to be sorted."""
  size = 2 * token_choice.FIRST
  logits = 0.3 * np.random.default_rng(2).normal(size=(7, size)).astype(np.float32)
  settings = dict(temperature=[1, 0, 0.7, 1.5, 1, 9, 0.2], top_k=[0, 0, 4, 0, 0, 300, 0],
                  top_p=[1, 1, 1, 0.7, 1, 0.95, 0.9], seed=[3, 3, 3, 9, 8, 3, 3])
  for rows, positions in ((range(7), 15), ((0, 2), 5), ((0, 6, 4), 5)):
    rows = np.array(rows)
    of = lambda rows: sampling(len(rows), **{name: np.array(x)[rows]
                                             for name, x in settings.items()})
    for position in range(positions):
      mixed = choose(of(rows), logits[rows], position)
      alone = [choose(of([i]), logits[[i]], position)[0] for i in rows]
      assert mixed.tolist() == list(map(int, alone))

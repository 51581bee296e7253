"""How a token is chosen."""

import jax
import numpy as np

from prompt_tuning_jax.decoding import token_choice


def test_greedy_takes_the_most_probable_and_of_equals_the_lowest():
  logits = np.array([[0, 3, 1], [2, 1, 2], [-np.inf, -1, -2]], np.float32)
  chosen = token_choice.Greedy()(jax.random.key(0), logits)
  assert chosen.dtype == np.int32
  assert chosen.tolist() == [1, 0, 1]

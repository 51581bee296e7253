"""What each initializer promises of the rows it makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.prompts.initializers import (
    ClassLabels,
    FromArray,
    SampledVocabulary,
    Text,
    Uniform,
)

V, D, P = 30, 6, 8
# Row i holds i, i + 1/4, ...: it names itself, and is exact in bfloat16.
TABLE = np.arange(V, dtype=np.float32)[:, None] + np.arange(D, dtype=np.float32) / 4
KEY = jax.random.key(0)


class Words:
  """A vocabulary: each word's ids are its letters, a = 10."""

  untrained = frozenset()

  def encode(self, text):
    return [ord(letter) - ord('a') + 10 for letter in text if letter != ' ']


def rows(embedding):
  """Which rows of the table these are; fails where one is not a row."""
  numbers = np.asarray(embedding)[:, 0].astype(int)
  np.testing.assert_array_equal(embedding, TABLE[numbers])
  return numbers.tolist()


EVERY = [Uniform(), SampledVocabulary(20), ClassLabels(('ab', 'c')), Text('hello'),
         FromArray(np.ones((P, D), np.float16))]


@pytest.mark.parametrize('initializer', EVERY, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize('table', [TABLE, jnp.asarray(TABLE), jnp.asarray(TABLE, jnp.bfloat16)],
                         ids=['numpy', 'jax', 'bfloat16'])
def test_shape_type_and_the_same_bits_from_the_same_key(initializer, table):
  first = initializer(KEY, P, table, Words())
  assert first.shape == (P, D) and first.dtype == jnp.float32
  np.testing.assert_array_equal(first, initializer(KEY, P, table, Words()))
  np.testing.assert_array_equal(first, initializer(KEY, P, TABLE, Words()))


@pytest.mark.parametrize('initializer', [Uniform(), SampledVocabulary(20)],
                         ids=lambda each: type(each).__name__)
def test_another_key_gives_another_prompt(initializer):
  first, other = (initializer(jax.random.key(i), P, TABLE, None) for i in range(2))
  assert np.any(first != other)


def test_uniform_fills_its_range():
  drawn = np.asarray(Uniform(0.25)(KEY, 1000, TABLE, None))
  assert -0.25 <= drawn.min() < -0.24 and 0.24 < drawn.max() < 0.25
  np.testing.assert_allclose(np.mean(drawn), 0, atol=0.01)


def test_sampled_rows_are_different_rows_of_the_first_n():
  drawn = rows(SampledVocabulary(20)(KEY, 20, TABLE, None))
  assert sorted(drawn) == list(range(20))
  assert drawn != sorted(drawn)
  assert max(rows(SampledVocabulary(20)(KEY, P, TABLE, None))) < 20


def test_sampling_repeats_rows_only_where_there_are_too_few():
  assert set(rows(SampledVocabulary(3)(KEY, 30, TABLE, None))) == {0, 1, 2}
  assert sorted(rows(SampledVocabulary(5000)(KEY, V, TABLE, None))) == list(range(V))


def test_rows_that_no_text_has_trained_are_not_drawn():
  words = Words()
  words.untrained = {0, 5, 6}
  assert sorted(rows(SampledVocabulary(6)(KEY, 6, TABLE, words))) == [1, 2, 3, 4, 7, 8]
  # Where all are trained, as a T5's are, a seed draws what it always has drawn.
  drawn = jax.random.choice(KEY, 20, (P,), replace=False).tolist()
  assert rows(SampledVocabulary(20)(KEY, P, TABLE, Words())) == drawn


def test_labels_are_the_means_of_their_pieces_then_sampled_rows():
  made = ClassLabels(('ab', 'c', 'def'), SampledVocabulary(5))(KEY, P, TABLE, Words())
  np.testing.assert_allclose(
      made[:3], [TABLE[[10, 11]].mean(0), TABLE[12], TABLE[[13, 14, 15]].mean(0)], rtol=1e-6)
  assert len(set(rows(made[3:]))) == 5 and max(rows(made[3:])) < 5


@pytest.mark.parametrize('length', [0, 1, 2])
def test_a_short_prompt_takes_the_first_labels(length):
  assert rows(ClassLabels(('a', 'b', 'c'))(KEY, length, TABLE, Words())) == [10, 11][:length]


def test_text_repeats_until_the_prompt_is_full():
  assert rows(Text('abc')(KEY, P, TABLE, Words())) == [10, 11, 12, 10, 11, 12, 10, 11]
  assert rows(Text('abc')(KEY, 2, TABLE, Words())) == [10, 11]


def test_from_array_is_the_array():
  given = np.random.default_rng(0).normal(size=(P, D)).astype(np.float32)
  np.testing.assert_array_equal(FromArray(given)(KEY, P, TABLE, None), given)


@pytest.mark.parametrize('initializer, vocabulary, message', [
    (ClassLabels(()), Words(), r'CLASS_LABELS should be a list of texts .*got \(\)'),
    (ClassLabels('ab'), Words(), "CLASS_LABELS should be a list of texts .*got 'ab'"),
    (ClassLabels(('a', ' ')), Words(), "' ' has no tokens"),
    (ClassLabels(('a',)), None, "from 'a' the vocabulary .* VOCABULARY"),
    (Text('az~'), Words(), "'az~' has id 39, but .* 30 rows"),
    (ClassLabels(('~',)), Words(), "'~' has id 39, but .* 30 rows"),
    (Text(''), Words(), "'' has no tokens"),
    (Text('a'), None, "from 'a' the vocabulary .* VOCABULARY"),
    (SampledVocabulary(0), None, 'first_n must be at least 1, got 0'),
    (FromArray(np.zeros((P + 1, D))), None, r'must have shape \(8, 6\) .*got \(9, 6\)'),
    (FromArray(np.zeros((P, D - 1))), None, r'must have shape \(8, 6\) .*got \(8, 5\)'),
])
def test_errors_are_one_line(initializer, vocabulary, message):
  with pytest.raises(ValueError, match=message) as error:
    initializer(KEY, P, TABLE, vocabulary)
  assert '\n' not in str(error.value)

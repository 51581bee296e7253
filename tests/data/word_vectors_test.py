"""Word vectors against their definition, computed word by word."""

import collections
import math

import numpy as np
import pytest

from prompt_tuning_jax import word_vectors as verb
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.data import word_vectors as made
from prompt_tuning_jax.data.word_vectors import word_vectors

SIZE, WIDTH = 40, 6


@pytest.fixture(scope='module')
def texts():
  """Texts of one of two halves of the words each."""
  rng = np.random.default_rng(0)
  return [rng.integers(0, SIZE // 2, 30) + SIZE // 2 * (n % 2) for n in range(200)]


def by_definition(texts, width, rarest):
  """The same in dense arithmetic, pair by pair."""
  frequency = collections.Counter(int(word) for text in texts for word in text)
  sides = []
  for weights, keys in ((made.BESIDE, lambda a, b: [(a, b)]), (made.BESIDE, lambda a, b: [(b, a)]),
                        (made.AROUND, lambda a, b: [(a, b), (b, a)])):
    counts = np.zeros((SIZE, SIZE))
    for text in texts:
      for distance, weight in weights.items():
        for first, second in zip(text, text[distance:], strict=False):
          if min(frequency[int(first)], frequency[int(second)]) >= rarest:
            for key in keys(first, second):
              counts[key] += weight
    neighbours = counts.sum(0) ** 0.75
    neighbours /= neighbours.sum()
    sides.append([[max(0.0, math.log(counts[a, b] / counts[a].sum() / neighbours[b]))
                   if counts[a, b] else 0.0 for b in range(SIZE)] for a in range(SIZE)])
  left, strength, _ = np.linalg.svd(np.concatenate(sides, axis=1))
  vectors = left[:, :width] * np.sqrt(strength[:width])
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  return np.sqrt(width) * vectors / np.where(lengths < 1e-9, 1.0, lengths)


def test_vectors_are_those_of_the_definition(texts):
  rare = np.array([3, 3, SIZE - 1, 5, 7, 5])  # an own text, so that counts are not all alike
  texts = [*texts, rare]
  vectors, known = word_vectors(texts, SIZE, WIDTH, rarest=1)
  expected = by_definition(texts, WIDTH, 1)
  assert known.all()
  np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=2e-2)


def test_words_of_a_kind_are_alike_and_rare_ones_have_no_vector(texts):
  texts = [np.where(text == 7, 6, text) for text in texts]
  vectors, known = word_vectors(texts, SIZE, WIDTH)
  assert list(np.flatnonzero(~known)) == [7] and not vectors[7].any()
  np.testing.assert_allclose(np.linalg.norm(vectors[known], axis=1), math.sqrt(WIDTH), rtol=1e-5)
  alike = vectors @ vectors.T / WIDTH
  half = np.arange(SIZE) < SIZE // 2
  same, other = half[:, None] == half, half[:, None] != half
  assert alike[same & known].mean() > 0.3 + alike[other & known].mean()


def test_words_of_two_texts_are_no_neighbours_and_portions_change_nothing(texts, monkeypatch):
  expected, _ = word_vectors(texts, SIZE, WIDTH)
  monkeypatch.setattr(made, 'TOKENS_AT_ONCE', 100)
  again, _ = word_vectors(iter(texts), SIZE, WIDTH)
  np.testing.assert_allclose(again, expected, atol=1e-4)
  joined, _ = word_vectors([np.concatenate(texts)], SIZE, WIDTH)
  assert np.abs(joined - expected).max() > 0.1


def test_too_few_words_are_told():
  with pytest.raises(ValueError, match='need 12 words that stand at least 50 times each, got 0'):
    word_vectors([np.arange(SIZE)], SIZE, WIDTH)
  with pytest.raises(ValueError, match='got 0'):
    word_vectors([], SIZE, WIDTH)


@pytest.fixture
def command(tiny_base, reviews, tmp_path):
  text = tmp_path / 'text.txt'
  text.write_text(reviews.read_text(encoding='utf-8') * 5, encoding='utf-8')
  return ['--vocabulary', str(tiny_base / 'spiece.model'), '--input', str(text),
          '--output', str(tmp_path / 'start'), '--network']


@pytest.mark.parametrize('tied', [False, True])
def test_a_base_starts_from_them(command, tmp_path, tied, monkeypatch):
  from prompt_tuning_jax import launch
  from prompt_tuning_jax.networks.t5 import T5Config
  config = T5Config(vocab_size=192, emb_dim=8, num_heads=2, num_encoder_layers=1, mlp_dim=16,
                    num_decoder_layers=1, head_dim=4, logits_via_embedding=tied)
  monkeypatch.setattr(launch, 'network_named', lambda name: config)
  assert verb.main([*command, 'this']) == 0
  base = base_checkpoint.load_base(tmp_path / 'start')
  chance = base_checkpoint.random_base(config, command[1])
  table, random = np.asarray(base.embedding), np.asarray(chance.embedding)
  changed = (table != random).any(axis=1)
  assert 16 <= changed.sum() < 100 and not changed[100:].any()  # no text has a sentinel
  np.testing.assert_allclose(np.linalg.norm(table[changed], axis=1),
                             math.sqrt(8) * random.std(), rtol=1e-5)
  if not tied:
    output = np.asarray(base.params['decoder']['logits_dense']['kernel'])
    before = np.asarray(chance.params['decoder']['logits_dense']['kernel'])
    np.testing.assert_array_equal((output != before).any(axis=0), changed)
    np.testing.assert_allclose(output.T[changed] / before.std(), table[changed] / random.std(),
                               rtol=1e-5)
  assert verb.main([*command, 'this']) == 1  # never over another base


def test_what_is_not_there_is_one_line(command, tmp_path, capsys):
  assert verb.main([*command, 'mine']) == 1
  assert 'no network mine' in capsys.readouterr().err
  assert verb.main(['--vocabulary=none.model', *command[2:], 'mini']) == 1
  assert 'none.model' in capsys.readouterr().err

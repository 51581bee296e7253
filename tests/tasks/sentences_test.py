"""The made-up sentences: sizes, shares, and that validation is not training again."""

from collections import Counter

import pytest

from prompt_tuning_jax.tasks import sentences


def test_sizes_and_shares():
  for split, size in sentences.SIZES.items():
    rows = sentences.examples(split)
    assert len(rows) == len({row['sentence'] for row in rows}) == size
    shares = Counter(row['label'] for row in rows)
    assert set(shares) == set(sentences.LABELS)
    assert 0.5 < max(shares.values()) / size < 0.6


def test_splits_share_no_sentence_and_validation_has_new_words():
  train, validation = ([row['sentence'] for row in sentences.examples(split)]
                       for split in ('train', 'validation'))
  assert not set(train) & set(validation)
  known = set(' '.join(train).replace(',', '').replace('.', '').split())
  new = [set(sentence.replace(',', '').strip('.').split()) - known for sentence in validation]
  assert sum(map(bool, new)) > 100
  assert any(sentence.startswith('There was only one') for sentence in validation)
  assert not any(sentence.startswith('There was only one') for sentence in train)


def test_always_the_same_and_without_the_answer():
  assert sentences.examples('train') == sentences.examples('train')
  assert sentences.examples('train')[0] == {
      'sentence': 'She said that the baker washed the dishes.', 'label': 'kitchen'}
  for split in sentences.SIZES:
    for row in sentences.examples(split):
      assert not set(sentences.LABELS) & set(row['sentence'].lower().strip('.').split())


def test_unknown_split():
  with pytest.raises(ValueError, match='train, validation'):
    sentences.examples('test')

"""The made-up sentences: sizes, shares, and that validation is not training again."""

import re
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


def words(sentence: str) -> set[str]:
  return set(re.findall(r'[\w,]*\w', sentence))


def test_splits_share_no_sentence_and_validation_has_new_words():
  train, validation = ([row['sentence'] for row in sentences.examples(split)]
                       for split in ('train', 'validation'))
  assert not set(train) & set(validation)
  known = words(' '.join(train))
  assert sum(bool(words(sentence) - known) for sentence in validation) > 100
  assert any(sentence.startswith('When the door') for sentence in validation)
  assert not any(sentence.startswith('When the door') for sentence in train)


def test_always_the_same_and_without_the_answer():
  assert sentences.examples('train') == sentences.examples('train')
  for split in sentences.SIZES:
    for row in sentences.examples(split):
      assert not set(sentences.LABELS) & words(row['sentence'].lower())
      assert '{' not in row['sentence']


def test_the_label_fits_the_sentence():
  rows = {row['sentence']: row['label'] for row in sentences.examples('train')}
  assert {rows[sentence] for sentence in rows if 'my dear' in sentence} == {'novel'}
  assert {rows[sentence] for sentence in rows if 'population' in sentence} == {'article'}


def test_unknown_split():
  with pytest.raises(ValueError, match='train, validation'):
    sentences.examples('test')

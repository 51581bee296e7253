"""Few-shot and low-data subsets: the right number, the same for a seed, and whole rows."""

import collections

import numpy as np
import pytest

from prompt_tuning_jax.data import token_cache
from prompt_tuning_jax.data.subsets import FewShot, LongInputs, LowData


@pytest.fixture(params=[True, False], ids=['labels', 'text'])
def cache(request, tmp_path):
  labels = ['no', 'yes', 'perhaps'] if request.param else None
  writer = token_cache.CacheWriter(tmp_path / 'cache')
  for i in range(90):
    target = labels[min(i % 4, 2)] if labels else f'text {i}'
    row = {'inputs': f'i{i}', 'targets': target, 'target': target}
    writer.add([2 + i] * (1 + i % 5) + [1], [100 + i, 1],
               {**row, 'choices': labels} if labels else row)
  writer.close(task='made', split='train')
  return token_cache.open_cache(tmp_path / 'cache')


def firsts(cache):
  return [int(cache.inputs(i)[0]) - 2 for i in range(cache.num_examples)]


def test_low_data(cache):
  small = LowData(20, seed=1)(cache)
  rows = firsts(small)
  assert len(set(rows)) == 20 == small.num_examples == len(small.rows)
  for i, row in enumerate(rows):
    np.testing.assert_array_equal(small.inputs(i), cache.inputs(row))
    np.testing.assert_array_equal(small.targets(i), cache.targets(row))
    assert small.rows[i] == cache.rows[row]
  assert firsts(LowData(20, seed=1)(cache)) == rows != firsts(LowData(20, seed=2)(cache))
  assert firsts(LowData(90)(cache)) == list(range(90))
  with pytest.raises(ValueError, match='made, train, has 90 examples, fewer than 91'):
    LowData(91)(cache)


def test_a_part_of_a_part(cache):
  part = LowData(5)(LowData(30)(cache))
  assert [part.rows[i]['inputs'] for i in range(5)] == [f'i{row}' for row in firsts(part)]


def test_few_shot(cache):
  if not cache.rows[0].get('choices'):
    with pytest.raises(ValueError, match='no labels to draw 4 examples of'):
      FewShot(4)(cache)
    return
  few = FewShot(4, seed=3)(cache)
  assert collections.Counter(row['targets'] for row in few.rows) == {
      'no': 4, 'yes': 4, 'perhaps': 4}
  assert firsts(few) == firsts(FewShot(4, seed=3)(cache)) != firsts(FewShot(4, seed=4)(cache))
  with pytest.raises(ValueError, match=r'fewer than 24 examples of: no \(23\), yes \(23\)'):
    FewShot(24)(cache)


@pytest.mark.parametrize('make', [lambda: FewShot(0), lambda: LowData(2.5), lambda: LowData(2, -1)])
def test_sizes_and_seeds_are_whole_numbers(make):
  with pytest.raises(ValueError, match='whole number of examples'):
    make()


def test_a_label_without_examples_is_told(cache):
  if cache.rows[0].get('choices'):
    part = cache.take(np.array([i for i in range(90) if i % 4 != 1]))  # no 'yes'
    with pytest.raises(ValueError, match=r'fewer than 2 examples of: yes \(0\)'):
      FewShot(2)(part)


def test_long_inputs(cache):
  long = LongInputs(5)(cache)
  assert firsts(long) == [i for i in range(90) if i % 5 >= 3]
  assert min(long.input_lengths) == 5 and long.rows[0]['inputs'] == 'i3'
  with pytest.raises(ValueError, match='made, train, has no inputs of 7 tokens .*longest has 6'):
    LongInputs(7)(cache)
  with pytest.raises(ValueError, match='whole number of tokens from 1'):
    LongInputs(0)

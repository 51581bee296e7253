"""Laws of parameter paths: split∘merge = identity, flatten∘unflatten = identity, misses raise."""

import numpy as np
import pytest

from prompt_tuning_jax import param_paths

TREE = {
    'prompt': {'embedding': np.ones((5, 4))},
    'encoder': {'layers_0': {'mlp': {'wi': {'kernel': np.ones((4, 8))}}},
                'encoder_norm': {'scale': np.ones(4)}},
}


def test_flatten_is_sorted_and_unflatten_undoes_it():
  flat = param_paths.flatten(TREE)
  assert list(flat) == ['encoder/encoder_norm/scale', 'encoder/layers_0/mlp/wi/kernel',
                        'prompt/embedding']
  assert param_paths.flatten(param_paths.unflatten(flat)) == flat
  assert param_paths.unflatten(flat)['prompt'] == TREE['prompt']


@pytest.mark.parametrize('patterns', [['prompt/.*'], ['.*kernel', '.*scale'], ['.*']])
def test_merge_of_split_is_the_tree(patterns):
  selected, rest = param_paths.split(TREE, patterns)
  assert param_paths.merge(selected, rest) == TREE
  assert not param_paths.flatten(selected).keys() & param_paths.flatten(rest).keys()


def test_a_pattern_that_matches_nothing_names_the_closest():
  # The trap: '.*/prompt/.*' does not fullmatch a prompt at the root; nothing would train.
  with pytest.raises(ValueError, match=r"matches '\.\*/prompt/\.\*'.*prompt/embedding"):
    param_paths.matching(['.*/prompt/.*'], param_paths.flatten(TREE))
  with pytest.raises(ValueError, match='encoder/layers_0/mlp/wi/kernel'):
    param_paths.matching(['encoder/.*', 'encoder/layer_0/mlp/wi/kernel'], param_paths.flatten(TREE))
  with pytest.raises(ValueError, match='regular expression'):
    param_paths.matching(['('], ['a'])
  with pytest.raises(ValueError, match='no parameters'):
    param_paths.matching(['a'], [])


def test_matching_keeps_the_order_and_matches_whole_paths():
  assert param_paths.matching(['b', 'a.*'], ['ab', 'b', 'bb']) == ['ab', 'b']


def test_merge_refuses_an_overlap():
  with pytest.raises(ValueError, match='prompt/embedding'):
    param_paths.merge(TREE, {'prompt': {'embedding': 1}})
  with pytest.raises(ValueError, match='is a leaf'):
    param_paths.merge({'a': 1}, {'a': {'b': 2}})


@pytest.mark.parametrize('flat', [{'a': 1, 'a/b': 2}, {'a/b': 1, 'a': 2}, {'a//b': 1}, {'': 1}])
def test_unflatten_refuses_impossible_paths(flat):
  with pytest.raises(ValueError):
    param_paths.unflatten(flat)


def test_flatten_refuses_keys_that_would_not_come_back():
  for key in ('a/b', '', 1):
    with pytest.raises(ValueError, match='non-empty strings'):
      param_paths.flatten({key: 1})


def test_count():
  assert param_paths.count(TREE) == 5 * 4 + 4 * 8 + 4
  assert param_paths.count({}) == 0

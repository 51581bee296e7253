"""What of a request can be known at once: its rows, or why it is refused."""

import dataclasses
import types

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.serving.accepting import Acceptance, Served
from prompt_tuning_jax.serving.programs import Shapes
from prompt_tuning_jax.serving.requests import (
  BadRequest,
  Classification,
  Generation,
  Late,
  TooLong,
  UnknownModel,
)

SHAPES = Shapes((1, 4), (16, 32), (16, 32), 12)


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


def accepted(base, request, shapes=SHAPES):
  """Its rows."""
  rows = lambda length: {'prompt/embedding': np.ones((length, 8), np.float32)}
  bank = PromptBank(base, {'before': PromptFile(rows(3), {'labels': ['good', 'bad']}),
                           'end': PromptFile(rows(7), {'placement': 'end'}),
                           'marked': PromptFile(rows(2), {'labels': ['good', 'bad'],
                                                          'target_prefix': '<extra_id_0> '}),
                           'numbers': PromptFile(rows(1), {'labels': [1, 2]})})
  served = Served(bank, types.SimpleNamespace(shapes=shapes))
  vocabulary = Vocabulary.of_base(base)
  accepts = Acceptance(vocabulary, 'base', 24)
  return accepts.rows(request, served, accepts.ids(request.inputs))


def test_rows_have_the_prompt_in_place_and_the_narrowest_width(base):
  first, second = accepted(base, Generation('end', (5,) * 9, 3, 0.5, n=2, seed=1))
  np.testing.assert_array_equal(first.tokens, [5] * 9 + list(range(192 + 3, 192 + 10)))
  assert (first.width, first.limit, first.index, second.index) == (16, 3, 0, 1)
  assert first.choice[:3] == (0.5, 0, 1.0) and first.choice[3] != second.choice[3]
  assert accepted(base, Generation('end', (5,) * 10))[0].width == 32
  row, prior = accepted(base, Classification('before', (5, 1), calibrated=True))
  np.testing.assert_array_equal(row.tokens, [192, 193, 194, 5, 1])
  assert prior.tokens.tolist() == [1] and not prior.slot.length  # the base alone
  assert row.labels == prior.labels and len(row.labels) == 2


def test_labels_have_the_sentinel_that_the_prompt_was_trained_with(base):
  sentinel = Vocabulary.of_base(base).sentinel(0)
  for labels in ((), ('good', 'bad'), ('<extra_id_0> good', '<extra_id_0> bad')):
    plain, = accepted(base, Classification('before', (5, 1), labels=('good', 'bad')))
    marked, = accepted(base, Classification('marked', (5, 1), labels=labels))
    assert marked.labels == tuple((sentinel, *ids) for ids in plain.labels)


def test_a_masked_language_model_needs_a_mask_and_has_no_prior(bert_file):
  base = base_checkpoint.random_base(
      BertConfig(192, 8, 2, 1, 4, 16, max_positions=32), str(bert_file))
  mask = base.config.mask_id
  for request in (Generation('before', (5, mask)), Classification('before', (5, mask),
                                                                  labels=('a', 'b'))):
    assert accepted(base, request)
    with pytest.raises(BadRequest, match='An input has 0 masks'):
      accepted(base, dataclasses.replace(request, inputs=(5, 1)))
  with pytest.raises(BadRequest, match='A masked language model cannot be calibrated'):
    accepted(base, dataclasses.replace(request, calibrated=True))


def test_the_same_seed_draws_the_same_and_none_draws_anew(base):
  seeds = lambda seed: tuple(row.choice[3] for row in accepted(base, Generation(
      'base', 'a', temperature=1.0, n=3, seed=seed)))
  expected = np.random.SeedSequence([7, 1]).generate_state(3)  # as `infer` draws for line 1
  assert seeds(7) == tuple(expected) and len({seeds(7), seeds(8), seeds(None), seeds(None)}) == 4


def test_a_prompt_and_an_input_too_long_together(base):
  narrow = dataclasses.replace(SHAPES, widths=(8,))
  with pytest.raises(TooLong, match='has 4 tokens and its prompt 7; this server reads up to 8'):
    accepted(base, Generation('end', (5,) * 4), narrow)
  assert accepted(base, Generation('before', (5,) * 4), narrow)


@pytest.mark.parametrize('request_, error, said', [
    (Generation('bifore', 'a'), UnknownModel, "no model 'bifore'. Did you mean 'before'?"),
    (Generation('before', ''), BadRequest, 'empty'),
    (Generation('before', '  '), BadRequest, 'empty'),
    (Generation('before', ()), BadRequest, 'empty'),
    (Generation('before', (3, 0)), BadRequest, 'got 0'),
    (Generation('before', (3, 192)), BadRequest, 'got 192'),
    (Generation('before', (3,) * 25), TooLong, 'has 25 tokens; this server reads up to 24'),
    (Generation('before', 'a ' * 5000), TooLong, 'has 10000 characters'),
    (Generation('before', 'a', max_tokens=13), BadRequest, '1 to 12 tokens, got max_tokens 13'),
    (Generation('before', 'a', stop=('x' * 65,)), BadRequest, '64 bytes'),
    (Generation('before', 'a', deadline=1.0), Late, 'deadline'),
    (Classification('end', 'a'), BadRequest, "'end' names no labels"),
    (Classification('base', 'a'), BadRequest, 'base names no labels'),
    (Classification('numbers', 'a'), BadRequest, "'numbers' names no labels"),
    (Classification('end', 'a', tuple(f'film {i}' for i in range(12))), TooLong, '12 labels have'),
])
def test_what_is_refused_at_once(base, request_, error, said):
  with pytest.raises(error) as caught:
    accepted(base, request_)
  assert said in caught.value.message and '\n' not in caught.value.message

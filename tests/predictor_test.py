"""What a predictor says of first words, and what a masked language model is not asked."""

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks.bart import BartConfig
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.predictor import DecodingSettings, Predictor
from prompt_tuning_jax.prompted_model import PromptedModel

SHAPE = dict(vocab_size=320, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16, num_encoder_layers=1)
CONFIGS = {'t5': T5Config(**SHAPE, num_decoder_layers=1),
           'bart': BartConfig(**SHAPE, num_decoder_layers=1, max_positions=24),
           'bert': BertConfig(**SHAPE, max_positions=24)}


@pytest.fixture(scope='module')
def loaded(bpe_file, bart_file, bert_file):
  """kind -> (base, vocabulary, predictor)."""
  files = {'t5': bpe_file, 'bart': bart_file, 'bert': bert_file}

  def load(kind):
    base = base_checkpoint.random_base(CONFIGS[kind], str(files[kind]))
    words = Vocabulary.of_base(base)
    return base, words, Predictor(PromptedModel(base.config.network()), words, batch_size=4)
  return load


@pytest.mark.parametrize('kind', CONFIGS)
def test_first_words_are_as_probable_as_targets_of_one_token(loaded, kind):
  """Behind what all targets begin with; the end behind the word is not counted."""
  base, vocabulary, predictor = loaded(kind)
  mask = [base.config.mask_id] if kind == 'bert' else []
  begins, labels = vocabulary.begins('targets'), ['a', 'b', 'd']
  words = [vocabulary.encode(label)[-1] for label in labels]
  assert bool(begins) == (kind == 'bart')
  inputs = [[*mask, 9, 8, 7], [9, *mask]]
  found = predictor.first_words(base.params, inputs)
  np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-5)
  scores = predictor.score(base.params, [each for each in inputs for _ in words],
                           [[*begins, word] for _ in inputs for word in words]).reshape(2, 3)
  gains = lambda log_p: log_p[:, 1:] - log_p[:, :1]
  np.testing.assert_allclose(gains(found[:, words]), gains(scores), rtol=1e-4, atol=1e-5)
  assert np.abs(gains(scores)[0] - gains(scores)[1]).max() > 1e-3
  if kind == 'bert':  # At its last mask a text ends for certain: ranks are of the words alone.
    ranked = np.stack(predictor.rank(base.params, inputs, [labels] * 2))
    np.testing.assert_allclose(ranked, found[:, words], rtol=1e-5)


def test_a_masked_language_model_needs_a_mask_and_has_no_prior(loaded):
  base, _, predictor = loaded('bert')
  for ask in (predictor.first_words, predictor.generate):
    with pytest.raises(ValueError, match='An input has 0 masks, but .* an answer takes 1: write a'):
      ask(base.params, [[base.config.mask_id, 8], [9, 8]])
  with pytest.raises(ValueError, match='A masked language model cannot be calibrated'):
    predictor.prior(base.params, ['good', 'bad'])


def test_a_stop_string_may_stand_in_an_id_beyond_the_vocabulary(tiny_base):
  """A T5 has more rows than its vocabulary has pieces: these are unknown words."""
  base = base_checkpoint.load_base(str(tiny_base))
  words, decoder = Vocabulary.of_base(base), base.params['decoder']
  kernel = np.array(decoder['logits_dense']['kernel'])
  kernel[:, :words.size] = 0
  params = {**base.params, 'decoder': {**decoder, 'logits_dense': {'kernel': kernel}}}
  predictor = Predictor(PromptedModel(base.config.network()), words, None, 2, 6)
  inputs = [[5, 9, 1], [7, 1]]
  assert all(text.count('⁇') == 6 for text in predictor.generate(params, inputs))
  stopped = predictor.generate_with(params, inputs, DecodingSettings(stop=('⁇',)))
  first = predictor.first_words(params, inputs)
  np.testing.assert_allclose([texts[0].score for texts in stopped], first.max(axis=1), rtol=1e-5)

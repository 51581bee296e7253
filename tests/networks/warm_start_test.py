"""Networks that start pretraining from counted words, and the verb that writes them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import launch, param_paths, warm_start
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.networks import relative_position
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.t5 import T5Config

CONFIG = T5Config(vocab_size=192, emb_dim=8, num_heads=4, num_encoder_layers=1, mlp_dim=16,
                  num_decoder_layers=1, head_dim=4)


@pytest.fixture
def started(tiny_base, reviews, tmp_path, monkeypatch):
  """started(config) -> flat leaves of the base that the verb writes, and of a random one."""
  text, output = tmp_path / 'text.txt', tmp_path / 'start'
  text.write_text(reviews.read_text(encoding='utf-8') * 5, encoding='utf-8')
  vocabulary = str(tiny_base / 'spiece.model')

  def run(config, vocabulary=vocabulary):
    monkeypatch.setattr(launch, 'network_named', lambda name: config)
    command = ['--network=this', '--vocabulary', vocabulary, '--input', str(text),
               '--output', str(output)]
    assert warm_start.main(command) == 0
    assert warm_start.main(command) == 1  # never over another base
    return [{path: np.asarray(leaf) for path, leaf in param_paths.flatten(base.params).items()}
            for base in (base_checkpoint.load_base(output),
                         base_checkpoint.random_base(config, vocabulary))]
  return run


@pytest.mark.parametrize('tied', [False, True])
def test_embeddings_are_word_vectors_and_a_constant(started, tied):
  config = dataclasses.replace(CONFIG, logits_via_embedding=tied)
  made, random = started(config)
  table, chance = made[config.embedding], random[config.embedding]
  np.testing.assert_allclose(table[:, 0], 0.375 * math.sqrt(8) * chance.std(), rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(table, axis=1), math.sqrt(8) * chance.std(), rtol=1e-5)
  parallel = np.einsum('vd,vd->v', table[:, 1:], chance[:, 1:]) / (
      np.linalg.norm(table[:, 1:], axis=1) * np.linalg.norm(chance[:, 1:], axis=1))
  has_none = np.isclose(parallel, 1.0)
  assert has_none[100:].all() and 16 <= (~has_none).sum() < 100  # no text has a sentinel
  assert {path for path in made if made[path].shape != random[path].shape} == set()


def test_outputs_give_frequencies_and_what_follows(started, reviews, tiny_base):
  made, _ = started(CONFIG)
  from prompt_tuning_jax.data.vocabulary import Vocabulary
  words = Vocabulary(str(tiny_base / 'spiece.model'))
  texts = words.encode_many(reviews.read_text(encoding='utf-8').splitlines())
  table, output = made[CONFIG.embedding], made[CONFIG.output]

  def loss(logits_of):
    pairs = np.array([pair for text in texts for pair in zip(text, text[1:], strict=False)])
    logits = logits_of(table[pairs[:, 0]] / table.std())
    logits = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return -np.mean(logits[np.arange(len(pairs)), pairs[:, 1]])

  frequencies = np.zeros_like(output)
  frequencies[0] = output[0]
  assert (loss(lambda x: x @ output) < loss(lambda x: x @ frequencies) - 0.3
          < math.log(CONFIG.vocab_size) - 0.6)


def test_heads_look_at_neighbours_and_alike_tokens_find_each_other(started):
  made, random = started(CONFIG)
  where = {}
  for side in ('encoder', 'decoder'):
    buckets = relative_position.bucket(jnp.arange(-3, 4), bidirectional=side == 'encoder',
                                       num_buckets=32, max_distance=128)
    bias = made[f'{side}/relpos_bias/rel_embedding'][:, np.asarray(buckets)]  # distances -3 … 3
    where[side] = [np.flatnonzero(row == row.max()) - 3 for row in bias]
  np.testing.assert_array_equal(where['encoder'][:3], [[-1], [1], [0]])
  assert [list(row) for row in where['decoder'][:2]] == [[-1], [-2]]
  assert len(where['encoder'][3]) == len(where['decoder'][3]) == 7
  cross = 'decoder/layers_0/encoder_decoder_attention/{}/kernel'
  np.testing.assert_allclose(made[cross.format('query')],
                             12.8 / CONFIG.head_dim * random[cross.format('key')], rtol=1e-6)
  rest = {path for path in made if 'layers_0' in path and 'norm' not in path}
  outs = {path for path in rest if path.endswith(('/out/kernel', '/wo/kernel'))}
  assert len(outs) == 5
  for path in rest - {cross.format('query')}:
    np.testing.assert_allclose(made[path], random[path] * (0.35 if path in outs else 1), rtol=1e-6)


def bert_words(reviews, bert_file):
  """How often each word stands in the reviews: [128]."""
  from prompt_tuning_jax.data.vocabulary import Vocabulary
  lines = reviews.read_text(encoding='utf-8').splitlines()
  return np.bincount(np.concatenate(Vocabulary(str(bert_file)).encode_many(lines)), minlength=128)


@pytest.mark.slow
def test_a_bert_has_word_vectors_and_frequencies_and_keeps_the_rest(started, bert_file, reviews):
  config = BertConfig(vocab_size=128, emb_dim=8, num_heads=2, num_encoder_layers=1, head_dim=4,
                      mlp_dim=16, max_positions=32)
  made, random = started(config, str(bert_file))
  changed = {path for path in made if not np.array_equal(made[path], random[path])}
  assert changed == {config.embedding, 'head/logits_bias'}
  shares = np.exp(made['head/logits_bias'])
  assert shares.argmax() == bert_words(reviews, bert_file).argmax()
  assert 0.9 < np.corrcoef(shares, bert_words(reviews, bert_file))[0, 1]


def test_what_is_not_there_is_one_line(tiny_base, reviews, tmp_path, capsys):
  command = ['--input', str(reviews), '--output', str(tmp_path / 'start')]
  vocabulary = f'--vocabulary={tiny_base / "spiece.model"}'
  assert warm_start.main([*command, vocabulary, '--network=mine']) == 1
  assert 'no network mine' in capsys.readouterr().err
  assert warm_start.main([*command, '--vocabulary=none.model', '--network=mini']) == 1
  assert 'none.model' in capsys.readouterr().err
  assert warm_start.main(['--input', str(reviews), '--output', str(tmp_path), vocabulary,
                          '--network=mini']) == 1
  assert 'name a new folder' in capsys.readouterr().err
  assert warm_start.main([*command, vocabulary, '--network=mini']) == 1
  assert 'take more text' in capsys.readouterr().err
  assert not (tmp_path / 'start').exists()

"""Hugging Face folders: transformers' own load and compute its logits; ours load there."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import hf_config, hf_safetensors, hf_t5
from prompt_tuning_jax.checkpoints.base_checkpoint import load_base
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.networks import parameters, t5

T5_1_1 = t5.T5Config(48, 8, 2, 2, 1, 4, 16)
T5_1_0 = dataclasses.replace(T5_1_1, mlp_activations=('relu',), logits_via_embedding=True)
# One mistake in the decoder's relative positions is invisible below 8 target tokens.
INPUTS = np.random.default_rng(0).integers(3, 48, (2, 9)).astype(np.int32)
TARGETS = np.random.default_rng(1).integers(3, 48, (2, 33)).astype(np.int32)


def random_params(config, dtype='float32'):
  rng = np.random.default_rng(0)
  return param_paths.unflatten({
      path: jnp.asarray(rng.normal(size=spec.shape, scale=0.5), dtype)
      for path, spec in parameters.parameter_specs(config).items()})


def assert_bit_equal(a, b):
  a, b = param_paths.flatten(a), param_paths.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert a[path].dtype == b[path].dtype
    assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def our_logits(config, params):
  targets = np.concatenate([np.zeros((2, 1), np.int32), TARGETS[:, :-1]], axis=1)
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
  return t5.Transformer(config).apply({'params': params}, INPUTS, targets, TARGETS,
                                      enable_dropout=False)


def their_logits(model):
  import torch
  targets = np.concatenate([np.zeros((2, 1), np.int32), TARGETS[:, :-1]], axis=1)
  with torch.no_grad():
    return model.float().eval()(input_ids=torch.tensor(INPUTS).long(), use_cache=False,
                                decoder_input_ids=torch.tensor(targets).long()).logits.numpy()


def torch_model(kind='t5', **changes):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  fields = dict(vocab_size=48, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_decoder_layers=1,
                num_heads=2, decoder_start_token_id=0) | changes
  config, model = {
      't5': (transformers.T5Config, transformers.T5ForConditionalGeneration),
      'mt5': (transformers.MT5Config, transformers.MT5ForConditionalGeneration)}[kind]
  model = model(config(**fields))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(std=0.5)
  if kind == 'mt5' or fields.get('tie_word_embeddings') is False:  # transformers 5 ties them
    model.lm_head.weight = torch.nn.Parameter(torch.randn(48, 8) * 0.5)
  return model


@pytest.mark.parametrize('kind, changes', [
    ('t5', {}),
    ('t5', {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}),
    ('t5', {'feed_forward_proj': 'gated-silu', 'tie_word_embeddings': False}),
    ('mt5', {'feed_forward_proj': 'gated-gelu'}),
    ('t5', {'relative_attention_num_buckets': 8, 'relative_attention_max_distance': 20}),
], ids=['t5 1.0', 't5 1.1', 'ul2', 'mt5', 'buckets'])
def test_folders_of_transformers_give_its_logits(tmp_path, kind, changes):
  model = torch_model(kind, **changes)
  model.save_pretrained(tmp_path)
  base = load_base(tmp_path)
  has_head = 'decoder/logits_dense/kernel' in param_paths.flatten(base.params)
  assert has_head == (kind == 'mt5' or 'tie_word_embeddings' in changes)
  assert base.config.logits_via_embedding != has_head
  np.testing.assert_allclose(our_logits(base.config, base.params), their_logits(model),
                             atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize('config', [T5_1_0, T5_1_1], ids=['t5 1.0', 't5 1.1'])
@pytest.mark.parametrize('shard_bytes', [10 ** 9, 1000])
def test_transformers_reads_what_we_write(tmp_path, config, shard_bytes):
  transformers = pytest.importorskip('transformers')
  params = random_params(config)
  hf_safetensors.write(tmp_path / 'x', config, params, shard_bytes=shard_bytes)
  model, report = transformers.T5ForConditionalGeneration.from_pretrained(
      tmp_path / 'x', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  np.testing.assert_allclose(our_logits(config, params), their_logits(model), atol=2e-4, rtol=2e-4)


def test_transformers_shards_and_bfloat16(tmp_path):
  model = torch_model(feed_forward_proj='gated-gelu', tie_word_embeddings=False).bfloat16()
  model.save_pretrained(tmp_path, max_shard_size='2KB')
  assert (tmp_path / 'model.safetensors.index.json').exists()
  base = load_base(tmp_path, dtype=None)
  assert all(leaf.dtype == jnp.bfloat16 for leaf in param_paths.flatten(base.params).values())
  np.testing.assert_allclose(our_logits(base.config, base.params), their_logits(model),
                             atol=2e-4, rtol=2e-4)
  whole = load_base(tmp_path)  # float32 by default; the values are the same
  for path, leaf in param_paths.flatten(whole.params).items():
    np.testing.assert_array_equal(leaf, param_paths.flatten(base.params)[path].astype(jnp.float32))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('config', [T5_1_0, T5_1_1], ids=['t5 1.0', 't5 1.1'])
@pytest.mark.parametrize('shard_bytes', [10 ** 9, 1000])
def test_load_of_write_is_bit_equal(tmp_path, config, dtype, shard_bytes):
  params = random_params(config, dtype)
  hf_safetensors.write(tmp_path / 'x', config, params, shard_bytes=shard_bytes)
  base = load_base(tmp_path / 'x', dtype=None)
  assert base.config == config
  assert_bit_equal(base.params, params)
  assert (tmp_path / 'x/model.safetensors').exists() == (shard_bytes > 1000)
  assert os.listdir(tmp_path) == ['x']


def test_the_safetensors_library_reads_our_files(tmp_path):
  params = random_params(T5_1_1, 'bfloat16')
  hf_safetensors.write(tmp_path / 'x', T5_1_1, params)
  tensors = safetensors.numpy.load_file(tmp_path / 'x/model.safetensors')
  flat = param_paths.flatten(params)
  assert len(tensors) == len(flat)
  for path, leaf in flat.items():
    tensor = tensors[hf_t5.name_of(path)]
    np.testing.assert_array_equal(tensor if tensor.shape == leaf.shape and 'kernel' not in path
                                  else tensor.T, leaf)


def written(tmp_path, config=T5_1_1):
  """A folder to damage, and its tensors under Hugging Face's names."""
  folder = tmp_path / 'x'
  hf_safetensors.write(folder, config, random_params(config))
  return folder, safetensors.numpy.load_file(folder / 'model.safetensors')


def test_duplicates_and_unused_tensors_are_fine(tmp_path):
  folder, tensors = written(tmp_path)
  expected = load_base(folder)
  for name in ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight'):
    tensors[name] = tensors['shared.weight']
  unused = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'
  tensors[unused] = np.ones((4, 2))
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  assert_bit_equal(load_base(folder).params, expected.params)
  del tensors['shared.weight']  # some converters keep another of the three names
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  assert_bit_equal(load_base(folder).params, expected.params)


def test_an_output_layer_that_is_a_copy_of_the_embedding_is_tied(tmp_path):
  folder, tensors = written(tmp_path, T5_1_0)
  expected = load_base(folder)
  tensors['lm_head.weight'] = tensors['shared.weight'].copy()
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  base = load_base(folder)
  assert base.config.logits_via_embedding and base.fingerprint == expected.fingerprint
  tensors['lm_head.weight'][-1, -1] += 1
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  assert not load_base(folder).config.logits_via_embedding


def test_rows_are_the_files_not_the_configs(tmp_path):
  folder, _ = written(tmp_path)
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | {'vocab_size': 40}))
  assert load_base(folder).config.vocab_size == 48


def test_missing_extra_misshaped_and_truncated_tensors_are_named_at_once(tmp_path):
  folder, tensors = written(tmp_path)
  del tensors['lm_head.weight'], tensors['encoder.block.1.layer.1.DenseReluDense.wo.weight']
  tensors['encoder.block.2.layer.0.SelfAttention.q.weight'] = np.zeros((8, 8), np.float32)
  tensors['decoder.final_layer_norm.weight'] = np.zeros(9, np.float32)
  tensors['encoder.final_layer_norm.weight'] = np.zeros(8, np.int64)
  path = folder / 'model.safetensors'
  safetensors.numpy.save_file(tensors, path)
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError) as error:
    load_base(folder)
  text = str(error.value)
  # config.json says that the output layer is not tied: a lost lm_head is not a tied model.
  assert 'decoder/logits_dense/kernel (lm_head.weight)' in text
  assert 'encoder/layers_1/mlp/wo/kernel (encoder.block.1.layer.1.DenseReluDense.wo.weight)' in text
  assert 'extra: encoder.block.2.layer.0.SelfAttention.q.weight;' in text
  assert 'decoder/decoder_norm/scale (decoder.final_layer_norm.weight) is [9], expected [8]' in text
  assert '(encoder.final_layer_norm.weight): its dtype is int64' in text
  assert text.count('truncated (model.safetensors has') == 1 and '\n' not in text


def test_a_missing_shard_names_its_tensors(tmp_path):
  hf_safetensors.write(tmp_path / 'x', T5_1_1, random_params(T5_1_1), shard_bytes=1000)
  next((tmp_path / 'x').glob('model-00002-*')).unlink()
  with pytest.raises(ValueError, match='lacks model-00002-of-.*which should hold .*weight'):
    load_base(tmp_path / 'x')
  index = tmp_path / 'x/model.safetensors.index.json'
  for text in ('{"weight_map": {"a": "../../etc/passwd"}}', '{}', '[', '{"weight_map": {"a": 1}}',
               r'{"weight_map": {"a": "b\nc"}}'):
    index.write_text(text)
    with pytest.raises(ValueError, match='index.json'):
      load_base(tmp_path / 'x')


@pytest.mark.parametrize('changes, reason', [
    ({'model_type': 'umt5'}, "model_type is 'umt5'"),
    ({'d_model': 0}, 'd_model should be a whole number from 1 to'),
    ({'num_layers': 10 ** 6}, 'num_layers should be a whole number from 1 to 256'),
    ({'num_heads': '2'}, 'num_heads'),
    ({'num_layers': True}, 'num_layers'),
    ({'feed_forward_proj': 'swish'}, 'feed_forward_proj'),
    ({'dropout_rate': 1.5}, 'dropout_rate'),
    ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon'),
    ({'relative_attention_num_buckets': 1}, 'config.json: relative_.*_buckets must be at least 4'),
    ({'relative_attention_max_distance': 16}, 'max_distance more than half of it, got 32 and 16'),
    ({'d_kv': 3}, 'is \\[8, 8\\], expected \\[8, 6\\]'),
])
def test_a_config_that_cannot_be_is_one_line(tmp_path, changes, reason):
  folder, _ = written(tmp_path)
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(config | changes))
  with pytest.raises(ValueError, match=reason) as error:
    load_base(folder)
  assert '\n' not in str(error.value)


def test_a_pickle_is_not_read(tmp_path):
  folder, _ = written(tmp_path)
  os.rename(folder / 'model.safetensors', folder / 'pytorch_model.bin')
  with pytest.raises(ValueError, match='pickle'):
    load_base(folder)


def test_write_refuses_what_is_not_the_network(tmp_path):
  flat = param_paths.flatten(random_params(T5_1_1))
  flat['prompt/embedding'] = flat.pop('encoder/encoder_norm/scale')
  with pytest.raises(ValueError, match='encoder/encoder_norm/scale, prompt/embedding'):
    hf_safetensors.write(tmp_path / 'x', T5_1_1, param_paths.unflatten(flat))
  with pytest.raises(ValueError, match='expected'):
    hf_safetensors.write(tmp_path / 'x', dataclasses.replace(T5_1_1, mlp_dim=20),
                         random_params(T5_1_1))
  assert not os.listdir(tmp_path)


def test_write_replaces_only_when_told(tmp_path):
  hf_safetensors.write(tmp_path / 'x', T5_1_0, random_params(T5_1_0))
  with pytest.raises(ValueError, match='exists already'):
    hf_safetensors.write(tmp_path / 'x', T5_1_1, random_params(T5_1_1))
  hf_safetensors.write(tmp_path / 'x', T5_1_1, random_params(T5_1_1), replace=True)
  assert load_base(tmp_path / 'x').config == T5_1_1
  assert os.listdir(tmp_path) == ['x']


def test_vocabulary_travels_with_the_folder(tmp_path):
  (tmp_path / 'words.model').write_bytes(b'pieces')
  vocabulary = VocabularyFile(str(tmp_path / 'words.model'), 7)
  params = random_params(T5_1_0)
  hf_safetensors.write(tmp_path / 'a', T5_1_0, params, vocabulary=vocabulary)
  found = load_base(tmp_path / 'a').vocabulary
  assert found == VocabularyFile(str(tmp_path / 'a/spiece.model'), 7)
  assert found.sha256 == vocabulary.sha256
  wide = dataclasses.replace(T5_1_0, vocab_size=3 + 256 + 125)
  hf_safetensors.write(tmp_path / 'b', wide, random_params(wide),
                       vocabulary=VocabularyFile('bytes', 125))
  assert load_base(tmp_path / 'b').vocabulary == VocabularyFile('bytes', 125)
  assert VocabularyFile('bytes').sha256 == 'bytes'
  (tmp_path / 'b/tokenizer_config.json').unlink()
  assert load_base(tmp_path / 'b').vocabulary is None
  shutil.copy(tmp_path / 'words.model', tmp_path / 'b/spiece.model')
  assert load_base(tmp_path / 'b').vocabulary.extra_ids == 100
  assert hf_config.find_vocabulary(tmp_path / 'b', hf_t5.MT5.vocabulary_files,
                                   hf_t5.MT5.extra_ids).extra_ids == 0


def test_a_tensor_in_two_files_is_refused(tmp_path):
  hf_safetensors.write(tmp_path / 'x', T5_1_1, random_params(T5_1_1), shard_bytes=2000)
  first, second = sorted((tmp_path / 'x').glob('model-*'))[:2]
  index = json.loads((tmp_path / 'x' / hf_safetensors.INDEX).read_text())
  (tmp_path / 'x/older.safetensors').write_bytes(second.read_bytes())
  index['weight_map']['another'] = 'older.safetensors'
  (tmp_path / 'x' / hf_safetensors.INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match='older.safetensors holds .*, which another file of'):
    load_base(tmp_path / 'x')

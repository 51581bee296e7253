"""GPT-2 folders: those of transformers give its logits here, and ours give them there."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import hf_gpt2, hf_safetensors, stored_leaf, t5x_legacy
from prompt_tuning_jax.checkpoints.base_checkpoint import load_base
from prompt_tuning_jax.networks import gpt, parameters

V, D, LAYERS, END = 40, 8, 2, 7  # V and END as Hugging Face counts
CONFIG = gpt.GPTConfig(V + 1, D, 2, LAYERS, D // 2, 12, ('gelu',), max_positions=24, use_bias=True,
                       scale_queries=True, logits_via_embedding=True, scale_logits=False,
                       has_padding_row=False)
TABLE = CONFIG.embedding
TEXTS = np.random.default_rng(0).integers(0, V, (2, 16))
NUM_INPUTS = 6


def random_params(config=CONFIG, dtype='float32'):
  """As a folder gives them: row 0 is the row of the end of text."""
  rng = np.random.default_rng(0)
  flat = {path: jnp.asarray(rng.normal(size=spec.shape, scale=0.5), dtype)
          for path, spec in parameters.parameter_specs(config).items()}
  flat[TABLE] = flat[TABLE].at[0].set(flat[TABLE][END + 1])
  return param_paths.unflatten(flat)


def torch_model(**changes):
  transformers = pytest.importorskip('transformers')
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  fields = dict(vocab_size=V, n_embd=D, n_head=2, n_layer=LAYERS, n_inner=12, n_positions=24,
                bos_token_id=END, eos_token_id=END) | changes
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(std=0.5)
  return model


def our_logits(base):
  """What follows each token from the last input on: [B, S, V], Hugging Face's ids."""
  ids = jnp.asarray(TEXTS + 1, jnp.int32)
  inputs, targets = ids[:, :NUM_INPUTS], ids[:, NUM_INPUTS:]
  given = jnp.concatenate([jnp.zeros((2, 1), jnp.int32), targets[:, :-1]], axis=1)
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base.params)
  with jax.default_matmul_precision('float32'):
    return np.asarray(base.config.network().apply(
        {'params': params}, inputs, given, targets, enable_dropout=False))[..., 1:]


def their_logits(model):
  import torch
  with torch.no_grad():
    logits = model.float().eval()(input_ids=torch.tensor(TEXTS)).logits.numpy()
  return logits[:, NUM_INPUTS - 1:-1]


def assert_close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


def assert_bit_equal(a, b):
  a, b = param_paths.flatten(a), param_paths.flatten(b)
  assert a.keys() == b.keys()
  for path in a:
    assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


@pytest.mark.parametrize('changes, shard_size, dtype', [
    ({}, '1GB', 'float32'), ({'n_inner': None, 'n_head': 1}, '1KB', 'bfloat16')],
    ids=['whole', 'shards, bfloat16, default width'])
def test_folders_of_transformers_give_its_logits(tmp_path, changes, shard_size, dtype):
  model = torch_model(**changes)
  model = model.bfloat16() if dtype == 'bfloat16' else model
  model.save_pretrained(tmp_path, max_shard_size=shard_size)
  assert (tmp_path / 'model.safetensors').exists() == (shard_size == '1GB')
  base = load_base(tmp_path, dtype=None)
  assert base.config.vocab_size == V + 1 and base.embedding.dtype == dtype
  np.testing.assert_array_equal(base.embedding[0], base.embedding[END + 1])
  assert_close(our_logits(base), their_logits(model))


@pytest.mark.parametrize('shard_bytes', [10 ** 9, 500])
def test_transformers_reads_what_we_write(tmp_path, shard_bytes):
  transformers = pytest.importorskip('transformers')
  hf_safetensors.write(tmp_path / 'x', CONFIG, random_params(), shard_bytes=shard_bytes)
  assert (tmp_path / 'x/model.safetensors').exists() == (shard_bytes > 500)
  model, report = transformers.GPT2LMHeadModel.from_pretrained(
      tmp_path / 'x', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  assert (model.config.vocab_size, model.config.eos_token_id) == (V, END)
  assert_close(our_logits(load_base(tmp_path / 'x')), their_logits(model))


@pytest.mark.parametrize('dtype, shard_bytes', [('float32', 10 ** 9), ('bfloat16', 500)])
def test_load_of_write_is_bit_equal(tmp_path, dtype, shard_bytes):
  params = random_params(dtype=dtype)
  hf_safetensors.write(tmp_path / 'x', CONFIG, params, shard_bytes=shard_bytes)
  base = load_base(tmp_path / 'x', dtype=None)
  assert base.config == CONFIG
  assert_bit_equal(base.params, params)
  t5x_legacy.write(tmp_path / 't5x', params)
  assert load_base(tmp_path / 't5x', config=CONFIG, dtype=None).fingerprint == base.fingerprint


def test_a_given_network_is_the_one_that_is_read(tmp_path):
  hf_safetensors.write(tmp_path / 'x', CONFIG, random_params())
  given = dataclasses.replace(CONFIG, dropout_rate=0.0)
  assert load_base(tmp_path / 'x', config=given).config == given
  with pytest.raises(ValueError, match=r'wpe.weight\) is \[24, 8\], expected \[20, 8\]'):
    load_base(tmp_path / 'x', config=dataclasses.replace(CONFIG, max_positions=20))


def test_row_0_that_was_trained_apart_is_dropped(tmp_path):
  flat = param_paths.flatten(random_params())
  flat[TABLE] = flat[TABLE].at[0].set(9.0)
  hf_safetensors.write(tmp_path / 'x', CONFIG, param_paths.unflatten(flat))
  table = load_base(tmp_path / 'x').embedding
  np.testing.assert_array_equal(table[1:], flat[TABLE][1:])
  np.testing.assert_array_equal(table[0], table[-1])  # no vocabulary: the last id, as GPT-2's


def test_only_what_is_asked_for_is_read(tmp_path):
  """Each part of a parameter is that part of the whole, and no row beside it is touched."""
  folder = tmp_path / 'x'
  hf_safetensors.write(folder, CONFIG, random_params())
  _, stored = hf_safetensors.open_folder(folder)
  whole = {path: np.array(leaf.read((slice(None),) * len(leaf.shape)))
           for path, leaf in stored.items()}
  assert {path: leaf.shape for path, leaf in whole.items()} == {
      path: spec.shape for path, spec in parameters.parameter_specs(CONFIG).items()}
  for path, leaf in stored.items():
    for start in (None, 0, 1, 3):
      for stop in (None, 1, 3, 4):
        index = (slice(start, stop), *(slice(1, 3),) * (len(leaf.shape) - 1))
        np.testing.assert_array_equal(leaf.read(index), whole[path][index], path)

  asked = []
  leaf = stored_leaf.StoredLeaf('x', (V, 3 * D), 'float32',
                                lambda index: asked.append(index) or np.zeros((V, 3 * D))[index])
  stored_leaf.part_of_last_axis(leaf, 1, 3).read((slice(2, 4), slice(3, 5)))
  hf_gpt2._with_start(leaf, END).read((slice(9, 11), slice(0, 5)))
  hf_gpt2._with_start(leaf, END).read((slice(0, 3), slice(0, 5)))
  rows_and_columns = [(index[0].start, index[0].stop, index[1].start, index[1].stop)
                      for index in asked]
  assert rows_and_columns == [(2, 4, D + 3, D + 5), (8, 10, 0, 5), (END, END + 1, 0, 5),
                              (0, 2, 0, 5)]


def damaged(tmp_path, change):
  """A folder written here whose tensors `change` has changed."""
  folder = tmp_path / 'x'
  hf_safetensors.write(folder, CONFIG, random_params())
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  change(tensors)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  return folder


def test_names_without_prefix_masks_and_a_copy_of_the_table_are_fine(tmp_path):
  def change(tensors):
    for name in list(tensors):
      tensors[name.removeprefix('transformer.')] = tensors.pop(name)
    tensors['lm_head.weight'] = tensors['wte.weight'].copy()
    for i in range(LAYERS):
      tensors[f'h.{i}.attn.bias'] = np.tril(np.ones((1, 1, 24, 24), np.uint8))
      tensors[f'h.{i}.attn.masked_bias'] = np.array(-1e4, np.float32)

  assert_bit_equal(load_base(damaged(tmp_path, change)).params, random_params())


def test_missing_extra_misshaped_and_truncated_tensors_are_named_at_once(tmp_path):
  def change(tensors):
    del tensors['transformer.h.0.attn.c_attn.bias'], tensors['transformer.wpe.weight']
    tensors['transformer.h.1.attn.c_attn.weight'] = np.zeros((D, 3 * D + 1), np.float32)
    tensors['transformer.h.1.mlp.c_fc.bias'] = np.zeros(5, np.float32)
    tensors['transformer.h.2.ln_1.bias'] = np.zeros(D, np.float32)
    tensors['lm_head.weight'] = np.ones((V, D), np.float32)

  folder = damaged(tmp_path, change)
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(ValueError) as error:
    load_base(folder)
  text = str(error.value)
  for part in ('query', 'key', 'value'):
    assert f'decoder/layers_0/self_attention/{part}/bias (h.0.attn.c_attn.bias)' in text
    assert (f'decoder/layers_1/self_attention/{part}/kernel (transformer.h.1.attn.c_attn.weight): '
            '[8, 25] in the file, expected [8, 24]') in text
  assert 'decoder/position_embedder/embedding (wpe.weight)' in text
  assert 'extra: h.2.ln_1.bias (transformer.h.2.ln_1.bias), lm_head.weight;' in text
  assert 'wi/bias (transformer.h.1.mlp.c_fc.bias) is [5], expected [12]' in text
  assert text.count('truncated (model.safetensors has') == 1 and '\n' not in text


@pytest.mark.parametrize('changes, reason', [
    ({'activation_function': 'relu'}, "activation_function is 'relu', expected 'gelu_new'"),
    ({'layer_norm_epsilon': 1e-6}, 'layer_norm_epsilon'),
    ({'scale_attn_weights': False}, 'scale_attn_weights'),
    ({'scale_attn_by_inverse_layer_idx': True}, 'scale_attn_by_inverse_layer_idx'),
    ({'tie_word_embeddings': False}, 'tie_word_embeddings'),
    ({'n_head': 3}, 'n_head, 3, does not divide'),
    ({'n_layer': '2'}, 'n_layer should be a whole number from 1 to 256'),
    ({'n_layer': 2 ** 30}, 'n_layer should be a whole number from 1 to 256'),
    ({'resid_pdrop': 1.0}, 'resid_pdrop'),
    ({'eos_token_id': V}, 'eos_token_id in config.json is 40, and the table has the rows 0 to 39'),
    ({'eos_token_id': None}, 'eos_token_id in config.json is None'),
])
def test_a_config_that_cannot_be_is_one_line(tmp_path, changes, reason):
  hf_safetensors.write(tmp_path / 'x', CONFIG, random_params())
  path, weights = tmp_path / 'x/config.json', tmp_path / 'x/model.safetensors'
  safetensors.numpy.save_file(safetensors.numpy.load_file(weights), weights)  # as others write it
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {'reorder_and_upcast_attn': True, 'vocab_size': 9}))
  assert load_base(tmp_path / 'x').config == CONFIG
  path.write_text(json.dumps(config | changes))
  with pytest.raises(ValueError, match=reason) as error:
    load_base(tmp_path / 'x')
  assert '\n' not in str(error.value)


def test_weights_written_with_another_end_of_text_are_refused(tmp_path):
  hf_safetensors.write(tmp_path / 'x', CONFIG, random_params())
  path = tmp_path / 'x/config.json'
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {'eos_token_id': config['eos_token_id'] - 1}))
  with pytest.raises(ValueError, match=f"has eos_token_id {END - 1}, but .* with '{END}'"):
    load_base(tmp_path / 'x')


def test_write_refuses_what_is_no_gpt2(tmp_path):
  for changes in ({'use_bias': False}, {'scale_logits': True}, {'mlp_activations': ('relu',)},
                  {'head_dim': 3}, {'has_padding_row': True}, {'max_positions': None}):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=f'no network with {next(iter(changes))}'):
      hf_safetensors.write(tmp_path / 'x', config, random_params(config))
  assert not os.listdir(tmp_path)

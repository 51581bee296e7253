"""BART folders: those of transformers give its numbers here, and ours give them there."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning_jax import param_paths, prompted_model
from prompt_tuning_jax.checkpoints import hf_safetensors
from prompt_tuning_jax.checkpoints.base_checkpoint import load_base
from prompt_tuning_jax.decoding.beam_search import BrevityPenalty
from prompt_tuning_jax.networks import bart, parameters
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

V, D, P, PAD, EOS = 40, 16, 3, 1, 2  # V and the ids as Hugging Face counts
CONFIG = bart.BartConfig(V + 1, D, 2, 2, 1, D // 2, 20, max_positions=24)
RNG = np.random.default_rng(0)
INPUTS = [RNG.integers(3, V, n) for n in (9, 4, 1, 12)]
TARGETS = [RNG.integers(3, V, n) for n in (3, 11, 7, 1)]

pytestmark = pytest.mark.usefixtures('exact_products')


@pytest.fixture(scope='module')
def model():
  """Every leaf is far from its usual value, the buffer of the logits' bias too."""
  config = transformers.BartConfig(
      vocab_size=V, d_model=D, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
      decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
      max_position_embeddings=24, forced_eos_token_id=None, attn_implementation='eager')
  made, rng = transformers.BartForConditionalGeneration(config), np.random.default_rng(1)
  made.generation_config.forced_eos_token_id = None
  with torch.no_grad():
    for name, leaf in [*made.named_parameters(), ('', made.final_logits_bias)]:
      values = rng.normal(size=leaf.shape)
      if leaf.ndim == 2 and 'embed' not in name and name:
        values *= 2 * D ** -0.5
      if name.endswith('.bias') or not name:
        values *= 0.1  # or one token would be likeliest everywhere
      if 'embed_positions' in name:
        values *= 4
      leaf.copy_(torch.tensor(values))
    made.model.shared.weight[EOS] = 1.02 * made.model.shared.weight[11]  # so that some texts end
  return made.eval()


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
  path = tmp_path_factory.mktemp('bart') / 'x'
  model.save_pretrained(path)
  return path


@pytest.fixture(scope='module')
def base(folder):
  return load_base(folder)


def padded(rows, fill=0):
  width = max(map(len, rows))
  return np.stack([np.pad(row, (0, width - len(row)), constant_values=fill) for row in rows])


def batch(inputs, targets):
  made = padded(targets).astype(np.int32)
  return {'encoder_input_tokens': padded(inputs).astype(np.int32), 'decoder_target_tokens': made,
          'decoder_input_tokens': np.pad(made, ((0, 0), (1, 0)))[:, :-1],
          'decoder_loss_weights': (made > 0).astype(np.float32)}


def shifted(rows):
  return [row + 1 for row in rows]


def theirs(model, **inputs):
  starts = [np.concatenate([[EOS], row[:-1]]) for row in TARGETS]
  return model(decoder_input_ids=torch.tensor(padded(starts, PAD)), **inputs)


def close(ours, expected, tolerance=1e-4):
  expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
  assert ours.shape == expected.shape
  assert np.max(np.abs(ours - expected)) <= tolerance * np.sqrt(np.mean(expected ** 2))


def test_hidden_states_and_logits_are_those_of_transformers(model, base):
  assert base.config == CONFIG
  made, ids = batch(shifted(INPUTS), shifted(TARGETS)), padded(INPUTS, PAD)
  with torch.no_grad():
    expected = theirs(model, input_ids=torch.tensor(ids), attention_mask=torch.tensor(ids != PAD))
  live, written = made['encoder_input_tokens'] > 0, made['decoder_target_tokens'] > 0
  network = base.config.network()
  states = network.apply({'params': base.params}, made['encoder_input_tokens'], method='encode',
                         enable_dropout=False)
  close(np.asarray(states)[live], expected.encoder_last_hidden_state.numpy()[live])
  logits = np.asarray(prompted_model.logits(PromptedModel(network), base.params, made))[written]
  close(logits[:, 1:], expected.logits.numpy()[written])
  assert np.all(logits[:, 0] < -1e9)


def with_prompt(model, prompt, text):
  words = model.model.shared(torch.tensor(text))
  return torch.cat([words[:1], prompt, words[1:]])


@pytest.mark.slow
def test_gradients_of_a_prompt_are_those_of_torch(model, base):
  """It stands behind the first token, <s> say."""
  prompt = torch.tensor(RNG.normal(size=(P, D)), dtype=torch.float32, requires_grad=True)
  rows = [with_prompt(model, prompt, text) for text in INPUTS]
  mask = padded([np.ones(len(row), int) for row in rows])
  logits = theirs(model, attention_mask=torch.tensor(mask), inputs_embeds=(
      torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))).logits
  labels = torch.tensor(padded(TARGETS, -100))
  loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
  loss.backward()
  ours = PromptedModel(CONFIG.network(), SoftPrompt(P, D))
  place = VirtualTokens(V + 1, P, 'after_first').place
  made = batch(list(map(place, shifted(INPUTS))), shifted(TARGETS))
  value, gradient = jax.jit(jax.value_and_grad(lambda rows: prompted_model.loss(
      ours, {**base.params, 'prompt': {'embedding': rows}}, made)[0]))(prompt.detach().numpy())
  close(np.asarray(value), loss.detach().numpy())
  close(np.asarray(gradient), prompt.grad)


def ended(rows, length):
  """Texts as ours are: ids + 1, the end included, 0 behind it."""
  made = []
  for row in rows:
    row = row[1:]  # what the decoder starts from
    size = list(row).index(EOS) + 1 if EOS in row else len(row)
    made.append(np.pad(row[:size] + 1, (0, length - size)))
  return np.stack(made)


@pytest.mark.parametrize('beams', [1, 4])
def test_decoding_is_that_of_transformers(model, base, beams):
  length, ids = 12, padded(INPUTS, PAD)
  with torch.no_grad():
    made = model.generate(
        torch.tensor(ids), attention_mask=torch.tensor(ids != PAD), max_new_tokens=length,
        do_sample=False, num_beams=beams, num_return_sequences=beams, length_penalty=0.0,
        early_stopping='never' if beams > 1 else False, return_dict_in_generate=True,
        output_scores=True)
  expected = ended(made.sequences.numpy(), length)
  ours, inputs = PromptedModel(CONFIG.network()), padded(shifted(INPUTS))
  if beams == 1:
    tokens = jax.jit(functools.partial(prompted_model.predict, ours, max_length=length,
                                       eos_id=EOS + 1))(base.params, inputs)
  else:
    tokens, scores = jax.jit(functools.partial(
        prompted_model.beam_search, ours, max_length=length, num_beams=beams,
        penalty=BrevityPenalty(0.0), eos_id=EOS + 1))(base.params, inputs)
    tokens = tokens.reshape(-1, length)
    np.testing.assert_allclose(scores.ravel(), made.sequences_scores, rtol=1e-4)
  np.testing.assert_array_equal(tokens, expected)
  assert len({tuple(row) for row in expected}) > 3 and 0 < np.sum(expected == EOS + 1) < 4 * beams


def random_params(dtype):
  rng = np.random.default_rng(2)
  flat = {path: jnp.asarray(rng.normal(size=spec.shape), dtype)
          for path, spec in parameters.parameter_specs(CONFIG).items()}
  for path in (CONFIG.embedding, 'decoder/logits_bias'):
    flat[path] = flat[path].at[0].set(0)  # nobody's
  return param_paths.unflatten(flat)


@pytest.mark.parametrize('dtype, shard_bytes', [('float32', 10 ** 9), ('bfloat16', 500)])
def test_load_of_write_is_bit_equal_and_transformers_reads_it(tmp_path, dtype, shard_bytes):
  params, config = random_params(dtype), dataclasses.replace(CONFIG, start_id=8)
  hf_safetensors.write(tmp_path / 'x', config, params, shard_bytes=shard_bytes)
  again = load_base(tmp_path / 'x', dtype=None)
  assert again.config == config
  a, b = param_paths.flatten(params), param_paths.flatten(again.params)
  assert a.keys() == b.keys()
  for path in a:
    assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path
  read, report = transformers.BartForConditionalGeneration.from_pretrained(
      tmp_path / 'x', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  assert read.config.decoder_start_token_id == 7 and read.config.vocab_size == V
  np.testing.assert_array_equal(read.final_logits_bias.float().numpy()[0],
                                np.asarray(a['decoder/logits_bias'], np.float32)[1:])


def test_a_file_of_the_bare_model_with_copies_of_its_table_is_fine(folder, base, tmp_path):
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  bare = {name.removeprefix('model.'): leaf for name, leaf in tensors.items()
          if name != 'final_logits_bias'}
  for name in ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight'):
    bare[name] = bare['shared.weight'].copy()
  (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
  safetensors.numpy.save_file(bare, tmp_path / 'model.safetensors')
  ours, expected = (param_paths.flatten(each.params) for each in (load_base(tmp_path), base))
  assert not np.any(ours.pop('decoder/logits_bias'))
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, expected[path])
  bare['lm_head.weight'] += 1
  del bare['encoder.layers.1.fc1.bias']
  safetensors.numpy.save_file(bare, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=r'fc1.bias\); extra: lm_head.weight'):
    load_base(tmp_path)


@pytest.mark.parametrize('changes, reason', [
    ({'scale_embedding': True}, 'scale_embedding is True, expected False'),
    ({'decoder_ffn_dim': 21}, 'decoder_ffn_dim is 21, expected 20'),
    ({'activation_function': 'tanh'}, "activation_function is 'tanh', expected one of"),
    ({'encoder_attention_heads': 3, 'decoder_attention_heads': 3}, '3, does not divide'),
    ({'decoder_start_token_id': '2'}, 'decoder_start_token_id should be a whole number')])
def test_a_config_that_cannot_be_is_one_line(folder, tmp_path, changes, reason):
  config = json.loads((folder / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | changes))
  (tmp_path / 'model.safetensors').symlink_to(folder / 'model.safetensors')
  with pytest.raises(ValueError, match=reason) as error:
    load_base(tmp_path)
  assert '\n' not in str(error.value)


def test_a_network_that_is_no_bart_is_not_written(tmp_path):
  config = dataclasses.replace(CONFIG, head_dim=5)
  shapes = parameters.parameter_specs(config)
  with pytest.raises(ValueError, match='expected emb_dim = num_heads'):
    hf_safetensors.write(tmp_path / 'x', config, param_paths.unflatten(
        {path: np.zeros(spec.shape, np.float32) for path, spec in shapes.items()}))

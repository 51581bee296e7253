"""BERT folders: those of transformers give its numbers here, and ours give them there."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning_jax import param_paths, prompted_model
from prompt_tuning_jax.checkpoints import hf_safetensors
from prompt_tuning_jax.checkpoints.base_checkpoint import load_base
from prompt_tuning_jax.networks import bert, parameters
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

V, D, P, CLS, SEP, MASK = 40, 16, 3, 4, 5, 6
CONFIG = bert.BertConfig(V, D, 2, 2, D // 2, 20, max_positions=24, mask_id=MASK, end_id=SEP)
RNG = np.random.default_rng(0)
# A pair of sentences, one sentence, one token; targets are what stands under the masks.
TEXTS = [np.array([CLS, 9, MASK, 11, SEP, MASK, 12, SEP]),
         np.array([CLS, *range(10, 20), MASK, SEP]), np.array([MASK])]
TARGETS = [np.array([21, 22, SEP]), np.array([23, SEP]), np.array([24])]

pytestmark = pytest.mark.usefixtures('exact_products')


@pytest.fixture(scope='module')
def model():
  """Every leaf is far from its usual value."""
  config = transformers.BertConfig(
      vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
      intermediate_size=20, max_position_embeddings=24, attn_implementation='eager')
  made, rng = transformers.BertForMaskedLM(config), np.random.default_rng(1)
  with torch.no_grad():
    for name, leaf in made.named_parameters():
      values = rng.normal(size=leaf.shape)
      leaf.copy_(torch.tensor(values * (2 * D ** -0.5 if 'dense' in name else 1)))
  return made.eval()


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
  """As transformers writes it, with the two ids that it has no use for."""
  path = tmp_path_factory.mktemp('bert') / 'x'
  model.save_pretrained(path)
  config = json.loads((path / 'config.json').read_text())
  (path / 'config.json').write_text(json.dumps(
      config | {'mask_token_id': MASK, 'sep_token_id': SEP}))
  return path


@pytest.fixture(scope='module')
def base(folder):
  return load_base(folder)


def padded(rows):
  width = max(map(len, rows))
  return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)


def batch(inputs, targets):
  made = padded(targets)
  return {'encoder_input_tokens': padded(inputs), 'decoder_target_tokens': made,
          'decoder_input_tokens': np.pad(made, ((0, 0), (1, 0)))[:, :-1],
          'decoder_loss_weights': (made > 0).astype(np.float32)}


def given(rows=TEXTS):
  """What transformers takes beside the ids: the pair's second sentence has type 1."""
  types = [np.cumsum(row == SEP) - (row == SEP) for row in rows]
  return {'attention_mask': torch.tensor(padded([np.ones(len(row)) for row in rows])),
          'token_type_ids': torch.tensor(padded([np.minimum(row, 1) for row in types])).long()}


def close(ours, expected, tolerance=1e-4):
  expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
  assert ours.shape == expected.shape
  assert np.max(np.abs(ours - expected)) <= tolerance * np.sqrt(np.mean(expected ** 2))


def test_hidden_states_and_logits_are_those_of_transformers(model, base):
  assert base.config == CONFIG
  ids, made = padded(TEXTS), batch(TEXTS, TARGETS)
  with torch.no_grad():
    expected = model(input_ids=torch.tensor(ids).long(), **given(), output_hidden_states=True)
  network = base.config.network()
  states = np.asarray(network.apply({'params': base.params}, ids, method='encode',
                                    enable_dropout=False))
  close(states[ids > 0], expected.hidden_states[-1].numpy()[ids > 0])
  logits = np.asarray(prompted_model.logits(PromptedModel(network), base.params, made))
  at_masks = np.stack([logits[0, 0], logits[0, 1], logits[1, 0], logits[2, 0]])
  close(at_masks, expected.logits.numpy()[ids == MASK])
  ends = np.stack([logits[0, 2], logits[1, 1]])  # behind the last mask a text ends, for certain
  np.testing.assert_array_equal(np.argmax(ends, -1), [SEP, SEP])
  np.testing.assert_array_equal(jax.nn.softmax(ends)[:, SEP], 1)


def test_gradients_of_a_prompt_behind_cls_are_those_of_torch(model, base):
  prompt = torch.tensor(RNG.normal(size=(P, D)), dtype=torch.float32, requires_grad=True)
  place = VirtualTokens(V, P, 'after_first').place
  rows = list(map(place, TEXTS))
  table = torch.cat([model.bert.embeddings.word_embeddings.weight, prompt])
  logits = model(inputs_embeds=table[torch.tensor(padded(rows)).long()], **given(rows)).logits
  pieces = torch.tensor([21, 22, 23, 24])
  loss = torch.nn.functional.cross_entropy(logits[torch.tensor(padded(rows) == MASK)], pieces)
  loss.backward()
  ours, made = PromptedModel(CONFIG.network(), SoftPrompt(P, D)), batch(rows, TARGETS)
  value, gradient = jax.jit(jax.value_and_grad(lambda rows: prompted_model.loss(
      ours, {**base.params, 'prompt': {'embedding': rows}}, made)[0]))(prompt.detach().numpy())
  share = 4 / 6  # Of six targets two are ends, which cost nothing.
  close(np.asarray(value), share * loss.detach().numpy())
  close(np.asarray(gradient), share * prompt.grad)


def random_params(dtype):
  rng = np.random.default_rng(2)
  return param_paths.unflatten({path: jnp.asarray(rng.normal(size=spec.shape), dtype)
                                for path, spec in parameters.parameter_specs(CONFIG).items()})


@pytest.mark.parametrize('dtype, shard_bytes', [('float32', 10 ** 9), ('bfloat16', 500)])
def test_load_of_write_is_bit_equal_and_transformers_reads_it(tmp_path, dtype, shard_bytes):
  params = random_params(dtype)
  hf_safetensors.write(tmp_path / 'x', CONFIG, params, shard_bytes=shard_bytes)
  again = load_base(tmp_path / 'x', dtype=None)
  assert again.config == CONFIG
  a, b = param_paths.flatten(params), param_paths.flatten(again.params)
  assert a.keys() == b.keys()
  for path in a:
    assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path
  read, report = transformers.BertForMaskedLM.from_pretrained(
      tmp_path / 'x', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  theirs = read.cls.predictions.transform.dense.weight.detach().float().numpy()
  np.testing.assert_array_equal(theirs.T, np.asarray(a['head/transform/kernel'], np.float32))


def test_the_first_files_are_read_too(folder, base, tmp_path):
  """Other names of norms, a pooler, a classifier of pairs, and copies of table and bias."""
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  old = {name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias',
                                                                     'LayerNorm.beta'): leaf
         for name, leaf in tensors.items()}
  old['cls.predictions.decoder.weight'] = old['bert.embeddings.word_embeddings.weight'].copy()
  old['cls.predictions.decoder.bias'] = old['cls.predictions.bias'].copy()
  for name, shape in {'bert.pooler.dense.weight': (D, D), 'bert.pooler.dense.bias': (D,),
                      'cls.seq_relationship.weight': (2, D), 'cls.seq_relationship.bias': (2,),
                      'bert.embeddings.position_ids': (1, 24)}.items():
    old[name] = np.zeros(shape, np.float32)
  (tmp_path / 'config.json').write_text((folder / 'config.json').read_text())
  safetensors.numpy.save_file(old, tmp_path / 'model.safetensors')
  ours, expected = (param_paths.flatten(each.params) for each in (load_base(tmp_path), base))
  assert ours.keys() == expected.keys()
  for path, leaf in ours.items():
    np.testing.assert_array_equal(leaf, expected[path])
  del old['cls.predictions.transform.dense.bias']
  old['cls.predictions.decoder.weight'] += 1
  safetensors.numpy.save_file(old, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match=r'Missing: head/transform/bias .*; extra: .*decoder.weight'):
    load_base(tmp_path)


@pytest.mark.parametrize('changes, reason', [
    ({'layer_norm_eps': 1e-5}, 'layer_norm_eps'), ({'is_decoder': True}, 'is_decoder'),
    ({'position_embedding_type': 'relative_key'}, 'position_embedding_type'),
    ({'hidden_act': 'tanh'}, "hidden_act is 'tanh', expected one of"),
    ({'num_attention_heads': 3}, '3, does not divide'),
    ({'mask_token_id': None, 'hidden_dropout_prob': 1}, 'hidden_dropout_prob')])
def test_a_config_that_cannot_be_is_one_line(folder, tmp_path, changes, reason):
  config = json.loads((folder / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config | changes))
  (tmp_path / 'model.safetensors').symlink_to(folder / 'model.safetensors')
  with pytest.raises(ValueError, match=reason) as error:
    load_base(tmp_path)
  assert '\n' not in str(error.value)


def test_ids_of_an_untold_mask_are_those_of_the_published_ones(folder, tmp_path):
  config = json.loads((folder / 'config.json').read_text())
  del config['mask_token_id'], config['sep_token_id']
  (tmp_path / 'config.json').write_text(json.dumps(config))
  (tmp_path / 'model.safetensors').symlink_to(folder / 'model.safetensors')
  assert load_base(tmp_path).config == dataclasses.replace(CONFIG, mask_id=103, end_id=102)

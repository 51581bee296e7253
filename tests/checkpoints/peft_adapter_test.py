"""PEFT folders: ours generate in PEFT what they do here, PEFT's do here what they do in PEFT."""

import json
import shutil
import warnings

import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning_jax import prompted_base
from prompt_tuning_jax.checkpoints import peft_adapter, prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import EMBEDDING, PromptFile
from prompt_tuning_jax.data.vocabulary import Vocabulary

LENGTH, NEW_TOKENS = 3, 6
KINDS = ('SEQ_2_SEQ_LM', 'CAUSAL_LM')
TEXTS = ([7, 20, 5, 31, 1], [9, 1], [40, 41, 42, 1])  # ids of transformers; 1 ends a text


@pytest.fixture(scope='module')
def torch():
  return pytest.importorskip('torch')


@pytest.fixture(scope='module')
def peft(torch):
  return pytest.importorskip('peft')


def save_random(torch, made, folder):
  with torch.no_grad():
    for name, parameter in made.named_parameters():
      if parameter.ndim > 1:  # Positions weigh most, so that texts vary.
        parameter.normal_(std=3 if 'wpe' in name else 0.7)
  made.save_pretrained(folder)
  return folder


@pytest.fixture(scope='module')
def folders(torch, tmp_path_factory, tiny_base, bpe_file):
  """{task type: a folder of transformers with a vocabulary}; the id 1 ends a text in both."""
  transformers = pytest.importorskip('transformers')
  made = {kind: tmp_path_factory.mktemp('bases') / kind for kind in KINDS}
  torch.manual_seed(3)
  save_random(torch, transformers.T5ForConditionalGeneration(transformers.T5Config(
      vocab_size=192, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_decoder_layers=1, num_heads=2,
      decoder_start_token_id=0)), made['SEQ_2_SEQ_LM'])
  save_random(torch, transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=300, n_embd=8, n_head=2, n_layer=1, n_positions=64, bos_token_id=1,
      eos_token_id=1)), made['CAUSAL_LM'])
  for name in ('spiece.model', 'tokenizer_config.json'):
    shutil.copy(tiny_base / name, made['SEQ_2_SEQ_LM'])
  shutil.copy(bpe_file, made['CAUSAL_LM'] / 'tokenizer.json')
  return made


def transformers_model(kind, folders):
  import transformers
  loader = {'SEQ_2_SEQ_LM': transformers.AutoModelForSeq2SeqLM,
            'CAUSAL_LM': transformers.AutoModelForCausalLM}[kind]
  return loader.from_pretrained(folders[kind]).eval()


def until_end(ids):
  ids = [int(i) for i in ids]
  return ids[:ids.index(1)] if 1 in ids else ids


def generated_there(torch, kind, model):
  """The ids that PEFT generates greedily: an encoder's texts in one padded batch."""
  settings = dict(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
  if kind == 'SEQ_2_SEQ_LM':
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    made = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), **settings)
    return [until_end(row[1:]) for row in made]
  # With a cache PEFT 0.21 on transformers 5 goes on from the prompt and the last token alone.
  return [until_end(model.generate(
      input_ids=torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.long),
      use_cache=False, **settings)[0, len(text):]) for text in TEXTS]


def generated_here(monkeypatch, kind, folders, prompt):
  """The ids that we generate; ours of a GPT-2 are those of transformers + 1."""
  shift = int(kind == 'CAUSAL_LM')
  monkeypatch.setattr(Vocabulary, 'decode', lambda self, ids: (
      until_end([i - shift for i in ids])))
  loaded = prompted_base.load(str(folders[kind]), prompt and str(prompt), batch_size=4,
                              max_decode_length=NEW_TOKENS)
  return loaded.predictor.generate(loaded.params, [
      np.array(text, np.int32) + shift for text in TEXTS])


def make_prompt(seed=0, **about):
  rows = np.random.default_rng(seed).normal(size=(LENGTH, 8)).astype(np.float32)
  return PromptFile({EMBEDDING: rows}, {'format_version': 1, 'length': LENGTH, **about})


@pytest.mark.parametrize('kind', [
    'SEQ_2_SEQ_LM', pytest.param('CAUSAL_LM', marks=pytest.mark.slow)])
def test_our_folder_generates_in_peft_what_it_does_here(
    tmp_path, monkeypatch, torch, peft, folders, kind):
  prompt = make_prompt()
  prompt_file.save(tmp_path / 'prompt.safetensors', prompt)
  peft_adapter.write(tmp_path / 'folder', prompt, str(folders[kind]), kind == 'CAUSAL_LM')
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    model = peft.PeftModel.from_pretrained(transformers_model(kind, folders), tmp_path / 'folder')
  config = model.peft_config['default']
  assert (config.task_type, config.base_model_name_or_path) == (kind, str(folders[kind]))
  expected = generated_there(torch, kind, model.eval())
  for source in ('prompt.safetensors', 'folder'):
    assert generated_here(monkeypatch, kind, folders, tmp_path / source) == expected
  assert generated_here(monkeypatch, kind, folders, None) != expected
  assert len(set(map(tuple, expected))) > 1


@pytest.mark.parametrize('kind', KINDS)
def test_a_folder_of_peft_generates_here_what_it_does_there(
    tmp_path, monkeypatch, torch, peft, folders, kind):
  model = peft.get_peft_model(transformers_model(kind, folders), peft.PromptTuningConfig(
      task_type=kind, num_virtual_tokens=LENGTH))
  rows = model.prompt_encoder['default'].embedding.weight
  assert len(rows) == LENGTH * (2 if kind == 'SEQ_2_SEQ_LM' else 1)
  with torch.no_grad():
    rows[LENGTH:] = 1000  # the half that PEFT saves and never uses
    rows[:LENGTH].normal_(generator=torch.Generator().manual_seed(1))
  model.save_pretrained(tmp_path / 'adapter')
  loaded = prompt_file.load(tmp_path / 'adapter')
  np.testing.assert_array_equal(loaded.params[EMBEDDING], rows[:LENGTH].detach().numpy())
  assert loaded.metadata['placement'] == 'before' and 'labels' not in loaded.metadata
  assert loaded.metadata['base'] == {'name': str(folders[kind]), 'd_model': 8}
  assert peft_adapter.is_decoder_only(tmp_path / 'adapter') == (kind == 'CAUSAL_LM')
  assert generated_here(monkeypatch, kind, folders, tmp_path / 'adapter') == generated_there(
      torch, kind, model.eval())


def test_what_is_written_comes_back_with_its_metadata(tmp_path):
  prompt = make_prompt(labels=['négatif', 'positif'], base={'fingerprint': 'a' * 64, 'd_model': 8})
  peft_adapter.write(tmp_path / 'folder', prompt, None, False)
  peft_adapter.write(tmp_path / 'folder', prompt, 't5', False)  # which replaces it
  again = prompt_file.load(tmp_path / 'folder')
  np.testing.assert_array_equal(again.params[EMBEDDING], prompt.params[EMBEDDING])
  assert again.params.keys() == prompt.params.keys() and again.metadata == prompt.metadata
  assert [path.name for path in tmp_path.iterdir()] == ['folder']
  peft_adapter.write(tmp_path / 'bare', PromptFile(prompt.params), None, False)  # as from a .npy
  assert 'base' in prompt_file.load(tmp_path / 'bare').metadata


def test_a_folder_with_anything_else_is_not_replaced(tmp_path):
  for name in ('notes.txt', 'checkpoint-100'):
    folder = tmp_path / name / 'folder'
    peft_adapter.write(folder, make_prompt(), None, False)
    before = (folder / 'adapter_model.safetensors').read_bytes()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=f'holds {name}'):
      peft_adapter.write(folder, make_prompt(1), None, False)
    assert (folder / 'adapter_model.safetensors').read_bytes() == before


@pytest.mark.parametrize('prompt, reason', [
    (make_prompt(placement='end'), "placement 'before', got one placed 'end'"),
    (PromptFile({'prompt/deep_embedding': np.ones((2, 3, 8))}), 'holds prompt/deep_embedding'),
    (PromptFile({'prefix/encoder': np.ones((1, 2, 1, 3, 2, 4))}), 'holds prefix/encoder'),
    (PromptFile({EMBEDDING: np.ones((3, 8)), 'lora/a': np.ones(3), 'lora/b': np.ones(3)}),
     'holds lora/a and 1 more')])
def test_what_peft_cannot_hold_is_refused(tmp_path, prompt, reason):
  with pytest.raises(ValueError, match=reason):
    peft_adapter.write(tmp_path / 'folder', prompt, None, False)
  assert not list(tmp_path.iterdir())


CONFIG = {'peft_type': 'PROMPT_TUNING', 'task_type': 'SEQ_2_SEQ_LM', 'num_virtual_tokens': LENGTH,
          'token_dim': 8, 'num_transformer_submodules': 1, 'base_model_name_or_path': 't5'}


def write_raw(folder, config, tensors, metadata=None):
  folder.mkdir(parents=True)
  text = config if isinstance(config, str) else json.dumps(config)
  (folder / 'adapter_config.json').write_text(text)
  safetensors.numpy.save_file(tensors, folder / 'adapter_model.safetensors', metadata)
  return folder


def rows(length=LENGTH, width=8, dtype=np.float32):
  values = np.random.default_rng(5).normal(size=(length, width))
  return {'prompt_embeddings': values.astype(dtype)}


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32'])
@pytest.mark.parametrize('submodules, stored', [(None, 2), (2, 2), (1, 1)])
def test_the_first_rows_are_read_as_float32(tmp_path, dtype, submodules, stored):
  import ml_dtypes
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  tensors = rows(LENGTH * stored, dtype=dtype)
  folder = write_raw(tmp_path / 'folder', CONFIG | {'num_transformer_submodules': submodules},
                     tensors)
  found = prompt_file.load(folder).params[EMBEDDING]
  assert found.dtype == np.float32 and found.flags.writeable
  np.testing.assert_array_equal(found, tensors['prompt_embeddings'][:LENGTH].astype(np.float32))


@pytest.mark.parametrize('config, tensors, reason', [
    ('{"peft_type"', rows(), 'is not JSON'),
    ('[' * 100_000, rows(), 'is not JSON'),
    ('[1]', rows(), 'should hold a JSON object'),
    ({}, rows(), 'peft_type is None'),
    *[(CONFIG | {'peft_type': kind}, rows(), f"peft_type is '{kind}', expected 'PROMPT_TUNING'")
      for kind in ('PREFIX_TUNING', 'LORA', 'P_TUNING')],
    (CONFIG | {'peft_type': ['LORA']}, rows(), 'peft_type is'),
    (CONFIG | {'task_type': 'SEQ_CLS'}, rows(), "task_type is 'SEQ_CLS', expected one of"),
    (CONFIG | {'task_type': None}, rows(), 'task_type is None'),
    (CONFIG | {'num_virtual_tokens': None}, rows(), 'num_virtual_tokens should be a positive'),
    (CONFIG | {'num_virtual_tokens': True}, rows(), 'num_virtual_tokens should be a positive'),
    (CONFIG | {'token_dim': 0}, rows(), 'token_dim should be a positive'),
    (CONFIG | {'num_transformer_submodules': '2'}, rows(), 'num_transformer_submodules should be'),
    (CONFIG | {'task_type': 'CAUSAL_LM', 'num_transformer_submodules': 2}, rows(6),
     'num_transformer_submodules is 2, expected 1'),
    (CONFIG | {'num_virtual_tokens': 4}, rows(), r'is \[3, 8\], but .* says \[4, 8\]'),
    (CONFIG | {'token_dim': 4}, rows(), r'is \[3, 8\], but .* says \[3, 4\]'),
    (CONFIG | {'num_transformer_submodules': 2}, rows(), r'says \[6, 8\]'),
    (CONFIG, rows(6), r'is \[6, 8\]'),
    (CONFIG, {'prompt_embeddings': np.ones(24, np.float32)}, r'is \[24\]'),
    (CONFIG, rows(dtype=np.float64), 'is float64, expected one of'),
    (CONFIG, rows(dtype=np.int32), 'is int32, expected one of'),
    (CONFIG, {'prompt_embeddings': np.full((3, 8), np.nan, np.float32)}, 'NaN or infinite'),
    (CONFIG, {'other': np.ones((3, 8), np.float32)}, 'prompt_embeddings and nothing else'),
    (CONFIG, {**rows(), 'classifier.weight': np.ones(3, np.float32)}, 'got classifier.weight'),
])
def test_a_folder_that_cannot_be_is_one_line(tmp_path, config, tensors, reason):
  folder = write_raw(tmp_path / 'folder', config, tensors)
  with pytest.raises(ValueError, match=reason) as error:
    prompt_file.load(folder)
  assert 'folder' in str(error.value) and '\n' not in str(error.value)


def test_damaged_weights_pickles_and_foreign_folders_are_one_line(tmp_path):
  folder = write_raw(tmp_path / 'folder', CONFIG, rows())
  weights = folder / 'adapter_model.safetensors'
  content = weights.read_bytes()

  def refused(reason):
    with pytest.raises(ValueError, match=reason) as error:
      prompt_file.load(folder)
    assert '\n' not in str(error.value)

  for kept, reason in ((0, 'is not a safetensors file'), (20, 'is not a safetensors file'),
                       (len(content) - 1, 'truncated')):
    weights.write_bytes(content[:kept])
    refused(reason)
  weights.rename(folder / 'adapter_model.bin')
  refused('is a pickle, .* safe_serialization=True')
  (folder / 'adapter_model.bin').unlink()
  refused('but no adapter_model.safetensors')
  write_raw(tmp_path / 'edited', CONFIG, rows(), {
      'prompt_tuning_jax': json.dumps({'format_version': 1, 'length': 9})})
  with pytest.raises(ValueError, match='length 9'):
    prompt_file.load(tmp_path / 'edited')

"""The verb export: what it writes is what the prompt was, and what others make of it."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from prompt_tuning_jax import export
from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors, prompt_file
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.checkpoints.prompt_file import EMBEDDING, PromptFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


def make_prompt(path, base, **about) -> PromptFile:
  rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  prompt = PromptFile({EMBEDDING: rows}, prompt_file.describe(base, length=4, **about))
  prompt_file.save(path, prompt)
  return prompt


def run(prompt, to, output, *flags):
  return export.main([f'--prompt={prompt}', f'--to={to}', f'--output={output}', *flags])


def refused(capsys, *argv) -> str:
  assert run(*argv) == 1
  said = capsys.readouterr().err.strip()
  assert said.startswith('error: ') and len(said.splitlines()) == 1
  return said


def write_rows(path, *rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return f'--input={path}'


def test_a_prompt_file_survives_peft(tmp_path, base):
  source = tmp_path / 'prompt.safetensors'
  prompt = make_prompt(source, base, task='sst2', labels=['bad', 'good'])
  assert run(source, 'peft', tmp_path / 'peft') == 0
  assert run(tmp_path / 'peft', 'prompt_file', tmp_path / 'again.safetensors') == 0
  again = prompt_file.load(tmp_path / 'again.safetensors')
  assert again.metadata == prompt.metadata
  np.testing.assert_array_equal(again.params[EMBEDDING], prompt.params[EMBEDDING])
  config = json.loads((tmp_path / 'peft' / 'adapter_config.json').read_text())
  assert config['base_model_name_or_path'] == base.name
  assert (config['task_type'], config['num_virtual_tokens']) == ('SEQ_2_SEQ_LM', 4)


def test_numpy_survives_every_form_and_learns_its_base(tmp_path, base, tiny_base):
  rows = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
  np.save(tmp_path / '0.npy', rows)
  assert run(tmp_path / '0.npy', 'peft', tmp_path / 'peft', '--base_model_name=org/t5') == 0
  assert run(tmp_path / 'peft', 'prompt_file', tmp_path / 'a.safetensors') == 0
  untold = prompt_file.load(tmp_path / 'a.safetensors').metadata
  assert untold['base'] == {'name': 'org/t5', 'd_model': 8} and 'labels' not in untold
  assert run(tmp_path / 'a.safetensors', 'prompt_file', tmp_path / 'b.safetensors',
             f'--base={tiny_base}') == 0
  told = prompt_file.load(tmp_path / 'b.safetensors').metadata
  described = prompt_file.describe(base, length=4)
  assert told == {key: described[key] for key in told} and 'labels' not in told
  assert told['base']['fingerprint'] == base.fingerprint
  assert run(tmp_path / 'b.safetensors', 'numpy', tmp_path / '1.npy') == 0
  assert (tmp_path / '1.npy').read_bytes() == (tmp_path / '0.npy').read_bytes()
  assert run(tmp_path / '1.npy', 'prompt_embeds', tmp_path / 'c.safetensors') == 0
  written = safetensors.numpy.load_file(tmp_path / 'c.safetensors')
  assert written.keys() == {'prompt_embeds'}
  np.testing.assert_array_equal(written['prompt_embeds'], rows)


@pytest.mark.parametrize('placement', ['before', 'infix', 'end'])
def test_inputs_embeds_give_torch_our_encoder_states(tmp_path, base, tiny_base, placement):
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  source = tmp_path / 'prompt.safetensors'
  prompt = make_prompt(source, base, placement=placement)
  words = Vocabulary.of_base(base)
  texts = [[*words.encode('a lovely film'), 1], [5, 9, 12, 33, 1], [7, 1]]
  rows = [{'inputs': 'a lovely film'}, *({'input_tokens': ids} for ids in texts[1:])]
  output = tmp_path / 'rows.safetensors'
  assert run(source, 'prompt_embeds', output, f'--base={tiny_base}',
             write_rows(tmp_path / 'rows.jsonl', *rows)) == 0
  embedded = safetensors.numpy.load_file(output)
  assert set(embedded) == {'row_0', 'row_1', 'row_2'}
  encoder = transformers.T5EncoderModel.from_pretrained(tiny_base).eval()
  virtual, network = VirtualTokens(192, 4, placement), base.config.network()
  for number, text in enumerate(texts):
    ids = virtual.place(np.array(text, np.int32))
    expected = network.apply({'params': base.params}, ids[None], enable_dropout=False,
                             virtual_embeddings=prompt.params[EMBEDDING], method='encode')
    with torch.no_grad():
      found = encoder(inputs_embeds=torch.tensor(embedded[f'row_{number}'])[None])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_rows_of_gpt2_are_those_of_transformers_ids(tmp_path, bpe_file, capsys):
  transformers = pytest.importorskip('transformers')
  config = GPTConfig(vocab_size=301, emb_dim=8, num_heads=2, num_layers=1, head_dim=4, mlp_dim=32,
                     mlp_activations=('gelu',), logits_via_embedding=True, max_positions=32,
                     use_bias=True, scale_queries=True, scale_logits=False, has_padding_row=False)
  vocabulary = VocabularyFile(str(shutil.copy(bpe_file, tmp_path / 'tokenizer.json')), 0)
  made = base_checkpoint.random_base(config, vocabulary)
  hf_safetensors.write(tmp_path / 'gpt2', config, made.params, vocabulary=made.vocabulary)
  base = base_checkpoint.load_base(tmp_path / 'gpt2')
  prompt = make_prompt(tmp_path / 'prompt.safetensors', base)
  flags = (f'--base={tmp_path / "gpt2"}', write_rows(
      tmp_path / 'rows.jsonl', {'inputs': 'a lovely film'}, {'inputs': 'dull'}))
  table = transformers.GPT2Model.from_pretrained(tmp_path / 'gpt2').wte.weight.detach().numpy()
  words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe_file))
  for dtype, error in (('float32', 0), ('float16', 2 ** -11), ('bfloat16', 2 ** -8)):
    output = tmp_path / f'{dtype}.safetensors'
    assert run(tmp_path / 'prompt.safetensors', 'prompt_embeds', output, *flags,
               f'--dtype={dtype}') == 0
    written = safetensors.numpy.load_file(output)
    for number, text in enumerate(('a lovely film', 'dull')):
      ids = [*words(' ' + text)['input_ids'], words.convert_tokens_to_ids('<|endoftext|>')]
      assert written[f'row_{number}'].dtype == dtype
      np.testing.assert_allclose(written[f'row_{number}'].astype(np.float32), np.concatenate(
          [prompt.params[EMBEDDING], table[ids]]), rtol=error, atol=error / 64)
  # The base tells that it has no encoder, and so does the folder that was written for it.
  assert run(tmp_path / 'prompt.safetensors', 'peft', tmp_path / 'a', flags[0]) == 0
  assert run(tmp_path / 'a', 'peft', tmp_path / 'b') == 0
  assert run(tmp_path / 'prompt.safetensors', 'peft', tmp_path / 'c', '--decoder_only') == 0
  for name in 'abc':
    config = json.loads((tmp_path / name / 'adapter_config.json').read_text())
    assert config['task_type'] == 'CAUSAL_LM'


def test_what_cannot_be_is_told_before_the_base_is_read(tmp_path, base, capsys, monkeypatch):
  monkeypatch.setattr(base_checkpoint, 'load_base', lambda *_, **__: pytest.fail('it was read'))
  source, out = tmp_path / 'prompt.safetensors', tmp_path / 'out'
  make_prompt(source, base, placement='end')
  deep = tmp_path / 'deep.safetensors'
  prompt_file.save(deep, PromptFile({'prompt/deep_embedding': np.ones((2, 3, 8))}))
  rows = write_rows(tmp_path / 'rows.jsonl', {'inputs': 'a'})
  use = '--base=mini'
  for reason, *argv in (
      ("placement 'before', got one placed 'end'", source, 'peft', out, use),
      ('PEFT takes a soft prompt alone', deep, 'peft', out, use),
      ('numpy takes a soft prompt alone', deep, 'numpy', out, use),
      ('prompt_embeds takes a soft prompt alone', deep, 'prompt_embeds', out, use),
      ('There is no file', tmp_path / 'absent', 'numpy', out, use),
      ('is a folder, expected a prompt file', tmp_path, 'numpy', out, use),
      ('There is no file', source, 'prompt_embeds', out, use, '--input=absent.jsonl'),
      ('--input needs the base', source, 'prompt_embeds', out, rows),
      ('--input belongs to --to=prompt_embeds', source, 'numpy', out, use, rows),
      ('--dtype belongs to', source, 'peft', out, '--dtype=float16'),
      ('--base_model_name belongs to', source, 'numpy', out, '--base_model_name=t5'),
      ('--max_input_length must be', source, 'prompt_embeds', out, '--max_input_length=0'),
      ('it is a folder', source, 'numpy', tmp_path),
      ('is no folder', source, 'peft', source / 'below'),
      ('would be written over', source, 'prompt_file', source)):
    assert reason in refused(capsys, *argv), argv
  assert not out.exists()


def test_what_only_the_base_tells_is_one_line(tmp_path, base, tiny_base, capsys):
  source, out, use = tmp_path / 'prompt.safetensors', tmp_path / 'out', f'--base={tiny_base}'
  prompt = make_prompt(source, base)
  assert 'has an encoder' in refused(capsys, source, 'peft', out, use, '--decoder_only')
  for row, reason in (({'inputs': 3}, 'rows.jsonl, line 1: expected text'),
                      ({'input_tokens': [192]}, 'should be a list of ids')):
    assert reason in refused(capsys, source, 'prompt_embeds', out, use,
                             write_rows(tmp_path / 'rows.jsonl', row))
  assert 'has no rows' in refused(capsys, source, 'prompt_embeds', out, use,
                                  write_rows(tmp_path / 'rows.jsonl'))
  np.save(tmp_path / 'large.npy', prompt.params[EMBEDDING] * 1e6)
  assert 'too large for float16' in refused(capsys, tmp_path / 'large.npy', 'prompt_embeds', out,
                                            '--dtype=float16')
  np.save(tmp_path / 'wide.npy', np.ones((2, 9)))
  assert 'width is 9, but 8' in refused(capsys, tmp_path / 'wide.npy', 'prompt_file', out, use)
  assert not out.exists()


def test_rows_alone_tell_on_stderr_that_they_stand_elsewhere(tmp_path, base, capsys):
  make_prompt(tmp_path / 'end.safetensors', base, placement='end')
  make_prompt(tmp_path / 'before.safetensors', base)
  for to in ('numpy', 'prompt_embeds'):
    for placement, said in (('end', "trained placed 'end'"), ('before', '')):
      assert run(tmp_path / f'{placement}.safetensors', to, tmp_path / 'out') == 0
      error = capsys.readouterr().err
      assert said in error and bool(error) == bool(said)


def test_help_loads_nothing_heavy():
  code = ("import sys; from prompt_tuning_jax import export; export.parser().format_help(); "
          "print({'jax', 'numpy', 'flax', 'tensorflow'} & set(sys.modules))")
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == 'set()'


def test_peft_has_no_prompts_of_masked_language_models(tmp_path, bert_file, capsys):
  vocabulary = VocabularyFile(str(bert_file), 0)
  made = base_checkpoint.random_base(BertConfig(
      vocab_size=120, emb_dim=8, num_heads=2, num_encoder_layers=1, head_dim=4, mlp_dim=16,
      max_positions=32), vocabulary)
  hf_safetensors.write(tmp_path / 'bert', made.config, made.params, vocabulary=vocabulary)
  make_prompt(tmp_path / 'prompt.safetensors', base_checkpoint.load_base(tmp_path / 'bert'))
  assert run(tmp_path / 'prompt.safetensors', 'peft', tmp_path / 'out',
             f'--base={tmp_path / "bert"}') != 0
  assert 'PEFT has no prompt tuning' in capsys.readouterr().err

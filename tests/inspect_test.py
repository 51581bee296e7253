"""The verb inspect: reports of prompts of all kinds, their attention, and wrong commands."""

import json
import re

import numpy as np
import pytest

from prompt_tuning_jax import inspect as verb
from prompt_tuning_jax import launch
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks.t5 import T5Config

RELEASED = 'prompt_tuning/pretrained_prompts/t5_1_1_lm100k_base'
pytestmark = pytest.mark.usefixtures('token_dir')


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


def save(path, base, leaves=None, **about) -> str:
  """A prompt of four tokens, or other leaves."""
  rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  leaves = leaves or {prompt_file.EMBEDDING: rows}
  prompt_file.save(path, PromptFile(leaves, prompt_file.describe(base, **about)))
  return str(path)


def numbers(capsys, *argv) -> dict:
  """What --json prints."""
  capsys.readouterr()
  assert verb.main([*map(str, argv), '--json']) == 0
  return json.loads(capsys.readouterr().out)


def refused(capsys, *argv) -> str:
  assert verb.main(list(map(str, argv))) == 1
  said = capsys.readouterr().err.strip()
  assert said.startswith('error: ') and len(said.splitlines()) == 1
  return said


def sections(path) -> list[str]:
  return re.findall(r'<h2>(.*?)</h2>', path.read_text('utf-8'))


@pytest.mark.slow
def test_a_report_has_words_others_and_attention_and_is_the_same_again(
    tmp_path, tiny_base, base, capsys):
  words = Vocabulary.of_base(base)
  ids = words.encode('lovely film')
  prompt = save(tmp_path / 'a.safetensors', base, {
      prompt_file.EMBEDDING: 9 * np.asarray(base.embedding)[ids]}, task='films', labels=['film'])
  save(tmp_path / 'b.safetensors', base, task='plays')
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('{"inputs": "a lovely film", "targets": "good"}\n{"inputs": "dull"}\n' * 6)
  flags = [f'--prompt={prompt}', f'--base={tiny_base}', '--prompts', tmp_path, '--nearest=3',
           f'--input={rows}', '--max_decode_length=6', '--num_examples=9', '--batch_size=4']
  found = numbers(capsys, *flags)
  assert [token['words'][0] for token in found['words']['tokens']] == [words.piece(i) for i in ids]
  assert found['words']['labels']['found'] == ['film']
  assert found['likeness']['names'] == ['films', 'plays']
  assert found['attention']['examples'] == 9
  for reading in found['attention']['readings']:
    positions, heads = np.array(reading['positions']), np.array(reading['heads'])
    assert positions.shape == (1, len(ids)) and heads.shape == (1, 2)
    np.testing.assert_allclose(positions.sum(), heads.mean(), rtol=1e-5)
  pages = []
  for name in ('one.html', 'two.html'):
    assert verb.main([*map(str, flags), f'--output={tmp_path}/{name}']) == 0
    pages.append((tmp_path / name).read_bytes())
  assert pages[0] == pages[1]
  assert sections(tmp_path / 'one.html') == [
      'What it is', 'Nearest words', 'Sizes of tokens and words', 'Principal components',
      'Other prompts', 'Attention']


@pytest.mark.slow
@pytest.mark.parametrize('method, names, readings', [
    ('deep_prompt', {'deep'}, {'input', 'target'}),
    ('prefix_tuning', {'prefix'}, {'input', 'target', 'target_to_target'}),
    ('lora', {'others'}, set())])
def test_a_run_of_any_method_can_be_looked_into(method, names, readings, tiny_base, reviews,
                                                tmp_path, capsys):
  own = ['--gin.run.train.inspect=False'] if method == 'lora' else ['--gin.PROMPT_LENGTH=4']
  assert launch.train([
      '--gin_file=run/prompt_tuning_text_file.gin', f'--gin_file=method/{method}.gin', *own,
      f'--gin.TRAIN_FILE={reviews}', '--gin.INPUTS=text', '--gin.TARGETS=label',
      f'--gin.INITIAL_CHECKPOINT_PATH={tiny_base}', f'--gin.MODEL_DIR={tmp_path}/model',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}", '--gin.TRAIN_STEPS=2',
      '--gin.BATCH_SIZE=8', '--gin.EVAL_PERIOD=0', '--gin.run.train.log_period=1']) == 0
  report = tmp_path / 'model' / 'report.html'
  assert report.exists() == (method != 'lora')
  if report.exists():
    assert {'What it is', 'Training'} < set(sections(report))
    assert ('Nearest words' in sections(report)) == (method == 'deep_prompt')
  prompt = f'--prompt={tmp_path}/model/prompts/last.safetensors'
  found = numbers(capsys, prompt, f'--base={tiny_base}', '--text', 'a warm play', 'dull')
  assert set(found['leaves']) == names
  assert {each['by'] for each in (found.get('attention') or {'readings': []})['readings']
          } == readings
  assert found['curves']['loss']['train'][-1][0] == 2
  if method == 'lora':
    assert [note for note in found['notes'] if note.startswith('Attention: no position')]
    assert all(0 <= row['relative'] < 1 for row in found['leaves']['others'])
  assert verb.main([prompt, f'--output={tmp_path}/report.html']) == 0
  assert 'Training' in sections(tmp_path / 'report.html')


@pytest.mark.slow
def test_the_released_prompts_make_a_readable_report(test_assets, tmp_path, capsys):
  """Without their base, and with random weights of its width in its place."""
  prompts = test_assets / RELEASED
  flags = [f'--prompt={prompts}/sst2.npy', '--prompts', prompts]
  found = numbers(capsys, *flags)
  assert found['likeness']['names'] == ['sst2.npy', 'mrpc.npy', 'rte.npy']
  np.testing.assert_allclose(found['likeness']['cosine_of_means'][0][1:], [.4956, .5184],
                             atol=1e-4)
  norms = np.linalg.norm(np.load(prompts / 'sst2.npy'), axis=1)
  np.testing.assert_allclose(found['norms']['prompt'], norms, rtol=1e-5)
  config = T5Config(vocab_size=32128, emb_dim=768, num_heads=2, num_encoder_layers=1,
                    num_decoder_layers=1, head_dim=4, mlp_dim=8)
  vocabulary = test_assets / 'prompt_tuning' / 'test_data' / 't5_vocab'
  base = base_checkpoint.random_base(config, str(vocabulary))
  base_checkpoint.write(tmp_path / 'base', config, base.params, vocabulary=base.vocabulary)
  assert verb.main([*map(str, flags), f'--base={tmp_path}/base', '--text', 'a gem .',
                    '--max_decode_length=4', f'--output={tmp_path}/report.html']) == 0
  page = (tmp_path / 'report.html').read_text('utf-8')
  assert len(sections(tmp_path / 'report.html')) == 6
  assert page.count('<tr><th scope="row">') > 100 and len(page) < 1_000_000


def test_wrong_commands_are_one_line(tmp_path, tiny_base, base, capsys):
  prompt = f'--prompt={save(tmp_path / "p.safetensors", base)}'
  with_base, output = f'--base={tiny_base}', f'--output={tmp_path}/report.html'
  other = prompt_file.load(tmp_path / 'p.safetensors')
  other.metadata['base'] = {**other.metadata['base'], 'fingerprint': 'f' * 64}
  prompt_file.save(tmp_path / 'other.safetensors', other)
  (tmp_path / 'rows.jsonl').write_text('{"text": "no inputs"}\n')
  for argv, message in [
      ((prompt,), 'Name the report'), ((prompt, f'--output={tmp_path}/a.pdf'), 'end in .html'),
      ((prompt, output, '--text', 'a'), 'add --base'), ((prompt, output, '--network=x'), '--base'),
      ((prompt, output, '--nearest=0'), '--nearest'),
      ((f'--prompt={tmp_path}/absent', output), 'no prompt file'),
      ((prompt, output, '--base=absent'), 'no bundled base'),
      ((f'--prompt={tmp_path}/other.safetensors', output, with_base), 'does not belong'),
      ((prompt, output, '--prompts', f'{tmp_path}/other.safetensors'), 'only prompts of one base'),
      ((prompt, output, with_base, f'--input={tmp_path}/rows.jsonl'), 'expected text in "inputs"'),
      ((prompt, output, with_base, f'--input={tmp_path}/none.jsonl'), 'There is no file')]:
    assert message in refused(capsys, *argv), argv
  assert not (tmp_path / 'report.html').exists()

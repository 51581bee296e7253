"""A damaged file of each format, given to each verb that reads it: one line and status 1, or 2."""

import json
import shutil

import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import export, infer, launch, score, serve, similarity
from prompt_tuning_jax.checkpoints import (
    base_checkpoint,
    hf_config,
    peft_adapter,
    prompt_file,
    t5x_legacy,
)

pytestmark = pytest.mark.usefixtures('token_dir')


@pytest.fixture(scope='module')
def good(tmp_path_factory, tiny_base, reviews):
  """A folder with a good file of every format: nothing in it is changed."""
  folder = tmp_path_factory.mktemp('good')
  base = base_checkpoint.load_base(tiny_base)
  shutil.copytree(tiny_base, folder / 'base')
  t5x_legacy.write(folder / 't5x', base.params)
  base.vocabulary.write(folder / 't5x')
  rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  prompt = prompt_file.PromptFile({prompt_file.EMBEDDING: rows}, prompt_file.describe(
      base, length=4, labels=['bad', 'good']))
  for name in ('prompt', 'prompts/a', 'prompts/b'):
    prompt_file.save(folder / f'{name}.safetensors', prompt)
  np.save(folder / 'prompt.npy', rows)
  peft_adapter.write(folder / 'peft', prompt, 'tiny', False)
  lines = [json.loads(line) for line in reviews.read_text('utf-8').splitlines()[:4]]
  (folder / 'rows.jsonl').write_text(''.join(
      json.dumps({'inputs': line['text'], 'targets': line['label']}) + '\n' for line in lines))
  shutil.copy(reviews, folder / 'train.jsonl')
  (folder / 'mine.gin').write_text("include 'run/prompt_tuning_text_file.gin'\n")
  return folder


def flip(path, bit: int = 1):
  """Changes a bit in the middle."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= bit
  path.write_bytes(data)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-5])


def garbage(path):
  path.write_bytes(b'\xff\x00{[' + path.read_bytes())


INFER = (infer.main, '--base={}/base', '--input={}/rows.jsonl', '--output={}/out.jsonl')
SCORE = (score.main, *INFER[1:])
EVAL = (eval_verb.main, '--base={}/base', '--input={}/rows.jsonl')
EXPORT = (export.main, '--base={}/base')
SERVE = (serve.main, '--base={}/base', '--port=0')
TRAIN = (launch.train, '--gin_file={}/mine.gin', '--gin.TRAIN_FILE={}/train.jsonl',
         '--gin.INITIAL_CHECKPOINT_PATH={}/base', '--gin.MODEL_DIR={}/run',
         '--gin.PROMPT_LENGTH=4', '--gin.TRAIN_STEPS=1', '--gin.INPUTS=text', '--gin.TARGETS=label')
SIMILARITY = (similarity.main, '{}/prompts')
CASES = [
    (INFER, 'prompt.safetensors', flip, '--prompt={}/prompt.safetensors'),
    (INFER, 'prompt.npy', truncate, '--prompt={}/prompt.npy'),
    (INFER, 'peft/adapter_model.safetensors', flip, '--prompt={}/peft'),
    (INFER, 'peft/adapter_config.json', garbage, '--prompt={}/peft'),
    (INFER, 'prompts/a.safetensors', flip, '--prompts={}/prompts'),
    (INFER, 'base/model.safetensors', flip),
    (INFER, 'base/config.json', garbage),
    (INFER, 'base/tokenizer_config.json', garbage),
    (INFER, 'base/spiece.model', garbage),
    (INFER, 'rows.jsonl', garbage, '--prompt={}/prompt.safetensors'),
    (INFER, 't5x/checkpoint', flip, '--base={}/t5x'),
    (INFER, 't5x/target.token_embedder.embedding/.zarray', garbage, '--base={}/t5x'),
    (INFER, 't5x/target.token_embedder.embedding/0.0', flip, '--base={}/t5x'),
    (SCORE, 'prompt.safetensors', flip, '--prompt={}/prompt.safetensors'),
    (SCORE, 'rows.jsonl', truncate, '--prompt={}/prompt.safetensors'),
    (SCORE, 'base/model.safetensors', truncate),
    (EVAL, 'prompt.safetensors', truncate, '--prompt={}/prompt.safetensors'),
    (EVAL, 'rows.jsonl', garbage, '--prompt={}/prompt.safetensors'),
    (EVAL, 'base/model.safetensors', flip, '--prompt={}/prompt.safetensors'),
    (EXPORT, 'prompt.safetensors', flip, '--prompt={}/prompt.safetensors', '--to=peft',
     '--output={}/out'),
    (EXPORT, 'base/model.safetensors', flip, '--prompt={}/prompt.safetensors',
     '--to=peft', '--output={}/out'),
    (SERVE, 'base/model.safetensors', flip, '--prompts={}/prompts'),
    (SIMILARITY, 'prompt.safetensors', flip, '--target={}/prompt.safetensors'),
    (TRAIN, 'mine.gin', garbage),
    (TRAIN, 'train.jsonl', garbage),
    (TRAIN, 'base/model.safetensors', flip),
    (TRAIN, 'base/spiece.model', garbage),
    (TRAIN, 'prompt.safetensors', flip, '--gin_file=prompt/from_file.gin',
     '--gin.INITIAL_PROMPT_PATH={}/prompt.safetensors'),
]


def test_the_files_are_good_before_they_are_damaged(good, tmp_path, capsys):
  folder = shutil.copytree(good, tmp_path / 'x')
  for (run, *flags), prompt in ((INFER, 'prompt.safetensors'), (SCORE, 'prompt.npy'),
                                (EVAL, 'peft')):
    argv = [*flags, f'--prompt={{}}/{prompt}']
    assert run([flag.format(folder) for flag in argv]) == 0, capsys.readouterr().err


@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(
    [case[0][0].__module__.split('.')[-1], case[1].replace('/', '_'), case[2].__name__]))
def test_a_user_gets_one_line(good, tmp_path, capsys, case):
  (run, *flags), name, damage, *more = case
  folder = shutil.copytree(good, tmp_path / 'x')
  damage(folder / name)
  more = [flag.format(folder) for flag in more]
  given = {flag.split('=')[0] for flag in more}
  argv = [flag.format(folder) for flag in flags if flag.split('=')[0] not in given - {'--gin_file'}]
  try:
    status = run([*argv, *more])
  except SystemExit as error:
    status = error.code
  said = capsys.readouterr().err.strip().splitlines()
  assert status in (1, 2)
  assert [line for line in said if line.startswith('error: ')] == said[-1:], said
  assert str(folder) in said[-1] and 'Traceback' not in ''.join(said)
  assert not (folder / 'out.jsonl').exists() and not (folder / 'out').exists()


def test_what_is_left_out_of_a_comparison_is_told(good, tmp_path, capsys):
  folder = shutil.copytree(good, tmp_path / 'x')
  shutil.copy(folder / 'prompts/a.safetensors', folder / 'prompts/c.safetensors')
  flip(folder / 'prompts/c.safetensors')
  assert similarity.main([f'{folder}/prompts']) == 0
  assert f'left out: {folder}/prompts/c.safetensors' in capsys.readouterr().err


def test_a_vocabulary_of_json_that_is_damaged_is_one_line(good, tmp_path, bpe_file, capsys):
  pytest.importorskip('tokenizers')
  folder = shutil.copytree(good, tmp_path / 'x')
  hf_config.write_json(folder / 'tokenizer.json', {'model': {'type': 'BPE', 'vocab': [1]}})
  argv = [flag.format(folder) for flag in INFER[1:]]
  assert infer.main([*argv, f'--vocabulary={folder}/tokenizer.json']) == 1
  said = capsys.readouterr().err.strip().splitlines()
  assert said[-1].startswith('error: ') and 'tokenizer.json' in said[-1]

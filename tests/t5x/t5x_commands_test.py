"""T5X's verbs with our gin files: what the page tells to type is understood, and works."""

import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip('t5x', reason=(
    'There is no T5X to import: install the extra `t5x`, or name checkouts of t5x, airio and '
    'jestimator in T5X_SOURCE.'))

GIN = pathlib.Path(__file__).resolve().parents[2] / 'gin'
LENGTHS = {'inputs': 16, 'targets': 8}
COMMANDS = [shlex.split(line) for line in re.findall(
    r'^python -m t5x\.[^\n]*', (GIN / 't5x' / 'README.md').read_text('utf-8').replace('\\\n', ' '),
    re.MULTILINE)]


@pytest.fixture
def gin_of(monkeypatch):
  """Reads gin files and bindings as a verb of T5X does."""
  import gin
  monkeypatch.setattr(gin.config, '_LOCATION_PREFIXES', ['', str(GIN)])

  def read(verb: str, files, bindings=()) -> str:
    main = importlib.import_module(f't5x.{verb}')
    monkeypatch.setitem(sys.modules, '__main__', main)
    gin.clear_config()
    gin.parse_config_files_and_bindings(files, bindings, finalize_config=False)
    return gin.config_str()

  yield read
  gin.clear_config()


@pytest.mark.parametrize('name', [path.stem for path in sorted((GIN / 't5x').glob('*.gin'))])
def test_every_gin_file_parses(name, gin_of):
  assert gin_of(name if name in ('eval', 'infer') else 'train', [f't5x/{name}.gin'])


@pytest.mark.parametrize('command', COMMANDS, ids=range(len(COMMANDS)))
def test_commands_of_the_page_are_understood(command, gin_of):
  values = lambda flag: [text.removeprefix(flag) for text in command if text.startswith(flag)]
  text = gin_of(command[2].removeprefix('t5x.'), values('--gin_file='), values('--gin.'))
  names = [binding.split('=')[0] for binding in values('--gin.')]
  assert names and not [name for name in names if f'%{name}' not in text]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['prompt_tuning', 'prefix_tuning'])
def test_commands_on_eight_devices(method, tmp_path, tiny, reviews, surroundings):
  """`t5x.train`, then `t5x.infer` and our `score` with what it trained."""
  flags = [f'--gin_search_paths={GIN}', f'--gin.TASK_FEATURE_LENGTHS={LENGTHS}',
           "--gin.MIXTURE_OR_TASK_NAME='reviews_in_t5x'",
           "--gin.MIXTURE_OR_TASK_MODULE='reviews_task'",
           '--gin.BATCH_SIZE=8', '--gin.MODEL_PARALLELISM=2']
  environment = {
      **os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [
          str(surroundings), os.environ.get('T5X_SOURCE')])),
      'JAX_NUM_CPU_DEVICES': '8', 'TF_CPP_MIN_LOG_LEVEL': '3'}

  def called(module, *argv):
    done = subprocess.run([sys.executable, '-m', module, *argv], env=environment, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

  called('t5x.train', f'--gin_file=t5x/{method}.gin', *flags, '--gin.TRAIN_STEPS=4',
         '--gin.EVAL_PERIOD=2', '--gin.EVAL_STEPS=1', '--gin.PROMPT_LENGTH=4',
         f"--gin.INITIAL_CHECKPOINT_PATH='{tiny}'", f"--gin.MODEL_DIR='{tmp_path}/model'")
  prompt = f'{tmp_path}/model/prompts/last.safetensors'
  called('t5x.infer', '--gin_file=t5x/infer.gin', *flags, "--gin.MODE='score'",
         f"--gin.CHECKPOINT_PATH='{tiny}'", f"--gin.PROMPT_FILE='{prompt}'",
         f"--gin.INFER_OUTPUT_DIR='{tmp_path}/scores'")
  rows = [json.loads(line) for line in reviews.read_text().splitlines()][:20]
  (tmp_path / 'rows.jsonl').write_text(''.join(
      json.dumps({'inputs': row['text'], 'targets': row['label']}) + '\n' for row in rows))
  called('prompt_tuning_jax.score', f'--base={tiny}', f'--prompt={prompt}',
         f'--input={tmp_path}/rows.jsonl', f'--output={tmp_path}/ours.jsonl')
  values = lambda path, name: [json.loads(line)[name] for line in path.read_text().splitlines()]
  theirs, = (tmp_path / 'scores').glob('reviews_in_t5x-score.jsonl*-of-*[0-9]')
  np.testing.assert_allclose(values(theirs, 'score'),
                             values(tmp_path / 'ours.jsonl', 'log_likelihood'), atol=1e-5)

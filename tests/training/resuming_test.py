"""Runs that go on: after a signal, a full disk, a read-only one, a second run, a wrong clock.

Whatever it was, the same call goes on once it is over, to the prompt of an undisturbed run.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prompt_tuning_jax import optimizers
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.checkpoints.file_lock import only_writer
from prompt_tuning_jax.data import packing
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.training import loop, methods, run
from prompt_tuning_jax.training.progress import Progress

pytestmark = pytest.mark.usefixtures('token_dir')


def trained(folder, base, reviews, steps=12, method=methods.PromptTuning(length=4), **settings):
  return run.train(
      TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(folder), str(base), method,
      optimizers.adafactor(0.3), **{'train_steps': steps, 'batch_size': 8, 'eval_period': 4,
                                    'save_period': 4, 'log_period': 2, **settings})


def prompts(folder):
  return {path.name: path.read_bytes() for path in (folder / 'prompts').iterdir()}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, tiny_base, reviews):
  """MODEL_DIR of a run of 12 steps."""
  folder = tmp_path_factory.mktemp('run') / 'model'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PROMPT_TUNING_JAX_CACHE', str(folder.parent / 'cache'))
    trained(folder, tiny_base, reviews)
  return folder


@pytest.fixture
def small_disk(tmp_path):
  """A file system of one megabyte."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], check=False,
                           capture_output=True)
  if mounted.returncode:
    pytest.skip('A small disk is made by mount, which is not allowed here.')
  yield folder
  subprocess.run(['umount', '-l', folder], check=True)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    undisturbed, tmp_path, tiny_base, reviews):
  for steps in (5, 12):  # 5 is no multiple of any period
    trained(tmp_path / 'model', tiny_base, reviews, steps)
  for name in ('best', 'last'):
    one, other = (prompt_file.load(path / 'prompts' / f'{name}.safetensors')
                  for path in (undisturbed, tmp_path / 'model'))
    np.testing.assert_array_equal(one.params['prompt/embedding'], other.params['prompt/embedding'])
  lines = lambda path: [json.loads(line) for line in (path / 'metrics.jsonl').open()]
  losses = lambda path: {line['step']: line['loss'] for line in lines(path)
                         if line['split'] == 'train'}
  both = losses(undisturbed).keys() & losses(tmp_path / 'model').keys()
  assert both >= {2, 4, 8, 10, 12}
  assert all(losses(undisturbed)[step] == losses(tmp_path / 'model')[step] for step in both - {6})


def test_a_resumed_run_tells_what_an_uninterrupted_one_does(
    tmp_path, tiny_base, reviews, monkeypatch):
  """It was stopped by a signal between two lines, and then killed after the next one."""
  def killed(step):
    if step == 7:
      raise KeyboardInterrupt

  train = lambda name: trained(tmp_path / name, tiny_base, reviews, log_period=3)
  train('whole')
  with monkeypatch.context() as patch:
    for stop in (lambda step: step == 5, killed):
      patch.setattr(loop, 'stop_requested', functools.partial(contextlib.nullcontext, stop))
      with contextlib.suppress(KeyboardInterrupt):
        train('parts')
  train('parts')
  one, other = ([json.loads(line) for line in (tmp_path / name / 'metrics.jsonl').open()]
                for name in ('whole', 'parts'))
  for line in (*one, *other):
    line.pop('examples_per_second', None)
  assert one == other and [line['step'] for line in one] == [3, 4, 6, 8, 9, 12, 12]


def test_another_optimizer_in_the_same_folder_is_refused(tmp_path, tiny_base, reviews):
  trained(tmp_path, tiny_base, reviews, 2)
  with pytest.raises(ValueError, match='cannot be resumed'):
    trained(tmp_path, tiny_base, reviews, 4, method=methods.PromptTuning(length=5))
  with pytest.raises(ValueError, match='seed was 0 and is 1'):
    trained(tmp_path, tiny_base, reviews, 4, seed=1)


def test_a_run_is_not_resumed_on_other_data_or_another_evaluation(tmp_path, tiny_base, reviews):
  rows = tmp_path / 'rows.jsonl'
  rows.write_bytes(reviews.read_bytes())
  trained(tmp_path / 'model', tiny_base, rows, 2)
  with pytest.raises(ValueError, match='rank_labels was True and is False'):
    trained(tmp_path / 'model', tiny_base, rows, 4, rank_labels=False)
  rows.write_text(reviews.read_text('utf-8').replace('this film', 'that film'), encoding='utf-8')
  with pytest.raises(ValueError, match='another run: batching was'):
    trained(tmp_path / 'model', tiny_base, rows, 4)
  rows.write_bytes(reviews.read_bytes())
  assert trained(tmp_path / 'model', tiny_base, rows, 4)['steps'] == 4


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_prompt(tmp_path, tiny_base, reviews):
  """SIGTERM in the middle of `python -m prompt_tuning_jax.train`, then the same command again."""
  command = [sys.executable, '-m', 'prompt_tuning_jax.train',
             '--gin_file=run/prompt_tuning_text_file.gin', f'--gin.MODEL_DIR={tmp_path / "model"}',
             f'--gin.INITIAL_CHECKPOINT_PATH={tiny_base}', f'--gin.TRAIN_FILE={reviews}',
             '--gin.PROMPT_LENGTH=4', '--gin.TRAIN_STEPS=1200', '--gin.BATCH_SIZE=8',
             '--gin.EVAL_PERIOD=400', '--gin.SAVE_PERIOD=200', '--gin.run.train.log_period=20',
             "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}"]
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
  for line in process.stderr:
    if line.startswith('step'):
      process.send_signal(signal.SIGTERM)
      break
  rest = process.stderr.read()
  assert process.wait() == 0, rest
  assert 'as a signal asked' in rest
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert 'Resuming at step' in done.stderr
  again = [arg.replace(str(tmp_path / 'model'), str(tmp_path / 'other')) for arg in command]
  subprocess.run(again, capture_output=True, text=True, check=True)
  one, other = (prompt_file.load(tmp_path / name / 'prompts' / 'last.safetensors')
                for name in ('model', 'other'))
  np.testing.assert_array_equal(one.params['prompt/embedding'], other.params['prompt/embedding'])


@pytest.mark.slow
def test_a_packed_run_resumes_bit_for_bit(tmp_path, tiny_base, reviews):
  options = {'batching': packing.PackedBatches, 'batch_size': 2}
  for name, steps in (('whole', (6,)), ('parts', (3, 6))):
    for last in steps:
      trained(tmp_path / name, tiny_base, reviews, last, **options)
  one, other = (prompt_file.load(tmp_path / name / 'prompts' / 'last.safetensors')
                for name in ('whole', 'parts'))
  np.testing.assert_array_equal(one.params['prompt/embedding'], other.params['prompt/embedding'])
  with pytest.raises(ValueError, match='batching was'):
    trained(tmp_path / 'whole', tiny_base, reviews, 8, batch_size=2)


# With no room the metrics are the first to be refused, with more a prompt file, then a state.
@pytest.mark.slow
@pytest.mark.parametrize('kilobytes', [0, 8, 24, 48])
def test_a_full_disk_is_one_line_and_the_run_goes_on_after_it(
    undisturbed, small_disk, tiny_base, reviews, kilobytes):
  folder = small_disk / 'model'
  trained(folder, tiny_base, reviews, 4)
  room = os.statvfs(small_disk)
  (small_disk / 'others').write_bytes(
      bytes(max(0, room.f_bavail * room.f_frsize - 1024 * kilobytes)))
  with pytest.raises(ValueError, match='cannot be written: No space left on device') as told:
    trained(folder, tiny_base, reviews)
  assert '\n' not in str(told.value)
  assert '4' in os.listdir(folder / 'checkpoints')
  (small_disk / 'others').unlink()
  trained(folder, tiny_base, reviews)
  assert prompts(folder) == prompts(undisturbed)
  assert not [path for path in folder.rglob('*') if path.name.endswith('tmp')]


def test_a_read_only_folder_is_one_line(small_disk, tiny_base, reviews):
  subprocess.run(['mount', '-o', 'remount,ro', small_disk], check=True)
  with pytest.raises(ValueError, match='model cannot be written: Read-only file system'):
    trained(small_disk / 'model', tiny_base, reviews)


def test_a_folder_in_a_file_is_one_line(tmp_path, tiny_base, reviews):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='file/model cannot be written: Not a directory'):
    trained(tmp_path / 'file' / 'model', tiny_base, reviews)


def test_a_second_run_in_a_folder_is_refused_and_a_lock_does_not_outlive_its_process(
    undisturbed, tmp_path, tiny_base, reviews):
  with only_writer(tmp_path / 'model'):
    with pytest.raises(ValueError, match='Another run is writing .*model'):
      trained(tmp_path / 'model', tiny_base, reviews)
    assert [path.name for path in (tmp_path / 'model').iterdir()] == ['.lock']
  (tmp_path / 'model' / '.lock').write_text('')  # as a killed run leaves it
  (tmp_path / 'model' / 'prompts').mkdir()
  (tmp_path / 'model' / 'prompts' / '.best.safetensors.7.tmp').write_text('')
  (tmp_path / 'model' / 'tokens' / '.sst2-train.7.tmp').mkdir(parents=True)  # of a token cache
  trained(tmp_path / 'model', tiny_base, reviews)
  assert prompts(tmp_path / 'model') == prompts(undisturbed)
  assert not (tmp_path / 'model' / '.lock').exists()


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(
    undisturbed, tmp_path, tiny_base, reviews, monkeypatch):
  now = time.time()
  moments = iter(range(10**9))
  monkeypatch.setattr(time, 'time', lambda: now - 60 * next(moments))
  for steps in (4, 8, 12):
    result = trained(tmp_path, tiny_base, reviews, steps)
  assert prompts(tmp_path) == prompts(undisturbed)
  assert 0 < result['seconds_to_best'] <= result['seconds'] < 600
  events = EventAccumulator(str(tmp_path)).Reload()
  assert [event.step for event in events.Scalars('train/loss')] == [2, 4, 6, 8, 10, 12]


def test_what_a_killed_run_told_after_its_last_state_is_told_once(tmp_path, caplog):
  for first, steps in ((0, (2, 4, 6)), (2, (4, 6, 8))):
    progress = Progress(tmp_path, 8, first)
    for step in steps:
      progress.report_training(step, 'task', {'loss': first + step}, 2)
    progress.close()
    with open(tmp_path / 'metrics.jsonl', 'ab') as file:  # where a kill may tear a line
      file.write(b'{"step": 9, "spl')
  told = [text for record in caplog.records if 'steps after 2' in (text := record.getMessage())]
  assert len(told) == 1 and told[0].startswith('Dropped the 2 lines of ')
  Progress(tmp_path, 8, 8).close()
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').open()]
  assert [(line['step'], line['loss']) for line in lines] == [(2, 2), (4, 6), (6, 8), (8, 10)]
  events = EventAccumulator(str(tmp_path)).Reload().Scalars('train/loss')
  assert [(event.step, event.value) for event in events] == [(2, 2), (4, 6), (6, 8), (8, 10)]

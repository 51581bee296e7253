"""What a run meets besides kills: a full disk, a read-only one, a second run, a wrong clock.

Whatever it was, the same call goes on once it is over, to the prompt of an undisturbed run.
"""

import json
import os
import subprocess
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prompt_tuning_jax import optimizers
from prompt_tuning_jax.checkpoints.file_lock import only_writer
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.training import methods, run
from prompt_tuning_jax.training.progress import Progress

pytestmark = pytest.mark.usefixtures('token_dir')


def trained(folder, base, reviews, steps=12):
  return run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(folder), str(base),
                   methods.PromptTuning(length=4), optimizers.adafactor(0.3), steps, 8,
                   eval_period=4, save_period=4, log_period=2)


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

"""A saved state is what was saved, or is passed over: whatever happens to its files."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import optimizers
from prompt_tuning_jax.checkpoints.training_state import TrainingStates
from prompt_tuning_jax.training import state as train_state

DAMAGES = {
    'deleted': lambda path, data: path.unlink(),
    'cut': lambda path, data: path.write_bytes(data[:len(data) // 2]),
    'emptied': lambda path, data: path.write_bytes(b''),
    'a bit flipped': lambda path, data: path.write_bytes(
        data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1:])}


def state(step, length=6, optimizer=None):
  """A state of random numbers that differ from step to step."""
  made = train_state.create({'prompt': {'embedding': jnp.zeros((length, 64))}},
                            optimizer or optimizers.adafactor(0.3))
  rng = np.random.default_rng(step)
  return jax.tree.map(lambda leaf: jnp.asarray(
      step if leaf.ndim == 0 else rng.normal(size=leaf.shape), leaf.dtype), made)


def assert_equal(restored, step):
  tree, records = restored
  jax.tree.map(np.testing.assert_array_equal, tree, state(step))
  assert records == {'at': step}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with the states of steps 4 and 8."""
  folder = tmp_path_factory.mktemp('states')
  states = TrainingStates(folder)
  for step in (4, 8):
    states.save(step, state(step), {'at': step})
    states.wait()
  states.close()
  return folder


def copied(saved, tmp_path):
  folder = tmp_path / 'states'
  shutil.copytree(saved, folder)
  return folder


def resumed(folder, like=None):
  states = TrainingStates(folder)
  try:
    return states.restore_latest(like or state(0))
  finally:
    states.close()


def test_the_newest_state_comes_back_bit_for_bit(saved):
  assert_equal(resumed(saved), 8)
  assert sorted(path.name for path in saved.iterdir()) == ['4', '8']


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_file_is_told_and_the_state_before_is_taken(saved, tmp_path, caplog, damage):
  files = [path.relative_to(saved) for path in sorted((saved / '8').rglob('*')) if path.is_file()]
  assert len(files) > 10
  for file in files:
    folder = tmp_path / 'states'
    shutil.copytree(saved, folder)
    caplog.clear()
    DAMAGES[damage](folder / file, (folder / file).read_bytes())
    restored = resumed(folder)
    if any(part in ('state', 'records') for part in file.parts) or (
        file.name == 'sums.json' and damage != 'deleted'):
      assert_equal(restored, 4)
      told = caplog.records[-1].getMessage()
      assert str(folder / '8') in told and 'Going back to the state of step 4' in told
      assert sorted(path.name for path in folder.iterdir()) == ['4', '8.damaged']
    else:  # orbax's notes of when and how it was written
      assert_equal(restored, 8)
    shutil.rmtree(folder)


@pytest.mark.parametrize('damage', [
    lambda folder: shutil.rmtree(folder / 'state'),
    lambda folder: [shutil.rmtree(folder / 'state'), shutil.rmtree(folder / 'records'),
                    (folder / 'sums.json').unlink()],
    lambda folder: [(folder / 'state' / '_METADATA').unlink(),
                    (folder / 'state' / '_METADATA').mkdir()],
], ids=['its arrays', 'all of it', 'a file that cannot be read'])
def test_a_state_of_which_a_part_is_gone_is_passed_over(saved, tmp_path, damage):
  folder = copied(saved, tmp_path)
  damage(folder / '8')
  assert_equal(resumed(folder), 4)
  assert sorted(path.name for path in folder.iterdir()) == ['4', '8.damaged']


def test_after_a_damaged_state_its_step_can_be_saved_again(saved, tmp_path):
  folder = copied(saved, tmp_path)
  shutil.rmtree(folder / '8' / 'state')
  states = TrainingStates(folder)
  assert_equal(states.restore_latest(state(0)), 4)
  states.save(8, state(8), {'at': 8})
  states.close()
  assert_equal(resumed(folder), 8)
  (folder / '8' / 'sums.json').write_text('{')  # a second time
  assert_equal(resumed(folder), 4)


def test_where_every_state_is_damaged_nothing_starts_over_by_itself(saved, tmp_path):
  folder = copied(saved, tmp_path)
  for step in ('4', '8'):
    (folder / step / 'records' / 'metadata').unlink()
  with pytest.raises(ValueError, match=r'4 is damaged.* There is no other saved state'):
    resumed(folder)
  assert sorted(path.name for path in folder.iterdir()) == ['4', '8']


@pytest.mark.parametrize(('name', 'like'), [
    ('length', {'length': 7}), ('optimizer', {'optimizer': optimizers.adamw()})])
def test_other_settings_are_no_damage(saved, tmp_path, name, like):
  folder = copied(saved, tmp_path)
  told = {'length': r'embedding was \[6, 64\] and is \[7, 64\]',
          'optimizer': r'v/prompt/embedding was \[6, 64\] and is not there'}
  with pytest.raises(ValueError, match=f'8 cannot be resumed: .*{told[name]}.*another MODEL_DIR'):
    resumed(folder, state(0, **like))
  assert sorted(path.name for path in folder.iterdir()) == ['4', '8']


def test_a_state_of_an_earlier_version_has_no_checksums(saved, tmp_path):
  folder = copied(saved, tmp_path)
  sums = folder / '8' / 'sums.json'
  sums.write_text(json.dumps({name: [size, None] for name, (size, _) in json.loads(
      sums.read_text()).items()}))  # of large files it had the sizes alone
  assert_equal(resumed(folder), 8)
  sums.unlink()
  assert_equal(resumed(folder), 8)


def test_a_flipped_bit_of_a_large_file_is_told(tmp_path):
  large = {'prompt': np.random.default_rng(0).normal(size=(17 << 20,)).astype(np.float32)}
  states = TrainingStates(tmp_path / 'states')
  states.save(4, large, {})
  states.close()
  file = max((tmp_path / 'states' / '4').rglob('*'), key=lambda path: path.stat().st_size)
  assert file.stat().st_size > 50 << 20
  with open(file, 'r+b') as stream:
    stream.seek(1 << 20)
    byte = stream.read(1)[0]
    stream.seek(1 << 20)
    stream.write(bytes([byte ^ 1]))
  with pytest.raises(ValueError, match=f'{file.name} is not what was written'):
    resumed(tmp_path / 'states', large)


def test_what_a_killed_save_left_goes(saved, tmp_path):
  folder = copied(saved, tmp_path)
  shutil.copytree(folder / '8', folder / '12.orbax-checkpoint-tmp')
  assert_equal(resumed(folder), 8)
  end = time.monotonic() + 60
  while len(names := sorted(path.name for path in folder.iterdir())) > 2:
    assert time.monotonic() < end, names  # Orbax removes it in a thread.
    time.sleep(0.05)
  assert names == ['4', '8']


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='file/states cannot be written: Not a directory'):
    TrainingStates(tmp_path / 'file' / 'states')


def test_runs_of_one_process_save_at_the_same_time(tmp_path):
  runs = [TrainingStates(tmp_path / str(i)) for i in range(4)]
  for step in range(1, 11):
    for run in runs:
      run.save(step, state(step), {'at': step})
  for i, run in enumerate(runs):
    run.close()
    assert_equal(resumed(tmp_path / str(i)), 10)

"""A killed process leaves the old folder or the new one, and nothing else once it has restarted."""

import pytest

from prompt_tuning_jax.checkpoints import atomic_write


def folder(path, text):
  path.mkdir()
  (path / 'weights').write_text(text)


def test_a_folder_that_stepped_aside_comes_back(tmp_path):
  folder(tmp_path / '.best.x1', 'new')  # Killed between the two renames.
  folder(tmp_path / '.best.x1.old', 'old')
  folder(tmp_path / 'best2', 'other')
  atomic_write.recover(tmp_path / 'best')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['best', 'best2']
  assert (tmp_path / 'best' / 'weights').read_text() == 'old'


def test_what_is_whole_stays_and_leftovers_go(tmp_path):
  atomic_write.recover(tmp_path / 'absent' / 'best')
  for name in ('best', '.best.x1', '.best.x2.old'):
    folder(tmp_path / name, name)
  (tmp_path / '.best.safetensors.12.tmp').write_text('of another writer')
  atomic_write.recover(tmp_path / 'best')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['.best.safetensors.12.tmp', 'best']
  assert (tmp_path / 'best' / 'weights').read_text() == 'best'


@pytest.mark.parametrize('write', [atomic_write.atomic_file, atomic_write.atomic_folder])
def test_a_disk_that_refuses_is_told_in_one_line_and_nothing_changes(tmp_path, write):
  (tmp_path / 'file').write_text('old')
  with pytest.raises(ValueError, match='cannot be written: '):
    with write(tmp_path / 'file' / 'inside'):
      pass
  with pytest.raises(ValueError, match='cannot be written: No space left on device'):
    with write(tmp_path / 'target'), open('/dev/full', 'wb', buffering=0) as full:
      full.write(b'x')
  with pytest.raises(FileNotFoundError):  # of what was to be read: not ours to explain
    with write(tmp_path / 'target'):
      open(tmp_path / 'absent')
  assert [path.name for path in tmp_path.iterdir()] == ['file']

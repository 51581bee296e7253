"""A killed process leaves the old folder or the new one, and nothing else once it has restarted."""

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

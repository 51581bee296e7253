"""Token caches: what is read is what was written; damage, races and full disks end well."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import threading
import types

import numpy as np
import pytest

from prompt_tuning_jax.data import token_cache
from prompt_tuning_jax.data.token_cache import CacheWriter, open_cache, open_or_build

VOCABULARY = types.SimpleNamespace(sha256='a' * 64, extra_ids=100)
LENGTHS = {'inputs': 32, 'targets': 8}


def shout(text, example, is_target, mark):
  assert not is_target
  return text.upper() + mark + example['inputs'] + str(example['idx'])


def share_right(targets, predictions):
  return {'right': float(np.mean([t == p for t, p in zip(targets, predictions, strict=True)]))}


def make_rows(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
  rng = np.random.default_rng(seed)
  return [(rng.integers(2, 8000, rng.integers(0, 31)).tolist() + [1],
           rng.integers(2, 8000, rng.integers(0, 7)).tolist() + [1]) for _ in range(count)]


@dataclasses.dataclass
class Task:
  """Counts how often it is built; `before_close` runs when all rows are added."""

  rows: list
  name: str = 'toy'
  parts: str = 'code 1'
  with_rows: bool = True
  before_close: object = lambda folder: None
  built: int = 0

  def key_parts(self, split):
    return {'parts': self.parts, 'split': split}

  def build(self, split, vocabulary, lengths, folder):
    self.built += 1
    writer = CacheWriter(folder)
    for i, (inputs, targets) in enumerate(self.rows):
      row = {'inputs': f'text {i}', 'targets': 'tgt', 'target': np.int64(i), 'choices': ['a', 'b'],
             'example': {'idx': i, 'raw': b'bytes'}}
      writer.add(inputs, targets, row if self.with_rows else None)
    self.before_close(folder)
    writer.close(metrics=[f'{__name__}:share_right'], num_cut={'inputs': 2, 'targets': 0},
                 postprocessor={'name': f'{__name__}:shout', 'kwargs': {'mark': '!'}})


@pytest.fixture(autouse=True)
def importable(monkeypatch):
  """The file's functions under a name that can be imported, as a task's functions have one."""
  module = types.ModuleType(__name__)
  module.shout, module.share_right = shout, share_right
  monkeypatch.setitem(__import__('sys').modules, __name__, module)


def _build(task, folder, split='train', lengths=LENGTHS, vocabulary=VOCABULARY):
  return open_or_build(task, split, vocabulary, lengths, folder)


def _contents(cache):
  return [(cache.inputs(i).tolist(), cache.targets(i).tolist()) for i in range(cache.num_examples)]


@pytest.mark.parametrize('count', [1, 57])
def test_what_is_read_is_what_was_written(tmp_path, count):
  rows = make_rows(count)
  cache = _build(Task(rows), tmp_path)
  assert cache.num_examples == cache.meta['num_examples'] == count
  assert _contents(cache) == rows
  assert cache.input_lengths.tolist() == [len(inputs) for inputs, _ in rows]
  assert cache.target_lengths.tolist() == [len(targets) for _, targets in rows]
  assert cache.input_tokens.dtype == cache.target_tokens.dtype == np.int32
  assert cache.rows[0] == cache.rows[0] == {
      'inputs': 'text 0', 'targets': 'tgt', 'target': 0, 'choices': ['a', 'b'],
      'example': {'idx': 0, 'raw': 'bytes'}}
  assert cache.postprocess('yes', cache.rows[0]) == 'YES!text 00'
  assert [fn([1, 2], [1, 3]) for fn in cache.metric_fns()] == [{'right': .5}]


def test_the_files_are_ordinary_npy_with_their_sums_in_meta(tmp_path):
  cache = _build(Task(make_rows(20)), tmp_path)
  meta = json.loads((cache.folder / 'meta.json').read_text())
  assert set(meta['files']) == {'inputs.npy', 'inputs_offsets.npy', 'targets.npy',
                                'targets_offsets.npy', 'rows.jsonl'}
  for name, digest in meta['files'].items():
    content = (cache.folder / name).read_bytes()
    assert digest['sha256'] == hashlib.sha256(content).hexdigest()
    if name.endswith('.npy'):
      array = np.load(cache.folder / name, allow_pickle=False)
      assert array.dtype == (np.int64 if 'offsets' in name else np.int32)


def test_empty_inputs_and_no_rows_are_fine_and_a_warm_start_reads_only(tmp_path):
  task = Task([([], [5, 1]), ([], [1])], with_rows=False)
  for _ in range(2):
    cache = _build(task, tmp_path)
    assert _contents(cache) == task.rows
  assert task.built == 1
  assert cache.rows == [] == list(cache.read_rows())


def test_each_part_of_the_key_is_another_cache(tmp_path):
  task, changes = Task(make_rows(3)), []
  changes.append(_build(task, tmp_path))
  changes.append(_build(task, tmp_path, split='train[:50%]'))
  changes.append(_build(task, tmp_path, lengths={'inputs': 33, 'targets': 8}))
  changes.append(_build(task, tmp_path, vocabulary=types.SimpleNamespace(sha256='b', extra_ids=0)))
  task.parts = 'code 2'
  changes.append(_build(task, tmp_path))
  task.name = 'another/name'
  changes.append(_build(task, tmp_path))
  assert task.built == len({cache.folder for cache in changes}) == 6
  assert all(cache.folder.parent == tmp_path for cache in changes)


def _truncate(folder):
  path = folder / 'targets.npy'
  path.write_bytes(path.read_bytes()[:-4])


def _flip(folder):
  path = folder / 'inputs.npy'
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize('damage', [
    _truncate, _flip,
    lambda folder: (folder / 'inputs_offsets.npy').unlink(),
    lambda folder: (folder / 'rows.jsonl').write_text('{}\n'),
    lambda folder: (folder / 'meta.json').write_text('{"format'),
    lambda folder: (folder / 'meta.json').write_text('[]'),
    lambda folder: (folder / 'meta.json').unlink(),
], ids=['truncated', 'flipped', 'missing', 'rows', 'meta', 'meta_list', 'no_meta'])
def test_a_damaged_cache_is_rebuilt_and_said_in_one_line(tmp_path, caplog, damage):
  task = Task(make_rows(9))
  damage(_build(task, tmp_path).folder)
  caplog.clear()
  assert _contents(_build(task, tmp_path)) == task.rows
  assert task.built == 2
  assert len([r for r in caplog.records if 'Rebuilding' in r.getMessage()]) == 1
  assert len(list(tmp_path.iterdir())) == 1
  _build(task, tmp_path)
  assert task.built == 2


def test_a_block_of_a_large_file_is_checked_when_a_row_in_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(token_cache.file_digest, 'WHOLE', 100)
  monkeypatch.setattr(token_cache.file_digest, 'BLOCK', 64)
  folder = _build(Task(make_rows(50)), tmp_path).folder
  good = open_cache(folder)
  content = (folder / 'inputs.npy').read_bytes()
  bounds = 4 * good.input_offsets + len(content) - good.input_tokens.nbytes
  assert len(content) > 20 * 64
  (folder / 'inputs.npy').write_bytes(content + b'0')
  with pytest.raises(ValueError, match='inputs.npy is not what was written'):
    open_cache(folder)
  for at in range(0, len(content), 37):
    damaged = bytearray(content)
    damaged[at] ^= 16
    (folder / 'inputs.npy').write_bytes(damaged)
    if at < 128:  # the header, read when it is opened
      with pytest.raises(ValueError, match='cannot be used|is not what was written'):
        open_cache(folder).inputs(40)
      continue
    cache, block = open_cache(folder), at // 64
    for i in range(50):
      for read in (cache.inputs, lambda i, of=cache: of.take(np.array([i])),
                   lambda i, of=cache: of.check(np.array([i, i]))):
        if bounds[i] // 64 <= block <= max(bounds[i + 1] - 1, bounds[i]) // 64:
          with pytest.raises(ValueError, match=f'is not what was written .block {block} of'):
            read(i)
        else:
          read(i)


def test_rows_of_a_large_file_are_checked_when_they_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(token_cache.file_digest, 'WHOLE', 100)
  monkeypatch.setattr(token_cache.file_digest, 'BLOCK', 64)
  folder = _build(Task(make_rows(50)), tmp_path).folder
  assert open_cache(folder).rows == open_cache(folder).take(np.arange(50)).rows
  content = bytearray((folder / 'rows.jsonl').read_bytes())
  content[len(content) // 2] ^= 1
  (folder / 'rows.jsonl').write_bytes(content)
  for cache in (open_cache(folder), open_cache(folder).take(np.arange(3))):
    with pytest.raises(ValueError, match='rows.jsonl is not what was written'):
      cache.rows  # noqa: B018


def test_a_cache_of_before_has_no_blocks_and_is_checked_whole(tmp_path, monkeypatch):
  folder = _build(Task(make_rows(50)), tmp_path).folder
  monkeypatch.setattr(token_cache.file_digest, 'WHOLE', 100)
  meta = json.loads((folder / 'meta.json').read_text())
  del meta['sha256']
  for each in meta['files'].values():
    each['ends_sha256'] = 'of the first and the last MiB, and no longer looked at'
  (folder / 'meta.json').write_text(json.dumps(meta))
  assert not open_cache(folder).blocks
  _flip(folder)
  with pytest.raises(ValueError, match='inputs.npy is not what was written'):
    open_cache(folder)


def test_an_empty_split_is_an_error_and_leaves_nothing(tmp_path):
  with pytest.raises(ValueError, match='Split train of task toy has no examples'):
    _build(Task([]), tmp_path)
  assert not list(tmp_path.iterdir())


def _raise(error):
  raise error


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'No space left on device'),
                                   ValueError('bad row'), KeyboardInterrupt(), FileNotFoundError()])
def test_a_failed_build_leaves_nothing(tmp_path, error):
  expected = ValueError if getattr(error, 'errno', None) == errno.ENOSPC else type(error)
  with pytest.raises(expected):
    _build(Task(make_rows(3), before_close=lambda folder: _raise(error)), tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(ValueError, match='No space left on device; free the disk or set PROMPT_TUN'):
    _build(Task(make_rows(3)), tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_cache_dir_that_cannot_be_one_is_a_clear_error(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='Cannot write the token cache'):
    _build(Task(make_rows(3)), tmp_path / 'file')


def test_of_two_that_build_at_once_the_first_to_finish_wins(tmp_path):
  both_done = threading.Barrier(2, timeout=20)
  tasks = [Task(make_rows(5), before_close=lambda folder: both_done.wait()) for _ in range(2)]
  caches = [None, None]

  def build(i):
    caches[i] = _build(tasks[i], tmp_path)
  threads = [threading.Thread(target=build, args=(i,)) for i in range(2)]
  [thread.start() for thread in threads]
  [thread.join() for thread in threads]
  assert [task.built for task in tasks] == [1, 1]
  assert caches[0].folder == caches[1].folder
  assert _contents(caches[0]) == _contents(caches[1]) == tasks[0].rows
  assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_goes_after_a_week(tmp_path):
  old, new = tmp_path / '.toy.1.tmp', tmp_path / '.toy.2.tmp'
  for folder in (old, new):
    folder.mkdir()
    (folder / 'inputs.npy').write_bytes(b'0')
  os.utime(old, (0, 0))
  _build(Task(make_rows(2)), tmp_path)
  assert not old.exists() and new.exists()


def test_cut_rows_are_said_on_every_start(tmp_path, caplog):
  caplog.set_level(logging.WARNING)
  for _ in range(2):
    caplog.clear()
    _build(Task(make_rows(4)), tmp_path)
    assert [r.getMessage() for r in caplog.records] == [
        'toy, train: 2 inputs (to 32) of 4 examples were longer than the task feature lengths '
        'and cut.']


def test_the_default_folder_follows_the_environment(tmp_path, monkeypatch):
  monkeypatch.setenv('PROMPT_TUNING_JAX_CACHE', str(tmp_path))
  assert _build(Task(make_rows(2)), None).folder.parent == tmp_path / 'tokens'
  monkeypatch.setenv('PROMPT_TUNING_JAX_CACHE', '')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  assert _build(Task(make_rows(2)), None).folder.parent == (
      tmp_path / 'home/.cache/prompt_tuning_jax/tokens')


def test_the_writer_refuses_what_cannot_be_trained_or_evaluated(tmp_path):
  writer = CacheWriter(tmp_path)
  with pytest.raises(ValueError, match='Row 0 has no target tokens'):
    writer.add([1], [])
  writer.add([1], [1])
  with pytest.raises(ValueError, match='for every row, or for none'):
    writer.add([1], [1], {'inputs': ''})
  assert pathlib.Path(tmp_path / 'inputs.npy').exists()

"""What a SeqIO task reads is there, and its token cache is known by that data and the code."""

import time

import pytest

from prompt_tuning_jax.data import seqio_task, token_cache
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.data.vocabulary import Vocabulary


def test_missing_data_is_told_at_once(tmp_path):
  task = SeqioTask('sst2', tfds_data_dir=str(tmp_path / 'nothing'))
  start = time.monotonic()
  with pytest.raises(ValueError) as error:
    token_cache.open_or_build(task, 'train', Vocabulary('bytes'), {'inputs': 12, 'targets': 4},
                              tmp_path)
  assert time.monotonic() - start < 1
  for words in ('glue/sst2:2.0.0', str(tmp_path / 'nothing'), 'TFDS_DATA_DIR', 'tfds build'):
    assert words in str(error.value)
  with pytest.raises(ValueError, match='local_text/novels'):
    SeqioTask('prefix_lm_novels', tfds_data_dir=str(tmp_path)).key_parts('train')


def test_prepared_versions(tmp_path):
  (tmp_path / 'glue' / 'sst2' / '2.0.0').mkdir(parents=True)
  (tmp_path / 'glue' / 'sst2' / '2.0.0' / 'dataset_info.json').write_text('{}')
  seqio_task.check_prepared(['glue/sst2:2.0.0', 'glue/sst2:2.*.*', 'glue/sst2'], str(tmp_path))
  with pytest.raises(ValueError, match='glue/sst2:1.0.0'):
    seqio_task.check_prepared(['glue/sst2:1.0.0'], str(tmp_path))


def test_key_follows_code_and_data(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / 'a_task_file.py').write_text("TFDS_DATASETS = {'t': ['d/c:1.0.0']}\n")
  info = tmp_path / 'data' / 'd' / 'c' / '1.0.0' / 'dataset_info.json'
  info.parent.mkdir(parents=True)
  info.write_text('one')
  task = SeqioTask('t', modules=('a_task_file',), tfds_data_dir=str(tmp_path / 'data'))
  keys = [task.key_parts('train')]
  info.write_text('two')
  keys.append(task.key_parts('train'))
  (tmp_path / 'a_task_file.py').write_text("TFDS_DATASETS = {'t': ['d/c:1.0.0']}  # new\n")
  keys.append(task.key_parts('train'))
  assert keys[0] != keys[1] != keys[2]
  (tmp_path / 'data').rename(tmp_path / 'moved')
  moved = SeqioTask('t', modules=('a_task_file',), tfds_data_dir=str(tmp_path / 'moved'))
  assert moved.key_parts('train') == keys[2]


@pytest.mark.parametrize('name', ['data.vocabulary', 'data.tokenizer', 'data.byte_level_bpe',
                                  'data.word_piece', 'tokenizer_file'])
def test_key_follows_the_code_that_writes_texts_as_tokens(tmp_path, monkeypatch, name):
  before, find = SeqioTask('quick_start').key_parts('train'), seqio_task.module_files
  (tmp_path / 'changed.py').write_text('')
  monkeypatch.setattr(seqio_task, 'module_files', lambda module: (
      [tmp_path / 'changed.py'] if module == f'prompt_tuning_jax.{name}' else find(module)))
  assert SeqioTask('quick_start').key_parts('train') != before

"""Prompt files: what is saved comes back; anything damaged or foreign is one clear line."""

import json
import os
import pathlib
import types

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile


def make_base(**changes):
  fields = dict(name='tiny', fingerprint='a' * 64, vocabulary=VocabularyFile('bytes', 100),
                config=types.SimpleNamespace(emb_dim=4, vocab_size=32))
  return types.SimpleNamespace(**fields | changes)


def make_prompt(length=5, width=4):
  embedding = np.random.default_rng(0).normal(size=(length, width)).astype(np.float32)
  metadata = prompt_file.describe(
      make_base(), length=length, task='sst2', labels=['négatif', 'positif'],
      metric={'name': 'accuracy', 'value': 0.93, 'step': 100})
  return PromptFile({'prompt/embedding': embedding}, metadata)


def one_line(error) -> str:
  assert '\n' not in str(error.value)
  return str(error.value)


def test_load_gives_back_what_was_saved(tmp_path):
  prompt = make_prompt()
  prompt.params['prefix/encoder/attention'] = np.zeros((2, 2, 1, 3, 2, 2), np.float32)
  path = tmp_path / 'best' / 'prompt.safetensors'
  prompt_file.save(path, prompt)
  loaded = prompt_file.load(path)
  assert loaded.metadata == prompt.metadata
  assert loaded.metadata['labels'] == ['négatif', 'positif']
  assert loaded.params.keys() == prompt.params.keys()
  for name, leaf in prompt.params.items():
    np.testing.assert_array_equal(loaded.params[name], leaf)
    assert loaded.params[name].dtype == np.float32 and loaded.params[name].flags.writeable
  assert os.listdir(path.parent) == ['prompt.safetensors']


def test_labels_are_kept_without_the_sentinel_that_was_before_them(tmp_path):
  marked = ['<extra_id_0> bad', '<extra_id_0> good']
  prompt = make_prompt()
  older = PromptFile(prompt.params, {**prompt.metadata, 'labels': marked})
  prompt_file.save(tmp_path / 'older.safetensors', older)
  for about in (prompt_file.describe(make_base(), labels=marked),
                prompt_file.load(tmp_path / 'older.safetensors').metadata):
    assert about['labels'] == ['bad', 'good']
    assert list(prompt_file.written(about, about['labels'])) == marked
    assert list(prompt_file.written(about, marked)) == marked
  assert prompt_file.written(prompt.metadata, ['bad']) == ('bad',)


def test_the_safetensors_library_reads_and_writes_the_same_file(tmp_path):
  prompt = make_prompt()
  path = tmp_path / 'prompt.safetensors'
  prompt_file.save(path, prompt)
  with safetensors.safe_open(path, 'numpy') as file:
    assert json.loads(file.metadata()['prompt_tuning_jax']) == prompt.metadata
    np.testing.assert_array_equal(file.get_tensor('prompt/embedding'),
                                  prompt.params['prompt/embedding'])
  other = tmp_path / 'other.safetensors'
  safetensors.numpy.save_file(prompt.params, other,
                              {'prompt_tuning_jax': json.dumps(prompt.metadata)})
  np.testing.assert_array_equal(prompt_file.load(other).params['prompt/embedding'],
                                prompt.params['prompt/embedding'])


def test_save_replaces_a_file_and_a_failed_save_leaves_it(tmp_path):
  path = tmp_path / 'prompt.safetensors'
  prompt_file.save(path, make_prompt(length=3))
  prompt_file.save(path, make_prompt(length=5))
  bad = make_prompt(length=5)
  bad.params['prompt/embedding'][2, 1] = np.nan
  with pytest.raises(ValueError, match='NaN'):
    prompt_file.save(path, bad)
  assert prompt_file.load(path).params['prompt/embedding'].shape == (5, 4)
  assert os.listdir(tmp_path) == ['prompt.safetensors']


@pytest.mark.parametrize('keep', [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
  path = tmp_path / 'prompt.safetensors'
  prompt_file.save(path, make_prompt())
  data = path.read_bytes()
  path.write_bytes(data[:keep])
  with pytest.raises(ValueError) as error:
    prompt_file.load(path)
  assert 'prompt.safetensors' in one_line(error)
  path.write_bytes(data + b'x')
  with pytest.raises(ValueError, match='1 bytes follow'):
    prompt_file.load(path)


def write_raw(path: pathlib.Path, header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)


METADATA = {'prompt_tuning_jax': json.dumps({'format_version': 1})}


def entry(shape, end, dtype='F32', begin=0):
  return {'__metadata__': METADATA,
          'prompt/embedding': {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}}


@pytest.mark.parametrize('header, reason', [
    (entry([2 ** 40, 2 ** 40], 16), 'impossible numbers'),
    (entry([-1, 4], 16), 'impossible numbers'),
    (entry([1.5, 4], 16), 'impossible numbers'),
    (entry([True, 4], 16), 'impossible numbers'),
    (entry([0, 4], 0), 'impossible shape'),
    (entry([4], 16), 'should be'),
    (entry([1, 4], 16, begin=-16), 'impossible numbers'),
    (entry([1, 4], 32, begin=16), 'starts at byte'),
    (entry([1, 4], 8, 'F16'), 'float16, expected float32'),
    (entry([1, 4], 8, 'BF16'), 'bfloat16, expected float32'),
    (entry([4, 4], 16, 'F8_E4M3'), 'F8_E4M3, expected float32'),
    ({'__metadata__': METADATA}, 'no parameters'),
    ({'prompt/embedding': {'dtype': 'F32', 'shape': [1, 4], 'data_offsets': [0, 16]}},
     'no prompt file'),
    ({'__metadata__': {'prompt_tuning_jax': '[1'}} , 'not a JSON object'),
    ({'__metadata__': {'prompt_tuning_jax': 3}}, 'not text'),
    ({'__metadata__': METADATA, 'x': 3}, 'not a safetensors file'),
    ([1, 2], 'not a safetensors file'),
    (b'{' * 2000, 'not a safetensors file'),
    (b'[' * 200000, 'not a safetensors file'),
    (b'\xff\xfe', 'not a safetensors file'),
])
def test_a_malformed_file_is_refused_in_one_line(tmp_path, header, reason):
  path = tmp_path / 'prompt.safetensors'
  size = 0
  if isinstance(header, dict) and isinstance(header.get('prompt/embedding'), dict):
    size = max(header['prompt/embedding']['data_offsets'][1], 0)
  write_raw(path, header, b'\0' * size)
  with pytest.raises(ValueError) as error:
    prompt_file.load(path)
  assert reason in one_line(error)


def test_an_absurd_header_length_allocates_nothing(tmp_path):
  path = tmp_path / 'prompt.safetensors'
  path.write_bytes((2 ** 62).to_bytes(8, 'little') + b'{}')
  with pytest.raises(ValueError, match='does not fit in 10 bytes'):
    prompt_file.load(path)


@pytest.mark.parametrize('changes, reason', [
    ({'format_version': 2}, 'format_version 2'),
    ({'format_version': True}, 'format_version True'),
    ({'length': 7}, 'length 7'),
    ({'base': {'d_model': 8}}, 'd_model 8'),
    ({'base': 'mini'}, 'should be a dict'),
    ({'labels': 'yes'}, 'should be a list'),
    ({'placement': 3}, 'should be a str'),
])
def test_metadata_that_contradicts_the_arrays_is_refused(tmp_path, changes, reason):
  prompt = make_prompt()
  prompt.metadata.update(changes)
  path = tmp_path / 'prompt.safetensors'
  with pytest.raises(ValueError, match=reason):
    prompt_file.save(path, prompt)
  safetensors.numpy.save_file(prompt.params, path,
                              {'prompt_tuning_jax': json.dumps(prompt.metadata)})
  with pytest.raises(ValueError) as error:
    prompt_file.load(path)
  assert reason in one_line(error)


def test_a_file_with_nan_is_refused(tmp_path):
  prompt = make_prompt()
  prompt.params['prompt/embedding'][0, 0] = np.inf
  path = tmp_path / 'prompt.safetensors'
  safetensors.numpy.save_file(prompt.params, path,
                              {'prompt_tuning_jax': json.dumps(prompt.metadata)})
  with pytest.raises(ValueError, match='NaN or infinite'):
    prompt_file.load(path)


def test_check_refuses_another_base_saying_which():
  prompt = make_prompt()
  prompt_file.check(prompt, make_base())
  prompt_file.check(prompt, make_base(vocabulary=None))
  prompt_file.check(PromptFile(prompt.params), make_base(fingerprint='b'))
  for changes, reason in [
      ({'fingerprint': 'b' * 64}, 'fingerprint is aaaaaaaaaaaa, but bbbbbbbbbbbb'),
      ({'config': types.SimpleNamespace(emb_dim=8, vocab_size=32)}, 'width is 4, but 8'),
      ({'config': types.SimpleNamespace(emb_dim=4, vocab_size=64)}, 'rows is 32, but 64'),
      ({'vocabulary': VocabularyFile('bytes', 0)}, 'extra ids is 100, but 0'),
  ]:
    with pytest.raises(ValueError) as error:
      prompt_file.check(prompt, make_base(name='other', **changes))
    assert reason in one_line(error) and "'other'" in str(error.value)
    assert "trained on 'tiny'" in str(error.value)


def test_numpy_prompts(tmp_path):
  array = np.arange(12, dtype=np.float64).reshape(3, 4)
  np.save(tmp_path / 'prompt.npy', array)
  prompt = prompt_file.load(tmp_path / 'prompt.npy')
  assert prompt.metadata == {} and prompt.params['prompt/embedding'].dtype == np.float32
  np.testing.assert_array_equal(prompt.params['prompt/embedding'], array)
  with pytest.raises(ValueError, match='width is 4, but 8'):
    prompt_file.check(prompt, make_base(config=types.SimpleNamespace(emb_dim=8, vocab_size=32)))
  (tmp_path / 'short.npy').write_bytes((tmp_path / 'prompt.npy').read_bytes()[:-8])
  (tmp_path / 'empty.npy').write_bytes(b'')
  np.savez(tmp_path / 'archive', np.ones((2, 2)))
  (tmp_path / 'archive.npz').rename(tmp_path / 'archive.npy')
  np.save(tmp_path / 'objects.npy', np.array([{}]), allow_pickle=True)
  np.save(tmp_path / 'integers.npy', np.ones((2, 2), int))
  np.save(tmp_path / 'vector.npy', np.ones(3))
  for name in ('short', 'empty', 'archive', 'objects', 'integers', 'vector'):
    with pytest.raises(ValueError) as error:
      prompt_file.load(tmp_path / f'{name}.npy')
    assert f'{name}.npy is not a' in one_line(error)
  with pytest.raises(ValueError, match='no prompt file'):
    prompt_file.load(tmp_path / 'absent.npy')


@pytest.mark.parametrize('name', ['sst2', 'mrpc', 'rte'])
def test_released_prompts_load(name, test_assets):
  prompt = prompt_file.load(
      test_assets / 'prompt_tuning/pretrained_prompts/t5_1_1_lm100k_base' / f'{name}.npy')
  assert prompt.params['prompt/embedding'].shape == (100, 768)
  with pytest.raises(ValueError, match='width is 768, but 4'):
    prompt_file.check(prompt, make_base())


def without_checksums(path):
  """The file as it was written before there were checksums."""
  with safetensors.safe_open(path, 'numpy') as file:
    metadata = {'prompt_tuning_jax': file.metadata()['prompt_tuning_jax']}
    tensors = {name: file.get_tensor(name) for name in file.keys()}
  safetensors.numpy.save_file(tensors, path, metadata)


def test_any_flipped_bit_is_told_or_changes_nothing(tmp_path):
  path, prompt = tmp_path / 'prompt.safetensors', make_prompt()
  prompt_file.save(path, prompt)
  content = path.read_bytes()
  for at in range(len(content)):
    path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1:])
    try:
      loaded = prompt_file.load(path)
    except ValueError as error:
      assert 'prompt.safetensors' in str(error) and '\n' not in str(error)
    else:
      assert loaded.sha256 == prompt.sha256


def test_a_changed_weight_and_a_changed_label_are_told(tmp_path):
  path = tmp_path / 'prompt.safetensors'
  prompt_file.save(path, make_prompt())
  content = path.read_bytes()
  path.write_bytes(content[:-4] + np.float32(0.5).tobytes())
  with pytest.raises(ValueError, match='prompt/embedding: its bytes in prompt.safetensors are not'):
    prompt_file.load(path)
  path.write_bytes(content.replace(b'positif', b'negatif'))
  with pytest.raises(ValueError, match='its header is not the one that was written'):
    prompt_file.load(path)


def test_an_older_file_without_checksums_is_read(tmp_path):
  path, prompt = tmp_path / 'prompt.safetensors', make_prompt()
  prompt_file.save(path, prompt)
  without_checksums(path)
  assert prompt_file.load(path).sha256 == prompt.sha256


def test_a_numpy_file_of_objects_runs_nothing(tmp_path):
  class Evil:
    def __reduce__(self):
      return os.mkdir, (str(tmp_path / 'EXECUTED'),)

  np.save(tmp_path / 'evil.npy', np.array([[Evil()]], object), allow_pickle=True)
  with pytest.raises(ValueError, match='evil.npy is not a .npy prompt'):
    prompt_file.load(tmp_path / 'evil.npy')
  (tmp_path / 'evil.npy').rename(tmp_path / 'evil.safetensors')
  with pytest.raises(ValueError, match='evil.safetensors is not a .npy prompt'):
    prompt_file.load(tmp_path / 'evil.safetensors')
  assert not (tmp_path / 'EXECUTED').exists()

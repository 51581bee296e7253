"""A folder of prompts: what comes, changes and goes; what cannot be used is refused in a line."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.serving.prompt_folder import PromptFolder


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


def write(path, base, length=3, seed=0, about=()):
  rows = np.random.default_rng(seed).normal(size=(length, base.config.emb_dim))
  prompt_file.save(path, prompt_file.PromptFile(
      {'prompt/embedding': rows.astype(np.float32)},
      {**prompt_file.describe(base, length=length), **dict(about)}))


def raw(header: dict, data: bytes = b'') -> bytes:
  text = json.dumps({'__metadata__': {'prompt_tuning_jax': '{"format_version": 1}'},
                     **header}).encode()
  return struct.pack('<Q', len(text)) + text + data


def leaf(shape, size, dtype='F32') -> dict:
  return {'prompt/embedding': {'dtype': dtype, 'shape': shape, 'data_offsets': [0, size]}}


def zip_bomb() -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('embedding.npy', b'\0' * (1 << 24))
  return file.getvalue()


def npy(array) -> bytes:
  file = io.BytesIO()
  np.save(file, array, allow_pickle=array.dtype == object)
  return file.getvalue()


class Malicious:
  """Unpickling it would make a file."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (os.system, (f'touch {self.path}',))


def test_bad_files_are_refused_one_line_each_and_the_good_one_serves(tmp_path, base, caplog):
  write(tmp_path / 'good.safetensors', base)
  whole = (tmp_path / 'good.safetensors').read_bytes()
  trap = tmp_path / 'trap'
  contents = {
      'truncated.safetensors': whole[:-20], 'headless.safetensors': whole[:5],
      'empty.safetensors': b'', 'garbage.safetensors': os.urandom(500),
      'pickled.safetensors': pickle.dumps(Malicious(trap)),
      'pickled_array.npy': pickle.dumps(Malicious(trap)),
      'object.npy': npy(np.array([Malicious(trap)], object)),
      'bomb_array.npy': zip_bomb(), 'bomb.safetensors': zip_bomb(),
      'integers.npy': npy(np.ones((3, 8), np.int32)), 'flat.npy': npy(np.ones(8, np.float32)),
      'half.safetensors': raw(leaf([3, 8], 48, 'F16'), bytes(48)),
      'huge.safetensors': raw(leaf([2 ** 40, 8], 2 ** 45)),
      'lying.safetensors': raw(leaf([2 ** 40, 8], 96), bytes(96)),
      'negative.safetensors': raw(leaf([-3, 8], 96), bytes(96)),
      'nan.npy': npy(np.full((3, 8), np.nan, np.float32)),
      'wide.npy': npy(np.ones((3, 9), np.float32)),
      'huge_array.npy': npy(np.ones((3, 8), np.float32)).replace(b'(3, 8)', b'(1099511627776, 8)'),
  }
  for name, content in contents.items():
    (tmp_path / name).write_bytes(content)
  write(tmp_path / 'other.safetensors', base,
        about={'base': {'name': 'other', 'fingerprint': 'ab' * 32}})
  write(tmp_path / 'words.safetensors', base,
        about={'vocabulary': {'sha256': 'cd' * 32, 'extra_ids': 100}})
  os.mkfifo(tmp_path / 'pipe.safetensors')
  bank, folder = PromptBank(base), PromptFolder(str(tmp_path))
  changes = folder.changes(bank, 32)
  assert list(changes.added) == ['good'] and not changes.removed
  assert len(changes.refused) == len(contents) + 3
  assert all(why and '\n' not in why for why in changes.refused.values())
  assert 'fingerprint' in changes.refused['other'] and 'vocab' in changes.refused['words']
  assert 'width is 9' in changes.refused['wide'] and 'NaN' in changes.refused['nan']
  assert not trap.exists()
  assert len(caplog.records) == len(changes.refused)
  again = folder.changes(bank.replaced(changes.added), 32)
  assert not again.added and again.refused == changes.refused
  assert len(caplog.records) == len(changes.refused), 'said once, not at every look'


def test_names_that_cannot_be(tmp_path, base):
  for name in ('a b', 'ü', 'base', '..', 'x' * 201, 'fine', 'twice'):
    write(tmp_path / f'{name}.safetensors', base)
  np.save(tmp_path / 'twice.npy', np.ones((3, 8), np.float32))
  write(tmp_path / '.hidden.safetensors', base)
  changes = PromptFolder(str(tmp_path), reserved='base').changes(PromptBank(base), 32)
  assert set(changes.added) == {'fine', 'twice'}
  assert {'a b', 'ü', 'base', 'twice'} <= set(changes.refused)
  assert 'name of the base' in changes.refused['base']


def test_a_second_file_of_a_name_does_not_take_the_place_of_the_first(tmp_path, base):
  write(tmp_path / 'one.safetensors', base)
  folder, bank = PromptFolder(str(tmp_path)), PromptBank(base)
  bank = bank.replaced(folder.changes(bank, 32).added)
  np.save(tmp_path / 'one.npy', np.ones((3, 8), np.float32))  # it sorts before the other
  changes = folder.changes(bank, 32)
  assert not changes.added and not changes.removed and 'two prompts' in changes.refused['one']
  (tmp_path / 'one.safetensors').unlink()
  assert list(folder.changes(bank, 32).added) == ['one']


def test_changed_files_come_again_and_a_broken_one_leaves_the_old_in_place(tmp_path, base):
  first, second = tmp_path / 'first.safetensors', tmp_path / 'second.safetensors'
  write(first, base)
  write(second, base)
  bank, folder = PromptBank(base), PromptFolder(str(tmp_path))

  def look():
    nonlocal bank
    changes = folder.changes(bank, 32)
    bank = bank.replaced(changes.added, changes.removed)
    return sorted(changes.added), sorted(changes.removed), sorted(changes.refused)

  assert look() == (['first', 'second'], [], [])
  assert look() == ([], [], [])
  write(first, base, seed=1)
  assert look() == (['first'], [], [])
  before = bank.files['second']
  second.write_bytes(b'no prompt')
  assert look() == ([], [], ['second'])
  assert look() == ([], [], ['second']) and bank.files['second'] is before
  write(second, base, length=5)
  assert look() == (['second'], [], [])
  assert len(bank.files['second'].params['prompt/embedding']) == 5
  first.unlink()
  assert look() == ([], ['first'], [])
  second.unlink()
  assert look() == ([], ['second'], []) and not bank.files


def test_adapters_of_another_activation_take_the_place_of_those_that_go(tmp_path, base):
  shapes = {'down': (1, 8, 2), 'down_bias': (1, 2), 'up': (1, 2, 8), 'up_bias': (1, 8)}

  def write_adapters(name, activation):
    prompt_file.save(tmp_path / f'{name}.safetensors', prompt_file.PromptFile(
        {f'adapter/encoder_mlp/{leaf}': np.ones(shape, np.float32)
         for leaf, shape in shapes.items()},
        prompt_file.describe(base, method='adapters', activation=activation)))

  write_adapters('one', 'gelu')
  folder, bank = PromptFolder(str(tmp_path)), PromptBank(base)
  bank = bank.replaced(folder.changes(bank, 32).added)
  write_adapters('beside', 'relu')
  changes = folder.changes(bank, 32)
  assert not changes.added and 'activation relu' in changes.refused['beside']
  (tmp_path / 'one.safetensors').unlink()
  write_adapters('instead', 'relu')
  changes = folder.changes(bank, 32)
  assert set(changes.added) == {'beside', 'instead'} and changes.removed == ('one',)
  assert not changes.refused


def test_files_beside_a_folder_and_no_folder(tmp_path, base):
  write(tmp_path / 'one.safetensors', base)
  files = {'renamed': str(tmp_path / 'one.safetensors')}
  assert set(PromptFolder(None, files).changes(PromptBank(base), 32).added) == {'renamed'}
  with pytest.raises(ValueError, match='no folder'):
    PromptFolder(str(tmp_path / 'absent'))


def test_a_folder_that_is_away_for_a_while_takes_no_prompt_with_it(tmp_path, base, caplog):
  place = tmp_path / 'prompts'
  place.mkdir()
  write(place / 'one.safetensors', base)
  bank, folder = PromptBank(base), PromptFolder(str(place))
  bank = bank.replaced(folder.changes(bank, 32).added)
  place.rename(tmp_path / 'away')
  for _ in range(2):
    changes = folder.changes(bank, 32)
    assert not changes.added and not changes.removed and list(changes.refused) == [str(place)]
  assert len(caplog.records) == 1
  (tmp_path / 'away').rename(place)
  changes = folder.changes(bank, 32)
  assert not changes.added and not changes.removed and not changes.refused

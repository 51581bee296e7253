"""Buckets: a run in one resumes bit for bit; what is read from one is what a local folder gives."""

import json
import logging
import pathlib

import numpy as np
import pytest

from prompt_tuning_jax import cloud_storage, export, infer, jsonl, optimizers, train_ensemble
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data import token_cache
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.training import methods, run


def trained(folder, base, reviews, steps, method=None):
  return run.train(
      TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(folder), str(base),
      method or methods.PromptTuning(length=4), optimizers.adafactor(0.3), train_steps=steps,
      batch_size=8, eval_period=4, save_period=4, log_period=2, config_text='# all of it\n')


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_a_local_one_and_resumes(bucket, tmp_path, tiny_base, reviews):
  local = tmp_path / 'local'
  trained(local, tiny_base, reviews, 12)
  folder = f'{bucket.url}/runs/one'
  for steps in (5, 12):
    result = trained(folder, tiny_base, reviews, steps)
  top = {name.removeprefix('runs/one/') for name in bucket if 'checkpoints/' not in name}
  of_local = {file.relative_to(local).as_posix() for file in local.rglob('*') if file.is_file()}
  is_one = lambda name: not name.startswith(('events.', 'checkpoints/', '.'))
  assert set(filter(is_one, top)) == set(filter(is_one, of_local)) >= {
      'config.gin', 'metrics.jsonl', 'report.json', 'prompts/best.safetensors'}
  assert sum(name.startswith('events.') for name in top) == 2  # one of each start
  assert result['prompt'] == f'{folder}/prompts/best.safetensors'
  assert json.loads(bucket['runs/one/report.json']) == result
  for name in ('best', 'last'):
    there = prompt_file.load(f'{folder}/prompts/{name}.safetensors')
    here = prompt_file.load(local / 'prompts' / f'{name}.safetensors')
    np.testing.assert_array_equal(there.params['prompt/embedding'], here.params['prompt/embedding'])
  lines = [json.loads(line) for line in bucket['runs/one/metrics.jsonl'].splitlines()]
  assert [line['step'] for line in lines if line['split'] == 'train'] == [2, 4, 5, 6, 8, 10, 12]


def upload(bucket, folder, name):
  """Puts a local folder's files into the bucket; its gs:// path."""
  for file in folder.rglob('*'):
    if file.is_file():
      bucket.write(f'{name}/{file.relative_to(folder).as_posix()}', file.read_bytes())
  return f'{bucket.url}/{name}'


@pytest.mark.slow
def test_base_data_and_prompt_of_a_bucket_answer_as_local_ones(
    bucket, tmp_path, tiny_base, reviews, capsys):
  here = base_checkpoint.load_base(str(tiny_base))
  base = upload(bucket, tiny_base, 'bases/tiny')
  bucket.write('bases/tiny/pytorch_model.bin', b'a pickle')
  assert base_checkpoint.load_base(base).fingerprint == here.fingerprint
  assert not any('pytorch_model' in line for line in bucket.log if line.startswith('GET bases/'))
  bucket.write('data/reviews.jsonl', reviews.read_bytes())
  result = trained(tmp_path / 'run', base, f'{bucket.url}/data/reviews.jsonl', 2)
  rows = [{'inputs': 'a lovely film', 'targets': 'good', 'prompt': 'last'},
          {'inputs': 'this play is dull', 'targets': 'bad', 'prompt': 'last'}]
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / 'rows.jsonl').write_text(text)
  bucket.write('rows.jsonl', text.encode())
  there = upload(bucket, tmp_path / 'run' / 'prompts', 'prompts')
  assert prompt_file.load(result['prompt']).sha256 == prompt_file.load(
      f'{there}/best.safetensors').sha256
  for base_, folder, place in (
      (str(tiny_base), str(tmp_path / 'run' / 'prompts'), str(tmp_path)),
      (base, there, bucket.url)):
    assert not infer.main(['--base', base_, '--prompts', folder, '--rank', '--input',
                           f'{place}/rows.jsonl', '--output', f'{place}/answers.jsonl'])
  assert bucket['answers.jsonl'] == (tmp_path / 'answers.jsonl').read_bytes()
  assert not list((tmp_path / 'cache' / 'unfinished').rglob('answers*'))
  assert not export.main(['--prompt', f'{there}/last.safetensors', '--to=peft', '--output',
                          f'{bucket.url}/peft', '--base_model_name=tiny'])
  assert prompt_file.load(f'{bucket.url}/peft').params.keys() == {'prompt/embedding'}
  capsys.readouterr()


def test_answers_that_cannot_be_put_into_the_bucket_stay(bucket, tmp_path, monkeypatch):
  (tmp_path / 'rows.jsonl').write_text('{"text": "a"}\n{"text": "bc"}\n')
  answered = []

  def answer(part):
    answered.extend(part)
    return [{'n': len(row['text'])} for _, row in part]

  def again():
    return jsonl.answer_file(str(tmp_path / 'rows.jsonl'), f'{bucket.url}/answers.jsonl', answer,
                             settings={})

  def refuse(*_, **__):
    raise ValueError('Cannot write')

  with monkeypatch.context() as patch, pytest.raises(ValueError, match='^Cannot write$'):
    patch.setattr(cloud_storage, 'put', refuse)
    again()
  assert again() == len(answered) == 2
  assert bucket['answers.jsonl'] == b'{"text": "a", "n": 1}\n{"text": "bc", "n": 2}\n'
  assert not list((tmp_path / 'cache' / 'unfinished').rglob('answers*'))


def test_a_copy_follows_its_folder(bucket):
  bucket.write('a/one.json', b'1')
  bucket.write('a/b/two.json', b'2')
  content = lambda: {file.name: file.read_bytes() for file in pathlib.Path(
      cloud_storage.fetch(f'{bucket.url}/a')).rglob('*.json')}
  assert content() == {'one.json': b'1', 'two.json': b'2'}
  del bucket['a/b/two.json']
  bucket.write('a/one.json', b'3')
  assert content() == {'one.json': b'3'}


def test_what_is_large_is_copied_once(bucket, monkeypatch):
  monkeypatch.setattr(cloud_storage, 'LARGE', 3)
  bucket.write('small.json', b'123')
  bucket.write('large.json', b'1234')
  for _ in range(2):
    for name in ('small', 'large'):
      path = cloud_storage.fetch(f'{bucket.url}/{name}.json')
      assert pathlib.Path(path).read_bytes() == bucket[f'{name}.json']
  assert reads(bucket, 'small.json') == 2 and reads(bucket, 'large.json') == 1
  bucket.write('large.json', b'12345')
  assert pathlib.Path(cloud_storage.fetch(f'{bucket.url}/large.json')).read_bytes() == b'12345'


def test_a_mirror_writes_what_changed_and_deletes_what_went(bucket):
  mirror = cloud_storage.Mirror(f'{bucket.url}/run')
  (mirror.folder / 'model').mkdir()
  for name in ('a.txt', 'b.txt', '.c.tmp', 'model/config.json', 'model/weights'):
    (mirror.folder / name).write_text('1')
  mirror.push()
  written = [line.split()[1] for line in bucket.log if line.startswith('WRITE')]
  assert written[-1] == 'run/model/config.json'
  assert set(written) == {'run/a.txt', 'run/b.txt', 'run/model/config.json', 'run/model/weights'}
  (mirror.folder / 'a.txt').write_text('12')
  (mirror.folder / 'b.txt').unlink()
  mirror.push(soon=False)  # a moment ago
  assert bucket['run/a.txt'] == b'1'
  bucket.log.clear()
  mirror.push()
  assert [line for line in bucket.log if line.startswith('WRITE')] == ['WRITE run/a.txt']
  assert set(bucket) == {'run/a.txt', 'run/model/config.json', 'run/model/weights'}
  again = cloud_storage.Mirror(f'{bucket.url}/run')
  assert (again.folder / 'a.txt').read_text() == '12'
  bucket.log.clear()
  again.push()
  assert not bucket.log


@pytest.mark.parametrize('call', [
    cloud_storage.fetch, prompt_file.load, prompt_file.in_folder, base_checkpoint.load_base])
def test_what_is_not_there_is_one_line(bucket, call):
  with pytest.raises(ValueError, match=r'^There is nothing at gs://test-bucket/missing\.$'):
    call(f'{bucket.url}/missing')


def test_what_needs_a_folder_of_this_machine_says_so(tiny_base, reviews, capsys):
  with pytest.raises(ValueError, match='cache_dir should be a folder of this machine'):
    token_cache.open_or_build(TextFile(str(reviews)), 'train', base_checkpoint.load_base(
        str(tiny_base)).vocabulary, {'inputs': 8, 'targets': 8}, 'gs://bucket/tokens')
  assert train_ensemble.main(['--seeds', '0', '1', '--gin.MODEL_DIR=gs://bucket/run']) == 1
  assert 'is a folder of this machine, got gs:' in capsys.readouterr().err


@pytest.mark.parametrize('path', ['gs://', 'gs:///', 'gs://b/../c'])
def test_paths_that_lead_out_are_refused(path):
  with pytest.raises(ValueError, match='gs://BUCKET/PATH'):
    cloud_storage.fetch(path)


def test_a_folder_of_this_machine_is_its_own_mirror(tmp_path):
  mirror = cloud_storage.Mirror(tmp_path)
  assert mirror.folder == mirror.place == tmp_path
  assert cloud_storage.fetch(tmp_path) == str(tmp_path)
  mirror.push()
  assert mirror.name(tmp_path / 'x') == str(tmp_path / 'x') and not list(tmp_path.iterdir())


def test_an_unreachable_bucket_is_one_line(bucket, tmp_path, tiny_base, reviews):
  with pytest.raises(ValueError, match='Cannot (read|write) gs://another/run') as caught:
    trained('gs://another/run', tiny_base, reviews, 2)
  assert '\n' not in str(caught.value)


def test_what_the_client_logs_has_no_traceback(bucket, caplog):
  with pytest.raises(ValueError):
    cloud_storage.fetch(f'{bucket.url}/missing')
  try:
    raise OSError('away')
  except OSError:
    logging.getLogger('gcsfs').exception('out of retries: away')  # as gcsfs.retry does
  assert caplog.records[-1].getMessage() == 'out of retries: away'
  assert caplog.records[-1].exc_info is None


def reads(bucket, name: str) -> int:
  return sum(line == f'DOWNLOAD {name}' for line in bucket.log)

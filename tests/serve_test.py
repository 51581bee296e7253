"""The verb that serves: a server in another process, and commands that cannot be."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from prompt_tuning_jax import serve, serving
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file

httpx = pytest.importorskip('httpx')
pytest.importorskip('uvicorn')


def one_line(capsys) -> str:
  """What a refused verb said."""
  said = capsys.readouterr().err.strip()
  assert said.startswith('error: ') and len(said.splitlines()) == 1
  return said


def save(path, base, seed, length=4):
  rows = np.random.default_rng(seed).normal(size=(length, 8)).astype(np.float32)
  prompt_file.save(path, prompt_file.PromptFile(
      {prompt_file.EMBEDDING: rows},
      prompt_file.describe(base, length=length, labels=['good', 'bad'], task='reviews')))
  return str(path)


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


@pytest.fixture
def server(tmp_path, tiny_base, base):
  """(a client of a server that asks for a key, its folder of prompts, its process)."""
  folder, keys = tmp_path / 'prompts', tmp_path / 'keys'
  folder.mkdir()
  save(folder / 'first.safetensors', base, 0)
  (folder / 'broken.safetensors').write_bytes(b'garbage')
  keys.write_text('one\n\nother\n', encoding='utf-8')
  process = subprocess.Popen(
      [sys.executable, '-m', 'prompt_tuning_jax.serve', '--base', tiny_base, '--prompts', folder,
       '--port', '0', '--batch_sizes', '2', '--max_input_length', '24', '--max_decode_length', '40',
       '--poll_seconds', '0.1', '--api_key_file', keys],
      stdout=subprocess.PIPE, stderr=open(tmp_path / 'log', 'wb'), text=True)
  try:
    said = process.stdout.readline()
    log = (tmp_path / 'log').read_text(encoding='utf-8')
    found = re.fullmatch(r'Serving 1 prompt of base on (http://127.0.0.1:\d+) \(compiled 4 '
                         r'programs in \d+ s\)\n', said)
    assert found, (said, log)
    assert len([line for line in log.splitlines() if 'Refused the prompt broken' in line]) == 1
    with httpx.Client(base_url=found[1], timeout=60,
                      headers={'Authorization': 'Bearer other'}) as client:
      yield client, folder, process
  finally:
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_server_from_its_start_to_its_end(server, base):
  client, folder, process = server
  assert client.get('/healthz').json()['status'] == 'ok'
  assert httpx.get(f'{client.base_url}/v1/models').status_code == 401
  models = client.get('/v1/models').json()['data']
  assert [(model['id'], model['labels']) for model in models] == [
      ('base', None), ('first', ['good', 'bad'])]
  [label] = client.post('/v1/classify', json={'model': 'first', 'input': 'warm'}).json()['data']
  assert set(label['probabilities']) == {'good', 'bad'}
  assert sum(label['probabilities'].values()) == pytest.approx(1)
  assert client.get('/v1/models', headers={'host': 'evil.example'}).status_code == 400
  assert 'Did you mean' in client.post('/v1/completions', json={
      'model': 'fist', 'prompt': 'a'}).json()['error']['message']

  save(folder / 'second.safetensors', base, 1)  # noticed without being told
  until = time.monotonic() + 30
  while len(client.get('/v1/models').json()['data']) < 3 and time.monotonic() < until:
    time.sleep(0.05)
  asked = {'model': 'second', 'prompt': ['a lovely film', 'cold'], 'n': 8, 'temperature': 2.0,
           'seed': 1}
  whole = client.post('/v1/completions', json=asked).json()['choices']
  assert len(whole) == 16

  async def stopped_while_asked():
    async with httpx.AsyncClient(base_url=client.base_url, headers=client.headers,
                                 timeout=60) as other:
      async with other.stream('POST', '/v1/completions', json={**asked, 'stream': True}) as answer:
        lines = answer.aiter_lines()
        first = await anext(lines)
        process.send_signal(signal.SIGTERM)
        return [first, *[line async for line in lines]]

  lines = [line for line in asyncio.run(stopped_while_asked()) if line]
  assert lines[-1] == 'data: [DONE]' and sum('"finish_reason":null' not in line
                                             for line in lines) == 17
  assert process.wait(timeout=30) == 0


@pytest.mark.parametrize('changes, said', [
    (['--base', 'absent'], 'absent'),
    (['--port', '70000'], '--port must be 0 to 65535'),
    (['--host', '203.0.113.1'], 'Cannot listen on 203.0.113.1'),
    (['--batch_sizes', '8,1'], 'batch_sizes must be rising'),
    (['--max_queue', '0'], 'max_queue must be at least 1'),
    (['--request_timeout', 'inf'], 'request_seconds must be more than 0 and finite'),
    (['--shutdown_seconds', 'nan'], 'shutdown_seconds must be'),
    (['--api_key_file', 'absent.keys'], 'There is no file absent.keys.'),
    (['--request_timeout', '0'], 'request_seconds must be more than 0'),
    (['--prompts', 'absent.safetensors'], 'no prompt file or folder absent.safetensors'),
    (['--api_key_file', os.devnull], 'has no key'),
])
def test_commands_that_cannot_be(tiny_base, capsys, changes, said):
  assert serve.main(['--base', str(tiny_base), '--port', '0', *changes]) == 1
  assert said in one_line(capsys)


def test_a_file_that_is_named_must_be_good(tiny_base, base, tmp_path, capsys):
  good, bad = save(tmp_path / 'good.safetensors', base, 0), tmp_path / 'bad.safetensors'
  bad.write_bytes(b'garbage')
  command = ['--base', str(tiny_base), '--port', '0', '--prompts', good]
  assert serve.main([*command, str(bad)]) == 1
  assert str(bad) in one_line(capsys)
  (tmp_path / 'other').mkdir()
  assert serve.main([*command, save(tmp_path / 'other/good.safetensors', base, 1)]) == 1
  assert 'two prompts of one name' in one_line(capsys)
  assert serve.main([*command, str(tmp_path), str(tmp_path / 'other')]) == 1
  assert 'one folder' in one_line(capsys)


def test_a_port_that_is_taken_is_told_before_anything_slow(capsys):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    assert serve.main(['--base', 'not even looked for', '--port', str(port)]) == 1
  assert f'Port {port} of 127.0.0.1 is taken' in one_line(capsys)


def test_only_a_server_of_its_own_machine_asks_for_its_name():
  known = ('localhost', '127.0.0.1', '[::1]')
  assert serve.hosts('localhost', '127.0.0.1') == serve.hosts('::1', '::1') == known
  assert serve.hosts('127.0.0.5', '127.0.0.5') == (*known, '127.0.0.5')
  assert serve.hosts('0.0.0.0', '0.0.0.0') == serve.hosts('::', '::') == ()


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
  for name in ('app', 'listener'):
    monkeypatch.delitem(sys.modules, f'prompt_tuning_jax.serving.{name}', raising=False)
    monkeypatch.delattr(serving, name, raising=False)
  monkeypatch.setitem(sys.modules, 'uvicorn', None)
  assert serve.main(['--base', 'mini']) == 1
  assert "pip install 'prompt_tuning_jax[serve]'" in one_line(capsys)


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch, caplog):
  (tmp_path / 'keys').write_text('a\n b \n', encoding='utf-8')
  monkeypatch.setenv(serve.KEY, 'c')
  command = ['--base', 'mini', '--api_key_file', str(tmp_path / 'keys')]
  assert serve.api_keys(serve.parser().parse_args(command)) == ('c', 'a', 'b')
  monkeypatch.delenv(serve.KEY)
  assert serve.api_keys(serve.parser().parse_args(['--base', 'mini'])) == () and not caplog.records
  assert serve.api_keys(serve.parser().parse_args(['--base', 'mini', '--host', '0.0.0.0'])) == ()
  assert 'may ask this server' in caplog.text

"""The server on a socket: OpenAI's own client, and clients that go, stall, lie or read nothing."""

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import time

import httpx
import openai
import pytest

from prompt_tuning_jax.serving.app import Settings
from prompt_tuning_jax.serving.listener import server

QUICK = Settings(body_seconds=.3, send_seconds=.3, request_seconds=20)


def _request(length: int | None, body: bytes, *headers: str) -> bytes:
  size = [] if length is None else [f'content-length: {length}']
  lines = ['POST /v1/completions HTTP/1.1', 'host: x', 'content-type: application/json', *size,
           *headers]
  return '\r\n'.join([*lines, '', '']).encode('ascii') + body


def _completion(prompt: str, **more) -> bytes:
  return json.dumps({'model': 'sst2', 'prompt': prompt, **more}).encode()


def _connect(url: str) -> socket.socket:
  connection = socket.create_connection(('127.0.0.1', httpx.URL(url).port))
  connection.settimeout(5)
  return connection


def _all(connection: socket.socket) -> bytes:
  parts = []
  while part := connection.recv(65536):
    parts.append(part)
  return b''.join(parts)


def _still_answers(url: str) -> None:
  response = httpx.post(f'{url}/v1/completions', json={'model': 'sst2', 'prompt': 'a b'})
  assert response.json()['choices'][0]['text'] == 'a b '


def test_the_openai_client(listening):
  with listening(Settings(api_keys=('secret',))) as (url, _):
    with openai.OpenAI(base_url=f'{url}/v1', api_key='secret', max_retries=0) as client:
      assert [model.id for model in client.models.list()] == ['mini', 'sst2']
      assert client.models.retrieve('sst2').created == 2
      answer = client.completions.create(model='sst2', prompt='a b c', max_tokens=2)
      assert answer.choices[0].text == 'a b ' and answer.choices[0].finish_reason == 'length'
      assert answer.usage.total_tokens == 6 and answer._request_id in answer.id
      chunks = list(client.completions.create(
          model='sst2', prompt=['a b', 'c'], stream=True, stream_options={'include_usage': True},
          extra_body={'top_k': 3}))
      texts = ['', '']
      for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
      assert texts == ['a b ', 'c '] and chunks[-1].usage.completion_tokens == 3
      with pytest.raises(openai.NotFoundError):
        client.completions.create(model='none', prompt='a')
      with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model='sst2', prompt='a', echo=True)
      assert caught.value.param == 'echo'
      with pytest.raises(openai.RateLimitError):
        client.completions.create(model='sst2', prompt='full')
      with pytest.raises(openai.APIError, match='Too late'):
        list(client.completions.create(model='sst2', prompt='then late', stream=True))
    with openai.OpenAI(base_url=f'{url}/v1', api_key='wrong', max_retries=0) as client:
      with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_the_async_openai_client(listening):
  async def run(url):
    async with openai.AsyncOpenAI(base_url=f'{url}/v1', api_key='any') as client:
      create = client.completions.create
      answers = await asyncio.gather(*[create(model='sst2', prompt=f'{i} x') for i in range(20)])
      assert [answer.choices[0].text for answer in answers] == [f'{i} x ' for i in range(20)]
      stream = await create(model='sst2', prompt='a b', stream=True)
      assert ''.join([chunk.choices[0].text async for chunk in stream]) == 'a b '

  with listening() as (url, _):
    asyncio.run(run(url))


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_is_not_waited_for(listening, engine, eventually, stream):
  with listening() as (url, _):
    body = _completion('forever', stream=stream)
    with _connect(url) as connection:
      connection.sendall(_request(len(body), body))
      if stream:
        assert connection.recv(10).startswith(b'HTTP/1.1 2')
      eventually(lambda: engine.tickets)
    eventually(lambda: engine.tickets[0].cancelled)
    _still_answers(url)
    eventually(lambda: 'route="/v1/completions",status="499"' in httpx.get(f'{url}/metrics').text)


def test_clients_that_stall_are_cut(listening):
  sent = (b'', b'POST /v1/comp', _request(100, b'')[:-2], _request(100, b''),
          _request(100, b'{"model"'), _request(None, b'5\r\n{"mod', 'transfer-encoding: chunked'))
  with listening(QUICK) as (url, _), contextlib.ExitStack() as stack:
    connections = [stack.enter_context(_connect(url)) for _ in sent]
    started = time.monotonic()
    for connection, part in zip(connections, sent, strict=True):
      connection.sendall(part)
    for connection in connections:
      assert _all(connection).startswith(b'HTTP/1.1 408 ')
    assert time.monotonic() - started < 3
    _still_answers(url)


def test_a_client_that_drips_is_cut(listening):
  with listening(QUICK) as (url, _), _connect(url) as connection:
    started = time.monotonic()
    with pytest.raises(OSError):
      for byte in _request(500, b' ' * 500):
        connection.sendall(bytes([byte]))
        time.sleep(.02)
    assert time.monotonic() - started < 3
    _still_answers(url)


def test_a_second_request_that_drips_is_cut(listening):
  with listening(QUICK) as (url, _), _connect(url) as connection:
    body = _completion('a')
    connection.sendall(_request(len(body), body) + b'POST /v1')
    answers = _all(connection)
    assert answers.startswith(b'HTTP/1.1 200 ') and b'HTTP/1.1 408 ' in answers


def test_a_body_too_large_is_refused_before_it_is_read(listening):
  def answer(url, length, sent, *headers):
    body = b' ' * sent
    if length is None:
      body = b'%x\r\n%b\r\n0\r\n\r\n' % (len(body), body)
    with _connect(url) as connection, concurrent.futures.ThreadPoolExecutor(1) as sender:
      sending = sender.submit(connection.sendall, _request(length, body, *headers))
      got = _all(connection)
      sending.exception()  # it may not get rid of all
      return got

  with listening() as (url, _), concurrent.futures.ThreadPoolExecutor(5) as pool:
    answers = [pool.submit(answer, url, *case) for case in (
        (10 << 20, 10 << 20), (10 << 20, 10), (10**18, 10),
        (None, 10 << 20, 'transfer-encoding: chunked'), (10 << 20, 0, 'expect: 100-continue'))]
    for got in (future.result() for future in answers):
      assert got.startswith(b'HTTP/1.1 413 ') and b'request_too_large' in got
      assert got.lower().count(b'connection: close') == 1
    _still_answers(url)


def test_a_client_without_a_key_gets_its_answer_whatever_it_sends(listening):
  with listening(Settings(api_keys=('key',))) as (url, _):
    response = httpx.post(f'{url}/v1/completions', content=b' ' * (10 << 20))
    assert response.status_code == 401


def test_a_client_that_reads_nothing_holds_no_one(listening, engine, eventually):
  with listening(QUICK) as (url, _), socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(('127.0.0.1', httpx.URL(url).port))
    body = _completion('forever', stream=True)
    connection.sendall(_request(len(body), body))
    eventually(lambda: engine.tickets)
    _still_answers(url)
    eventually(lambda: engine.tickets[0].cancelled, 15)


def test_a_client_that_reads_no_answers_is_cut(listening, eventually):
  with listening(QUICK) as (url, running), socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(('127.0.0.1', httpx.URL(url).port))
    connection.settimeout(.2)
    with contextlib.suppress(OSError):  # until the server, which waits to write, reads no more
      while True:
        connection.sendall(b'GET / HTTP/1.1\r\nhost: x\r\n\r\n' * 100)
    eventually(lambda: not running.server_state.tasks)
    eventually(lambda: not running.server_state.connections)
    assert 'requests_in_flight 1.0' in httpx.get(f'{url}/metrics').text  # this one


def test_a_shutdown_takes_its_seconds():
  running = server(None, Settings(shutdown_seconds=3, request_seconds=20))
  assert running.config.timeout_graceful_shutdown == 3


def test_not_http(listening):
  with listening(QUICK) as (url, _):
    for sent in (b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n', b'GET / HTTP/9\r\n\r\n',
                 _request(5, b'{}', 'content-length: 7'), _request(10**30, b'')):
      with _connect(url) as connection:
        connection.sendall(sent)
        assert _all(connection).startswith(b'HTTP/1.1 400 ')
    with _connect(url) as connection, contextlib.suppress(OSError):
      connection.sendall(b'x' * 1_000_000)  # headers too long
    _still_answers(url)


def test_what_was_accepted_is_finished(listening, engine, eventually):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    with listening() as (url, running):
      asked = [pool.submit(httpx.post, f'{url}/v1/completions', json={
          'model': 'sst2', 'prompt': 'slowly a b c d e f g', 'stream': stream})
          for stream in (False, True)]
      eventually(lambda: len(engine.tickets) == 2)
      running.should_exit = True
      eventually(lambda: not running.servers[0].is_serving())
      with pytest.raises(httpx.ConnectError):
        httpx.get(f'{url}/healthz')
    whole, stream = (future.result() for future in asked)
  assert whole.json()['choices'][0]['text'] == 'slowly a b c d e f g '
  assert stream.text.endswith('data: [DONE]\n\n')
  assert [ticket.ended for ticket in engine.tickets] == [True, True]


def test_one_that_fails_fails_alone(listening):
  texts = [f'slowly {i}' for i in range(8)] + ['bug', 'bug later', 'fails', 'full', 'late'] * 4
  with listening() as (url, _), concurrent.futures.ThreadPoolExecutor(16) as pool:
    with httpx.Client() as client:
      post = lambda text: client.post(f'{url}/v1/completions',
                                      json={'model': 'sst2', 'prompt': text})
      answers = list(pool.map(post, texts))
  for text, answer in zip(texts, answers, strict=True):
    if text.startswith('slowly'):
      assert answer.json()['choices'][0]['text'] == f'{text} '
    else:
      assert answer.status_code in (429, 500, 504)

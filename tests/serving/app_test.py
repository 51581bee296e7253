"""The app over ASGI: its answers, its errors and its keys."""

import asyncio
import json
import logging

import pytest

from prompt_tuning_jax.serving import access
from prompt_tuning_jax.serving.app import Settings
from prompt_tuning_jax.serving.metrics import Metrics

GOOD = {'model': 'sst2', 'prompt': 'a b c'}


def _error(response, status):
  assert response.status_code == status, response.text
  assert response.headers['content-type'] == 'application/json'
  assert set(response.json()) == {'error'}
  error = response.json()['error']
  assert set(error) == {'message', 'type', 'param', 'code'}
  assert error['message'] and '\n' not in error['message']
  return error


def test_completions_are_openais(ask):
  answer = ask('POST', '/v1/completions', json={
      **GOOD, 'prompt': ['a b c', 'd'], 'n': 2, 'max_tokens': 2, 'stop': 'x', 'seed': 3}).json()
  assert answer.pop('id').startswith('cmpl-') and answer.pop('created') > 1e9
  choice = lambda index, text, reason: {
      'index': index, 'text': text, 'logprobs': None, 'finish_reason': reason}
  assert answer == {
      'object': 'text_completion', 'model': 'sst2',
      'choices': [choice(0, 'a b ', 'length'), choice(1, 'a b ', 'length'), choice(2, 'd ', 'stop'),
                  choice(3, 'd ', 'stop')],
      'usage': {'prompt_tokens': 6, 'completion_tokens': 6, 'total_tokens': 12}}


def test_the_engine_is_asked_what_the_client_asked(ask, engine):
  ask('POST', '/v1/completions', json={
      'model': 'sst2', 'prompt': [[5, 1]], 'max_tokens': 7, 'temperature': 1, 'top_k': 4,
      'top_p': .5, 'n': 3, 'stop': ['a', 'é'], 'seed': 9, 'user': 'me', 'echo': False,
      'best_of': 1})
  request = engine.tickets[0].request
  assert (request.inputs, request.max_tokens, request.temperature, request.top_k, request.top_p,
          request.n, request.stop, request.seed) == ((5, 1), 7, 1.0, 4, .5, 3, ('a', 'é'), 9)
  ask('POST', '/v1/completions', json=GOOD)
  request = engine.tickets[1].request
  assert (request.max_tokens, request.temperature, request.top_k, request.top_p, request.n,
          request.stop, request.seed) == (None, 0.0, 0, 1.0, 1, (), None)
  ask('POST', '/v1/classify', json={'model': 'sst2', 'input': 'x', 'labels': ['u', 'v'],
                                    'length_normalized': True, 'calibrated': True})
  request = engine.tickets[2].request
  assert (request.labels, request.length_normalized, request.calibrated) == (('u', 'v'), True, True)


def _events(response):
  lines = [part.removeprefix('data: ') for part in response.text.split('\n\n') if part]
  return [json.loads(line) if line != '[DONE]' else line for line in lines]


def test_a_stream_joined_is_the_answer(ask):
  asked = {**GOOD, 'prompt': ['a b c', 'd\u2028e'], 'n': 2}
  whole = ask('POST', '/v1/completions', json=asked).json()
  response = ask('POST', '/v1/completions',
                 json={**asked, 'stream': True, 'stream_options': {'include_usage': True}})
  assert response.headers['content-type'].startswith('text/event-stream')
  *chunks, last, done = _events(response)
  assert done == '[DONE]' and last['choices'] == [] and last['usage'] == whole['usage']
  assert all(chunk['usage'] is None and chunk['id'] == last['id'] for chunk in chunks)
  joined = [{'index': i, 'text': '', 'logprobs': None, 'finish_reason': None} for i in range(4)]
  for chunk in chunks:
    [new] = chunk['choices']
    joined[new['index']]['text'] += new['text']
    joined[new['index']]['finish_reason'] = new['finish_reason']
  assert joined == whole['choices']
  assert '"usage"' not in ask('POST', '/v1/completions', json={**asked, 'stream': True}).text


def test_classification(ask):
  answer = ask('POST', '/v1/classify', json={'model': 'sst2', 'input': ['x y', 'z']}).json()
  probabilities = {'negative': pytest.approx(1 / 3), 'positive': pytest.approx(2 / 3)}
  data = [{'index': index, 'label': 'positive', 'probability': pytest.approx(2 / 3),
           'probabilities': probabilities, 'log_likelihoods': {'negative': -1., 'positive': -2.}}
          for index in range(2)]
  assert answer == {'object': 'list', 'model': 'sst2', 'data': data,
                    'usage': {'prompt_tokens': 5, 'total_tokens': 5}}


def test_models(ask):
  listed = ask('GET', '/v1/models').json()
  assert [model['id'] for model in listed['data']] == ['mini', 'sst2']
  one = ask('GET', '/v1/models/sst2').json()
  assert one == listed['data'][1] == {
      'id': 'sst2', 'object': 'model', 'created': 2, 'owned_by': 'prompt_tuning_jax',
      'labels': ['negative', 'positive'], 'task': 'glue_sst2'}
  assert _error(ask('GET', '/v1/models/none/at all'), 404)['code'] == 'model_not_found'


def test_health_and_reload(ask, engine):
  assert ask('GET', '/healthz').json() == {'status': 'ok', 'queued': 0, 'running': 0}
  engine.status = 'stopping'
  assert ask('GET', '/healthz').status_code == 503
  json_type = {'content-type': 'application/json'}
  assert ask('POST', '/v1/reload', headers=json_type).json()['added'] == ['new']
  for kind in ({}, {'content-type': 'text/plain'}):  # a form on any web page sends these
    _error(ask('POST', '/v1/reload', headers=kind), 415)


@pytest.mark.parametrize('method, path, status', [
    ('GET', '/nothing', 404), ('POST', '/v1/models', 405), ('GET', '/v1/completions', 405),
    ('DELETE', '/v1/classify', 405), ('POST', '/v1/completions/', 404)])
def test_other_paths_and_methods(ask, method, path, status):
  _error(ask(method, path), status)


@pytest.mark.parametrize('text, status, code', [
    ('full', 429, 'rate_limit_exceeded'), ('long', 400, 'context_length_exceeded'),
    ('stopping', 503, 'unavailable'), ('late', 504, 'deadline_exceeded'), ('fails', 500, None)])
@pytest.mark.parametrize('stream', [False, True])
def test_what_the_engine_refuses_has_its_status(ask, text, status, code, stream):
  response = ask('POST', '/v1/completions', json={**GOOD, 'prompt': text, 'stream': stream})
  assert _error(response, status)['code'] == code
  assert response.headers.get('retry-after') == {429: '3', 503: '1'}.get(status)


def test_a_model_that_is_not_there(ask):
  assert _error(ask('POST', '/v1/completions', json={**GOOD, 'model': 'no'}), 404)['code'] == (
      'model_not_found')
  response = ask('POST', '/v1/classify', json={'model': 'mini', 'input': 'x'})
  assert _error(response, 400)['param'] == 'labels'


@pytest.mark.parametrize('text', ['bug', 'bug later', 'then bug later'])
@pytest.mark.parametrize('stream', [False, True])
def test_an_error_of_ours_is_told_without_its_traceback(ask, caplog, text, stream):
  response = ask('POST', '/v1/completions', json={**GOOD, 'prompt': text, 'stream': stream})
  begun = stream and text.startswith('then')
  assert response.status_code == (200 if begun else 500)
  told = _events(response)[-1] if begun else response.json()
  assert response.headers['x-request-id'] in told['error']['message']
  assert 'secret' not in response.text and 'Traceback' not in response.text
  [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
  assert response.headers['x-request-id'] in record.getMessage()
  assert 'secret' in str(record.exc_info[1])


def test_a_stream_that_fails_ends_with_the_error(ask):
  response = ask('POST', '/v1/completions', json={**GOOD, 'prompt': 'then late', 'stream': True})
  events = _events(response)
  assert events[0]['choices'][0]['text'] == 'then'
  assert events[-1]['error']['code'] == 'deadline_exceeded'


@pytest.mark.parametrize('bad', ['full', 'late', 'bug', 'bug later'])
def test_all_texts_of_a_request_or_none(ask, engine, bad):
  response = ask('POST', '/v1/completions', json={**GOOD, 'prompt': ['a', 'forever', bad, 'b']})
  assert response.status_code in (429, 500, 504)
  assert engine.tickets[1].cancelled


@pytest.mark.parametrize('path, field', [('completions', 'prompt'), ('classify', 'input')])
def test_a_late_answer_is_refused_and_its_work_cancelled(ask, engine, path, field):
  response = ask('POST', f'/v1/{path}', Settings(request_seconds=.05),
                 json={'model': 'sst2', field: ['forever', 'a']})
  assert '0.05 seconds' in _error(response, 504)['message']
  assert engine.tickets[0].cancelled


def test_a_late_stream_ends_with_the_error(ask, engine):
  response = ask('POST', '/v1/completions', Settings(request_seconds=.1),
                 json={**GOOD, 'prompt': 'forever', 'stream': True})
  assert _events(response)[-1]['error']['code'] == 'deadline_exceeded'
  assert engine.tickets[0].cancelled


def test_without_time_the_work_is_cancelled_before_it_begins(ask, engine):
  assert ask('POST', '/v1/completions', Settings(request_seconds=1e-9), json={
      **GOOD, 'prompt': 'forever'}).status_code == 504
  assert engine.tickets[0].cancelled


def test_keys(ask):
  settings = Settings(api_keys=('first', 'zweité'))
  key = lambda value: {'authorization': value.encode('utf-8')}
  for path, method in (('/v1/models', 'GET'), ('/metrics', 'GET'), ('/v1/completions', 'POST'),
                       ('/nothing', 'GET'), ('/v1/reload', 'POST')):
    for headers in ({}, key('Bearer'), key('Bearer fırst'), key('Bearer first2'),
                    key('Basic first')):
      assert _error(ask(method, path, settings, headers=headers), 401)['code'] == 'invalid_api_key'
  for value in ('Bearer first', 'bearer zweité'):
    assert ask('GET', '/v1/models', settings, headers=key(value)).status_code == 200
  for path in ('/', '/healthz'):
    assert ask('GET', path, settings).status_code == 200
  assert 'first' not in repr(settings)
  with pytest.raises(ValueError, match='empty'):
    Settings(api_keys=('',))


def test_hosts(ask):
  settings = Settings(allowed_hosts=('localhost', '127.0.0.1', '[::1]'))
  for host in ('localhost', 'LocalHost:8000', '127.0.0.1:1', '[::1]', '[::1]:8000'):
    assert ask('GET', '/v1/models', settings, headers={'host': host}).status_code == 200
  for host in ('evil.example', 'localhost.evil.example:8000', '127.0.0.1.evil', '[::2]:1', '::1',
               ''):
    message = _error(ask('GET', '/v1/models', settings, headers={'host': host}), 400)['message']
    assert 'Host must be one of localhost' in message
  assert ask('GET', '/v1/models', headers={'host': 'evil.example'}).status_code == 200


@pytest.mark.parametrize('name', ['request_seconds', 'shutdown_seconds'])
@pytest.mark.parametrize('value', [-1, float('nan'), float('inf')])
def test_settings_are_positive(name, value):
  with pytest.raises(ValueError, match=name):
    Settings(**{name: value})


def test_a_request_that_a_shutdown_cancels_is_one_that_has_gone(engine, caplog):
  async def app(*_):
    raise asyncio.CancelledError

  metrics = Metrics(engine.statistics)
  scope = {'type': 'http', 'method': 'GET', 'path': '/', 'headers': []}
  asyncio.run(access.observed(app, metrics)(scope, None, None))
  assert 'status="499"' in str(metrics.text())
  assert not [record for record in caplog.records if record.exc_info]


def test_a_body_too_large_or_not_json(ask):
  settings = Settings(max_body_bytes=100)
  body = lambda size: json.dumps(GOOD).ljust(size).encode()
  json_type = {'content-type': 'application/json'}

  async def parts(size):
    for i in range(0, size, 10):
      yield body(size)[i:i + 10]

  for make in (body, parts):
    assert ask('POST', '/v1/completions', settings, content=make(100),
               headers=json_type).status_code == 200
    assert '100 bytes' in _error(ask('POST', '/v1/completions', settings, content=make(101),
                                     headers=json_type), 413)['message']
  for kind in ('text/plain', 'application/x-www-form-urlencoded',
               'application/json; charset=latin1', 'application/jsonx', None):
    headers = {'content-type': kind} if kind else {}
    _error(ask('POST', '/v1/completions', content=body(90), headers=headers), 415)
  assert ask('POST', '/v1/completions', content=body(90), headers={
      'content-type': 'Application/JSON; Charset="UTF-8"'}).status_code == 200


def test_the_page_may_load_nothing_else(ask):
  response = ask('GET', '/')
  policy = response.headers['content-security-policy']
  assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
  assert 'unsafe' not in policy and 'http' not in response.text.replace('http-equiv', '')
  for inline in (' style=', ' onclick=', ' onload=', 'innerHTML'):
    assert inline not in response.text

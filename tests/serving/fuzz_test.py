"""Requests drawn at random: each is answered rightly or refused clearly, and harms no other."""

import asyncio
import json
import math
import sys

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prompt_tuning_jax.serving.app import create_app

CASES = settings(max_examples=400, derandomize=True, database=None, deadline=None,
                 suppress_health_check=list(HealthCheck))
VALID = {
    'completions': {
        'model': st.sampled_from(['sst2', 'mini']),
        'prompt': st.sampled_from(['a b', ['a', 'b'], [1, 2], [[1], [2, 3]], ['a', [4]]]),
        'max_tokens': st.sampled_from([None, 1, 5]),
        'temperature': st.sampled_from([0, .5, 2]),
        'top_k': st.integers(0, 50),
        'top_p': st.floats(0, 1),
        'n': st.integers(1, 4),
        'stop': st.sampled_from([None, 'x', ['x', 'yy']]),
        'seed': st.integers(0, 2**32 - 1),
        'stream': st.booleans(),
        'logprobs': st.none(),
        'echo': st.just(False),
    },
    'classify': {
        'model': st.sampled_from(['sst2', 'mini']),
        'input': st.sampled_from(['a b', ['a', 'b'], [1, 2]]),
        'labels': st.sampled_from([None, ['x'], ['yes', 'no', 'é']]),
        'length_normalized': st.booleans(),
        'calibrated': st.booleans(),
    },
}
# Half pairs of surrogates too, NaN, infinities, and integers beyond every width.
ODD = (None, True, False, -1, 0, 1.5, 1e308, -1e-300, float('nan'), float('inf'), -float('inf'),
       2**31, 2**32, 2**64, 10**500, 10**5000, '', 'None', '\x00', '\ud800', 'a\udfff', 'é\u2028',
       'x' * 5000, [], {}, [[]], [None], [''], [-1], [2**31], {'': []}, ['a'] * 500)
LEAVES = (st.none() | st.booleans() | st.integers() | st.integers(-2**70, 2**70) | st.floats()
          | st.text(st.characters(), max_size=20)
          | st.sampled_from([odd for odd in ODD if odd != 10**5000]))
ANY = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(
    st.text(max_size=8), inner, max_size=4), max_leaves=8)
PIECES = st.sampled_from([b'NaN', b'-Infinity', b'1e999', b'{', b'}', b'[' * 5000, b'"', b'\\ud800',
                          b'\xff', b'\x00', b',', b'null', b'9' * 5000, b'\xe2\x80\xa8', b''])


@st.composite
def requests(draw):
  """A path and a body: a valid request, of which some fields are left out, replaced or added."""
  path = draw(st.sampled_from(sorted(VALID)))
  fields = VALID[path]
  body = {name: draw(fields[name]) for name in fields
          if name in ('model', 'prompt', 'input') or draw(st.booleans())}
  for name in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
    inside = isinstance(body.get(name), list) and draw(st.booleans())
    body[name] = [*body[name], draw(LEAVES)] if inside else draw(ANY)
  if draw(st.integers(0, 9)) == 0:
    body[draw(st.text(max_size=12))] = draw(ANY)
  if draw(st.integers(0, 9)) == 0 and body:
    del body[draw(st.sampled_from(sorted(body)))]
  return path, json.dumps(body).encode('ascii')


@st.composite
def bodies(draw):
  """The same, of which some bytes are lost or replaced."""
  path, body = draw(requests())
  for _ in range(draw(st.integers(1, 3))):
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(body))] * 2)))
    body = body[:start] + draw(PIECES | st.binary(max_size=6)) + body[min(end, start + 8):]
  return path, body


@pytest.fixture(scope='module')
def loop():
  """One event loop for all."""
  with asyncio.Runner() as runner:
    yield runner


@pytest.fixture
def post(loop, engine):
  """post(path, body) -> the response and what the engine was asked."""
  engine.start()
  transport = httpx.ASGITransport(create_app(engine), raise_app_exceptions=False)
  client = httpx.AsyncClient(transport=transport, base_url='http://test')

  def post(path, body, kind='application/json'):
    engine.tickets.clear()
    sent = client.post(f'/v1/{path}', content=body, headers={'content-type': kind})
    return loop.run(sent), [ticket.request for ticket in engine.tickets]

  return post


def _check(path, response, asked):
  assert response.status_code in (200, 400, 404, 413), response.text
  if response.status_code != 200:
    error = response.json()['error']
    assert set(error) == {'message', 'type', 'param', 'code'}
    assert error['message'] and len(error['message'].splitlines()) == 1
    return
  assert asked
  for request in asked:
    assert isinstance(request.inputs, (str, tuple)) and request.inputs
    assert all(type(token) is int and token >= 0 for token in request.inputs
               if not isinstance(request.inputs, str))
  if path == 'classify':
    data = response.json()['data']
    assert [answer['index'] for answer in data] == list(range(len(asked)))
    for answer in data:
      assert math.isclose(sum(answer['probabilities'].values()), 1)
      assert answer['probability'] == max(answer['probabilities'].values())
    return
  for request in asked:
    assert request.max_tokens is None or 0 < request.max_tokens < 2**31
    assert 0 <= request.temperature <= 2 and 0 <= request.top_p <= 1 and 0 <= request.top_k < 2**31
    assert type(request.n) is int and 1 <= request.n <= 16
    assert request.seed is None or 0 <= request.seed < 2**32
    ''.join([request.model, *request.stop, *([request.inputs] if isinstance(request.inputs, str)
                                             else [])]).encode('utf-8')
  _check_choices(response, sum(request.n for request in asked))


def _check_choices(response, count):
  if response.headers['content-type'] == 'application/json':
    choices = response.json()['choices']
  else:
    *events, done, end = response.text.split('\n\n')
    assert done == 'data: [DONE]' and not end
    choices = [choice for event in events
               for choice in json.loads(event.removeprefix('data: '))['choices']
               if choice['finish_reason']]
  assert sorted(choice['index'] for choice in choices) == list(range(count))
  assert all(choice['finish_reason'] in ('stop', 'length') for choice in choices)


def _run(post, cases, strategy):
  statuses = []

  @settings(cases)
  @given(strategy)
  def run(case):
    path, body = case
    response, asked = post(path, body)
    statuses.append(response.status_code)
    _check(path, response, asked)

  run()
  response, _ = post('completions', b'{"model": "sst2", "prompt": "a b"}')
  assert response.json()['choices'][0]['text'] == 'a b '
  return statuses


def _dumps(value):
  """JSON with integers of any number of digits."""
  limit = sys.get_int_max_str_digits()
  sys.set_int_max_str_digits(0)
  try:
    return json.dumps(value).encode('ascii')
  finally:
    sys.set_int_max_str_digits(limit)


def test_every_field_with_every_odd_value(post):
  plain = {'completions': {'model': 'sst2', 'prompt': 'a b'},
           'classify': {'model': 'sst2', 'input': 'a b'}}
  for path, fields in VALID.items():
    for name in [*fields, 'top', 'stream_options']:
      for odd in ODD:
        for value in (odd, [odd], ['a', odd], [1, odd], [[1, odd]]):
          _check(path, *post(path, _dumps({**plain[path], name: value})))


@pytest.mark.slow
def test_fields_at_random(post):
  statuses = _run(post, CASES, requests())
  assert len(statuses) >= 400 and statuses.count(200) >= 40 and statuses.count(400) >= 100


@pytest.mark.slow
def test_bytes_at_random(post):
  statuses = _run(post, CASES, bodies())
  assert len(statuses) >= 400 and statuses.count(400) >= 200


@pytest.mark.slow
def test_noise(post):
  noise = st.tuples(st.sampled_from(sorted(VALID)), st.binary(max_size=200)
                    | ANY.map(lambda value: json.dumps(value).encode('ascii')))
  statuses = _run(post, settings(CASES, max_examples=300), noise)
  assert len(statuses) >= 300 and set(statuses) == {400}


@pytest.mark.slow
def test_many_at_random(post):
  _run(post, settings(CASES, max_examples=4_000), requests() | bodies())

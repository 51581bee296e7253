"""JSON in: what is refused, by which name, and what the message says."""

import json
import sys
import time

import pytest

from prompt_tuning_jax.serving import wire
from prompt_tuning_jax.serving.engine import EngineSettings
from prompt_tuning_jax.serving.programs import most_labels
from prompt_tuning_jax.serving.requests import BadRequest

COMPLETION = {'model': 'm', 'prompt': 'a'}
CLASSIFICATION = {'model': 'm', 'input': 'a'}


def _refused(read, body, param, words):
  with pytest.raises(BadRequest) as caught:
    read(body if isinstance(body, bytes) else json.dumps(body).encode())
  assert caught.value.param == param
  assert words in caught.value.message and '\n' not in caught.value.message
  assert len(caught.value.message) < 400


@pytest.mark.parametrize('field, value, words', [
    ('model', None, '"model" must be a string'), ('model', '', 'got ""'),
    ('model', 'x' * 257, '256'),
    ('prompt', None, 'got null'), ('prompt', '', 'not empty'), ('prompt', [], 'list of 0'),
    ('prompt', ['a', ''], '"prompt[1]"'), ('prompt', ['a', 1], '"prompt[1]"'),
    ('prompt', [1, 'a'], '"prompt[1]"'), ('prompt', [[1], []], '"prompt[1]"'),
    ('prompt', [[1, True]], '"prompt[0][1]"'), ('prompt', [1, -1], 'from 0'),
    ('prompt', [1.0], '"prompt[0]"'), ('prompt', [2**31], '2147483647'),
    ('prompt', {'a': 1}, 'object'),
    ('prompt', ['a'] * 129, '128'),
    ('max_tokens', 0, 'from 1'), ('max_tokens', True, 'integer'), ('max_tokens', 1.0, 'got 1.0'),
    ('max_tokens', '5', 'got "5"'), ('max_tokens', 10**400, '…'),
    ('temperature', -.1, 'from 0 to 2'), ('temperature', 2.1, 'from 0 to 2'),
    ('temperature', False, 'got false'), ('temperature', 10**400, 'from 0 to 2'),
    ('top_k', -1, 'from 0'), ('top_p', 1.5, 'from 0 to 1'), ('n', 17, 'from 1 to 16'),
    ('n', 0, 'from 1'),
    ('seed', -1, 'from 0'), ('seed', 2**32, '4294967295'), ('stop', 'é' * 33, '64 bytes'),
    ('stop', '', '"stop[0]"'), ('stop', ['a'] * 5, 'at most 4'), ('stop', 3, 'got 3'),
    ('stream', 'yes', 'true or false'), ('stream', 1, 'true or false'),
    ('stream_options', {'include_usage': True}, '"stream": true'), ('user', 3, '"user"'),
    ('logprobs', 0, 'not supported'), ('echo', True, 'send false'), ('best_of', 2, 'send 1'),
    ('suffix', 'x', 'not supported'), ('logit_bias', {'1': 1}, 'send {}'),
    ('presence_penalty', .5, 'not supported'), ('frequency_penalty', -1, 'not supported'),
    ('max_token', 5, 'did you mean "max_tokens"?'), ('messages', [], 'no field "messages"'),
    ('x' * 1000, 1, 'no field')])
def test_a_bad_field_is_named(field, value, words):
  _refused(wire.completion, {**COMPLETION, field: value}, field[:256], words)


@pytest.mark.parametrize('field, value, words', [
    ('input', None, '"input"'), ('input', '', 'not empty'), ('labels', [], 'list of 0'),
    ('labels', 'ab', 'got "ab"'), ('labels', ['a', 'a'], '"a" is there twice'),
    ('labels', ['a', 1], '"labels[1]"'), ('labels', ['x' * 1025], '1024'),
    ('calibrated', 0, 'got 0'),
    ('length_normalized', 'no', 'true or false'), ('prompt', 'a', 'there are model, input,')])
def test_a_bad_field_of_a_classification_is_named(field, value, words):
  _refused(wire.classification, {**CLASSIFICATION, field: value}, field, words)


@pytest.mark.parametrize('body, words', [
    (b'', 'must be JSON'), (b'{', 'line 1'), (b'[]', 'JSON object'), (b'"a"', 'JSON object'),
    (b'{"model": NaN}', 'NaN'), (b'{"n": -Infinity}', '-Infinity'), (b'{"n": 1e999}', '1e999'),
    (b'\xff', 'UTF-8: byte 0'), ('{"a": 1}'.encode('utf-16'), 'UTF-8'),
    (b'{"model": "\x00"}', 'JSON'),
    (b'\xef\xbb\xbf{}', 'JSON'), (b'[' * 500_000, 'deep'), (b'{"a":' * 150_000, 'deep'),
    (b'{"n": ' + b'1' * 100_000 + b'}', 'digits'), (rb'{"model": "\ud800"}', 'surrogate'),
    (rb'{"model": "\uDC00\ud800"}', 'surrogate')])
def test_what_is_no_json(body, words):
  _refused(wire.completion, body, None, words)


@pytest.mark.parametrize('depth', range(100, 1100, 100))
def test_lists_in_lists_are_refused_however_deep(depth):
  prompt = b'[' * depth + b']' * depth
  for text in (b'"a"', b'"\\ud83d\\ude00"'):
    with pytest.raises(BadRequest):
      wire.completion(b'{"model": ' + text + b', "prompt": ' + prompt + b'}')


def test_a_field_is_there_once():
  _refused(wire.completion, b'{"model": "a", "model": "b"}', 'model', 'twice')
  body = '{' + ''.join(f'"{i}": 0, ' for i in range(50_000)) + '"49999": 0}'
  started = time.monotonic()
  _refused(wire.completion, body.encode(), '49999', 'twice')
  assert time.monotonic() - started < 1


def test_as_many_labels_as_the_engine_takes():
  assert most_labels(EngineSettings().label_widths[-1]) == wire.MAX_LABELS
  body = lambda count: {**CLASSIFICATION, 'labels': [str(i) for i in range(count)]}
  assert wire.classification(json.dumps(body(wire.MAX_LABELS)).encode())
  _refused(wire.classification, body(wire.MAX_LABELS + 1), 'labels', f'1 to {wire.MAX_LABELS}')


def test_null_and_neutral_are_as_left_out():
  plain = wire.completion(json.dumps(COMPLETION).encode())
  nothing = dict.fromkeys(set(wire._COMPLETION) - set(COMPLETION))
  assert wire.completion(json.dumps({**nothing, **COMPLETION}).encode()) == plain
  neutral = {name: value for name, values in wire._NEUTRAL.items() for value in values}
  assert wire.completion(json.dumps({**neutral, **COMPLETION}).encode()) == plain


def test_a_pair_of_surrogates_is_a_character():
  body = rb'{"model": "m", "prompt": "\ud83d\ude00"}'
  assert wire.completion(body).requests[0].inputs == '\U0001f600'


def test_texts_and_ids():
  texts = lambda prompt: [request.inputs for request in wire.completion(
      json.dumps({**COMPLETION, 'prompt': prompt}).encode(), 5.0).requests]
  assert texts('a') == ['a'] and texts(['a', 'b']) == ['a', 'b']
  assert texts([1, 2]) == [(1, 2)] and texts([[1, 2], [3]]) == [(1, 2), (3,)]
  assert texts(['a', [3]]) == ['a', (3,)]


def test_the_limit_of_recursion_is_left_alone():
  before = sys.getrecursionlimit()
  with pytest.raises(BadRequest):
    wire.completion(b'[' * 100_000)
  assert sys.getrecursionlimit() == before

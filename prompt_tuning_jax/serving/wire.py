"""JSON in: bytes -> requests; what is wrong is told by the name of its field, once, here.

OpenAI's completions (https://platform.openai.com/docs/api-reference/completions), less what a
prompt has no use for. A field that is not known is refused: a misspelt one would be an answer to
another question.
"""

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from prompt_tuning_jax.serving.requests import (
  MAX_STOP_BYTES,
  MAX_STOPS,
  BadRequest,
  Classification,
  Generation,
)

MAX_TEXTS = 128  # of a request
MAX_CHOICES = 16  # of a text
MAX_LABELS, MAX_LABEL_BYTES = 128, 1024  # as many as the engine's widest row has room for
MAX_NAME = 256
_INT32 = 2**31 - 1

# Fields of OpenAI's that we do not have -> the values that ask for nothing.
_NEUTRAL = {
    'best_of': (1,),
    'echo': (False,),
    'frequency_penalty': (0, 0.0),
    'logit_bias': ({},),
    'logprobs': (False,),
    'presence_penalty': (0, 0.0),
    'suffix': ('',),
}
_COMPLETION = ('model', 'prompt', 'max_tokens', 'temperature', 'top_k', 'top_p', 'n', 'stop',
               'seed', 'stream', 'stream_options', 'user', *_NEUTRAL)
_CLASSIFICATION = ('model', 'input', 'labels', 'length_normalized', 'calibrated', 'user')


@dataclass(frozen=True)
class Completion:
  """A request for completions: its texts, all of one model, and how the answer is sent."""

  requests: tuple[Generation, ...]
  stream: bool
  include_usage: bool  # in a stream's last event


def completion(body: bytes, deadline: float | None = None) -> Completion:
  """The body of POST /v1/completions.

  Raises:
    BadRequest: it is no such request.
  """
  fields = _object(body, _COMPLETION)
  for name, neutral in _NEUTRAL.items():
    value = fields.get(name)
    if value is not None and not any(_same(value, one) for one in neutral):
      raise BadRequest(f'"{name}" is not supported: leave it out, or send {_shown(neutral[0])}, '
                       f'got {_shown(value)}.', param=name)
  _string(fields, 'user', None)
  stream = _boolean(fields, 'stream')
  asked = dict(
      model=_string(fields, 'model'),
      max_tokens=_integer(fields, 'max_tokens', 1, _INT32, None),
      temperature=_number(fields, 'temperature', 0.0, 2.0, 0.0),
      top_k=_integer(fields, 'top_k', 0, _INT32, 0),
      top_p=_number(fields, 'top_p', 0.0, 1.0, 1.0),
      n=_integer(fields, 'n', 1, MAX_CHOICES, 1),
      stop=_stops(fields),
      seed=_integer(fields, 'seed', 0, 2**32 - 1, None),
      deadline=deadline,
  )
  texts = enumerate(_texts(fields, 'prompt'), 1)
  return Completion(tuple(Generation(inputs=text, place=place, **asked) for place, text in texts),
                    stream, _include_usage(fields, stream))


def classification(body: bytes, deadline: float | None = None) -> tuple[Classification, ...]:
  """The body of POST /v1/classify.

  Raises:
    BadRequest: it is no such request.
  """
  fields = _object(body, _CLASSIFICATION)
  _string(fields, 'user', None)
  asked = dict(
      model=_string(fields, 'model'),
      labels=_labels(fields),
      length_normalized=_boolean(fields, 'length_normalized'),
      calibrated=_boolean(fields, 'calibrated'),
      deadline=deadline,
  )
  return tuple(Classification(inputs=text, **asked) for text in _texts(fields, 'input'))


def _object(body: bytes, known: Sequence[str]) -> dict[str, Any]:
  """The JSON object that a body is, of known fields, whose numbers are finite and texts Unicode."""
  try:
    value = json.loads(body.decode('utf-8'), parse_constant=_no_number, parse_float=_finite,
                       object_pairs_hook=_once)
    if re.search(rb'\\u[dD][89a-fA-F]', body):  # half a pair names no character
      json.dumps(value, ensure_ascii=False).encode('utf-8')
  except UnicodeDecodeError as error:
    raise BadRequest(f'The body must be UTF-8: byte {error.start} is not.') from None
  except UnicodeEncodeError:
    raise BadRequest('The body has half of a surrogate pair (\\ud800 to \\udfff), which is no '
                     'character.') from None
  except RecursionError:
    raise BadRequest('The body is nested too deeply.') from None
  except json.JSONDecodeError as error:
    raise BadRequest(f'The body must be JSON: {error.msg} at line {error.lineno}, column '
                     f'{error.colno}.') from None
  except ValueError:  # Python reads no integer of so many digits
    raise BadRequest('The body has a number of too many digits.') from None
  if not isinstance(value, dict):
    raise BadRequest(f'The body must be a JSON object, got {_shown(value)}.')
  for name in value.keys() - set(known):
    near = difflib.get_close_matches(name[:MAX_NAME], known, 1)
    hint = f'did you mean "{near[0]}"?' if near else f'there are {", ".join(known)}.'
    raise BadRequest(f'There is no field {_shown(name)}: {hint}', param=name[:MAX_NAME])
  return value


def _no_number(text: str) -> NoReturn:
  raise BadRequest(f'The body must be JSON, which has no {text}.')


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise BadRequest(f'The body has the number {text[:40]}, which is too large.')
  return value


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  value = dict(pairs)
  if len(value) < len(pairs):
    seen = set()  # counting each would take a time quadratic in what a client may send
    twice = next(name for name, _ in pairs if name in seen or seen.add(name))
    raise BadRequest(f'The field {_shown(twice)} is there twice.', param=twice[:MAX_NAME])
  return value


def _shown(value: Any) -> str:
  """What came, on one line and short, whatever it is."""
  if isinstance(value, list):
    return f'a list of {len(value)}'
  if isinstance(value, dict):
    return 'an object' if value else '{}'
  value = value[:40] if isinstance(value, str) else value
  text = json.dumps(value, ensure_ascii=False)
  if not text.isprintable():  # U+2028, for one, would begin another line
    text = json.dumps(value)
  return text if len(text) <= 60 else text[:60] + '…'


def _same(value: Any, other: Any) -> bool:
  return type(value) is type(other) and value == other


def _refuse(name: str, expected: str, value: Any) -> NoReturn:
  raise BadRequest(f'"{name}" must be {expected}, got {_shown(value)}.',
                   param=name.partition('[')[0])


_REQUIRED = object()


def _string(fields: Mapping[str, Any], name: str, default: Any = _REQUIRED) -> str | None:
  value = fields.get(name)
  if value is None and default is not _REQUIRED:
    return default
  if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
    _refuse(name, f'a string of 1 to {MAX_NAME} characters', value)
  return value


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
  value = fields.get(name)
  if value is not None and not isinstance(value, bool):
    _refuse(name, 'true or false', value)
  return bool(value)


def _integer(fields: Mapping[str, Any], name: str, low: int, high: int,
             default: int | None) -> int | None:
  value = fields.get(name)
  if value is None:
    return default
  if type(value) is not int or not low <= value <= high:  # a bool is an int
    _refuse(name, f'an integer from {low} to {high}', value)
  return value


def _number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
  value = fields.get(name)
  if value is None:
    return default
  if type(value) not in (int, float) or not low <= value <= high:
    _refuse(name, f'a number from {low:g} to {high:g}', value)
  return float(value)


def _texts(fields: Mapping[str, Any], name: str) -> list[str | tuple[int, ...]]:
  """A text or a list of texts; a text is a string or a list of ids."""
  value = fields.get(name)
  if isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int):
    return [_text(name, value)]
  if not isinstance(value, list) or not 0 < len(value) <= MAX_TEXTS:
    _refuse(name, f'a string, a list of token ids, or a list of 1 to {MAX_TEXTS} of either', value)
  return [_text(f'{name}[{i}]', text) for i, text in enumerate(value)]


def _text(place: str, value: Any) -> str | tuple[int, ...]:
  if isinstance(value, str) and value:
    return value
  if not isinstance(value, list) or not value:
    _refuse(place, 'a text that is not empty, or its token ids', value)
  for i, token in enumerate(value):
    if type(token) is not int or not 0 <= token <= _INT32:
      _refuse(f'{place}[{i}]', f'a token id from 0 to {_INT32}', token)
  return tuple(value)


def _stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
  value = fields.get('stop')
  stops = [] if value is None else [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > MAX_STOPS:
    _refuse('stop', f'a string or a list of at most {MAX_STOPS} strings', value)
  return _strings('stop', stops, MAX_STOP_BYTES)


def _labels(fields: Mapping[str, Any]) -> tuple[str, ...]:
  value = fields.get('labels')
  if value is None:
    return ()
  if not isinstance(value, list) or not 0 < len(value) <= MAX_LABELS:
    _refuse('labels', f'a list of 1 to {MAX_LABELS} strings', value)
  labels = _strings('labels', value, MAX_LABEL_BYTES)
  if len(set(labels)) < len(labels):
    twice = next(label for label in labels if labels.count(label) > 1)
    raise BadRequest(f'"labels" must all differ: {_shown(twice)} is there twice.', param='labels')
  return labels


def _strings(name: str, values: list[Any], most: int) -> tuple[str, ...]:
  for i, value in enumerate(values):
    if not isinstance(value, str) or not 0 < len(value.encode('utf-8')) <= most:
      _refuse(f'{name}[{i}]', f'a string of 1 to {most} bytes in UTF-8', value)
  return tuple(values)


def _include_usage(fields: Mapping[str, Any], stream: bool) -> bool:
  options = fields.get('stream_options')
  if options is None:
    return False
  if not stream:
    raise BadRequest('"stream_options" is only for "stream": true.', param='stream_options')
  if not isinstance(options, dict) or options.keys() - {'include_usage'}:
    _refuse('stream_options', '{"include_usage": true or false}', options)
  return _boolean(options, 'include_usage')

"""JSON out: events -> OpenAI's answers, whole or as a stream, and its form of an error."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prompt_tuning_jax.serving.requests import Finished, Labels, Model, Refused, Text

DONE = b'data: [DONE]\n\n'
# Status -> (type, code).
_ERRORS = {
    401: ('invalid_request_error', 'invalid_api_key'),
    404: ('invalid_request_error', 'not_found'),
    405: ('invalid_request_error', 'method_not_allowed'),
    408: ('invalid_request_error', 'request_timeout'),
    413: ('invalid_request_error', 'request_too_large'),
    415: ('invalid_request_error', 'unsupported_media_type'),
    429: ('rate_limit_error', 'rate_limit_exceeded'),
    503: ('server_error', 'unavailable'),
    504: ('server_error', 'deadline_exceeded'),
}


def encode(value: Any) -> bytes:
  """ASCII, so that no client finds a line break in it that is none (U+2028)."""
  return json.dumps(value, allow_nan=False, separators=(',', ':')).encode('ascii')


def event(value: Any) -> bytes:
  """One event of a stream (server-sent events)."""
  return b'data: ' + encode(value) + b'\n\n'


def error(status: int, message: str, param: str | None = None,
          code: str | None = None) -> dict[str, Any]:
  """What is said to the one whose request is not answered."""
  kind, of_status = _ERRORS.get(
      status, ('server_error' if status >= 500 else 'invalid_request_error', None))
  return {'error': {'message': message, 'type': kind, 'param': param, 'code': code or of_status}}


def refusal(why: Refused) -> dict[str, Any]:
  """The same, of what was raised."""
  return error(why.status, why.message, why.param, why.code)


def model(one: Model) -> dict[str, Any]:
  """An entry of GET /v1/models."""
  return {'id': one.name, 'object': 'model', 'created': one.created,
          'owned_by': 'prompt_tuning_jax', 'task': one.task,
          'labels': None if one.labels is None else list(one.labels)}


def usage(prompt_tokens: int, completion_tokens: int | None = None) -> dict[str, int]:
  """Tokens read, tokens written and their sum."""
  written = {} if completion_tokens is None else {'completion_tokens': completion_tokens}
  return {'prompt_tokens': prompt_tokens, **written,
          'total_tokens': prompt_tokens + (completion_tokens or 0)}


@dataclass(frozen=True)
class Completion:
  """The answer to POST /v1/completions; choice j of text i of a request has index i * n + j."""

  id: str
  created: int
  model: str
  n: int

  def _answer(self, choices: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    return {'id': self.id, 'object': 'text_completion', 'created': self.created,
            'model': self.model, 'choices': choices, **more}

  def _choice(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
    return {'text': text, 'index': index, 'logprobs': None, 'finish_reason': reason}

  def chunk(self, place: int, new: Text | Finished, with_usage: bool) -> dict[str, Any]:
    """One event of text `place`, for a stream."""
    text, reason = (new.text, None) if isinstance(new, Text) else ('', new.reason)
    choice = self._choice(place * self.n + new.index, text, reason)
    return self._answer([choice], **({'usage': None} if with_usage else {}))

  def last_chunk(self, used: Mapping[str, int]) -> dict[str, Any]:
    """What a stream that was asked for its usage ends with."""
    return self._answer([], usage=used)

  def whole(self, events: Iterable[tuple[int, Text | Finished]], texts: int,
            used: Mapping[str, int]) -> dict[str, Any]:
    """All events of all texts, at once."""
    pieces = [[] for _ in range(texts * self.n)]
    reasons = [None] * len(pieces)
    for place, new in events:
      index = place * self.n + new.index
      if isinstance(new, Text):
        pieces[index].append(new.text)
      else:
        reasons[index] = new.reason
    choices = [self._choice(index, ''.join(parts), reason)
               for index, (parts, reason) in enumerate(zip(pieces, reasons, strict=True))]
    return self._answer(choices, usage=used)


def classification(model: str, answers: Sequence[Labels], used: Mapping[str, int]):
  """The answer to POST /v1/classify."""
  data = []
  for index, answer in enumerate(answers):
    probabilities = dict(zip(answer.labels, answer.probabilities, strict=True))
    label = max(probabilities, key=probabilities.get)  # of equals, the first
    data.append({'index': index, 'label': label, 'probability': probabilities[label],
                 'probabilities': probabilities,
                 'log_likelihoods': dict(zip(answer.labels, answer.log_likelihoods, strict=True))})
  return {'object': 'list', 'model': model, 'data': data, 'usage': used}

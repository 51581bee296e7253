"""Around every request: an id, a line in the log, what is counted, the key, and no traceback."""

import asyncio
import hashlib
import hmac
import logging
import math
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from prompt_tuning_jax.serving import answers
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.requests import Refused
from prompt_tuning_jax.serving.waiting import Gone

LOG = logging.getLogger('prompt_tuning_jax.serving')
OPEN_PATHS = ('/', '/healthz')  # to all, whatever the keys
GONE = 499  # in the log and the metrics; there is no one to send it to
_HEADERS = ((b'x-content-type-options', b'nosniff'), (b'cache-control', b'no-store'))


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  """Any JSON value."""
  return Response(answers.encode(value), status, headers, 'application/json')


def refusal(_: Request | None, error: Exception) -> Response:
  """The answer to a request that raised a `requests.Refused` or Starlette's HTTPException."""
  if not isinstance(error, Refused):
    value = answers.error(error.status_code, error.detail)
    return json_response(value, error.status_code, dict(error.headers or {}))
  seconds = error.retry_after
  if seconds is None and error.status in (429, 503):
    seconds = 1
  headers = {} if seconds is None else {'Retry-After': str(max(1, math.ceil(seconds)))}
  return json_response(answers.refusal(error), error.status, headers)


def failure(request_id: str) -> dict[str, Any]:
  """What is told of an error of ours, of which the log has the rest."""
  return answers.error(500, 'The server failed to answer; its log says why, under the request '
                            f'id {request_id}.')


def observed(app: Any, metrics: Metrics) -> Any:
  """App of whose requests each has an id (the header X-Request-Id), is logged and counted."""
  async def run(scope, receive, send):
    if scope['type'] != 'http':
      await app(scope, receive, send)
      return
    request_id = uuid.uuid4().hex
    scope.setdefault('state', {})['request_id'] = request_id
    status, started = None, time.monotonic()

    async def named_send(message):
      nonlocal status
      if message['type'] == 'http.response.start':
        status = message['status']
        own = [(b'x-request-id', request_id.encode('ascii')), *_HEADERS]
        message = {**message, 'headers': [*message.get('headers', ()), *own]}
      await send(message)

    with metrics.in_flight.track_inprogress():
      try:
        await app(scope, receive, named_send)
      except (Gone, asyncio.CancelledError):  # the latter of one that outlasts a shutdown
        status = GONE
      except Exception:  # noqa: BLE001 one request fails, the server does not
        LOG.exception('%s failed', request_id)
        if status is None:
          await json_response(failure(request_id), 500)(scope, receive, named_send)
        else:
          status = 500
      finally:
        seconds = time.monotonic() - started
        route = getattr(scope.get('route'), 'path', 'none')  # not the path: there are many of them
        metrics.observe(route, status or GONE, seconds)
        LOG.info('%s %s %r %s %.1f ms', request_id, scope['method'], scope['path'][:200],
                 status or GONE, 1000 * seconds)

  return run


def at_hosts(app: Any, hosts: Sequence[str]) -> Any:
  """App that is asked for by one of the names `hosts` (the header Host, at any port), if any.

  A web page may have its own name lead to the machine of its visitor (DNS rebinding), and would
  be of one origin with a server there; the name is all that tells.
  """
  async def run(scope, receive, send):
    if hosts and scope['type'] == 'http':
      given = dict(scope['headers']).get(b'host', b'').decode('latin-1').lower()
      if re.sub(r':\d*$', '', given) not in hosts:
        value = answers.error(400, f'The header Host must be one of {", ".join(hosts)}, with any '
                                   f'port, got {given[:100]!r}.')
        await json_response(value, 400)(scope, receive, send)
        return
    await app(scope, receive, send)

  return run


def authorized(app: Any, keys: Sequence[str]) -> Any:
  """App that asks for one of `keys` (`Authorization: Bearer KEY`), if there are any."""
  digest = lambda key: hashlib.sha256(key).digest()
  digests = [digest(key.encode('utf-8')) for key in keys]

  async def run(scope, receive, send):
    if digests and scope['type'] == 'http' and scope['path'] not in OPEN_PATHS:
      scheme, _, key = dict(scope['headers']).get(b'authorization', b'').partition(b' ')
      given = digest(key.strip())
      # Every key is compared, in a time that tells nothing of how much of it is right.
      known = sum([hmac.compare_digest(given, one) for one in digests])
      if not known or scheme.lower() != b'bearer':
        what = 'is wrong' if key else 'is missing'
        value = answers.error(401, f'The API key {what}: send the header "Authorization: Bearer '
                                   'KEY".')
        await json_response(value, 401, {'WWW-Authenticate': 'Bearer'})(scope, receive, send)
        return
    await app(scope, receive, send)

  return run

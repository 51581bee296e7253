"""Bodies of requests: read up to a size and for a time, and what becomes of an unread one."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

from prompt_tuning_jax.serving.waiting import Gone, Receive

_LINGER_SECONDS = 1.0
_LINGER_BYTES = 1 << 24


async def read_json(headers: Mapping[str, str], receive: Receive, max_bytes: int,
                    seconds: float) -> bytes:
  """The body of a request that says it is JSON.

  A web page can send other types to a server on its visitor's machine without asking it first;
  JSON it cannot.

  Raises:
    HTTPException: it is of another type (415), too large (413) or did not come in time (408).
    Gone: the client has.
  """
  kind, _, parameters = headers.get('content-type', '').lower().partition(';')
  charset = parameters.replace(' ', '').replace('"', '')
  if kind.strip() != 'application/json' or charset not in ('', 'charset=utf-8', 'charset=utf8'):
    raise HTTPException(415, 'The header Content-Type must be application/json, in UTF-8.')
  too_large = HTTPException(413, f'The body must have at most {max_bytes} bytes: send fewer or '
                                 'shorter texts, or the texts in several requests.')
  length = headers.get('content-length', '')
  # What is said is only a reason to read nothing: it may be a lie.
  if length.isdecimal() and (len(length) > 18 or int(length) > max_bytes):
    raise too_large
  body = bytearray()
  try:
    async with asyncio.timeout(seconds):
      while True:
        message = await receive()
        if message['type'] == 'http.disconnect':
          raise Gone
        body += message.get('body', b'')
        if len(body) > max_bytes:
          raise too_large
        if not message.get('more_body', False):
          return bytes(body)
  except TimeoutError:
    raise HTTPException(408, f'The body did not come within {seconds:g} seconds.') from None


def lingering(app: Any) -> Any:
  """App whose answer reaches the client also where the client's body has not been read.

  The connection cannot serve another request then. Closed at once, it would be reset, and the
  client would lose the answer: so the whole answer is sent, and what still comes is thrown away
  for a moment before the answer is ended.
  """
  async def run(scope, receive, send):
    if scope['type'] != 'http':
      await app(scope, receive, send)
      return
    names = {name for name, _ in scope['headers']}
    unread = bool(names & {b'content-length', b'transfer-encoding'})

    async def watched_receive():
      nonlocal unread
      message = await receive()
      unread = unread and message.get('more_body', False)
      return message

    async def watched_send(message):
      if not unread:
        await send(message)
      elif message['type'] == 'http.response.start':
        headers = [*message.get('headers', ()), (b'connection', b'close')]
        await send({**message, 'headers': headers})
      elif message.get('more_body', False):
        await send(message)
      else:
        await send({**message, 'more_body': True})
        await _throw_away(watched_receive, lambda: unread)
        await send({'type': 'http.response.body', 'body': b''})

    await app(scope, watched_receive, watched_send)

  return run


async def _throw_away(receive: Receive, unread) -> None:
  size, end = 0, time.monotonic() + _LINGER_SECONDS
  while unread() and size < _LINGER_BYTES and time.monotonic() < end:
    try:
      message = await asyncio.wait_for(receive(), end - time.monotonic())
    except TimeoutError:
      return
    if message['type'] == 'http.disconnect':
      return
    size += len(message.get('body', b''))

"""The listening socket: uvicorn, with a time limit for a request's headers."""

import asyncio
import math
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from prompt_tuning_jax.serving.app import Settings

_TOO_SLOW = (b'HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n'
             b'content-type: application/json\r\ncontent-length: %d\r\n\r\n%b')
_BODY = (b'{"error":{"message":"The headers did not come in time.","type":"invalid_request_error",'
         b'"param":null,"code":"request_timeout"}}')


def server(app: Any, settings: Settings, host: str = '127.0.0.1',
           port: int = 8000) -> uvicorn.Server:
  """A server of `app` whose `run()` returns after SIGINT or SIGTERM.

  It then takes no new connections, and finishes what it has accepted before it stops the engine;
  the deadline of every request bounds how long that takes.
  """
  def protocol(**given: Any) -> H11Protocol:
    connection = H11Protocol(**given)
    _watch(connection, settings.body_seconds)
    return connection

  return uvicorn.Server(uvicorn.Config(
      app, host, port, http=protocol, ws='none', loop='asyncio', lifespan='on', log_level='warning',
      access_log=False, server_header=False, limit_concurrency=settings.max_connections,
      timeout_graceful_shutdown=math.ceil(settings.body_seconds + settings.request_seconds)))


def _watch(connection: H11Protocol, seconds: float) -> None:
  """Cuts a connection that sends no whole headers, or does not take what closes it, for
  `seconds` to twice that; uvicorn itself waits without end."""
  loop = asyncio.get_running_loop()

  def check(before: Any) -> None:
    transport, cycle = connection.transport, connection.cycle
    if transport is None or connection not in connection.connections:
      return
    waits = cycle is None or cycle.response_complete
    if transport.is_closing():
      if before == 'closing':
        transport.abort()
        return
      before = 'closing'
    elif waits and before is (cycle or connection):
      transport.write(_TOO_SLOW % (len(_BODY), _BODY))
      transport.close()
      before = 'closing'
    else:
      before = (cycle or connection) if waits else None
    loop.call_later(seconds, check, before)

  loop.call_later(seconds, check, connection)

"""The listening socket: uvicorn, with time limits for headers to come and answers to be taken."""

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
  what is not finished after `settings.shutdown_seconds` is cancelled.
  """
  def protocol(**given: Any) -> H11Protocol:
    connection = H11Protocol(**given)
    _watch(connection, settings.body_seconds)
    _cut_unread(connection, settings.send_seconds)
    return connection

  return uvicorn.Server(uvicorn.Config(
      app, host, port, http=protocol, ws='none', loop='asyncio', lifespan='on', log_level='warning',
      access_log=False, server_header=False, limit_concurrency=settings.max_connections,
      timeout_graceful_shutdown=math.ceil(settings.shutdown_seconds)))


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


def _cut_unread(connection: H11Protocol, seconds: float) -> None:
  """Cuts a connection whose client leaves what has been written to it unread for `seconds`.

  It is done here, for every answer, and not around the app's `send`: an app that gives up leaves
  uvicorn to send an error of its own, for which it waits without end.
  """
  loop = asyncio.get_running_loop()
  pause, resume, timer = connection.pause_writing, connection.resume_writing, None

  def pause_writing() -> None:
    nonlocal timer
    timer = loop.call_later(seconds, connection.transport.abort)
    pause()

  def resume_writing() -> None:
    timer.cancel()
    resume()

  connection.pause_writing, connection.resume_writing = pause_writing, resume_writing

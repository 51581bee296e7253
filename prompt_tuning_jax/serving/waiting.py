"""Waiting for the engine: until it has answered, the client has gone or the deadline has passed."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

from prompt_tuning_jax.serving.requests import Late

Receive = Callable[[], Awaitable[dict[str, Any]]]


class Gone(Exception):
  """The client has closed its connection: there is no one to answer."""


def submit_all(engine: Any, requests: Sequence[Any]) -> list[Any]:
  """A ticket for every request, or none.

  Raises:
    Refused: one of them is refused, and the others are cancelled; or all together are more than may
      ever wait.
  """
  engine.check_size(sum(request.rows for request in requests))
  tickets = []
  try:
    for request in requests:
      tickets.append(engine.submit(request))
  except BaseException:
    for ticket in tickets:
      ticket.cancel()
    raise
  return tickets


async def events(tickets: Sequence[Any]) -> AsyncIterator[tuple[int, Any]]:
  """(place of the ticket, event), as they come; raises what the first ticket to fail raises.

  Close it when done (`contextlib.aclosing`). What comes is queued without a bound of its own, so
  that a client that reads slowly never holds the engine; there are at most as many events as
  tokens were asked for.
  """
  queue = asyncio.Queue()

  async def listen(place: int, ticket: Any) -> None:
    try:
      async for event in ticket:
        queue.put_nowait((place, event, None))
      queue.put_nowait((place, None, None))
    except Exception as error:  # noqa: BLE001 it is raised where the events are read
      queue.put_nowait((place, None, error))

  unfinished = len(tickets)
  listeners = [asyncio.create_task(listen(place, ticket)) for place, ticket in enumerate(tickets)]
  try:
    while unfinished:
      place, event, error = await queue.get()
      if event is not None:
        yield place, event
        continue
      if error is not None:
        raise error
      unfinished -= 1
  finally:
    for listener in listeners:
      listener.cancel()


async def collected(tickets: Sequence[Any]) -> list[tuple[int, Any]]:
  """All the events of all tickets."""
  async with contextlib.aclosing(events(tickets)) as coming:
    return [pair async for pair in coming]


async def disconnected(receive: Receive) -> None:
  """Returns when the client has gone; its body must have been read."""
  while (await receive())['type'] != 'http.disconnect':
    pass


async def answered(work: Coroutine[Any, Any, Any], tickets: Sequence[Any], receive: Receive,
                   deadline: float) -> Any:
  """The result of `work`, which reads the events of `tickets`.

  Without a result, be it that work fails or that there is no one, or no time, to wait for it, all
  tickets are cancelled.

  Raises:
    Exception: what work raises.
    Gone: the client has.
    Late: the deadline (of time.monotonic()) has passed.
  """
  started = time.monotonic()
  task = asyncio.create_task(work)
  watcher = asyncio.create_task(disconnected(receive))
  try:
    await asyncio.wait((task, watcher), timeout=max(0.0, deadline - started),
                       return_when=asyncio.FIRST_COMPLETED)
    if task.done():
      return task.result()
    if watcher.done():
      raise Gone
    raise Late(f'Not answered within {round(deadline - started, 2):g} seconds: ask for fewer '
               'tokens or texts, or try again when there are fewer others.')
  finally:
    task.cancel()
    watcher.cancel()
    if task.cancelled() or not task.done() or task.exception():
      for ticket in tickets:
        ticket.cancel()
    await asyncio.gather(task, watcher, return_exceptions=True)

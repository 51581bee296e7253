"""What the one who submitted a request holds: its events come here from the engine's thread."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from prompt_tuning_jax.serving.requests import Classification, Generation, Refused

_END = object()


class Ticket:
  """An async iterator of the events of one request; raises what it is refused with later.

  `closed` says that no more events are wanted: it is answered, refused or cancelled.
  """

  def __init__(self, request: Generation | Classification, prompt_tokens: int, rows: int,
               cancelled: Callable[[], None]):
    self.request, self.prompt_tokens, self.closed = request, prompt_tokens, False
    self._rows, self._results, self._cancelled = rows, {}, cancelled
    self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

  def cancel(self) -> None:
    """Nobody waits any more; again, or after the end, it does nothing."""
    if not self.closed:
      self.closed = True
      self._events.put_nowait(_END)
      self._cancelled()

  def results(self, index: int, result: Any) -> list[Any] | None:
    """Takes what row `index` came to; once all rows of the request have, theirs in order."""
    self._results[index] = result
    return ([self._results[i] for i in range(self._rows)] if len(self._results) == self._rows
            else None)

  def __aiter__(self):
    return self

  async def __anext__(self) -> Any:
    event = await self._events.get()
    if event is _END:
      self._events.put_nowait(_END)  # so that it ends whenever it is asked
      raise StopAsyncIteration
    if isinstance(event, Refused):
      self._events.put_nowait(_END)
      raise event
    return event


class Outbox:
  """Events for tickets, gathered in the engine's thread and sent together."""

  def __init__(self):
    self._items = []

  def put(self, ticket: Ticket, *events: Any, last: bool = False) -> None:
    """Events of a ticket that is not closed; the last of them close it."""
    if not ticket.closed:
      ticket.closed = last or any(isinstance(event, Refused) for event in events)
      self._items.append((ticket, (*events, _END) if last else events))

  def send(self) -> None:
    """Hands on what there is, waking each event loop once."""
    items, self._items = self._items, []
    for loop in {ticket._loop for ticket, _ in items}:
      try:
        loop.call_soon_threadsafe(
            _hand_over, [item for item in items if item[0]._loop is loop])
      except RuntimeError:  # the loop is closed: nobody listens
        pass


def _hand_over(items: Iterable[tuple[Ticket, tuple]]) -> None:
  for ticket, events in items:
    for event in events:
      ticket._events.put_nowait(event)

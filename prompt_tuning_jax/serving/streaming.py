"""Completions sent while they are made: server-sent events, as OpenAI's clients read them."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prompt_tuning_jax.serving import access, answers
from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.requests import Finished, Refused
from prompt_tuning_jax.serving.waiting import Gone, answered, events

_START = {'type': 'http.response.start', 'status': 200,
          'headers': [(b'content-type', b'text/event-stream; charset=utf-8'),
                      (b'x-accel-buffering', b'no')]}  # nginx hands on each event as it comes


@dataclass(frozen=True)
class Stream:
  """A response (an ASGI app) of the events of some tickets.

  An error before the first event is answered with its own status; a later one is an event, after
  which the stream ends without [DONE].
  """

  answer: answers.Completion
  tickets: Sequence[Any]
  deadline: float
  with_usage: bool
  metrics: Metrics

  async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
    """Sends until all tickets are finished.

    Raises:
      Refused: there is no answer, and nothing has been sent.
      Gone: the client has.
    """
    begun = False

    async def write(data: bytes, more: bool = True) -> None:
      nonlocal begun
      try:
        if not begun:
          begun = True
          await send(_START)
        await send({'type': 'http.response.body', 'body': data, 'more_body': more})
      except OSError:
        raise Gone from None

    try:
      await answered(self._write_all(write), self.tickets, receive, self.deadline)
    except Gone:
      raise
    except Refused as error:
      if not begun:
        raise
      await write(answers.event(answers.refusal(error)), False)
    except Exception:  # noqa: BLE001 the client has a status 200 already
      if not begun:
        raise
      request_id = scope['state']['request_id']
      access.LOG.exception('%s failed', request_id)
      await write(answers.event(access.failure(request_id)), False)

  async def _write_all(self, write: Any) -> None:
    submitted, written, first = time.monotonic(), 0, True
    async with contextlib.aclosing(events(self.tickets)) as coming:
      async for place, event in coming:
        if first:
          self.metrics.observe_first_event(time.monotonic() - submitted)
          first = False
        if isinstance(event, Finished):
          written += event.tokens
        await write(answers.event(self.answer.chunk(place, event, self.with_usage)))
    if self.with_usage:
      used = answers.usage(sum(ticket.prompt_tokens for ticket in self.tickets), written)
      await write(answers.event(self.answer.last_chunk(used)))
    await write(answers.DONE, more=False)

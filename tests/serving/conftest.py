"""An engine without a network, whose texts say what it is to do, and a server around it."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import httpx
import pytest

from prompt_tuning_jax.serving.app import Settings, create_app
from prompt_tuning_jax.serving.listener import server
from prompt_tuning_jax.serving.requests import (
  BadRequest,
  Classification,
  Failed,
  Finished,
  Labels,
  Late,
  Model,
  Overloaded,
  Statistics,
  Stopping,
  Text,
  TooLong,
  UnknownModel,
)

MODELS = (Model('mini', 1), Model('sst2', 2, ('negative', 'positive'), 'glue_sst2'))
AT_ONCE = {'full': Overloaded('The queue is full.', 2.5), 'long': TooLong('Too long.'),
           'stopping': Stopping('The server stops.'), 'bug': RuntimeError('secret')}
LATER = {'fails': Failed('It failed.'), 'late': Late('Too late.'),
         'bug later': RuntimeError('secret')}


class Ticket:
  """Echoes the words of a text, each a token; `slowly`, one every 0.05 s; `forever`, no end."""

  def __init__(self, request):
    self.request, self.cancelled, self.ended = request, 0, False
    text = request.inputs
    self.words = text.split() if isinstance(text, str) else [f'<{token}>' for token in text]
    self.prompt_tokens = len(self.words) + 1

  def cancel(self):
    self.cancelled += 1

  async def __aiter__(self):
    request = self.request
    if self.words[:1] == ['then']:
      yield Text(0, 'then')
    error = LATER.get(' '.join(self.words).removeprefix('then '))
    if error is not None:
      raise error
    if isinstance(request, Classification):
      if 'forever' in self.words:
        await asyncio.Event().wait()
      labels = request.labels or ('negative', 'positive')
      total = sum(range(1, len(labels) + 1))
      yield Labels(labels, tuple((i + 1) / total for i in range(len(labels))),
                   tuple(-1.0 - i for i in range(len(labels))))
    else:
      async for event in self._generation(request):
        yield event
    self.ended = True

  async def _generation(self, request):
    words = self.words[:request.max_tokens]
    for word in words:
      for index in range(request.n):
        yield Text(index, f'{word} ')
      if 'slowly' in self.words:
        await asyncio.sleep(.05)
      while 'forever' in self.words:
        await asyncio.sleep(.01)
        yield Text(0, 'again ' * 10_000)
    reason = 'length' if len(words) < len(self.words) else 'stop'
    for index in range(request.n):
      yield Finished(index, reason, len(words), -1.0)


@dataclasses.dataclass
class FakeEngine:
  """What app.py asks of an engine."""

  tickets: list = dataclasses.field(default_factory=list)
  status: str = 'starting'

  def models(self):
    return MODELS

  def check_size(self, rows):
    assert rows > 0

  def submit(self, request):
    if request.model not in {model.name for model in MODELS}:
      raise UnknownModel(f'There is no prompt {request.model!r}.')
    if isinstance(request, Classification) and request.model == 'mini' and not request.labels:
      raise BadRequest('"labels" must be given.', param='labels')
    if request.inputs in AT_ONCE:
      raise AT_ONCE[request.inputs]
    self.tickets.append(Ticket(request))
    return self.tickets[-1]

  async def reload(self):
    return {'added': ['new'], 'removed': [], 'refused': {}}

  def health(self):
    return {'status': self.status, 'queued': 0, 'running': 0}

  def statistics(self):
    return Statistics(queued=3, running=2, batches={1: 4, 3: 2, 8: 1}, seconds={'decode': 1.5},
                      prompt_tokens=7, generated_tokens=9, cancelled=5)

  def start(self):
    self.status = 'ok'

  async def stop(self):
    self.status = 'stopped'


@pytest.fixture
def engine():
  """An engine of a test's own."""
  return FakeEngine()


@pytest.fixture
def ask(engine):
  """ask(method, path, settings, **httpx) -> response, of the app itself, without a socket."""
  engine.start()

  def ask(method, path, settings=None, **given):
    async def run():
      transport = httpx.ASGITransport(create_app(engine, settings), raise_app_exceptions=False)
      async with httpx.AsyncClient(transport=transport, base_url='http://test') as client:
        return await client.request(method, path, **given)
    return asyncio.run(run())

  return ask


@pytest.fixture
def listening(engine):
  """listening(settings) -> context of a server of `engine`: (its base URL, its uvicorn.Server)."""
  @contextlib.contextmanager
  def listening(settings=None):
    settings = settings or Settings()
    running = server(create_app(engine, settings), settings, port=0)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
      eventually(lambda: running.started)
      port = running.servers[0].sockets[0].getsockname()[1]
      yield f'http://127.0.0.1:{port}', running
    finally:
      running.should_exit = True
      thread.join(20)
      assert not thread.is_alive()
    assert engine.status == 'stopped'

  return listening


def eventually(condition, seconds=5.0):
  """Waits until condition() holds."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(.01)


@pytest.fixture(name='eventually')
def eventually_fixture():
  """eventually(condition, seconds=5): waits until it holds."""
  return eventually

"""The app: OpenAI-compatible completions and models, classification, health, metrics and a page."""

import base64
import contextlib
import hashlib
import importlib.resources
import math
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from prompt_tuning_jax.serving import access, answers, wire
from prompt_tuning_jax.serving.bodies import lingering, read_json
from prompt_tuning_jax.serving.metrics import CONTENT_TYPE, Metrics
from prompt_tuning_jax.serving.requests import Finished, Refused, UnknownModel
from prompt_tuning_jax.serving.streaming import Stream
from prompt_tuning_jax.serving.waiting import answered, collected, submit_all


@dataclass(frozen=True)
class Settings:
  """What the one who starts the server decides."""

  api_keys: tuple[str, ...] = field(default=(), repr=False)  # (): all may ask
  allowed_hosts: tuple[str, ...] = ()  # names that requests are for, without port; (): any
  max_body_bytes: int = 1 << 20
  body_seconds: float = 10.0  # for a request's headers, and again for its body
  request_seconds: float = 60.0  # from a request's body to the end of its answer
  send_seconds: float = 30.0  # for a client to take what has been written to it
  shutdown_seconds: float = 30.0  # for what was accepted, when the server is to end; 0 is none
  max_connections: int = 512

  def __post_init__(self):
    if not all(self.api_keys):
      raise ValueError('An API key is empty: give a longer one, or none to let all ask.')
    for name in ('max_body_bytes', 'body_seconds', 'request_seconds', 'send_seconds',
                 'max_connections'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f'{name} must be more than 0 and finite, got {getattr(self, name)}.')
    if not 0 <= self.shutdown_seconds < math.inf:
      raise ValueError(f'shutdown_seconds must be 0 or more and finite, got '
                       f'{self.shutdown_seconds}.')


def create_app(engine: Any, settings: Settings | None = None) -> Starlette:
  """The app, which starts the engine and stops it (`serving.engine.Engine`)."""
  settings = settings or Settings()
  metrics = Metrics(engine.statistics)

  @contextlib.asynccontextmanager
  async def lifespan(_):
    engine.start()
    try:
      yield
    finally:
      await engine.stop()

  routes = [
      Route('/', _page()),
      Route('/healthz', health),
      Route('/metrics', measurements),
      Route('/v1/models', models),
      Route('/v1/models/{name:path}', one_model),
      Route('/v1/completions', completions, methods=['POST']),
      Route('/v1/classify', classify, methods=['POST']),
      Route('/v1/reload', reload, methods=['POST']),
  ]
  app = Starlette(
      routes=routes,
      lifespan=lifespan,
      exception_handlers={Refused: access.refusal, HTTPException: access.refusal},
      middleware=[Middleware(access.observed, metrics=metrics),
                  Middleware(lingering),
                  Middleware(access.at_hosts, hosts=settings.allowed_hosts),
                  Middleware(access.authorized, keys=settings.api_keys)])
  app.router.redirect_slashes = False
  app.state.engine, app.state.settings, app.state.metrics = engine, settings, metrics
  return app


async def completions(request: Request) -> Any:
  """POST /v1/completions."""
  body, deadline = await _body(request)
  asked = wire.completion(body, deadline)
  engine = request.app.state.engine
  tickets = submit_all(engine, asked.requests)
  first = asked.requests[0]
  answer = answers.Completion(f'cmpl-{request.state.request_id}', int(time.time()), first.model,
                              first.n)
  if asked.stream:
    return Stream(answer, tickets, deadline, asked.include_usage,
                  request.app.state.metrics)
  events = await answered(collected(tickets), tickets, request.receive, deadline)
  written = sum(event.tokens for _, event in events if isinstance(event, Finished))
  used = answers.usage(_prompt_tokens(tickets), written)
  return access.json_response(answer.whole(events, len(tickets), used))


async def classify(request: Request) -> Response:
  """POST /v1/classify."""
  body, deadline = await _body(request)
  asked = wire.classification(body, deadline)
  tickets = submit_all(request.app.state.engine, asked)
  labels = dict(await answered(collected(tickets), tickets, request.receive, deadline))
  ordered = [labels[place] for place in range(len(tickets))]
  used = answers.usage(_prompt_tokens(tickets))
  return access.json_response(answers.classification(asked[0].model, ordered, used))


async def models(request: Request) -> Response:
  """GET /v1/models."""
  data = [answers.model(one) for one in request.app.state.engine.models()]
  return access.json_response({'object': 'list', 'data': data})


async def one_model(request: Request) -> Response:
  """GET /v1/models/NAME."""
  name = request.path_params['name']
  for one in request.app.state.engine.models():
    if one.name == name:
      return access.json_response(answers.model(one))
  raise UnknownModel(f'There is no model {name[:wire.MAX_NAME]!r}: GET /v1/models lists those '
                     'there are.', param='model')


async def reload(request: Request) -> Response:
  """POST /v1/reload, whose body may be empty; its type keeps web pages of others out."""
  await _body(request)
  return access.json_response(await request.app.state.engine.reload())


async def health(request: Request) -> Response:
  """GET /healthz."""
  now = request.app.state.engine.health()
  return access.json_response(now, 200 if now['status'] == 'ok' else 503)


async def measurements(request: Request) -> Response:
  """GET /metrics."""
  return Response(request.app.state.metrics.text(), headers={'content-type': CONTENT_TYPE})


def _page() -> Callable[[Request], Awaitable[Response]]:
  """GET /: the page, whose own style and script are all that it may load."""
  page = importlib.resources.files('prompt_tuning_jax.serving').joinpath('page.html').read_bytes()
  policy = ["default-src 'none'", "connect-src 'self'", 'img-src data:', "base-uri 'none'",
            "form-action 'none'", "frame-ancestors 'none'"]
  for tag in (b'style', b'script'):
    [text] = re.findall(b'<%s>(.*?)</%s>' % (tag, tag), page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text).digest()).decode('ascii')
    policy.append(f"{tag.decode('ascii')}-src 'sha256-{digest}'")
  headers = {'Content-Security-Policy': '; '.join(policy), 'Referrer-Policy': 'no-referrer'}

  async def root(_: Request) -> Response:
    return Response(page, headers=headers, media_type='text/html')

  return root


async def _body(request: Request) -> tuple[bytes, float]:
  """The body of a POST, and the time.monotonic() by which it must be answered."""
  settings = request.app.state.settings
  body = await read_json(request.headers, request.receive, settings.max_body_bytes,
                         settings.body_seconds)
  return body, time.monotonic() + settings.request_seconds


def _prompt_tokens(tickets: Sequence[Any]) -> int:
  return sum(ticket.prompt_tokens for ticket in tickets)

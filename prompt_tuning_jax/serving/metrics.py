"""What Prometheus is told of the server: its requests, and the work of its engine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from prompt_tuning_jax.serving.requests import Statistics

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_PREFIX = 'prompt_tuning_'
_SECONDS = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
  """Counts of one server, in a registry of its own."""

  def __init__(self, statistics: Callable[[], Statistics]):
    self.registry = prometheus_client.CollectorRegistry()
    self.in_flight = prometheus_client.Gauge(
        _PREFIX + 'http_requests_in_flight', 'Requests that are being answered.',
        registry=self.registry)
    self._requests = prometheus_client.Counter(
        _PREFIX + 'http_requests', 'Requests; status 499: the client went before the answer.',
        ('route', 'status'), registry=self.registry)
    self._seconds = prometheus_client.Histogram(
        _PREFIX + 'http_request_seconds', "From a request's headers to the end of its answer.",
        ('route',), buckets=_SECONDS, registry=self.registry)
    self._first_seconds = prometheus_client.Histogram(
        _PREFIX + 'first_event_seconds', 'From submission to the first event of a stream.',
        buckets=_SECONDS, registry=self.registry)
    self.registry.register(_Engine(statistics))

  def observe(self, route: str, status: int, seconds: float) -> None:
    """One request, answered or not."""
    self._requests.labels(route, str(status)).inc()
    self._seconds.labels(route).observe(seconds)

  def observe_first_event(self, seconds: float) -> None:
    """One stream that has begun."""
    self._first_seconds.observe(seconds)

  def text(self) -> bytes:
    """What GET /metrics answers."""
    return prometheus_client.generate_latest(self.registry)


@dataclass(frozen=True)
class _Engine:
  """The engine's own counts, asked for when Prometheus asks."""

  statistics: Callable[[], Statistics]

  def collect(self) -> Iterator[Any]:
    now = self.statistics()
    yield GaugeMetricFamily(_PREFIX + 'queue_depth', 'Texts that wait.', now.queued)
    yield GaugeMetricFamily(_PREFIX + 'running', 'Texts in the batches of this moment.',
                            now.running)
    for name, about, value in (
        ('prompt_tokens', 'Tokens of the texts that were read.', now.prompt_tokens),
        ('generated_tokens', 'Tokens that were written.', now.generated_tokens),
        ('cancelled', 'Texts given up because no one waited any more.', now.cancelled)):
      yield CounterMetricFamily(_PREFIX + name, about, value)
    seconds = CounterMetricFamily(_PREFIX + 'engine_seconds', 'Time spent in each phase.',
                                  labels=['phase'])
    for phase, value in sorted(now.seconds.items()):
      seconds.add_metric([phase], value)
    yield seconds
    yield _batch_sizes(now)

  def describe(self) -> list[Any]:
    """Names are registered without asking the engine, which may not have started."""
    return []


def _batch_sizes(now: Statistics) -> HistogramMetricFamily:
  bounds = [1]
  while bounds[-1] < max(now.batches, default=1):
    bounds.append(2 * bounds[-1])
  counts = [sum(count for size, count in now.batches.items() if low < size <= high)
            for low, high in zip([0, *bounds], bounds, strict=False)]
  below = [*accumulate(counts)]
  buckets = [(str(float(bound)), count) for bound, count in zip(bounds, below, strict=True)]
  total = sum(size * count for size, count in now.batches.items())
  return HistogramMetricFamily(_PREFIX + 'batch_size', 'Texts in a batch.',
                               [*buckets, ('+Inf', below[-1])], total)

"""What Prometheus reads."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

from prompt_tuning_jax.serving.metrics import Metrics
from prompt_tuning_jax.serving.requests import Statistics


def _samples(text):
  return {(sample.name, *sorted(sample.labels.items())): sample.value
          for family in text_string_to_metric_families(text) for sample in family.samples}


def test_requests_and_the_engine(ask):
  good = {'model': 'sst2', 'prompt': 'a'}
  # Each request of `ask` has an app, and so counts, of its own: /metrics tells of no other.
  assert ask('POST', '/v1/completions', json=good).status_code == 200
  response = ask('GET', '/metrics')
  assert response.headers['content-type'].startswith('text/plain; version=')
  samples = _samples(response.text)
  assert not [key for key in samples if key[0] == 'prompt_tuning_http_requests_total']
  assert samples['prompt_tuning_http_requests_in_flight',] == 1  # itself
  assert samples['prompt_tuning_queue_depth',] == 3 and samples['prompt_tuning_running',] == 2
  assert samples['prompt_tuning_generated_tokens_total',] == 9
  assert samples['prompt_tuning_prompt_tokens_total',] == 7
  assert samples['prompt_tuning_cancelled_total',] == 5
  assert samples['prompt_tuning_engine_seconds_total', ('phase', 'decode')] == 1.5
  sizes = {dict(key[1:])['le']: value for key, value in samples.items()
           if key[0] == 'prompt_tuning_batch_size_bucket'}
  assert sizes == {'1.0': 4, '2.0': 4, '4.0': 6, '8.0': 7, '+Inf': 7}
  assert samples['prompt_tuning_batch_size_sum',] == 4 + 6 + 8
  assert samples['prompt_tuning_batch_size_count',] == 7


def test_requests_are_counted_by_route_and_status_alone(listening):
  with listening() as (url, _):
    for path in ('/v1/models/sst2', '/v1/models/a', '/v1/models/b', '/c', '/d'):
      httpx.get(url + path)
    list(httpx.post(f'{url}/v1/completions', json={'model': 'sst2', 'prompt': 'a', 'stream': True}
                    ).iter_lines())
    samples = _samples(httpx.get(f'{url}/metrics').text)
  counts = {key[1:]: value for key, value in samples.items()
            if key[0] == 'prompt_tuning_http_requests_total'}
  key = lambda route, status: (('route', route), ('status', status))
  named = '/v1/models/{name:path}'
  assert counts == {key(named, '200'): 1, key(named, '404'): 2, key('none', '404'): 2,
                    key('/v1/completions', '200'): 1}
  assert samples['prompt_tuning_first_event_seconds_count',] == 1


def test_an_engine_that_has_done_nothing():
  samples = _samples(Metrics(Statistics).text().decode())
  assert samples['prompt_tuning_batch_size_count',] == 0

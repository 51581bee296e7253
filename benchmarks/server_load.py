"""The server under load: many prompts, many clients, every answer checked.

  python benchmarks/server_load.py [--requests=12000] [--output=benchmarks/server_load.json]

Makes random prompts and prefixes for the bundled base, answers a set of random requests (labels,
greedy texts, drawn texts) offline, starts `prompt_tuning_jax.serve` in another process, and sends
the requests from 1, 8 and 64 clients at a time, each of which asks again as soon as it is answered.
An answer that does not come is lost; one that is not the offline answer is wrong, and crossed if it
is that of another request. Prints and writes requests per second, the median and the 99th
percentile of the time to an answer, and the server's memory. `driver_share` is the processor time
of this process by the time that passed: where it is well below 1, the clients did not hold up the
server.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import psutil

import prompt_tuning_jax
from prompt_tuning_jax import prompted_base, ranking
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.predictor import DecodingSettings
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS

CLIENTS = {1: 0.1, 8: 0.3, 64: 0.6}  # clients -> their share of all requests
LENGTHS = (64, 16)  # tokens of inputs and texts
WORDS = ('the a of and to in was he that it his her with as had for you not on at by which but '
         'from they all said one so what when there man sir very now little come time go').split()
LABELS = ('good', 'bad', 'yes', 'no', 'maybe', 'entailment', 'neutral', 'contradiction')
SEED = 7
SHOWN = ('clients', 'requests', 'per_second', 'p50_ms', 'p99_ms', 'lost', 'wrong', 'crossed',
         'driver_share')


def write_prompts(folder: str, base, count: int, rng: np.random.Generator) -> None:
  """`count` prompts of random lengths, placements and labels; a tenth of them are prefixes."""
  table, config = np.asarray(base.embedding, np.float32), base.config
  for i in range(count):
    length = int(rng.integers(1, 61))
    labels = list(map(str, rng.choice(LABELS, rng.integers(2, 5), replace=False)))
    if i % 10 == 9:
      about = prompt_file.describe(base, method='prefix_tuning', labels=labels)
      shape = (2, length, config.num_heads, config.head_dim)
      params = {f'prefix/{place}': rng.normal(size=(layers, *shape)).astype(np.float32)
                for place, layers in config.attentions.items()}
    else:
      about = prompt_file.describe(base, placement=str(rng.choice(PLACEMENTS)), length=length,
                                   labels=labels)
      params = {prompt_file.EMBEDDING: 2 * table[rng.integers(3, 4000, length)]}
    prompt_file.save(os.path.join(folder, f'prompt_{i:02d}.safetensors'),
                     prompt_file.PromptFile(params, about))


def random_requests(names: list[str], count: int, rng: np.random.Generator) -> list[dict]:
  """[{'path', 'body'}]: six tenths are classified, the others continued, some of these drawn."""
  made = []
  for i in range(count):
    text = ' '.join(rng.choice(WORDS, rng.integers(1, 40)))
    body = {'model': str(rng.choice(names))}
    if i % 10 < 6:
      made.append({'path': '/v1/classify', 'body': {**body, 'input': text}})
    else:
      drawn = {'temperature': 1.0, 'top_p': 0.9, 'seed': SEED} if i % 10 == 9 else {}
      made.append({'path': '/v1/completions', 'body': {**body, 'prompt': text, **drawn}})
  return made


def answer_offline(prompts: str, requests: list[dict]) -> None:
  """Adds 'expected', which the server must say, to every request."""
  offline = prompted_base.load('mini', prompts=prompts, max_decode_length=LENGTHS[1])
  kinds = {'labels': [], 'greedy': [], 'drawn': []}
  for request in requests:
    kinds['labels' if request['path'] == '/v1/classify' else
          'drawn' if 'seed' in request['body'] else 'greedy'].append(request)
  for kind, rows in kinds.items():
    fields = [{'inputs': row['body'].get('input', row['body'].get('prompt'))} for row in rows]
    inputs = [offline.tokens('', row, 'input') for row in fields]
    slots = [offline.bank.slot(row['body']['model']) for row in rows]
    if kind == 'labels':
      labels = [offline.bank.files[row['body']['model']].metadata['labels'] for row in rows]
      scores = offline.predictor.rank(offline.params, inputs, labels, slots)
      for row, names, score in zip(rows, labels, scores, strict=True):
        shares = ranking.probabilities(score).tolist()
        row['expected'] = dict(zip(names, shares, strict=True))
    else:
      decoding = (DecodingSettings(temperature=1.0, top_p=0.9, seed=SEED) if kind == 'drawn' else
                  DecodingSettings())
      found = offline.predictor.generate_with(offline.params, inputs, decoding, slots,
                                              [1] * len(rows))  # as line 1 of a file
      for row, [text] in zip(rows, found, strict=True):
        row['expected'] = text.text


def is_right(request: dict, answer: dict) -> bool:
  """Whether an answer of the server is the offline one."""
  expected = request['expected']
  if isinstance(expected, str):
    return answer['choices'][0]['text'] == expected
  found = answer['data'][0]['probabilities']
  return found.keys() == expected.keys() and all(
      abs(found[name] - expected[name]) < 1e-4 for name in expected)


class Client:
  """One connection that is kept; as little HTTP as it takes."""

  async def open(self, port: int) -> 'Client':
    self._reader, self._writer = await asyncio.open_connection('127.0.0.1', port)
    return self

  async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
    """(status, body) of the answer."""
    self._writer.write(b'POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
                       b'content-length: %d\r\n\r\n%b' % (path.encode(), len(body), body))
    head = await self._reader.readuntil(b'\r\n\r\n')
    length = int(re.search(rb'content-length: (\d+)', head, re.IGNORECASE)[1])
    return int(head.split(b' ', 2)[1]), await self._reader.readexactly(length)

  def close(self) -> None:
    self._writer.close()


async def drive(port: int, process: psutil.Process, requests: list[dict], clients: int,
                count: int) -> dict:
  """`count` requests from so many clients, as fast as they are answered."""
  times, answers, memory, numbers = [], [], [], iter(range(count))
  bodies = [json.dumps(request['body']).encode() for request in requests]

  async def client() -> None:
    connection = await Client().open(port)
    for number in numbers:  # shared by all: each number is taken once
      if number % max(1, count // 8) == 0:
        memory.append(round(process.memory_info().rss / 1e6))
      place = number % len(requests)
      began = time.perf_counter()
      try:
        status, body = await connection.post(requests[place]['path'], bodies[place])
      except (OSError, asyncio.IncompleteReadError, TypeError):
        connection = await Client().open(port)
        continue
      times.append(time.perf_counter() - began)
      answers.append((place, status, body))
    connection.close()

  began, used = time.perf_counter(), time.process_time()
  await asyncio.gather(*(client() for _ in range(clients)))
  seconds, used = time.perf_counter() - began, time.process_time() - used
  good = [(place, json.loads(body)) for place, status, body in answers if status == 200]
  wrong = [(place, answer) for place, answer in good if not is_right(requests[place], answer)]
  crossed = [place for place, answer in wrong if any(
      is_right(other, answer) for other in requests
      if other['path'] == requests[place]['path'])]
  p50, p99 = np.percentile(times, [50, 99])
  return {'clients': clients, 'requests': count, 'seconds': seconds,
          'per_second': len(good) / seconds, 'p50_ms': 1e3 * p50, 'p99_ms': 1e3 * p99,
          'lost': count - len(good), 'wrong': len(wrong), 'crossed': len(crossed),
          'driver_share': used / seconds, 'resident_megabytes': memory}


@contextlib.contextmanager
def serving(prompts: str, log: str, batch_sizes: str):
  """(port, what it said, its psutil.Process) of a server that is stopped in the end."""
  command = [sys.executable, '-m', 'prompt_tuning_jax.serve', '--base', 'mini', '--prompts',
             prompts, '--port', '0', '--max_input_length', str(LENGTHS[0]), '--max_decode_length',
             str(LENGTHS[1]), '--batch_sizes', batch_sizes]
  with open(log, 'wb') as file:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
  try:
    said = process.stdout.readline().strip()
    found = re.search(r'http://[^:]+:(\d+)', said)
    if not found:
      raise RuntimeError(f'The server did not start: {pathlib.Path(log).read_text()[-2000:]}')
    yield int(found[1]), said, psutil.Process(process.pid)
    process.send_signal(signal.SIGTERM)
    if process.wait(timeout=60):
      raise RuntimeError(f'The server ended with {process.returncode}.')
  finally:
    process.kill()
    process.wait()


def measure(flags) -> dict:
  """All that is reported."""
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    prompts = os.path.join(folder, 'prompts')
    os.mkdir(prompts)
    write_prompts(prompts, base_checkpoint.load_base('mini'), flags.prompts, rng)
    names = sorted(prompt_file.in_folder(prompts))
    requests = random_requests(names, min(flags.distinct, flags.requests), rng)
    answer_offline(prompts, requests)
    print(f'{len(requests)} different requests are answered offline', flush=True)
    with serving(prompts, os.path.join(folder, 'log'), flags.batch_sizes) as (port, said, process):
      print(said, flush=True)
      loads = []
      for clients, share in CLIENTS.items():
        found = asyncio.run(drive(port, process, requests, clients,
                                  round(share * flags.requests)))
        loads.append(found)
        print('  '.join(f'{name} {found[name]:.4g}' for name in SHOWN), found['resident_megabytes'],
              flush=True)
  return {'version': prompt_tuning_jax.__version__, 'jax': jax.__version__,
          'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores',
          'device': jax.devices()[0].device_kind, 'server': said, 'prompts': flags.prompts,
          'batch_sizes': flags.batch_sizes,
          'different_requests': len(requests), 'loads': loads,
          'load_average': os.getloadavg()[1]}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--requests', type=int, default=12000, help='in all (default 12000)')
  parser.add_argument('--distinct', type=int, default=1500, help='different ones (default 1500)')
  parser.add_argument('--prompts', type=int, default=50, help='default 50')
  parser.add_argument('--batch_sizes', default='1,4,16', help="the server's (default 1,4,16)")
  parser.add_argument('--output', metavar='FILE.json')
  flags = parser.parse_args()
  found = measure(flags)
  if flags.output:
    pathlib.Path(flags.output).write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
  wrong = sum(load['lost'] + load['wrong'] for load in found['loads'])
  sys.exit(f'{wrong} answers lost or wrong' if wrong else 0)


if __name__ == '__main__':
  main()

"""Damaged files of every format: read as what was written, or refused in one line, in little time.

Each case damages one file of a specimen in a way drawn by its number, and is read in a process
whose time and memory are limited. Never is another exception raised, the process ended, code
executed, or, where checksums can tell, anything read but what was written.
"""

import collections
import json
import os
import pathlib
import subprocess
import sys

import pytest

CHILD = pathlib.Path(__file__).with_name('child.py')
# Of formats that hold checksums, nothing else than was written may be read.
EXACT = ('prompt', 'peft', 't5', 't5_bfloat16', 't5_shards', 'gpt2', 'bart', 'bert', 't5x',
         'token_cache', 'token_cache_large', 'gzip', 'partial', 'states')
# Those of others, and texts, where another text is as good: never a crash.
OTHERS = ('npy', 't5x_of_t5x', 'jsonl', 'csv', 'tsv', 'text_task', 'spiece', 'metrics', 'gin')
NEEDING = {'peft_of_peft': 'peft', 't5_of_transformers': 'transformers',
           'gpt2_of_transformers': 'transformers', 'tokenizer': 'tokenizers',
           'merges': 'tokenizers', 'words': 'tokenizers'}
# A few formats of which some cases are read, and how many of each are where many are.
FAST, SLOW = ('prompt', 'peft', 't5', 't5x', 'token_cache', 'jsonl', 'tokenizer'), 120


def child(*args) -> subprocess.CompletedProcess:
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(sys.path)}
  return subprocess.run([sys.executable, str(CHILD), *map(str, args)], capture_output=True,
                        text=True, check=False, env=environment)


@pytest.fixture(scope='module')
def specimens(tmp_path_factory):
  """A folder of specimens, of which each is made when it is asked for."""
  folder = tmp_path_factory.mktemp('specimens')

  def make(names) -> pathlib.Path:
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
      made = child('make', folder, *missing)
      assert made.returncode == 0, made.stderr[-2000:]
    return folder
  return make


def check(folder: pathlib.Path, names, last: int, first: int = 0) -> None:
  """Reads cases [first, last) of each format; fails naming those that went wrong."""
  done = child('read', folder, first, last, *names)
  lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"format"')]
  assert lines, done.stderr[-2000:]
  assert done.returncode == 0, f'{lines[-1]} ended the process: {done.stderr[-2000:]}'
  cases = [line for line in lines if 'result' in line]
  bad = [case for case in cases if case['result'] == 'wrong'
         or case['result'] == 'different' and case['format'] in EXACT]
  assert not bad, '\n'.join(map(str, bad[:20]))
  for name in names:
    results = collections.Counter(case['result'] for case in cases if case['format'] == name)
    assert results.total() == last - first
    # Most damage matters, or these are no cases; of an unfinished file it is made good.
    assert name == 'partial' or results['equal'] < 0.6 * results.total(), (name, results)


@pytest.mark.slow
def test_some_cases_of_every_kind_of_file(specimens):
  check(specimens(FAST), FAST, 30)


@pytest.mark.slow
@pytest.mark.parametrize('names', [EXACT, OTHERS, tuple(NEEDING)],
                         ids=('exact', 'others', 'needing'))
def test_many_cases_of_each_format(specimens, names):
  for library in {NEEDING[name] for name in names if name in NEEDING}:
    pytest.importorskip(library)
  check(specimens(names), names, SLOW)


@pytest.mark.slow
def test_a_case_is_the_same_in_every_process(specimens):
  folder = specimens(['prompt'])
  runs = [[json.loads(line)['how'] for line in child('read', folder, 0, 12, 'prompt')
           .stdout.splitlines()] for _ in range(2)]
  assert runs[0] == runs[1] and len(set(runs[0])) > 6

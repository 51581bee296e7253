"""Turns are timed alike in this process and in others, and a process that fails is told."""

import time

import pytest
import turns

SERVES = """
import sys, time
sys.path.insert(0, {folder!r})
import turns

def make():
  print('libraries print too')
  return lambda: time.sleep(0.2)

turns.serve(make)
"""


def test_runs_here_and_in_a_process_of_their_own_take_turns(tmp_path):
  script = tmp_path / 'serves.py'
  script.write_text(SERVES.format(folder=turns.__file__.rpartition('/')[0]), 'utf-8')
  order = []
  here = lambda: (order.append('here'), time.sleep(0.1))
  with turns.Apart(str(script)) as apart:
    found = turns.compared({'apart': apart, 'here': here}, {'ratio': ('apart', 'here')}, repeats=3)
    process = apart._process
    assert process.poll() is None
  assert process.poll() is not None and len(order) == 2 + 3
  medians = found['seconds']['medians']
  assert medians['apart'] >= 0.2 and medians['here'] >= 0.1
  assert found['processor_seconds']['medians']['apart'] < 0.1


def test_a_run_settles_before_it_is_timed():
  order = []
  runs = {name: lambda name=name: order.append(name) for name in 'ab'}
  taken = turns.take_turns(runs, repeats=2, before=1, settle=2)['seconds']
  assert ''.join(order) == 'ab' + 2 * 'aaabbb'
  assert {name: len(seconds) for name, seconds in taken.items()} == {'a': 2, 'b': 2}


def test_a_process_that_ends_early_is_told(tmp_path):
  script = tmp_path / 'fails.py'
  script.write_text('raise SystemExit(3)', 'utf-8')
  with turns.Apart(str(script)) as apart, pytest.raises(SystemExit, match=r'fails.py failed \(3\)'):
    turns.take_turns({'apart': apart}, repeats=1)

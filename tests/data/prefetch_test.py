"""Prefetching: the same items in order, ahead of time, with errors and ends in their places."""

import gc
import itertools
import subprocess
import sys
import threading
import time

import pytest

from prompt_tuning_jax.data.prefetch import Prefetch


def _threads() -> int:
  return sum(thread.name == 'prefetch' for thread in threading.enumerate())


def _wait_until(condition) -> None:
  end = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < end
    time.sleep(.01)


@pytest.mark.parametrize('start', [0, 7])
@pytest.mark.parametrize('depth', [1, 2, 5])
def test_prefetched_is_the_same_as_direct(start, depth):
  with Prefetch(lambda i: i * i, start, depth) as items:
    assert list(itertools.islice(items, 50)) == [i * i for i in range(start, start + 50)]


def test_items_are_made_ahead_but_not_further_than_depth():
  made = []
  with Prefetch(lambda i: made.append(i) or i, 0, depth=3) as items:
    _wait_until(lambda: len(made) == 4)  # Three wait, one more is in the thread's hands.
    time.sleep(.1)
    assert made == [0, 1, 2, 3]
    assert next(items) == 0
    _wait_until(lambda: len(made) == 5)


def test_an_error_comes_where_its_item_would_and_stays():
  def get(i):
    if i == 3:
      raise ValueError('row 3 is bad')
    return i
  items = Prefetch(get, 0, depth=5)
  assert [next(items) for _ in range(3)] == [0, 1, 2]
  for _ in range(2):
    with pytest.raises(ValueError, match='row 3 is bad'):
      next(items)
  items.close()


def test_stop_iteration_ends_it():
  def get(i):
    if i == 4:
      raise StopIteration
    return i
  assert list(Prefetch(get)) == [0, 1, 2, 3]


def test_close_stops_the_thread_whatever_it_is_doing():
  before = _threads()
  for depth in (1, 3):
    items = Prefetch(lambda i: i, 0, depth)
    next(items)
    items.close()
    items.close()
    assert _threads() == before
    with pytest.raises(ValueError, match='closed'):
      next(items)


def test_a_forgotten_one_closes_itself():
  before = _threads()
  items = Prefetch(lambda i: i)
  next(items)
  del items
  gc.collect()
  _wait_until(lambda: _threads() == before)


def test_an_open_one_does_not_hold_up_the_interpreter():
  code = ('from prompt_tuning_jax.data.prefetch import Prefetch\n'
          'items = Prefetch(lambda i: i)\nprint(next(items))')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60,
                        check=True)
  assert done.stdout == '0\n' and not done.stderr


def test_depth_is_at_least_one():
  with pytest.raises(ValueError, match='depth must be at least 1'):
    Prefetch(lambda i: i, depth=0)

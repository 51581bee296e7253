"""Makes the next items in a thread while the device works on the present one."""

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any


class Prefetch:
  """Iterator over get(start), get(start + 1), …, up to `depth` of them made ahead.

  An exception in `get` is raised where its item would have come, and again on every later call.
  Ends with `close`, as a context, when nothing refers to it any more, or with the interpreter.
  """

  def __init__(self, get: Callable[[int], Any], start: int = 0, depth: int = 2):
    if depth < 1:
      raise ValueError(f'depth must be at least 1, got {depth}.')
    self._items = queue.Queue(depth)
    self._stop = threading.Event()
    self._error = None
    # The thread must not refer to `self`: it would keep it alive.
    thread = threading.Thread(target=_work, args=(get, start, self._items, self._stop),
                              name='prefetch', daemon=True)
    self._finish = weakref.finalize(self, _finish, self._items, self._stop, thread)
    thread.start()

  def __iter__(self) -> 'Prefetch':
    return self

  def __next__(self):
    if self._error is None and self._finish.alive:
      item, self._error = self._items.get()
      if self._error is None:
        return item
    if self._error is not None:
      raise self._error
    raise ValueError('This prefetch is closed: make a new one from the step you need.')

  def close(self) -> None:
    """Stops the thread and waits until it has finished its item. May be called again."""
    self._finish()

  def __enter__(self) -> 'Prefetch':
    return self

  def __exit__(self, *_):
    self.close()


def _work(get, start: int, items: queue.Queue, stop: threading.Event) -> None:
  """Puts (item, None) until told to stop, or (None, error) and ends."""
  index = start
  while not stop.is_set():
    try:
      result = get(index), None
    except BaseException as error:  # pylint: disable=broad-exception-caught
      result = None, error
    items.put(result)
    if result[1] is not None:
      return
    index += 1


def _finish(items: queue.Queue, stop: threading.Event, thread: threading.Thread) -> None:
  stop.set()
  while thread.is_alive():
    with contextlib.suppress(queue.Empty):
      while True:
        items.get_nowait()  # Room for what the thread may be waiting to put.
    if thread is threading.current_thread():  # The garbage collector may run anywhere.
      return
    thread.join(timeout=.05)

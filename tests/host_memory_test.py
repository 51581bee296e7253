"""Freed memory goes back to the system after a compilation, and only then."""

import ctypes
import pathlib
import resource
import sys

import jax
import pytest

from prompt_tuning_jax import host_memory
from prompt_tuning_jax.partitioning import Partitioner

BLOCK, COUNT = 100_000, 1_000  # smaller than what glibc takes from the system one by one


def resident() -> int:
  """Bytes of this process that are in memory."""
  pages = pathlib.Path('/proc/self/statm').read_text('utf-8').split()[1]
  return int(pages) * resource.getpagesize()


@pytest.fixture
def listened(monkeypatch):
  """The listeners that `Partitioner.jit` registers, taken away afterwards."""
  register, made = jax.monitoring.register_event_duration_secs_listener, []
  monkeypatch.setattr(jax.monitoring, 'register_event_duration_secs_listener',
                      lambda listener: (made.append(listener), register(listener)))
  host_memory.give_back_after_compilations.cache_clear()
  for _ in range(2):  # the second time adds none
    Partitioner().jit(lambda x: x)
  yield made
  for listener in made:
    jax.monitoring.unregister_event_duration_listener(listener)
  host_memory.give_back_after_compilations.cache_clear()


@pytest.mark.skipif(sys.platform != 'linux' or not hasattr(ctypes.CDLL(None), 'malloc_trim'),
                    reason='malloc_trim is of glibc')
def test_what_was_freed_goes_back_after_a_long_compilation(listened):
  assert len(listened) == 1
  library = ctypes.CDLL(None)
  library.malloc.restype, library.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
  blocks = [library.malloc(BLOCK) for _ in range(COUNT)]
  last = library.malloc(BLOCK)  # in use above them, so that `free` alone gives back nothing
  for block in blocks:
    ctypes.memset(block, 1, BLOCK)
  held = resident()
  for block in blocks:
    library.free(block)
  compiled = lambda seconds: jax.monitoring.record_event_duration_secs(
      host_memory.COMPILED, seconds)
  compiled(host_memory.LEAST_SECONDS / 2)
  assert resident() > held - BLOCK * COUNT / 2
  compiled(1.0)
  assert resident() < held - BLOCK * COUNT / 2
  library.free(last)


def test_jax_still_tells_of_its_compilations_by_this_name():
  told = []
  listener = lambda event, *_, **__: told.append(event)
  jax.monitoring.register_event_duration_secs_listener(listener)
  jax.jit(lambda x: x + len(told))(1.0)
  jax.monitoring.unregister_event_duration_listener(listener)
  assert host_memory.COMPILED in told

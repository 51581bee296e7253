"""Files answered part by part are whole after any kill, with no part answered twice in vain."""

import json
import subprocess
import sys

import pytest

# Forks a child for each moment, so that Python starts once. Every moment has two kills and then an
# undisturbed run, whose target must be the undisturbed one; a kill may cost one part, not more.
KILLS = '''
import os, signal, sys, time
from prompt_tuning_jax import jsonl
from prompt_tuning_jax.checkpoints import partial_file

mode, source, target, log, whole = sys.argv[1:]
FILES = {jsonl.__file__, partial_file.__file__}
jsonl.CHUNK = 3
whole = open(whole, 'rb').read()
PARTS = 4

def die():
  os.kill(os.getpid(), signal.SIGKILL)

def at_line(number):
  def trace(frame, event, _):
    nonlocal number
    if frame.f_code.co_filename not in FILES:
      return None
    if event == 'line':
      number -= 1
      number or die()
    return trace
  sys.settrace(trace)

def at_step(number):
  def counted(do, before=lambda *_: None):
    def step(*args):
      nonlocal number
      number -= 1
      if not number:
        before(*args)
        die()
      return do(*args)
    return step
  tear = lambda file, data: file.write(data[:len(data) // 2 + 1])
  partial_file._write = counted(partial_file._write, tear)
  for name in ('fsync', 'replace', 'unlink'):
    setattr(os, name, counted(getattr(os, name)))

def answer(part):
  os.write(answered, b'.')
  if mode == 'from_outside':
    time.sleep(0.01)
  return [{'n': len(row['text'])} for _, row in part]

def run(number):
  """Whether a child, killed at `number` or not at all, came to its end."""
  child = os.fork()
  if not child:
    try:
      if number and mode != 'from_outside':
        (at_line if mode == 'at_lines' else at_step)(number)
      jsonl.answer_file(source, target, answer, settings={'a': 1})
      sys.settrace(None)
      os._exit(0)
    except BaseException as error:
      print(repr(error), file=sys.stderr)
      os._exit(1)
  if number and mode == 'from_outside':
    time.sleep(0.003 * number)
    os.kill(child, signal.SIGKILL)
  status = os.waitpid(child, 0)[1]
  assert status in (0, signal.SIGKILL), status
  return status == 0

number = 0
while True:
  number += 11 if mode == 'at_lines' else 1
  answered = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
  kills, wholes = 0, 1
  for again in (number, number // 2 + 1, 0):
    if run(again):
      break
    kills += 1
    if os.path.exists(target):
      wholes = 2  # killed between the last two steps: the next call begins a new file
      assert open(target, 'rb').read() == whole, 'the target is not whole'
  assert open(target, 'rb').read() == whole, (number, 'other rows')
  left = [name for name in os.listdir(os.path.dirname(target)) if '.partial' in name]
  assert not left, (number, left)
  assert os.fstat(answered).st_size <= wholes * PARTS + kills, (number, 'parts answered again')
  os.unlink(target)
  os.close(answered)
  if not kills:
    break
print(number)
'''


@pytest.mark.parametrize('mode, least', [
    pytest.param('at_lines', 100, marks=pytest.mark.slow), ('at_steps', 20),
    pytest.param('from_outside', 3, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_neither_tears_nor_loses_nor_repeats_a_row(tmp_path, mode, least):
  source, target = tmp_path / 'rows.jsonl', tmp_path / 'out' / 'out.jsonl'
  target.parent.mkdir()
  rows = [{'id': i, 'text': 'é' * (i % 7)} for i in range(11)]
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  answered = [{**row, 'n': len(row['text'])} for row in rows]
  (tmp_path / 'whole').write_text(
      ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in answered), encoding='utf-8')
  done = subprocess.run([sys.executable, '-c', KILLS, mode, str(source), str(target),
                         str(tmp_path / 'log'), str(tmp_path / 'whole')],
                        capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > least, 'too few kills'

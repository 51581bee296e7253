"""Training runs killed at random moments, over and over, against one that nobody disturbed.

  python benchmarks/kill_training.py --kills 50 --steps 20000 --output benchmarks/kill_training.json

A tiny network trains through the command line, in a process of its own. `kills` kills it with
SIGKILL, at moments drawn uniformly from the whole time of a run or, every other time, in the middle
of what is told of it (`MOMENTS`: a save, a prompt file, an evaluation, the data). The same command
then goes on, and is killed again, until it comes to its end. Then its files must be, byte for byte,
those of the run that nobody disturbed; a resumed run must begin at the newest state that was whole,
which is of the last save, or of the one before where the last was still being written.
`steps` trains so many steps at once and tells its memory and open files on the way. Prints JSON;
--output also writes it, beside what the file has of the other part.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax

from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors
from prompt_tuning_jax.data.vocabulary import train_vocabulary
from prompt_tuning_jax.networks.t5 import T5Config

SAVE, EVAL, LOG = 20, 100, 10  # periods, in steps
MOMENTS = ('random', 'save', 'random', 'prompt file', 'random', 'evaluation', 'random', 'data')


def write_base(folder: pathlib.Path) -> None:
  """A random T5 of 8 dimensions in `folder`/base, with a vocabulary, and `folder`/rows.jsonl."""
  rng = random.Random(0)
  words = {'good': ('lovely', 'bright', 'warm'), 'bad': ('awful', 'dull', 'cold')}
  rows = [{'text': f'this {rng.choice(("film", "play", "song"))} is {rng.choice(words[label])}',
           'label': label} for label in rng.choices(sorted(words), k=240)]
  lines = [json.dumps(row) + '\n' for row in rows]
  (folder / 'rows.jsonl').write_text(''.join(lines), encoding='utf-8')
  vocabulary = train_vocabulary(lines, folder / 'spiece.model', pieces=60)
  config = T5Config(vocab_size=192, emb_dim=8, num_heads=2, num_encoder_layers=1,
                    num_decoder_layers=1, head_dim=4, mlp_dim=16)
  base = base_checkpoint.random_base(config, vocabulary.file)
  # So large that a prompt changes what it answers.
  params = jax.tree.map(lambda leaf: 4 * leaf, base.params)
  hf_safetensors.write(folder / 'base', config, params, vocabulary=base.vocabulary)


def command(folder: pathlib.Path, model_dir: pathlib.Path, steps: int) -> list[str]:
  """The command line of a run of so many steps."""
  return [
      sys.executable, '-m', 'prompt_tuning_jax.train',
      '--gin_file=run/prompt_tuning_text_file.gin', f'--gin.MODEL_DIR={model_dir}',
      f'--gin.INITIAL_CHECKPOINT_PATH={folder / "base"}',
      f'--gin.TRAIN_FILE={folder / "rows.jsonl"}', '--gin.PROMPT_LENGTH=4', '--gin.BATCH_SIZE=8',
      f'--gin.TRAIN_STEPS={steps}', f'--gin.EVAL_PERIOD={EVAL}', f'--gin.SAVE_PERIOD={SAVE}',
      f'--gin.run.train.log_period={LOG}',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}"]


class Run:
  """A command that has been started; `log` is its stderr so far."""

  def __init__(self, arguments: list[str], log: pathlib.Path, cache: pathlib.Path):
    environment = {'JAX_PLATFORMS': 'cpu', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
                   'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1', **os.environ}
    self._log, self._began = log, time.monotonic()
    with open(log, 'wb') as file:
      self._process = subprocess.Popen(
          arguments, stdout=subprocess.DEVNULL, stderr=file,
          env={**environment, 'PROMPT_TUNING_JAX_CACHE': str(cache)})
    self.pid = self._process.pid

  @property
  def log(self) -> str:
    return self._log.read_text(encoding='utf-8', errors='replace')

  @property
  def step(self) -> int:
    """The last step that it told of."""
    return max(map(int, re.findall(r'^step (\d+)/', self.log, re.MULTILINE)), default=0)

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._began

  def runs(self) -> bool:
    return self._process.poll() is None

  @property
  def is_under_way(self) -> bool:
    """Whether it has found its state, or taken steps: what a killed save left is gone by then."""
    return self.step > 0 or 'Resuming at step' in self.log

  def until(self, happens: Callable[[], bool], pause: float = 5e-4) -> bool:
    """Waits until something happens; False if the run ends before."""
    while self.runs():
      if happens():
        return True
      time.sleep(pause)
    return False

  def stop(self, number: int = signal.SIGKILL) -> int:
    """Sends a signal and waits: the exit status, negative for the number of a signal."""
    with contextlib.suppress(ProcessLookupError):
      self._process.send_signal(number)
    return self._process.wait()

  def end(self) -> str:
    """Waits until it has come to its end; all that it said."""
    if self._process.wait():
      raise SystemExit(f'A run failed:\n{self.log}')
    return self.log


def states(model_dir: pathlib.Path) -> list[int]:
  """The steps of the saved states that are whole."""
  return sorted(int(path.name) for path in (model_dir / 'checkpoints').glob('*')
                if path.name.isdecimal())


def is_saving(model_dir: pathlib.Path) -> bool:
  return any((model_dir / 'checkpoints').glob('*-tmp'))


def contents(model_dir: pathlib.Path) -> dict:
  """What must not depend on kills: prompt files, metrics but rates, and which files there are."""
  lines = [json.loads(line) for line in (model_dir / 'metrics.jsonl').read_text().splitlines()]
  for line in lines:
    line.pop('examples_per_second', None)
  files = {path.name: path.read_bytes() for path in (model_dir / 'prompts').iterdir()}
  names = sorted(path.name for path in model_dir.iterdir() if not path.name.startswith('events'))
  return {'files': files, 'metrics': lines, 'names': names,
          'states': sorted(os.listdir(model_dir / 'checkpoints'))}


def doing(run: Run, model_dir: pathlib.Path) -> str:
  """What a run is at, as far as it shows from outside."""
  log, step = run.log, run.step
  if not run.is_under_way:
    return 'start'
  if is_saving(model_dir):
    return 'save'
  if f'step {step}/' in log and step % EVAL == 0 and step and (
      log.count(f'\nstep {step}/') < 2):  # of training, and not yet of evaluation
    return 'evaluation'
  return 'steps'


def moment(kind: str, run: Run, model_dir: pathlib.Path, cache: pathlib.Path, whole: float,
           rng: random.Random) -> bool:
  """Waits for a moment to kill; False if the run has ended before."""
  at, wait = rng.uniform(0, whole), rng.uniform(0, 0.06)
  before = states(model_dir)[-1:]
  passed = rng.randrange(4)  # so many of them go by unharmed
  if kind == 'random':
    return run.until(lambda: run.seconds > at)
  if kind == 'save':
    saves = lambda: len([s for s in states(model_dir) if s > (before or [0])[0]]) >= passed % 2
    came = run.until(lambda: run.is_under_way and saves() and is_saving(model_dir))
  elif kind == 'prompt file':
    came = run.until(lambda: any((model_dir / 'prompts').glob('.*.tmp')), pause=0)
    wait = rng.uniform(0, 0.004)
  elif kind == 'evaluation':
    came = run.until(lambda: run.step and not run.step % EVAL)
  else:
    came = run.until(lambda: any((cache / 'tokens').glob('.*.tmp')))
    wait = rng.uniform(0, 0.01)
  if came:
    time.sleep(wait)
  return came and run.runs()


def kill(folder: pathlib.Path, kills: int, steps: int, seed: int) -> dict:
  """Kills runs so many times in all; raises SystemExit where one does not resume as it should."""
  rng, log = random.Random(seed), folder / 'log'
  whole = Run(command(folder, folder / 'whole', steps), log, folder / 'cache')
  whole.end()
  began = time.monotonic()
  Run(command(folder, folder / 'whole_again', steps), log, folder / 'cache').end()
  seconds = time.monotonic() - began  # with everything compiled
  expected = contents(folder / 'whole')
  check(contents(folder / 'whole_again') == expected, 'Two undisturbed runs differ.', folder)
  told, lost, runs, ended = [], [], 0, 0
  while len(told) < kills:
    model_dir, runs = folder / f'killed_{runs}', runs + 1
    ended_here, steps_told = False, 0
    while not ended_here:
      kind = MOMENTS[len(told) % len(MOMENTS)]
      cache = folder / f'cache_{len(told)}' if kind == 'data' else folder / 'cache'
      newest = states(model_dir)[-1:]
      run = Run(command(folder, model_dir, steps), log, cache)
      left = seconds * (1 - (newest or [0])[0] / steps / 2)  # half of the time goes into the start
      is_killed = len(told) < kills and moment(kind, run, model_dir, cache, left, rng)
      if is_killed:
        at = doing(run, model_dir)
        status = run.stop()
        is_killed = status == -signal.SIGKILL
      if is_killed:
        told.append({'moment': kind, 'doing': at, 'seconds': round(run.seconds, 2),
                     'step': run.step, 'saved': (states(model_dir) or [0])[-1]})
      else:
        run.end()
        seconds = seconds if newest else run.seconds  # other programs may slow it down or not
        ended_here = True
        ended += 1
      resumed = re.search(r'Resuming at step (\d+)', run.log)
      if newest and run.is_under_way:
        check(bool(resumed) and int(resumed[1]) == newest[0],
              'Not resumed at the newest whole state.', folder)
        lost.append(max(0, steps_told - newest[0]))
        check(lost[-1] <= 2 * SAVE, f'{lost[-1]} steps were lost.', folder)
      steps_told = run.step or steps_told
    check(contents(model_dir) == expected, f'{model_dir} differs.', folder)
  return {
      'kills': len(told), 'by_moment': dict(collections.Counter(each['moment'] for each in told)),
      'while_doing': dict(collections.Counter(each['doing'] for each in told)),
      'runs_to_the_end': ended, 'bit_equal': ended,
      'steps_of_a_run': steps, 'save_period': SAVE, 'eval_period': EVAL,
      'seconds_of_a_run': round(seconds, 1), 'most_steps_lost': max(lost, default=0),
      'median_steps_lost': statistics.median(lost) if lost else 0, 'each': told}


def long_run(folder: pathlib.Path, steps: int) -> dict:
  """Memory, open files and threads of one run of so many steps."""
  run = Run(command(folder, folder / 'long', steps), folder / 'log', folder / 'cache')
  seen = {}
  while run.runs():
    # It may end at any moment.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, TypeError):
      step = run.step
      status = pathlib.Path(f'/proc/{run.pid}/status').read_text()
      # Not the pages of files, which the system takes back as it likes.
      held, swapped, threads = (int(re.search(rf'^{name}:\s+(\d+)', status, re.MULTILINE)[1])
                                for name in ('RssAnon', 'VmSwap', 'Threads'))
      seen.setdefault(step * 20 // steps, []).append(
          (step, (held + swapped) / 1024, len(os.listdir(f'/proc/{run.pid}/fd')), threads))
    time.sleep(0.25)
  run.end()
  rows = [{'step': group[0][0], 'megabytes': round(statistics.median(x[1] for x in group), 1),
           'open_files': min(x[2] for x in group),  # Others are those of a save under way.
           'threads': max(x[3] for x in group)}
          for group in (seen[part] for part in sorted(seen)) if 0 < group[0][0] < steps]
  tenth = next(row for row in rows if row['step'] >= steps / 10)
  grown = rows[-1]['megabytes'] - tenth['megabytes']
  fewest = lambda rows: min(row['open_files'] for row in rows)  # between saves
  saves = (rows[-1]['step'] - tenth['step']) / SAVE
  return {'steps': steps, 'saves': steps // SAVE, 'evaluations': steps // EVAL,
          'seconds': round(run.seconds, 1), 'megabytes_grown_after_a_tenth': round(grown, 1),
          'kilobytes_grown_per_save': round(1024 * grown / saves, 1),
          'open_files_grown': fewest(rows[len(rows) // 2:]) - fewest(rows[:len(rows) // 2]),
          'on_the_way': rows}


def check(holds: bool, message: str, folder: pathlib.Path) -> None:
  if not holds:
    raise SystemExit(f'{message} The last run said:\n{(folder / "log").read_text()}')


def tell(result: dict, output: str | None) -> None:
  """Prints a part, and writes it beside what `output` has of others."""
  text = json.dumps(result, indent=1)
  print(text, flush=True)
  if output:
    path = pathlib.Path(output)
    others = json.loads(path.read_text('utf-8')) if path.exists() else {}
    path.write_text(json.dumps({**others, **result}, indent=1) + '\n', 'utf-8')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--run_steps', type=int, default=800, help='of a run that is killed')
  parser.add_argument('--steps', type=int, default=20000, help='of the long run; 0 for none')
  parser.add_argument('--output', help='also write the JSON here')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='kill_training.') as folder:
    folder = pathlib.Path(folder)
    write_base(folder)
    if flags.kills:
      killed = kill(folder, flags.kills, flags.run_steps, flags.seed)
      tell({'seed': flags.seed, 'killed': killed}, flags.output)
    if flags.steps:
      tell({'long_run': long_run(folder, flags.steps)}, flags.output)


if __name__ == '__main__':
  main()

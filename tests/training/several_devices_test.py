"""One code path: a run is the same on one device, on eight in any preset, in two processes."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning_jax import launch, param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.training import run

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / 'several_devices.py'
TOLERANCE = 1e-5
RUNS = {  # name: (method, preset, further flags)
    # What eight devices do not divide is rounded up.
    'data': ('prompt_tuning', 'data', ('--gin.run.train.eval_batch_size=6',)),
    'fsdp': ('prompt_tuning', 'fsdp', ()),
    'tensor': ('prompt_tuning', 'tensor', ()),
    'fsdp_tensor': ('prompt_tuning', 'fsdp_tensor', ('--gin.MODEL_PARALLELISM=4',)),
    'prefix_tensor': ('prefix_tuning', 'tensor', ()),
    'lora_fsdp_tensor': ('lora', 'fsdp_tensor', ()),
    'all_data': ('model_tuning', 'data', ()),
    'all_fsdp': ('model_tuning', 'fsdp', ()),
}


def command(folder, base, reviews, method, preset, more=(), steps=4) -> list[str]:
  """Flags of `train`. Dropout is on: masks must not depend on how many devices there are."""
  length = () if method in ('lora', 'model_tuning', 'prompt_design') else ('--gin.PROMPT_LENGTH=4',)
  return [
      '--gin_file=run/prompt_tuning_text_file.gin', f'--gin_file=method/{method}.gin',
      f'--gin_file=partitioning/{preset}.gin', f'--gin.MODEL_DIR={folder}',
      f'--gin.INITIAL_CHECKPOINT_PATH={base}', f'--gin.TRAIN_FILE={reviews}',
      f'--gin.TRAIN_STEPS={steps}', '--gin.BATCH_SIZE=16', '--gin.EVAL_PERIOD=4',
      '--gin.SAVE_PERIOD=4', '--gin.DROPOUT_RATE=0.1', '--gin.run.train.log_period=1',
      '--gin.run.train.max_eval_examples=20',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}", *length, *more]


def lines(folder) -> list[dict]:
  """What the run reported, without what depends on the clock."""
  return [{name: value for name, value in json.loads(line).items() if name != 'examples_per_second'}
          for line in (folder / 'metrics.jsonl').read_text('utf-8').splitlines()]


def leaves(folder) -> dict[str, np.ndarray]:
  """What trained."""
  last = folder / 'prompts' / 'last'
  if last.is_dir():
    return param_paths.flatten(base_checkpoint.load_base(str(last)).params)
  return prompt_file.load(last.with_suffix('.safetensors')).params


def assert_alike(one, other):
  for line, expected in zip(lines(one), lines(other), strict=True):
    assert line.keys() == expected.keys()
    for name, value in expected.items():
      assert line[name] == (value if isinstance(value, str) else
                            pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)), name
  trained, expected = leaves(one), leaves(other)
  assert trained.keys() == expected.keys()
  for path in expected:
    np.testing.assert_allclose(trained[path], expected[path], rtol=TOLERANCE, atol=TOLERANCE,
                               err_msg=path)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  """The token cache of all runs here."""
  with pytest.MonkeyPatch.context() as patch:
    folder = tmp_path_factory.mktemp('cache')
    patch.setenv('PROMPT_TUNING_JAX_CACHE', str(folder))
    yield folder


@pytest.fixture(scope='module')
def on_one_device(cache, tmp_path_factory, tiny_base, reviews):
  """{method: MODEL_DIR}."""
  folders = {}
  for method in {method for method, *_ in RUNS.values()}:
    folders[method] = tmp_path_factory.mktemp('one') / method
    train_here(command(folders[method], tiny_base, reviews, method, 'data'))
  return folders


def train_here(argv: list[str]) -> None:
  """As `python -m prompt_tuning_jax.train` would, in this process, on one device."""
  flags = launch.parse_flags(argv)
  launch.read_config(launch.find_files(flags.gin_file), flags.gin_bindings, run.train)
  run.train(**launch.resolve(run.train, config_text=None)[0])


@pytest.fixture(scope='module')
def on_eight_devices(cache, tmp_path_factory, tiny_base, reviews):
  """MODEL_DIRs of all `RUNS`, in one process."""
  folder = tmp_path_factory.mktemp('eight')
  given = [command(folder / name, tiny_base, reviews, *settings)
           for name, settings in RUNS.items()]
  done = subprocess.run([sys.executable, str(SCRIPT), 'run'], input=json.dumps(given), text=True,
                        capture_output=True, check=False)
  assert done.returncode == 0, done.stderr
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('name', RUNS)
def test_eight_devices_train_as_one_does(on_one_device, on_eight_devices, name):
  assert_alike(on_eight_devices / name, on_one_device[RUNS[name][0]])


@pytest.mark.slow
def test_virtual_devices_of_a_processor_share_one_copy_of_the_base(tiny_base):
  done = subprocess.run([sys.executable, str(SCRIPT), 'copies'], input=json.dumps([str(tiny_base)]),
                        text=True, capture_output=True, check=False)
  assert done.returncode == 0, done.stderr
  copies, = json.loads(done.stdout)
  assert copies and set(copies.values()) == {1}, copies


def in_two_processes(argv: list[str], second: tuple[str, ...] = ()) -> list[subprocess.Popen]:
  """`python -m prompt_tuning_jax.train` twice, with four devices each."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  environment = {**os.environ, 'JAX_NUM_CPU_DEVICES': '4'}
  return [subprocess.Popen(
      [sys.executable, '-m', 'prompt_tuning_jax.train', *argv, *(second if i else ()),
       f'--coordinator_address={address}', '--num_processes=2', f'--process_id={i}'],
      stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
          for i in range(2)]


def finished(running: list[subprocess.Popen]) -> list[str]:
  """What they said."""
  said = [process.communicate(timeout=600)[1] for process in running]
  print(*said, sep='\n')  # shown where this fails
  assert [process.returncode for process in running] == [0, 0]
  return said


@pytest.mark.slow
@pytest.mark.parametrize('preset', ['data', 'fsdp_tensor', 'tensor'])
def test_two_processes_train_as_one_device_does(on_one_device, tmp_path, tiny_base, reviews,
                                                preset):
  argv = command(tmp_path / 'model', tiny_base, reviews, 'prompt_tuning', preset)
  said = finished(in_two_processes(argv))
  assert_alike(tmp_path / 'model', on_one_device['prompt_tuning'])
  assert 'The trained prompt' in said[0] and 'step' not in said[1]
  report = json.loads((tmp_path / 'model' / 'report.json').read_text('utf-8'))
  assert report['steps'] == 4 and report['best_step'] == 4


@pytest.mark.slow
@pytest.mark.parametrize(('method', 'preset', 'more'), [
    ('prompt_design', 'fsdp', ('--gin.EXAMPLES=2',)),
    ('prefix_tuning', 'tensor', ('--gin_file=prefix/words.gin', '--gin.PREFIX_TEXT=a dull film',
                                 '--gin.prefix_tuning.PrefixTuning.width=None')),
    ('evolutionary_search', 'fsdp_tensor', ())])
def test_two_processes_start_from_words_of_a_base_in_parts(
    cache, tmp_path, tiny_base, reviews, method, preset, more):
  argv = lambda name, preset: command(tmp_path / name, tiny_base, reviews, method, preset, more)
  finished(in_two_processes(argv('two', preset)))
  train_here(argv('one', 'data'))
  assert_alike(tmp_path / 'two', tmp_path / 'one')


@pytest.mark.slow
def test_sigterm_to_one_process_stops_both_and_the_same_command_resumes(
    cache, tmp_path, tiny_base, reviews):
  argv = lambda name, steps: command(tmp_path / name, tiny_base, reviews, 'prompt_tuning', 'data',
                                     ('--gin.EVAL_PERIOD=0', '--gin.SAVE_PERIOD=0'), steps)
  running = in_two_processes(argv('parts', 100_000))
  for line in running[0].stderr:
    if line.startswith('step'):
      running[1].send_signal(signal.SIGTERM)
      break
  said = finished(running)
  stopped = max(int(folder.name) for folder in (tmp_path / 'parts' / 'checkpoints').iterdir()
                if folder.name.isdecimal())
  assert all(f'Stopping at step {stopped} ' in each for each in said)
  assert lines(tmp_path / 'parts')[-1]['step'] == stopped
  said = finished(in_two_processes(argv('parts', stopped + 3)))
  assert f'Resuming at step {stopped}.' in said[0]
  finished(in_two_processes(argv('whole', stopped + 3)))
  assert lines(tmp_path / 'parts') == lines(tmp_path / 'whole')
  for path, leaf in leaves(tmp_path / 'whole').items():
    np.testing.assert_array_equal(leaves(tmp_path / 'parts')[path], leaf)


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other(cache, tmp_path, tiny_base, reviews):
  argv = command(tmp_path / 'model', tiny_base, reviews, 'prompt_tuning', 'data')
  running = in_two_processes(argv, second=('--gin.run.train.metric=no_such_metric',))
  said = [process.communicate(timeout=300)[1] for process in running]
  assert running[0].returncode and running[1].returncode == 1
  assert 'no_such_metric' in said[1] and not (tmp_path / 'model' / 'report.json').exists()


@pytest.mark.slow
def test_a_base_that_devices_share_scores_alike(on_one_device, tmp_path, tiny_base, reviews):
  rows = [json.loads(line) for line in reviews.read_text('utf-8').splitlines()[:20]]
  (tmp_path / 'rows.jsonl').write_text(''.join(
      json.dumps({'inputs': row['text'], 'targets': row['label']}) + '\n' for row in rows))
  prompt = on_one_device['prompt_tuning'] / 'prompts' / 'last.safetensors'
  scores = []
  for devices, parallelism in ((1, 1), (8, 4)):
    output = tmp_path / f'{devices}.jsonl'
    subprocess.run(
        [sys.executable, '-m', 'prompt_tuning_jax.score', f'--base={tiny_base}',
         f'--prompt={prompt}', f'--input={tmp_path / "rows.jsonl"}', f'--output={output}',
         f'--model_parallelism={parallelism}'], check=True, env={
             **os.environ, 'JAX_NUM_CPU_DEVICES': str(devices)})
    scores.append([json.loads(line)['log_likelihood'] for line in open(output, encoding='utf-8')])
  assert scores[0] == pytest.approx(scores[1], rel=TOLERANCE)

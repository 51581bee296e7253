"""The scripts of jobs/: what they would run, what they run, and what they refuse.

gcloud, xpk, sbatch and the like are stood in for by a program that records its arguments and
answers as the test says.
"""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

JOBS = pathlib.Path(__file__).resolve().parent.parent / 'jobs'
SCRIPTS = sorted([*JOBS.glob('*.sh'), *JOBS.glob('*.sbatch')])
NAME = lambda path: path.name
TRAINING = ['--gin_file=run/prompt_tuning.gin', "--gin.INPUTS=it's {text}: \"a\" $b"]
PLACE = ['--zone=us-west4-a', '--project=mine']
TPU = ['--name=run-1', '--accelerator=v5litepod-16', '--model_dir=gs://bucket/run-1', *PLACE]
IMAGE = '--image=us-docker.pkg.dev/mine/images/prompt_tuning_jax'
COMMANDS = {
    'tpu_vm.sh': TPU,
    'queued_resource.sh': [*TPU, '--spot'],
    'xpk.sh': ['--name=run-1', '--cluster=c', '--tpu_type=v5litepod-16', IMAGE, *PLACE,
               '--model_dir=gs://bucket/run-1'],
    'vertex.sh': ['--name=run-1', '--region=us-west1', '--machine=a2-highgpu-1g', IMAGE,
                  '--gpu=NVIDIA_TESLA_A100', '--spot', '--model_dir=gs://bucket/run-1'],
    'slurm.sh': ['--name=run-1', '--nodes=2', '--gpus_per_node=8', '--time=24:00:00',
                 '--model_dir=gs://bucket/run-1', '--account=us'],
}
# Records its arguments; prints and ends as the next line of answers/NAME.VERB says.
STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
here, name, given = pathlib.Path(__file__).parent, pathlib.Path(sys.argv[0]).name, sys.argv[1:]
told = {{}}
for argument in given:
  if argument.startswith('--config=') and pathlib.Path(argument[9:]).exists():
    told['config'] = pathlib.Path(argument[9:]).read_text()
with open(here / 'calls.jsonl', 'a') as calls:
  calls.write(json.dumps([name, *given]) + '\\n')
(here / 'told.json').write_text(json.dumps(told))
verb = next((word for word in ('describe', 'create', 'delete', 'ssh') if word in given), '')
answers = here / f'{{name}}.{{verb}}'
if answers.exists():
  first, *rest = answers.read_text().split('\\n')
  answers.write_text('\\n'.join(rest if rest else [first]))
  if first == 'FAIL':
    sys.exit(1)
  print(first)
"""


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
  """The folder of stand-ins, which PATH begins with."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  for name in ('gcloud', 'xpk', 'sbatch', 'srun', 'scontrol'):
    (folder / name).write_text(STAND_IN)
    (folder / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')
  monkeypatch.setenv('POLL_SECONDS', '0')
  return folder


def call(script, *arguments, cwd=None):
  return subprocess.run(['bash', str(JOBS / script), *arguments], capture_output=True, text=True,
                        cwd=cwd, timeout=60, check=False)


def calls(folder):
  path = folder / 'calls.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def printed(done):
  """The commands of a dry run, as lists of arguments."""
  assert not done.returncode, done.stderr
  return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith('#')]


@pytest.mark.parametrize('path', SCRIPTS, ids=NAME)
def test_shellcheck_finds_nothing(path):
  beside = os.pathsep.join([os.path.dirname(sys.executable), os.environ['PATH']])
  program = shutil.which('shellcheck', path=beside) or pytest.skip(
      'shellcheck is not installed: .[test] has it')
  done = subprocess.run([program, '-x', path.name], cwd=JOBS, capture_output=True, text=True,
                        check=False)
  assert not done.returncode, done.stdout


def test_every_script_is_run_here():
  sourced_or_inner = {'arguments.sh', 'tpu.sh', 'worker.sh', 'slurm.sbatch'}
  assert {path.name for path in SCRIPTS} == COMMANDS.keys() | sourced_or_inner


@pytest.mark.parametrize('script', COMMANDS)
def test_a_dry_run_prints_what_a_run_runs(script, stand_ins):
  arguments = [*COMMANDS[script], '--', *TRAINING]
  dry = printed(call(script, '--dry_run', *arguments))
  assert not calls(stand_ins)  # it runs nothing
  state = {'tpu_vm.sh': '\nREADY', 'queued_resource.sh': '\nCREATING\nACTIVE'}.get(script)
  if state:
    (stand_ins / 'gcloud.describe').write_text(state)
  done = call(script, *arguments)
  assert not done.returncode, done.stderr
  ran = [words for words in calls(stand_ins) if 'describe' not in words]
  is_file = lambda word: word.startswith('--config=')
  strip = lambda words: [word for word in words if not is_file(word)]
  assert list(map(strip, ran)) == list(map(strip, dry))


def worker_arguments(words):
  """What worker.sh gets of a command that starts it: [MODEL_DIR, flags…]."""
  if any(word.endswith('worker.sh') for word in words):
    at = next(i for i, word in enumerate(words) if word.endswith('worker.sh'))
    return words[at + 1:]
  inner = next(word for word in words if word.startswith('--command=') and 'worker.sh' in word)
  return worker_arguments(shlex.split(inner.removeprefix('--command=')))


@pytest.mark.parametrize('script', ['tpu_vm.sh', 'queued_resource.sh', 'xpk.sh', 'slurm.sh'])
def test_the_flags_of_the_training_come_through_every_shell(script):
  dry = printed(call(script, '--dry_run', *COMMANDS[script], '--', *TRAINING))
  last = next(words for words in reversed(dry) if any('worker.sh' in word for word in words))
  assert worker_arguments(last) == ['gs://bucket/run-1', *TRAINING, '--multiprocess']


def test_tpu_vm_commands(stand_ins):
  made, copied, install, train = printed(
      call('tpu_vm.sh', '--dry_run', *TPU, '--spot', '--', *TRAINING))
  tpu = ['gcloud', 'compute', 'tpus', 'tpu-vm']
  assert made == [*tpu, 'create', 'run-1', *PLACE, '--accelerator-type=v5litepod-16',
                  '--version=v2-alpha-tpuv5-lite', '--spot', '--quiet']
  assert copied == [*tpu, 'scp', str(JOBS / 'worker.sh'), 'run-1:', *PLACE, '--worker=all',
                    '--quiet']
  for words in (install, train):
    assert words[:-1] == [*tpu, 'ssh', 'run-1', *PLACE, '--worker=all', '--quiet']
  words = shlex.split(install[-1].removeprefix('--command='))
  assert words[words.index('install', 5):][:4] == [
      'install', '-q', '--python=venv/bin/python', 'prompt_tuning_jax[tpu,gcs]']


def test_a_preempted_tpu_is_made_again_and_a_ready_one_taken(stand_ins):
  (stand_ins / 'gcloud.describe').write_text('READY\nPREEMPTED\nPREEMPTED\n\nREADY')
  (stand_ins / 'gcloud.ssh').write_text('\nFAIL\n')  # the training ends as its machine does
  done = call('tpu_vm.sh', *TPU, '--', *TRAINING)
  assert not done.returncode, done.stderr
  verbs = [words[4] for words in calls(stand_ins)]
  once = ['scp', 'ssh', 'ssh', 'describe']
  assert verbs == ['describe', *once, 'describe', 'delete', 'describe', 'create', *once]


def test_a_suspended_request_is_queued_again(stand_ins):
  (stand_ins / 'gcloud.describe').write_text(
      'SUSPENDED\n\nWAITING_FOR_RESOURCES\nACTIVE\nSUSPENDING\nSUSPENDED\n\nACTIVE\nACTIVE')
  done = call('queued_resource.sh', *TPU, '--', *TRAINING)
  assert not done.returncode, done.stderr
  verbs = [words[4] for words in calls(stand_ins) if words[4] != 'describe']
  train = ['scp', 'ssh', 'ssh']
  assert verbs == ['delete', 'create', *train, 'delete', 'create', *train, 'delete']


def test_a_training_that_fails_keeps_its_tpu(stand_ins):
  (stand_ins / 'gcloud.describe').write_text('ACTIVE')
  (stand_ins / 'gcloud.ssh').write_text('FAIL')
  done = call('queued_resource.sh', *TPU, '--', *TRAINING)
  assert done.returncode == 2 and 'the training failed' in done.stderr
  assert 'delete' not in [words[4] for words in calls(stand_ins)]


def test_a_workload_is_made_though_there_was_none_to_delete(stand_ins):
  (stand_ins / 'xpk.delete').write_text('FAIL')
  assert not call('xpk.sh', *COMMANDS['xpk.sh'], '--', *TRAINING).returncode
  _, made = calls(stand_ins)
  assert {'--max-restarts=100', '--num-slices=1', '--workload=run-1',
          '--termination-grace-period-seconds=120'} <= set(made)


def test_the_job_of_vertex(stand_ins):
  yaml = pytest.importorskip('yaml')
  assert not call('vertex.sh', *COMMANDS['vertex.sh'], '--', *TRAINING).returncode
  job = yaml.safe_load(json.loads((stand_ins / 'told.json').read_text())['config'])
  assert job == {
      'workerPoolSpecs': [{
          'replicaCount': 1,
          'machineSpec': {'machineType': 'a2-highgpu-1g', 'acceleratorType': 'NVIDIA_TESLA_A100',
                          'acceleratorCount': 1},
          'containerSpec': {'imageUri': IMAGE.removeprefix('--image='),
                            'command': ['bash', '/app/jobs/worker.sh'],
                            'args': ['gs://bucket/run-1', *TRAINING]}}],
      'scheduling': {'restartJobOnWorkerRestart': True, 'strategy': 'SPOT'}}
  dry = call('vertex.sh', '--dry_run', *COMMANDS['vertex.sh'], '--', *TRAINING)
  shown = [line[2:] for line in dry.stdout.splitlines() if line.startswith('# ')]
  assert yaml.safe_load('\n'.join(shown)) == job


@pytest.mark.parametrize('script', COMMANDS)
@pytest.mark.parametrize('given, message', [
    (['--nmae=x'], '--nmae is not a flag'), (['--name'], '--name needs a value'),
    (['--name model_dir=x'], '--name model_dir is not a flag'),
    (['--name=Run 1'], '--name should be'), (['run-1'], 'expected --NAME=VALUE, got run-1'),
    (['--model_dir=/tmp/x y', '--model_dir=gs://b'], 'gs://BUCKET/FOLDER'),
    (['--', '--gin.X=1'], 'no --gin_file=FILE'), (['--', '--gin_file', 'f'], 'no --gin_file=FILE'),
    (['--', '--gin_file=f', '--gin.MODEL_DIR=x'], '--gin.MODEL_DIR')], ids=lambda value: value[0])
def test_what_cannot_be_is_one_line(script, given, message, stand_ins):
  training = [] if '--' in given else ['--', *TRAINING]
  done = call(script, *COMMANDS[script], *given, *training)
  assert done.returncode == 2 and message in done.stderr
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  assert not calls(stand_ins)


def test_a_python_that_slurm_would_cut_off_is_refused(stand_ins):
  done = call('slurm.sh', *COMMANDS['slurm.sh'], '--python=/opt/a,b/python', '--', *TRAINING)
  assert done.returncode == 2 and '--python may have no comma' in done.stderr
  assert not calls(stand_ins)


@pytest.mark.parametrize('script', COMMANDS)
def test_what_is_missing_is_told_and_help_says_all_flags(script):
  done = call(script, '--', *TRAINING)
  assert done.returncode == 2 and 'is missing' in done.stderr
  text = call(script, '--help').stdout
  assert all(f'--{word.split("=")[0][2:]}' in text for word in COMMANDS[script])


# Stands in for Python: "trains" until it gets SIGTERM, or ends at once with the status in $END.
PYTHON = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then cp "$3" "$KEPT" && echo "$4" >"$KEPT.place"; exit; fi
printf '%s\\n' "$@"
[[ ! $END ]] || exit "$END"
trap 'echo saved; exit 0' TERM
echo ready
while true; do sleep 0.05; done
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
  """start(*command) of what runs on a machine: a process, of which `tmp_path`/kept is the log."""
  (tmp_path / 'python').write_text(PYTHON)
  (tmp_path / 'python').chmod(0o755)
  monkeypatch.setenv('PYTHON', str(tmp_path / 'python'))
  monkeypatch.setenv('KEPT', str(tmp_path / 'kept'))
  monkeypatch.setenv('END', '')
  return lambda *command: subprocess.Popen(['bash', *map(str, command)], stdout=subprocess.PIPE,
                                           text=True)


def started(process):
  """What it printed until the training was ready."""
  lines = []
  while not lines or lines[-1] != 'ready':
    line = process.stdout.readline()
    assert line, lines
    lines.append(line.rstrip())
  return lines[:-1]


@pytest.mark.parametrize('end', ['0', '1'])
def test_a_worker_ends_as_its_training_and_keeps_what_it_printed(
    worker, tmp_path, monkeypatch, end):
  monkeypatch.setenv('END', end)
  process = worker(JOBS / 'worker.sh', 'gs://bucket/run', *TRAINING)
  shown, _ = process.communicate(timeout=60)
  assert process.returncode == int(end)
  assert shown.splitlines() == ['-m', 'prompt_tuning_jax.train', *TRAINING,
                                '--gin.MODEL_DIR=gs://bucket/run']
  assert (tmp_path / 'kept').read_text() == shown
  assert (tmp_path / 'kept.place').read_text().startswith('gs://bucket/run/logs/20')


def test_a_worker_that_is_stopped_saves_and_is_not_done(worker, tmp_path):
  process = worker(JOBS / 'worker.sh', 'gs://bucket/run', *TRAINING)
  started(process)
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=60)[0] == 'saved\n'
  assert process.returncode == 143
  assert (tmp_path / 'kept').read_text().endswith('saved\n')


def test_a_local_model_dir_needs_no_copy_of_the_log(worker, tmp_path, monkeypatch):
  monkeypatch.setenv('END', '0')
  process = worker(JOBS / 'worker.sh', tmp_path / 'run', *TRAINING)
  process.communicate(timeout=60)
  assert not process.returncode and not (tmp_path / 'kept').exists()


def test_a_preempted_slurm_job_goes_back_into_the_queue(worker, stand_ins, monkeypatch, tmp_path):
  (stand_ins / 'srun').write_text('#!/usr/bin/env bash\nshift && exec "$@"\n')
  monkeypatch.setenv('SLURM_JOB_ID', '17')
  command = (JOBS / 'slurm.sbatch', JOBS / 'worker.sh', tmp_path / 'run', *TRAINING)
  process = worker(*command)
  assert started(process)[:2] == ['-m', 'prompt_tuning_jax.train']
  process.send_signal(signal.SIGTERM)
  assert process.communicate(timeout=60)[0] == 'saved\n' and not process.returncode
  assert calls(stand_ins) == [['scontrol', 'requeue', '17']]
  monkeypatch.setenv('END', '3')
  process = worker(*command)
  process.communicate(timeout=60)
  assert process.returncode == 3 and len(calls(stand_ins)) == 1

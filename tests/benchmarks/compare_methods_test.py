"""The comparison of methods: its settings are runs that exist, its table is what they report."""

import importlib.util
import json
import pathlib
import tomllib

import pytest

from prompt_tuning_jax import launch

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks'
SETTINGS = tomllib.loads((FOLDER / 'compare_methods.toml').read_text('utf-8'))
_spec = importlib.util.spec_from_file_location('compare_methods', FOLDER / 'compare_methods.py')
compare_methods = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compare_methods)


@pytest.mark.parametrize(('method', 'task'), [
    *((method, 'sst2') for method in SETTINGS['methods']),
    *(('lora', task) for task in SETTINGS['tasks'])])
def test_every_run_is_understood(method, task, tmp_path):
  _, _, verb, *flags = compare_methods.command(SETTINGS, method, task, 3, tmp_path)
  assert verb == 'prompt_tuning_jax.train'
  assert launch.train([*flags, '--dry_run']) == 0


def test_seeds_become_a_mean_and_its_spread(tmp_path):
  settings = {'common': {}, 'tasks': {'a': {}}, 'methods': {'m': {'gin': ['X=1']}}}
  reports = []
  for seed, score in enumerate((60.0, 70.0)):
    folder = tmp_path / 'm' / 'a' / str(seed)
    folder.mkdir(parents=True)
    (folder / 'report.json').write_text(json.dumps({
        'metric': 'accuracy', 'best_value': score, 'trainable_parameters': 5120,
        'saved_parameters': 512, 'parameters': 10 ** 6, 'saved_bytes': 2048, 'seconds': 10 + seed,
        'seconds_to_best': 5, 'peak_bytes': 7}))
    command = compare_methods.command(settings, 'm', 'a', seed, folder)
    assert '--gin.X=1' in command
    (folder / 'command.json').write_text(json.dumps(command[1:]))
    reports.append(compare_methods.report_of(settings, 'm', 'a', seed, tmp_path))
  cell = compare_methods.cell(reports)
  assert (cell['mean'], cell['scores']) == (65.0, [60.0, 70.0])
  assert cell['deviation'] == pytest.approx(50 ** 0.5)
  lines = compare_methods.table({'m': {'a': cell}}, ['a']).splitlines()
  assert [part.strip() for part in lines[2].split('|')[1:-1]] == [
      'm', '5,120', '512', '2 KiB', '65.0 ± 7.1', '10']
  compare_methods.plot({'m': {'a': cell}}, ['a'], tmp_path / 'results.png')
  assert (tmp_path / 'results.png').stat().st_size > 1000
  with pytest.raises(SystemExit, match='holds a run of other settings'):
    compare_methods.report_of({**settings, 'common': {'gin': ['Y=2']}}, 'm', 'a', 0, tmp_path)


NETWORKS = tomllib.loads((FOLDER / 'compare_networks.toml').read_text('utf-8'))
_spec = importlib.util.spec_from_file_location('pretrain_networks',
                                               FOLDER / 'pretrain_networks.py')
pretrain_networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(pretrain_networks)


@pytest.mark.slow
@pytest.mark.parametrize('name', pretrain_networks.NETWORKS)
def test_every_network_is_pretrained_and_then_compared(name, tmp_path):
  """Commands and settings are understood, each method's on this network."""
  text = tmp_path / 'text.txt'
  text.write_text('a text\n')
  vocabulary, start, training = pretrain_networks.commands(name, [str(text)], tmp_path, 20)
  assert vocabulary[2] == 'prompt_tuning_jax.train_vocabulary'
  assert f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path / name}_start'" in training
  assert start[2:4] == ['prompt_tuning_jax.warm_start', f'--network={name}_micro']
  (tmp_path / f'{name}.json').write_text('{}')
  assert launch.train([*training[3:], '--gin.INITIAL_CHECKPOINT_PATH=None', '--dry_run']) == 0
  for method in NETWORKS['methods']:
    task = 'gpt2' if name == 'gpt' else name
    _, _, _, *flags = compare_methods.command(NETWORKS, method, task, 0, tmp_path / 'run')
    base = f"--gin.INITIAL_CHECKPOINT_PATH='/tmp/networks/{name}'"
    flags[flags.index(base)] = f'--gin_file=network/{name}_micro.gin'
    assert launch.train([*flags, '--gin.INITIAL_CHECKPOINT_PATH=None', '--dry_run']) == 0

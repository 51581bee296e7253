"""The full-size recipes for SuperGLUE: they are the papers' runs, and tell their sizes offline."""

import ast
import pathlib
import socket

import efficiency
import pytest

from prompt_tuning_jax import launch
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.training import methods, run

ROOT = pathlib.Path(__file__).resolve().parent.parent
TASKS = sorted(path.stem.removeprefix('superglue_')
               for path in (ROOT / 'gin' / 'run').glob('superglue_*.gin'))
WORDS = {  # of tasks that have no labels (Lester et al. 2021, appendix)
    'record': {'commonsense', 'reasoning', 'reading', 'comprehension'},
    'wsc': {'commonsense', 'pronoun', 'resolution'}}


def _command(task: str, size: str) -> list[str]:
  checkpoint = f'gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_{size}/checkpoint_1100000'
  return [f'--gin_file=run/superglue_{task}.gin', f'--gin_file=network/t5_1_1_{size}.gin',
          '--gin_file=vocabulary/t5.gin', f'--gin.INITIAL_CHECKPOINT_PATH={checkpoint}',
          f'--gin.MODEL_DIR=/data/superglue/{size}/{task}']


def _constants(name: str) -> set[str]:
  tree = ast.parse((ROOT / 'tasks' / f'{name}.py').read_text(encoding='utf-8'))
  return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize('task', TASKS)
def test_a_recipe_is_the_papers_run(task):
  flags = launch.parse_flags(_command(task, 'small'))
  launch.read_config(launch.find_files(flags.gin_file), flags.gin_bindings, run.train)
  given, text = launch.resolve(run.train, config_text=None)
  labels = given['method'].initializer.labels
  assert given['method'] == methods.PromptTuning(100, 'before', initializers.ClassLabels(labels))
  assert set(labels) == WORDS.get(task, set(labels) & _constants('super_glue'))
  assert f'super_glue_{task}' in _constants(task if task in WORDS else 'super_glue')
  assert given['task'].name == f'super_glue_{task}'
  expected = {'train_steps': 30000, 'batch_size': 32, 'dropout_rate': 0.1, 'rank_labels': False,
              'eval_period': 1000}
  assert {key: given[key] for key in expected} == expected
  assert 'optimizers.adafactor.learning_rate = 0.3\n' in text


def test_all_eight_are_there():
  assert TASKS == ['boolq', 'cb', 'copa', 'multirc', 'record', 'rte', 'wic', 'wsc']


@pytest.mark.parametrize('size, numbers', [
    pytest.param(size, numbers, id=size, marks=[] if size == 'small' else [pytest.mark.slow])
    for size, numbers in zip(efficiency.SIZES, efficiency.PAPER, strict=True)])
def test_a_recipe_tells_its_sizes_without_a_network_or_data(size, numbers, monkeypatch, capsys):
  monkeypatch.setattr(socket, 'getaddrinfo', lambda *given: pytest.fail('it asks the network'))
  monkeypatch.delenv('TFDS_DATA_DIR', raising=False)
  large = ['--gin_file=execution/large.gin', '--gin.PARAMETER_DTYPE=bfloat16',
           '--gin_file=partitioning/fsdp.gin']
  assert launch.train([*_command('boolq', size), *large, '--dry_run']) == 0
  told = dict(line[1:].rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()
              if line.startswith('#   '))
  sizes = {key.strip(): int(value.replace(',', '')) for key, value in told.items()}
  assert sizes['parameters that train'] == numbers
  assert sizes['bytes of the frozen base (bfloat16)'] == 2 * sizes['parameters that are frozen']
  assert sizes['bytes of the optimizer state'] < 1.001 * 4 * numbers + 100
  assert 4 * numbers < sizes['bytes of the file that is kept'] < 4 * numbers + 2000

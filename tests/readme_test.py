"""What README tells to type: training commands are understood, and the example of a task works."""

import pathlib
import re
import shlex
import sys

import pytest

from prompt_tuning_jax import launch
from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.tasks import prepared

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {folder: (ROOT / folder / 'README.md').read_text('utf-8') for folder in (
    '.', 'benchmarks', 'benchmarks/reproduce', 'gin', 'gin/t5x', 'jobs', 'tasks',
    'prompt_tuning_jax/bases/mini', 'prompt_tuning_jax/bases/mini_large',
    'prompt_tuning_jax/serving')}
CONTRIBUTING = (ROOT / 'CONTRIBUTING.md').read_text('utf-8')
SHELL = '\n'.join(re.findall(r'```bash\n(.*?)```', '\n'.join(
    PAGES[folder] for folder in ('.', 'benchmarks', 'gin', 'tasks')), re.DOTALL))
COMMANDS = [shlex.split(line, comments=True)
            for line in SHELL.replace('\\\n', ' ').splitlines()
            if line.startswith('python -m prompt_tuning_jax.train ')]


@pytest.mark.parametrize('command', COMMANDS, ids=range(len(COMMANDS)))
def test_training_commands_are_understood(command, tmp_path, monkeypatch):
  """All but what they read: a data file named in a command is made here."""
  monkeypatch.chdir(tmp_path)
  for name in ('train.jsonl', 'dev.jsonl', 'words.jsonl', 'spiece.model', 'tokenizer.json'):
    (tmp_path / name).write_text('{"text": "a", "label": "b"}\n')
  assert launch.train([*command[3:], '--dry_run']) == 0


@pytest.mark.parametrize('rate', ['Equal', 'Temperature', 'Proportional'])
def test_rates_are_named_on_the_command_line(rate, tmp_path, capsys):
  assert launch.train(['--gin_file=run/quick_start.gin', '--gin_file=task/mixture.gin',
                       "--gin.MIXTURE_TASKS=('sst2', 'mrpc')", f'--gin.RATE=@mixture.{rate}()',
                       f'--gin.MODEL_DIR={tmp_path}', '--dry_run']) == 0
  assert f'RATE = @mixture.{rate}()' in capsys.readouterr().out


def test_there_are_commands():
  assert len(COMMANDS) >= 12


@pytest.mark.parametrize('folder', PAGES)
def test_links_lead_to_files_and_headings(folder):
  for link in re.findall(r'\]\(([^)\s]+)\)', PAGES[folder]):
    if link.startswith('https://'):
      continue
    path, _, heading = link.partition('#')
    target = ROOT / folder / (path or 'README.md')
    assert target.exists(), link
    if heading:
      page = target / 'README.md' if target.is_dir() else target
      headings = re.findall(r'^#+ (.*)$', page.read_text('utf-8'), re.MULTILINE)
      assert heading in [re.sub(r'[^\w -]', '', text.lower()).replace(' ', '-')
                         for text in headings], link


def test_the_tree_has_every_module():
  tree = re.search(r'## The tree\n\n```\n(.*?)```', CONTRIBUTING, re.DOTALL)[1]
  named = set(re.findall(r'\w+\.py', tree))
  everywhere = {path.name for folder in ('prompt_tuning_jax', 'tasks')
                for path in (ROOT / folder).rglob('*.py')}
  assert named <= everywhere
  for folder in ('prompt_tuning_jax', 'prompt_tuning_jax/data', 'tasks'):
    modules = {path.name for path in (ROOT / folder).glob('[!_]*.py')}
    assert modules <= named, modules - named


def test_data_that_tfds_lacks_is_written_as_told(tmp_path, monkeypatch):
  pytest.importorskip('tensorflow_datasets')
  for name, text in (('train.txt', 'It was late.\n\nShe read on.\n'), ('validation.txt', 'No.')):
    (tmp_path / name).write_text(text)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  code = re.findall(r'```python\n(.*?)```', PAGES['tasks'], re.DOTALL)[0]
  exec(compile(code, 'tasks/README.md', 'exec'), {})
  dataset = prepared.declared()['lm_novels']
  assert not prepared.missing(dataset, str(tmp_path / 'tfds'))
  assert prepared.rows(dataset, 'train', str(tmp_path / 'tfds')) == 2


def test_the_example_of_a_benchmark_is_a_task(tmp_path, monkeypatch):
  tfds = pytest.importorskip('tensorflow_datasets')

  class RottenTomatoes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """As in the TFDS catalogue, with two rows."""

    name, VERSION = 'rotten_tomatoes', tfds.core.Version('1.0.0')

    def _info(self):
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
          'text': tfds.features.Text(), 'label': tfds.features.ClassLabel(names=['neg', 'pos'])}))

    def _split_generators(self, dl_manager):
      return {'train': iter([(0, {'text': 'a gem .', 'label': 'pos'}),
                             (1, {'text': 'dull', 'label': 'neg'})])}

    def _generate_examples(self):
      raise AssertionError

  RottenTomatoes(data_dir=tmp_path / 'tfds').download_and_prepare()
  code = re.findall(r'```python\n(.*?)```', PAGES['tasks'], re.DOTALL)[-1]
  assert len(code.splitlines()) < 80
  (tmp_path / 'rotten_tomatoes.py').write_text(code)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'tfds'))
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'tfds'))
  seqio_builder.build('rotten_tomatoes', ['rotten_tomatoes'], 'train',
                      {'file': 'bytes', 'extra_ids': 100}, {'inputs': 30, 'targets': 12},
                      str(tmp_path / 'cache'), None)
  rows = token_cache.open_cache(tmp_path / 'cache').rows
  assert {(row['inputs'], row['targets'], row['target']) for row in rows} == {
      ('text: a gem .', 'positive', 1), ('text: dull', 'negative', 0)}
  assert rows[0]['choices'] == ['negative', 'positive']
  seqio = sys.modules['seqio']
  seqio.TaskRegistry.remove('rotten_tomatoes')
  assert sys.modules.pop('rotten_tomatoes')

"""`python -m prompt_tuning_jax.tasks`: what it lists, shows and refuses."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

from prompt_tuning_jax.tasks import __main__ as listing
from prompt_tuning_jax.tasks import prepared

TASKS = pathlib.Path(listing.__file__).parent
QUICK_START = """\
quick_start
  data     none: made up in its file
  splits   train 2,000, validation 300
  metrics  accuracy
  labels   novel, article
  example  the first of validation
  inputs   sentence: It is a river in northern Norway with a population of 63.
  targets  article
  choices  novel, article
  answer   1

"""


@pytest.fixture
def run(monkeypatch, capsys):
  """argv -> (exit status, standard output, standard error), with the environment put back."""
  pytest.importorskip('seqio')
  for name in ('TFDS_DATA_DIR', 'TF_CPP_MIN_LOG_LEVEL', 'CUDA_VISIBLE_DEVICES'):
    monkeypatch.setenv(name, '')

  def command(*argv: str) -> tuple[int, str, str]:
    status = listing.main(list(argv))
    return status, *capsys.readouterr()

  return command


def columns(table: str) -> dict[str, list[str]]:
  """First column -> the other two."""
  return {cells[0]: cells[1:] for cells in
          ([cell.strip() for cell in line.split('  ') if cell.strip()]
           for line in table.splitlines())}


def test_nothing_is_prepared(run, tmp_path):
  status, out, err = run('--tfds_data_dir', str(tmp_path))
  assert status == 0 and err == ''
  table = columns(out)
  assert table.pop('TASK') == ['METRICS', 'SPLITS']
  assert table['sst2, glue_sst2'] == ['accuracy', 'not prepared: glue/sst2:2.0.0']
  assert table['quick_start'] == ['accuracy', 'train 2,000, validation 300']
  assert table['span_corruption_local_text'] == [
      '-', 'not prepared: local_text/novels:1.0.0, local_text/wiki:1.0.0']
  assert table['prefix_lm_c4'] == ['-', 'not prepared: c4/en:3.0.1']
  names = [name for cell in table for name in cell.split(', ')]
  assert sorted(names) == sorted(prepared.declared()) and len(names) == len(set(names))
  assert len(out.splitlines()) == len(table) + 1


def test_sizes_are_those_of_the_prepared_data(run, tfds_data_dir):
  _, out, _ = run('--tfds_data_dir', str(tfds_data_dir))
  table, checked = columns(out), 0
  for task, name in (('sst2, glue_sst2', 'glue/sst2/2.0.0'), ('mrpc, glue_mrpc', 'glue/mrpc/2.0.0'),
                     ('lm_novels', 'local_text/novels/1.0.0')):
    info = tfds_data_dir / name / 'dataset_info.json'
    if info.exists():
      splits = {split['name']: sum(map(int, split['shardLengths']))
                for split in json.loads(info.read_text())['splits']}
      assert table[task][1] == ', '.join(
          f'{split} {splits[split]:,}' for split in ('train', 'validation', 'test')
          if split in splits)
      checked += 1
  if not checked:
    pytest.skip('TFDS_DATA_DIR has none of glue/sst2, glue/mrpc and local_text/novels')


def test_a_task_without_data(run, tmp_path):
  assert run('quick_start', '--tfds_data_dir', str(tmp_path)) == (0, QUICK_START, '')


def test_an_example_with_labels(run, tfds_data_dir):
  if prepared.missing(['glue/sst2:2.0.0'], str(tfds_data_dir)):
    pytest.skip('TFDS_DATA_DIR has no glue/sst2')
  status, out, err = run('glue_sst2', 'quick_start', '--tfds_data_dir', str(tfds_data_dir))
  first, second, *_ = out.split('\n\n')
  assert (status, err) == (0, '') and second + '\n\n' == QUICK_START
  lines = first.splitlines()
  assert lines[0] == 'glue_sst2 (also sst2)' and lines[1] == '  data     glue/sst2:2.0.0'
  assert lines[3:] == [
      '  metrics  accuracy', '  labels   negative, positive', '  example  the first of validation',
      '  inputs   sentence: it treats women like idiots .', '  targets  negative',
      '  choices  negative, positive', '  answer   0']


def test_metrics_have_the_names_of_their_numbers(run, tfds_data_dir):
  if prepared.missing(['squad/v1.1:3.0.0', 'super_glue/multirc:1.0.2'],
                      str(tfds_data_dir)):
    pytest.skip('TFDS_DATA_DIR has no squad/v1.1 or no super_glue/multirc')
  _, out, _ = run('squad', 'multirc', '--tfds_data_dir', str(tfds_data_dir))
  assert [line for line in out.splitlines() if line.startswith('  metrics')] == [
      '  metrics  exact_match, f1', '  metrics  f1a, exact_match']


def test_an_example_of_tokens(run, tfds_data_dir):
  if prepared.missing(['local_text/wiki:1.0.0'], str(tfds_data_dir)):
    pytest.skip('TFDS_DATA_DIR has no local_text/wiki')
  status, out, err = run('span_corruption_wiki', 'lm_wiki', '--tfds_data_dir', str(tfds_data_dir))
  assert (status, err) == (0, '')
  corrupted, plain = ({line.split()[0]: line[11:] for line in part.splitlines()[1:]}
                      for part in out.strip('\n').split('\n\n'))
  assert corrupted['length'] == plain['length'] == '160 tokens, here bytes'
  assert corrupted['inputs'].startswith('"Ruddigore" is<extra_id_0>entioned in the l<extra_id_1>')
  assert corrupted['targets'].startswith('<extra_id_0> m<extra_id_1>aw c<extra_id_2>')
  assert 'inputs' not in plain and plain['targets'].startswith('"Ruddigore" is mentioned in')


def test_long_texts_are_cut_and_stay_one_line(run, tmp_path, monkeypatch):
  monkeypatch.setattr(listing, 'SHOWN', 40)
  _, out, _ = run('quick_start', '--tfds_data_dir', str(tmp_path))
  assert '  inputs   sentence: It is a river in northern Norw … (67 characters)\n' in out


def test_an_unknown_task(run, tmp_path):
  assert run('quick_start', 'stst2', '--tfds_data_dir', str(tmp_path)) == (
      2, '', "There is no task 'stst2': is it 'sst2'? Without names, all are listed.\n")
  with pytest.raises(SystemExit) as stopped:
    run('--no_such_flag')
  assert stopped.value.code == 2


def test_unprepared_data(run, tmp_path):
  folder = str(tmp_path)
  status, out, err = run('quick_start', 'sst2', '--tfds_data_dir', folder)
  assert (status, out) == (1, '') and err.count('\n') == 1
  assert err.startswith(f'Task sst2 needs glue/sst2:2.0.0, not prepared in {folder}: ')
  assert f'`TFDS_DATA_DIR={folder} python -c ' in err and "tfds.load('glue/sst2:2.0.0')" in err
  status, _, err = run('lm_local_text', '--tfds_data_dir', folder)
  assert status == 1 and 'needs local_text/novels:1.0.0, local_text/wiki:1.0.0,' in err
  assert 'tfds.load' not in err and 'build it there' in err


def test_the_newest_version_of_what_is_prepared(tmp_path):
  for version, rows in (('1.0.0', ['3']), ('1.1.0', ['4', '5'])):
    folder = tmp_path / 'some/data' / version
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text(json.dumps(
        {'splits': [{'name': 'train', 'shardLengths': rows}, {'name': 'empty'}]}))
  (tmp_path / 'some/other/1.0.0').mkdir(parents=True)
  names = ['some/data:1.0.0', 'some/data:1.*.*', 'some/data', 'some/other:1.0.0', 'none:1.0.0']
  assert prepared.missing(names, str(tmp_path)) == names[3:]
  told = [prepared.rows(some, split, str(tmp_path)) for some, split in (
      (names[:1], 'train'), (names[1:2], 'train'), (names[:2], 'train'), (names[:1], 'test'),
      ([], 'train'), (names[:1], 'empty'))]
  assert told == [3, 9, 12, None, None, 0]


def test_a_declared_task_is_registered_and_a_registered_one_declared(run, tmp_path):
  run('--tfds_data_dir', str(tmp_path))
  import seqio
  ours = {name for name in seqio.TaskRegistry.names() for step in
          seqio.TaskRegistry.get(name).preprocessors
          if getattr(step, 'func', step).__module__.startswith('prompt_tuning_jax.tasks')}
  written = [task for path in TASKS.glob('*.py') for node in ast.parse(path.read_text()).body
             if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'TFDS_DATASETS'
             for task in ast.literal_eval(node.value)]
  assert len(written) == len(set(written))
  registered = {name for name in (*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names())}
  assert ours <= set(prepared.declared()) == set(written) <= registered


@pytest.mark.slow
def test_the_command_is_quiet(tmp_path):
  done = subprocess.run(
      [sys.executable, '-m', 'prompt_tuning_jax.tasks', 'quick_start',
       f'--tfds_data_dir={tmp_path}'], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout, done.stderr) == (0, QUICK_START, '')

"""A sweep: its combinations, what they are told, and that each is the run that it names."""

import json
import os
import signal
import statistics

import numpy as np
import pytest

from prompt_tuning_jax import launch, many_runs, sweep, verb
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.training import loop, population

RATE = 'optimizers.adafactor.learning_rate'


def test_combinations_are_the_product_and_bear_their_values():
  found = sweep.combinations([['PROMPT_LENGTH', '1', '20'], [RATE, '0.1', '0.3'],
                              ['gin_file', 'prompt/text.gin']])
  assert list(found) == [f'PROMPT_LENGTH={length},learning_rate={rate},text'
                         for length in (1, 20) for rate in (0.1, 0.3)]
  assert found['PROMPT_LENGTH=20,learning_rate=0.1,text'] == {
      'PROMPT_LENGTH': '20', RATE: '0.1', 'gin_file': 'prompt/text.gin'}
  assert list(sweep.combinations([['a.rate', '1'], ['b.rate', "('x', 2)"]])) == [
      'a.rate=1,b.rate=x_2']
  assert list(sweep.combinations(
      [['one/a.rate', '1'], ['two/a.rate', '../x', 'é y'], ['b/X', '2']])) == [
          f'one_a.rate=1,two_a.rate={value},b_X=2' for value in ('.._x', 'é_y')]  # of one folder


def test_a_run_of_a_sweep_is_a_command_of_train(tmp_path):
  made = sweep.commands(['--gin_file=run/quick_start.gin'], tmp_path, sweep.combinations(
      [['gin_file', 'prompt/random_uniform.gin'], ['PROMPT_LENGTH', '3', '4']]), [5, 7])
  assert len(made) == 4
  name = 'random_uniform,PROMPT_LENGTH=4/seed_7'
  flags = launch.parse_flags(made[name])
  assert flags.gin_file == ['run/quick_start.gin', 'prompt/random_uniform.gin']
  assert flags.gin_bindings == ['PROMPT_LENGTH = 4', f"MODEL_DIR = '{tmp_path}/{name}'",
                                'run.train.seed = 7']


def test_the_table_has_means_and_tells_what_diverged():
  report = {'metric': 'accuracy', 'best_step': 2, 'steps': 4, 'seconds': 1.0,
            'trainable_parameters': 8, 'prompt': 'file'}
  outcomes = {f'{name}/seed_{seed}': {**report, 'best_value': value}
              for name, values in (('a', (50.0, 70.0)), ('b', (80.0, None)))
              for seed, value in enumerate(values)}
  outcomes['b/seed_1'] = loop.Diverged('at step 3')
  rows = sweep.summary({'a': {'X': '1'}, 'b': {'X': '2'}}, [0, 1], outcomes)
  assert [(row['mean'], row['deviation'], row['diverged']) for row in rows] == [
      (60.0, pytest.approx(statistics.stdev([50, 70])), 0), (80.0, None, 1)]
  assert rows[1]['seeds']['1'] == {'diverged': 'at step 3'}
  first, second = sweep.table(rows).splitlines()
  assert first.split() == ['a', 'accuracy', '60', '±', '14']
  assert second.split() == ['b', 'accuracy', '80', '(1', 'diverged)']


def test_spaces_in_a_flag_of_train_make_it_no_value_of_ours():
  made = many_runs.flags_of(verb.bare_parser('sweep', ''), '', required=False)
  made.add_argument('--vary', action='append', nargs='+')
  lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 96, 'targets': 8}"
  flags, rest = many_runs.parsed(made, [
      '--gin_file=my runs/a.gin', '--vary', 'A', '1', '2', lengths, '--seeds', '0', '1',
      '--gin.INPUTS=review: {text}', '--dry_run'])
  assert (flags.vary, flags.seeds) == ([['A', '1', '2']], [0, 1])
  assert rest == ['--gin_file=my runs/a.gin', lengths, '--gin.INPUTS=review: {text}', '--dry_run']


@pytest.mark.parametrize('flags, said', [
    (['--vary', 'PROMPT_LENGTH'], 'needs values'), (['--vary', 'PROMPT_LENGTH', '2', '2'], 'Two'),
    (['--vary', 'PROMT_LENGTH', '2'], 'Did you mean PROMPT_LENGTH'),
    (['--vary', 'PROMPT_LENGTH', '2', '--seeds', '1', '1'], 'different ones'),
    (['--vary', 'PROMPT_LENGTH', '2', '--at_once', '0'], 'at least 1'),
    (['--vary', 'gin_file', 'prompt/none.gin'], 'No gin file'),
    (['--vary', 'PROMPT_LENGTH', '2', '--gin.run.train.seed=1'], '--seeds alone'),
    (['--vary', 'run.train.seed', '1', '2'], '--seeds say the seeds'),
    (['--vary', 'MODEL_DIR', 'a', 'b'], 'each run has its own'),
    (['--vary', 'PROMPT_LENGTH', '2', '--vary', 'PROMPT_LENGTH', '3'], 'given once'),
    (['--vary', 'PROMPT_LENGTH', '2', '--gin.MODEL_DIR=gs://bucket/a'], 'once')])
def test_what_is_no_sweep_is_one_line_before_training(tmp_path, capsys, flags, said, monkeypatch):
  monkeypatch.setattr(population, 'prepared', lambda arguments: pytest.fail('it trained'))
  assert sweep.main(['--gin_file=run/quick_start.gin', f'--gin.MODEL_DIR={tmp_path}', *flags]) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and said in error
  assert not list(tmp_path.iterdir())


def test_a_signal_after_the_last_step_of_a_group_is_not_lost(monkeypatch):
  """The group is done, and the next one is not begun."""
  began = []

  def train(group, stop):
    began.extend(group)
    assert not stop(0)
    os.kill(os.getpid(), signal.SIGTERM)
    return {name: {'stopped': False} for name in group}

  monkeypatch.setattr(many_runs, 'configured', lambda argv: {})
  monkeypatch.setattr(population, 'prepared', lambda arguments: arguments)
  monkeypatch.setattr(population, 'groups', lambda trainings, most: [{'a': 0}, {'b': 0}])
  monkeypatch.setattr(population, 'train', train)
  before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
  try:
    with pytest.raises(SystemExit):
      many_runs.train({'a': [], 'b': []}, 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGTERM, before)
  assert began == ['a']


@pytest.mark.slow
def test_each_run_of_a_sweep_is_what_train_alone_makes(tiny_base, reviews, tmp_path, token_dir,
                                                       capsys):
  common = ['--gin_file=run/prompt_tuning_text_file.gin', f'--gin.TRAIN_FILE={reviews}',
            f'--gin.INITIAL_CHECKPOINT_PATH={tiny_base}', '--gin.TRAIN_STEPS=6',
            "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}", '--gin.EVAL_PERIOD=3',
            '--gin.BATCH_SIZE=4', '--gin.DROPOUT_RATE=0.0']
  command = ['--vary', 'PROMPT_LENGTH', '1', '3', '--vary', RATE, '0.1', '0.3', '--seeds', '0', '1',
             *common, f'--gin.MODEL_DIR={tmp_path}/sweep']
  assert sweep.main(command) == 0
  rows = json.loads((tmp_path / 'sweep' / 'sweep.json').read_text())
  assert capsys.readouterr().out == (tmp_path / 'sweep' / 'sweep.txt').read_text()
  assert len(rows) == 4
  for row in rows:
    reports = [json.loads((tmp_path / 'sweep' / row['name'] / f'seed_{seed}' / 'report.json')
                          .read_text()) for seed in (0, 1)]
    assert row['mean'] == pytest.approx(np.mean([report['best_value'] for report in reports]))
  assert launch.train([*common, '--gin.PROMPT_LENGTH=1', f'--gin.{RATE}=0.3',
                       '--gin.run.train.seed=1', f'--gin.MODEL_DIR={tmp_path}/alone']) == 0
  one, other = (prompt_file.load(folder / 'prompts' / 'last.safetensors').params['prompt/embedding']
                for folder in (tmp_path / 'alone',
                               tmp_path / 'sweep' / 'PROMPT_LENGTH=1,learning_rate=0.3/seed_1'))
  np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
  before = (tmp_path / 'sweep' / 'sweep.txt').read_text()
  assert sweep.main(command) == 0 and before == (tmp_path / 'sweep' / 'sweep.txt').read_text()

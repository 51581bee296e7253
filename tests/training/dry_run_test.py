"""Sizes told before a run are those of the run: counts of the methods' table, and a real report."""

import json

import pytest

from prompt_tuning_jax import launch

RUN = ['--gin_file=run/prompt_tuning.gin', '--gin.MODEL_DIR=/nowhere',
       '--gin.INITIAL_CHECKPOINT_PATH=gs://nowhere/checkpoint_1']
COMMON = [*RUN, '--gin.MIXTURE_OR_TASK_NAME=sst2']


def told(capsys, *flags) -> dict[str, int]:
  """The sizes that --dry_run prints, by what they are of."""
  assert launch.train([*flags, '--dry_run']) == 0
  printed = capsys.readouterr().out
  lines = printed[printed.index('# Sizes'):].splitlines()[1:]
  assert all(line.startswith('#   ') for line in lines)  # what is printed is gin
  return {name.strip(): int(number.replace(',', ''))
          for name, number in (line[4:].rsplit(maxsplit=1) for line in lines)}


# The table of methods in gin/README.md.
@pytest.mark.parametrize('method, count', [
    ('prompt_tuning', 102_400), *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        ('deep_prompt', 2_457_600), ('lora', 2_359_296), ('ia3', 282_624),
        ('norm_scales', 124_928), ('input_output', 65_798_144), ('model_tuning', 783_150_080),
        ('adapters', 15_859_200), ('prompt_design', 0)))])
def test_methods_have_the_parameters_that_they_are_known_for(method, count, capsys):
  found = told(capsys, *COMMON, '--gin_file=network/t5_1_1_large.gin',
               f'--gin_file=method/{method}.gin', '--gin.run.train.parameter_dtype=bfloat16')
  whole = 783_150_080
  part = method in ('norm_scales', 'input_output', 'model_tuning')
  assert found['parameters that train'] == count
  assert found['parameters that are frozen'] == whole - part * count
  assert found['bytes of the frozen base (bfloat16)'] == 2 * (whole - part * count)
  assert found['bytes of what trains (float32)'] == found['bytes of its gradients'] == 4 * count
  kept = found.get('bytes of the file that is kept')
  if method in ('model_tuning', 'prompt_design', 'input_output'):
    assert (kept is None) == (method != 'input_output')
  else:
    assert 4 * count < kept < 4 * count * 1.02 + 80_000


@pytest.mark.slow
def test_the_optimizer_keeps_factors_or_two_moments(capsys):
  network = '--gin_file=network/t5_1_1_xxl.gin'
  adafactor = told(capsys, *COMMON, network)['bytes of the optimizer state']
  adamw = told(capsys, *COMMON, network, '--gin_file=method/embedding_only.gin')
  trained = 4 * 100 * 4096  # P rows of the width of XXL, not factored
  assert trained <= adafactor < trained + 1000
  assert 2 * trained <= adamw['bytes of the optimizer state'] < 2 * trained + 1000


def test_prompts_of_several_tasks_are_counted(capsys):
  found = told(capsys, *RUN, '--gin_file=network/t5_1_1_small.gin',
               '--gin_file=task/mixture.gin', "--gin.MIXTURE_TASKS=('sst2', 'mrpc')",
               '--gin_file=method/multitask_prompts.gin')
  assert found['parameters that train'] == 3 * 100 * 512  # two tasks' own rows, and shared ones
  assert found['bytes of the file that is kept'] > 2 * 4 * 100 * 512


def test_a_checkpoint_that_is_not_here_is_said_to_be_unknown(capsys):
  assert launch.train([*COMMON, '--dry_run']) == 0
  line = capsys.readouterr().out.rstrip().splitlines()[-1]
  assert line.startswith('# Sizes are not known: gs://nowhere/checkpoint_1 is not on this machine.')


@pytest.mark.parametrize('length', ['-3', '2.5', 'many'])
def test_a_length_that_cannot_be_is_one_line(length, capsys):
  flags = [*COMMON, '--gin_file=network/t5_1_1_small.gin', '--dry_run']
  assert launch.train([*flags, f'--gin.PROMPT_LENGTH={length}']) == 1
  said = capsys.readouterr().err
  assert said.startswith('error: PROMPT_LENGTH should be a whole number of at least 1, got ')
  assert said.count('\n') == 1


@pytest.mark.parametrize(('method', 'dtype'), [
    ('prompt_tuning', 'float32'), *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        ('prefix_tuning', 'float32'), ('lora', 'float32'), ('norm_scales', 'int8')))])
def test_a_run_has_the_sizes_that_were_told(method, dtype, tiny_base, reviews, tmp_path, token_dir,
                                            capsys):
  flags = ['--gin_file=run/prompt_tuning_text_file.gin', f'--gin_file=method/{method}.gin',
           f'--gin.TRAIN_FILE={reviews}', '--gin.INPUTS=text', '--gin.TARGETS=label',
           f'--gin.INITIAL_CHECKPOINT_PATH={tiny_base}', f'--gin.MODEL_DIR={tmp_path}/model',
           "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}", '--gin.TRAIN_STEPS=1',
           '--gin.BATCH_SIZE=8', '--gin.EVAL_PERIOD=0', f'--gin.PARAMETER_DTYPE={dtype}']
  flags += ['--gin.PROMPT_LENGTH=4'] if method.startswith('pr') else []
  found = told(capsys, *flags)
  assert not (tmp_path / 'model').exists()
  assert launch.train(flags) == 0
  report = json.loads((tmp_path / 'model' / 'report.json').read_text())
  assert found['parameters that train'] == report['trainable_parameters']
  assert (sum(found[f'parameters that {what}'] for what in ('train', 'are frozen'))
          == report['parameters'])
  told_bytes = [found[f'bytes of the frozen base ({dtype})'], found['bytes of the optimizer state']]
  assert told_bytes == [report['bytes'][name] for name in ('frozen', 'optimizer_state')]
  assert abs(found['bytes of the file that is kept'] - report['saved_bytes']) < 200

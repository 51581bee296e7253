"""Pretraining with fresh noise, by its gin file: it resumes bit for bit, and only as it began."""

import numpy as np
import pytest

from prompt_tuning_jax import launch, param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('token_dir')]


def pretrain(folder, steps, *flags, task='span_corruption_novels'):
  return launch.train([
      '--gin_file=run/pretrain_span_corruption.gin', '--gin_file=network/tiny.gin', *flags,
      '--gin.VOCABULARY=bytes', f'--gin.MIXTURE_OR_TASK_NAME={task}', f'--gin.MODEL_DIR={folder}',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 24}", f'--gin.TRAIN_STEPS={steps}',
      '--gin.BATCH_SIZE=8', '--gin.SAVE_PERIOD=2', '--gin.EVAL_PERIOD=0',
      '--gin.optimizers.linear_decay.warmup_steps=1', '--gin.optimizers.linear_decay.steps=99',
      '--gin.seqio_task.SeqioTask.max_examples=16'])  # two steps an epoch


def leaves(folder):
  base = base_checkpoint.load_base(str(folder / 'prompts' / 'last'))
  return param_paths.flatten(base.params)


def test_a_stopped_run_goes_on_with_the_same_noise(tfds_data_dir, tmp_path, capsys):
  if not (tfds_data_dir / 'local_text' / 'novels').exists():
    pytest.skip('local_text/novels has not been prepared')
  fresh = '--gin_file=batching/fresh_noise.gin'
  for name, stops in (('whole', (6,)), ('parts', (3, 6))):
    for steps in stops:
      assert pretrain(tmp_path / name, steps, fresh) == 0
  assert pretrain(tmp_path / 'plain', 6) == 0
  one, other, plain = (leaves(tmp_path / name) for name in ('whole', 'parts', 'plain'))
  for path, leaf in one.items():
    np.testing.assert_array_equal(leaf, other[path], path)
  assert any((leaf != plain[path]).any() for path, leaf in one.items())
  assert pretrain(tmp_path / 'whole', 8) != 0
  assert 'another run: batching was' in capsys.readouterr().err
  assert pretrain(tmp_path / 'prefixes', 2, fresh, task='prefix_lm_novels') != 0
  assert 'got other rows from prefix_lm_novels: take batching/' in capsys.readouterr().err

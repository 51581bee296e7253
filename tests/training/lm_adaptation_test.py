"""LM adaptation by its one command: from a real T5X checkpoint, restartable, to a base."""

import numpy as np
import pytest

from prompt_tuning_jax import launch, param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('token_dir')]


def adapt(folder, checkpoint, vocabulary, steps):
  return launch.train([
      '--gin_file=run/lm_adaptation.gin', '--gin_file=network/tiny.gin',
      f'--gin.INITIAL_CHECKPOINT_PATH={checkpoint}', f'--gin.VOCABULARY={vocabulary}',
      '--gin.MIXTURE_OR_TASK_NAME=prefix_lm_novels', f'--gin.MODEL_DIR={folder}',
      "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 32}", f'--gin.TRAIN_STEPS={steps}',
      '--gin.BATCH_SIZE=8', '--gin.SAVE_PERIOD=2', '--gin.EVAL_PERIOD=4',
      '--gin.seqio_task.SeqioTask.max_examples=64'])


def leaves(path):
  return param_paths.flatten(base_checkpoint.load_base(str(path)).params)


def test_a_stopped_adaptation_goes_on_and_its_result_is_a_base(
    tfds_data_dir, test_assets, tmp_path):
  if not (tfds_data_dir / 'local_text' / 'novels').exists():
    pytest.skip('local_text/novels has not been prepared')
  assets = test_assets / 'prompt_tuning' / 'test_data'
  checkpoint, vocabulary = assets / 'test_t5_1_1_tiny' / 'checkpoint_3', assets / 't5_vocab'
  for name, stops in (('whole', (4,)), ('parts', (2, 4))):
    for steps in stops:
      assert adapt(tmp_path / name, checkpoint, vocabulary, steps) == 0
  one, other = (leaves(tmp_path / name / 'prompts' / 'last') for name in ('whole', 'parts'))
  before = param_paths.flatten(base_checkpoint.load_base(str(checkpoint)).params)
  assert one.keys() == before.keys()
  for path, leaf in one.items():
    np.testing.assert_array_equal(leaf, other[path], path)
  changed = [path for path, leaf in one.items() if np.any(leaf != before[path])]
  assert len(changed) == len(one)

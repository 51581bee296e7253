"""What a run refuses is told in one line before anything trains."""

import functools

import numpy as np
import pytest

from prompt_tuning_jax import optimizers
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.networks import gpt
from prompt_tuning_jax.training import methods, run

pytestmark = pytest.mark.usefixtures('token_dir')


def trained(folder, base, reviews, steps, **given):
  return run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(folder), str(base), **{
      'method': methods.PromptTuning(4), 'optimizer': optimizers.adafactor(), 'train_steps': steps,
      'batch_size': 8, 'eval_period': 4, **given})


@pytest.mark.parametrize('given, message', [
    ({'train_steps': 'ten'}, 'TRAIN_STEPS'), ({'batch_size': 0}, 'BATCH_SIZE'),
    ({'seed': -1}, 'SEED'), ({'seed': 2 ** 64}, 'SEED'), ({'dropout_rate': 1.5}, 'DROPOUT_RATE'),
    ({'metric': 'acuracy'}, 'Did you mean accuracy'), ({'eval_period': 2.5}, 'EVAL_PERIOD'),
    ({'save_period': -1}, 'SAVE_PERIOD'), ({'patience': 'one'}, 'PATIENCE'),
    ({'eval_batch_size': -4}, 'EVAL_BATCH_SIZE'), ({'max_eval_examples': -3}, 'MAX_EVAL_EXAMPLES'),
    ({'z_loss': 'x'}, 'Z_LOSS should be at least 0'), ({'z_loss': float('nan')}, 'Z_LOSS'),
    ({'label_smoothing': 1.5}, 'LABEL_SMOOTHING should be at least 0 and less than 1'),
    ({'parameter_dtype': 'int32'}, 'PARAMETER_DTYPE should be one of float32, bfloat16, int8'),
    ({'parameter_dtype': 'bf16'}, 'PARAMETER_DTYPE'),
    ({'method': methods.PromptTuning(0)}, 'PROMPT_LENGTH should be a whole number of at least 1'),
    ({'method': methods.PromptTuning(3, 'inside')}, 'placement')])
def test_wrong_values_are_told_before_anything_trains(
    tmp_path, tiny_base, reviews, given, message):
  with pytest.raises(ValueError, match=message):
    trained(tmp_path / 'model', tiny_base, reviews, **{'steps': 2, **given})
  assert not list(tmp_path.glob('model/*'))


@pytest.mark.parametrize('name', ['rate[0.3]', 'a\\b'])
def test_a_folder_that_could_not_be_read_back_is_refused(
    tmp_path, tiny_base, reviews, name, monkeypatch):
  with pytest.raises(ValueError, match='MODEL_DIR may not have'):
    trained(tmp_path / name, tiny_base, reviews, 2)
  assert not list(tmp_path.iterdir())
  (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / name)
  with pytest.raises(ValueError, match='MODEL_DIR may not have'):
    trained('model', tiny_base, reviews, 2)


def test_numbers_may_be_numpys(tmp_path, tiny_base, reviews):
  assert trained(tmp_path / 'model', tiny_base, reviews, 2, eval_period=np.int64(2),
                 eval_batch_size=np.int32(4), z_loss=np.float32(0),
                 max_eval_examples=0)['steps'] == 2


def test_too_few_positions_for_evaluation_are_told_before_anything_trains(
    tmp_path, bpe_file, reviews):
  """Texts to be generated may be longer than all targets that are trained on."""
  config = gpt.GPTConfig(vocab_size=301, emb_dim=8, num_heads=2, num_layers=1, head_dim=4,
                         mlp_dim=16, mlp_activations=('gelu',), logits_via_embedding=True,
                         max_positions=45, use_bias=True)
  base = base_checkpoint.random_base(config, str(bpe_file))
  whole = functools.partial(
      run.train, TextFile(str(reviews), labels=()), model_dir=str(tmp_path / 'model'),
      initial_checkpoint_path=base, method=methods.PromptTuning(length=4),
      optimizer=optimizers.adafactor(), train_steps=2, batch_size=8, inspect=False)
  with pytest.raises(ValueError, match='The network has 45 positions'):
    whole(task_feature_lengths={'inputs': 40, 'targets': 40})
  assert not list(tmp_path.glob('model/*'))
  assert whole(task_feature_lengths={'inputs': 40, 'targets': 12})['steps'] == 2

"""Prompts of several tasks that train together: their parts, their files, each alone."""

import json
import random

import jax
import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import optimizers
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data import mixture
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.prompts.task_prompts import Concatenation, Product, Separate, Sum
from prompt_tuning_jax.training import methods, run
from prompt_tuning_jax.training.multitask import MultitaskPrompts

pytestmark = pytest.mark.usefixtures('token_dir')
WAYS = {'separate': Separate(), 'sum': Sum(), 'product': Product(),
        'concatenation': Concatenation(1)}
# Trainable numbers of two tasks' prompts of 3 rows, 8 wide.
COUNTS = {'separate': 48, 'sum': 72, 'product': 72, 'concatenation': 8 + 32}


@pytest.fixture(scope='module')
def two_tasks(tmp_path_factory, reviews):
  path = tmp_path_factory.mktemp('colours') / 'colours.jsonl'
  rng = random.Random(1)
  with open(path, 'w', encoding='utf-8') as file:
    for _ in range(60):
      label = rng.choice(('red', 'blue'))
      file.write(json.dumps({'text': f'the film is {label} and warm', 'label': label}) + '\n')
  return mixture.Mixture([TextFile(str(reviews)), TextFile(str(path))], mixture.Equal())


def trained(folder, base, task, method, steps=4):
  return run.train(task, {'inputs': 24, 'targets': 8}, str(folder), str(base), method,
                   optimizers.adamw(0.03), steps, 8, eval_period=2, save_period=2, log_period=1)


@pytest.mark.slow
@pytest.mark.parametrize('way', ['concatenation', 'separate', 'sum', 'product'])
def test_a_run_and_each_tasks_file(tmp_path, tiny_base, two_tasks, way, capsys):
  method = MultitaskPrompts(3, combine=WAYS[way])
  result = trained(tmp_path / 'whole', tiny_base, two_tasks, method)
  assert result['trainable_parameters'] == COUNTS[way]
  for steps in (3, 4):
    trained(tmp_path / 'parts', tiny_base, two_tasks, method, steps)
  lines = [json.loads(line) for line in (tmp_path / 'whole' / 'metrics.jsonl').open()]
  last = [line for line in lines if line['split'] == 'validation'][-1]
  prompts = {}
  for task in ('reviews', 'colours'):
    one, other = (prompt_file.load(tmp_path / run_ / 'prompts' / 'last' / f'{task}.safetensors')
                  for run_ in ('whole', 'parts'))
    np.testing.assert_array_equal(one.params['prompt/embedding'], other.params['prompt/embedding'])
    prompts[task] = one
    assert one.metadata['task'] == task and len(one.metadata['labels']) == 2
    assert one.metadata['metric'] == {'name': 'accuracy', 'value': last[f'{task}/accuracy'],
                                      'step': 4}
    # Taken out of the bank, a prompt answers alone as it did among the others.
    cache = next((tmp_path / 'cache' / 'tokens').glob(f'{task}-validation-*'))
    file = tmp_path / 'whole' / 'prompts' / 'last' / f'{task}.safetensors'
    assert eval_verb.main(['--base', str(tiny_base), '--prompt', str(file), '--input',
                           str(cache / 'rows.jsonl')]) == 0
    assert json.loads(capsys.readouterr().out)['accuracy'] == pytest.approx(
        last[f'{task}/accuracy'])
  reviews, colours = (prompts[task].params['prompt/embedding'] for task in prompts)
  assert reviews.shape == (3, 8) and np.all(np.any(reviews != colours, axis=1)) == (
      way != 'concatenation')
  if way == 'concatenation':  # The first row is the one they share.
    np.testing.assert_array_equal(reviews[0], colours[0])


@pytest.mark.parametrize('way', ['sum', 'product'])
def test_tasks_start_from_what_they_share(tiny_base, way):
  base = base_checkpoint.load_base(str(tiny_base))
  method = MultitaskPrompts(3, combine=WAYS[way], tasks=('a', 'b'))
  leaves = method.initial(jax.random.key(0), base, None)['prompt']
  bank = method.model(base.config).prompt.apply({'params': leaves}).reshape(2, 3, 8)
  np.testing.assert_array_equal(bank[0], bank[1])
  np.testing.assert_array_equal(bank[0], leaves['shared'])


@pytest.mark.slow
def test_a_task_that_is_not_evaluated_has_no_score(tmp_path, tiny_base, two_tasks):
  class Unevaluated(TextFile):
    """A file of which all is for training."""

    eval_split = None

  reviews, colours = two_tasks.tasks
  task = mixture.Mixture([Unevaluated(reviews.train_file), colours], mixture.Equal())
  result = trained(tmp_path / 'model', tiny_base, task, MultitaskPrompts(3), 2)
  kept = {name: prompt_file.load(f'{result["prompt"]}/{name}.safetensors').metadata
          for name in ('reviews', 'colours')}
  assert kept['reviews']['metric'] is None and len(kept['reviews']['labels']) == 2
  assert kept['colours']['metric']['value'] == result['best_value']
  # Nor has one prompt of both the labels of one.
  result = trained(tmp_path / 'one', tiny_base, task, methods.PromptTuning(3), 2)
  about = prompt_file.load(result['prompt']).metadata
  assert about['labels'] is None and list(about['tasks']) == ['colours']


@pytest.mark.slow
def test_one_task_is_no_mixture_and_another_way_another_run(tmp_path, tiny_base, two_tasks):
  with pytest.raises(ValueError, match='need a mixture of at least two'):
    trained(tmp_path / 'model', tiny_base, two_tasks.tasks[0], MultitaskPrompts(3))
  with pytest.raises(ValueError, match='COMBINE should be %SUM'):
    MultitaskPrompts(3, combine='SUM')
  trained(tmp_path / 'model', tiny_base, two_tasks, MultitaskPrompts(3, combine=Sum()), 2)
  with pytest.raises(ValueError, match='holds another run: method was'):
    trained(tmp_path / 'model', tiny_base, two_tasks, MultitaskPrompts(3, combine=Product()), 4)
  assert eval_verb.main(['--base', str(tiny_base), '--prompt', str(
      tmp_path / 'model' / 'prompts' / 'best'), '--input', 'none.jsonl']) == 1


def test_rows_to_share_must_leave_some(tiny_base):
  with pytest.raises(ValueError, match='shared must be a whole number'):
    Concatenation(0)
  with pytest.raises(ValueError, match='cannot share 3 rows'):
    Concatenation(3).lengths(3)

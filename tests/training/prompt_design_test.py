"""Prompt design: which examples stand in the text, that it fits, and that nothing trains."""

import json

import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import optimizers
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training import run
from prompt_tuning_jax.training.prompt_design import PromptDesign, chosen

pytestmark = pytest.mark.usefixtures('token_dir')
ROWS = [{'targets': 'a', 'choices': ['a', 'b', 'c']}] * 20 + [
    {'targets': 'b', 'choices': ['a', 'b', 'c']}] * 2 + [
        {'targets': 'c', 'choices': ['a', 'b', 'c']}] * 5


def designed(folder, base, reviews, **settings):
  return run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(folder), str(base),
                   PromptDesign(**settings), optimizers.adafactor(), 30, 8)


def test_a_run_evaluates_and_saves_and_trains_nothing(tmp_path, tiny_base, reviews, capsys):
  result = designed(tmp_path / 'model', tiny_base, reviews, description='good or bad',
                    examples=4, context_length=108)
  assert (result['trainable_parameters'], result['best_step']) == (0, 0)
  file = prompt_file.load(result['prompt'])
  assert file.metadata['text'].startswith('good or bad ')
  base = base_checkpoint.load_base(str(tiny_base))
  words = Vocabulary.of_base(base)
  ids = np.asarray(words.encode(file.metadata['text']))
  np.testing.assert_array_equal(file.params['prompt/embedding'], np.asarray(base.embedding)[ids])
  # Law: the designed prompt is the text itself before the input.
  cache = next((tmp_path / 'cache' / 'tokens').glob('reviews-validation-*'))
  rows = [json.loads(line) for line in (cache / 'rows.jsonl').open()]
  longer = tmp_path / 'longer.jsonl'
  longer.write_text(''.join(json.dumps(
      {'input_tokens': [*ids.tolist(), *words.encode(row['inputs']), 1],
       'targets': row['targets']}) + '\n' for row in rows), encoding='utf-8')
  for flags in (['--prompt', result['prompt'], '--input', str(cache / 'rows.jsonl')],
                ['--input', str(longer)]):
    assert eval_verb.main(['--base', str(tiny_base), *flags]) == 0
    assert json.loads(capsys.readouterr().out)['accuracy'] == pytest.approx(result['best_value'])


@pytest.mark.slow
def test_the_runs_seed_draws_and_another_design_is_another_run(tmp_path, tiny_base, reviews):
  texts = set()
  for seed in range(3):
    result = run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8},
                       str(tmp_path / str(seed)), str(tiny_base),
                       PromptDesign(examples=2, context_length=108), optimizers.adafactor(), 1, 8,
                       seed=seed)
    texts.add(prompt_file.load(result['prompt']).metadata['text'])
  assert len(texts) == 3
  with pytest.raises(ValueError, match='holds another run: method was'):
    designed(tmp_path / '0', tiny_base, reviews, examples=1, context_length=108)


def test_labels_take_turns_and_the_seed_decides():
  labels = lambda count, seed=0: [ROWS[i]['targets'] for i in chosen(ROWS, count, seed)]
  for count, each in ((3, [1, 1, 1]), (6, [2, 2, 2]), (9, [2, 3, 4]), (100, [2, 5, 20])):
    found = labels(count)
    assert sorted(found.count(label) for label in 'abc') == each
  assert chosen(ROWS, 0, 0) == chosen([], 0, 0) == []
  assert chosen(ROWS, 6, 0) == chosen(ROWS, 6, 0) != chosen(ROWS, 6, 1)
  assert len(set(chosen(ROWS, 100, 0))) == len(ROWS)
  assert len({tuple(labels(6, seed)) for seed in range(9)}) > 1  # Not always in the same order.
  # Nor always the same labels, where there are more than examples.
  assert {tuple(sorted(labels(2, seed))) for seed in range(30)} == {
      ('a', 'b'), ('a', 'c'), ('b', 'c')}


def test_examples_that_do_not_fit_are_left_out(tmp_path, tiny_base, reviews, caplog):
  result = designed(tmp_path / 'a', tiny_base, reviews, examples=50, context_length=88)
  assert 'examples fit into 88 tokens' in caplog.text
  assert len(prompt_file.load(result['prompt']).params['prompt/embedding']) <= 88 - 32
  with pytest.raises(ValueError, match='expected from 1 to 0'):
    designed(tmp_path / 'b', tiny_base, reviews, context_length=32)
  for settings, message in (({'examples': -1}, 'EXAMPLES should be a whole number from 0'),
                            ({'description': 5}, 'description of a designed prompt should be a')):
    with pytest.raises(ValueError, match=message):
      PromptDesign(**settings)
  with pytest.raises(ValueError, match='written with {inputs} and {targets}'):
    designed(tmp_path / 'c', tiny_base, reviews, template='{input}', context_length=108)

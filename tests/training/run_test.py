"""A whole run on a tiny base: its files, and every way of using the prompt."""

import functools
import json
import os

import jax
import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import infer, optimizers, param_paths, score
from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors, prompt_file
from prompt_tuning_jax.data import batches, mixture, packing, subsets
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.training import loop, methods, run

pytestmark = pytest.mark.usefixtures('token_dir')


def trained(folder, base, reviews, steps=12, method=None, **settings):
  method = method or methods.PromptTuning(length=4)
  rate = 0.3 if isinstance(method, methods.PromptTuning) else 0.01
  task = TextFile(str(reviews)) if isinstance(reviews, os.PathLike) else reviews
  return run.train(
      task, {'inputs': 24, 'targets': 8}, str(folder), str(base), method,
      optimizers.adafactor(rate), **{'train_steps': steps, 'batch_size': 8, 'eval_period': 4,
                                     'save_period': 4, 'log_period': 2, **settings})


@pytest.fixture(scope='module')
def finished(tmp_path_factory, tiny_base, reviews):
  """(MODEL_DIR of an uninterrupted run of 12 steps, what it returned)."""
  folder = tmp_path_factory.mktemp('run') / 'model'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PROMPT_TUNING_JAX_CACHE', str(folder.parent / 'cache'))
    return folder, trained(folder, tiny_base, reviews)


def test_a_run_leaves_what_it_promises(finished, tiny_base, reviews):
  folder, result = finished
  assert {path.name.split('.')[0] for path in folder.iterdir()} >= {
      'prompts', 'metrics', 'events', 'curves', 'checkpoints'}
  assert result['prompt'] == str(folder / 'prompts' / 'best.safetensors')
  best = prompt_file.load(result['prompt'])
  assert best.params['prompt/embedding'].shape == (4, 8)
  base = base_checkpoint.load_base(str(tiny_base))
  prompt_file.check(best, base)
  about = best.metadata
  assert about['base']['fingerprint'] == base.fingerprint
  assert (about['method'], about['placement'], about['task']) == (
      'prompt_tuning', 'before', 'reviews')
  assert sorted(about['labels']) == ['bad', 'good']
  assert about['metric'] == {'name': 'accuracy', 'value': result['best_value'],
                             'step': result['best_step']}
  size = sum(path.stat().st_size for path in (folder / 'prompts').iterdir())
  assert size < 8_000


def test_what_a_run_cost_is_reported(finished, tiny_base, caplog):
  folder, result = finished
  assert json.loads((folder / 'report.json').read_text('utf-8')) == result
  weights = param_paths.count(base_checkpoint.load_base(str(tiny_base)).params)
  assert (result['trainable_parameters'], result['parameters']) == (32, weights + 32)
  assert result['trainable_percent'] == pytest.approx(100 * 32 / (weights + 32))
  assert result['bytes']['frozen'] == 4 * weights and result['bytes']['gradients'] == 4 * 32
  assert result['bytes']['optimizer_state'] < 4 * 64  # Adafactor keeps rows and columns, or all.
  assert (result['saved_parameters'], result['steps']) == (32, 12)
  assert result['saved_bytes'] == (folder / 'prompts' / 'best.safetensors').stat().st_size
  assert 0 < result['seconds_to_best'] <= result['seconds']
  assert result['peak_bytes'] > result['bytes']['frozen']


@pytest.mark.slow
def test_a_step_is_compiled_once_from_the_start_and_when_resumed(
    tmp_path, tiny_base, reviews, monkeypatch):
  made, make = [], loop.make_train_step
  monkeypatch.setattr(loop, 'make_train_step', lambda *args, **settings: made.append(
      make(*args, **settings)) or made[-1])
  one_width = functools.partial(batches.TrainBatches, buckets=batches.Buckets((), ()))
  for steps in (3, 6):
    trained(tmp_path / 'model', tiny_base, reviews, steps, batching=one_width)
  assert [step._cache_size() for step in made] == [1, 1]


def test_no_steps_evaluate_the_start(tmp_path, tiny_base, reviews):
  result = trained(tmp_path / 'model', tiny_base, reviews, 0)
  start = prompt_file.load(result['prompt']).params['prompt/embedding']
  base = base_checkpoint.load_base(str(tiny_base))
  expected = methods.PromptTuning(length=4).initial(jax.random.key(0), base, None)
  np.testing.assert_array_equal(start, expected['prompt']['embedding'])
  again = trained(tmp_path / 'model', tiny_base, reviews, 0)
  assert {name: again[name] for name in ('best_value', 'steps')} == {
      'best_value': result['best_value'], 'steps': 0}
  lines = [json.loads(line) for line in (tmp_path / 'model' / 'metrics.jsonl').open()]
  assert [(line['step'], line['split']) for line in lines] == [(0, 'validation')]
  assert lines[0]['accuracy'] == result['best_value'] and result['best_step'] == 0


def test_labels_are_kept_where_nothing_is_evaluated(tmp_path, tiny_base, reviews):
  result = trained(tmp_path / 'model', tiny_base, reviews, 2, eval_period=0)
  about = prompt_file.load(result['prompt']).metadata
  assert sorted(about['labels']) == ['bad', 'good'] and about['metric'] is None


@pytest.mark.slow
def test_a_prompt_trained_behind_a_sentinel_tells_eval_so(tmp_path, tiny_base, capsys):
  pytest.importorskip('seqio')
  result = run.train(SeqioTask('quick_start', sentinel=True), {'inputs': 24, 'targets': 12},
                     str(tmp_path / 'model'), str(tiny_base), methods.PromptTuning(4),
                     optimizers.adafactor(0.3), 4, 8, eval_period=4, eval_batch_size=128)
  about = prompt_file.load(result['prompt']).metadata
  assert (about['labels'], about['target_prefix']) == (['novel', 'article'], '<extra_id_0> ')
  assert eval_verb.main(['--base', str(tiny_base), '--prompt', result['prompt'], '--task',
                         'quick_start', '--max_input_length', '24', '--max_decode_length', '12',
                         '--batch_size', '128']) == 0
  values = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert values['accuracy'] == pytest.approx(result['best_value'])


def test_a_metric_that_is_no_number_stops_nothing(tmp_path, tiny_base, reviews, monkeypatch):
  """Such as a correlation with answers that are all alike."""
  monkeypatch.setattr(TokenCache, 'metric_fns', lambda cache: [
      lambda targets, predictions: {'pearson': float('nan')}])
  result = trained(tmp_path / 'model', tiny_base, reviews, 4, save_period=2)
  assert (result['steps'], result['best_value']) == (4, None)
  assert prompt_file.load(result['prompt']).metadata['metric'] is None
  assert trained(tmp_path / 'model', tiny_base, reviews, 6, save_period=2)['steps'] == 6


@pytest.mark.slow
def test_model_tuning_saves_a_base(tmp_path, tiny_base, reviews):
  before = base_checkpoint.load_base(str(tiny_base))
  result = trained(tmp_path, tiny_base, reviews, 4, method=methods.ModelTuning())
  after = base_checkpoint.load_base(result['prompt'])
  assert after.fingerprint != before.fingerprint
  assert after.vocabulary.sha256 == before.vocabulary.sha256
  assert hf_safetensors.is_folder(tmp_path / 'prompts' / 'last')


@pytest.mark.slow
def test_a_run_from_random_weights_needs_network_and_vocabulary(tmp_path, tiny_base, reviews):
  base = base_checkpoint.load_base(str(tiny_base))
  with pytest.raises(ValueError, match='VOCABULARY'):
    run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(tmp_path), None,
              methods.ModelTuning(), optimizers.adamw(), 2, 8, network=base.config)
  random = functools.partial(
      run.train, TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(tmp_path), None,
      methods.ModelTuning(), optimizers.adamw(), 2, 8, network=base.config,
      vocabulary=base.vocabulary.file)
  with pytest.raises(ValueError, match="take 'float32'"):
    random(parameter_dtype='int8')
  result = random()
  loaded = base_checkpoint.load_base(result['prompt'])
  assert param_paths.count(loaded.params) == param_paths.count(base.params)


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return str(path)


def read(path):
  return [json.loads(line) for line in open(path, encoding='utf-8')]


def test_infer_and_score_agree_with_each_other_and_take_ids_or_text(finished, tmp_path, tiny_base):
  folder, _ = finished
  base = ['--base', str(tiny_base), '--prompt', str(folder / 'prompts' / 'best.safetensors')]
  vocabulary = base_checkpoint.load_base(str(tiny_base)).vocabulary
  from prompt_tuning_jax.data.vocabulary import Vocabulary
  encode = lambda text: [*Vocabulary(vocabulary.file).encode(text), 1]
  texts = [f'this film is {word}' for word in ('lovely', 'dull', 'very cold and dull')]
  rows = [{'inputs': text, 'targets': label, 'id': i} for i, (text, label) in enumerate(
      (text, label) for text in texts for label in ('good', 'bad'))]
  ids = [{'input_tokens': encode(row['inputs']), 'target_tokens': encode(row['targets'])}
         for row in rows]
  outputs = []
  for name, content in (('text', rows), ('ids', ids)):
    source, target = write(tmp_path / f'{name}.jsonl', content), str(tmp_path / f'{name}.out')
    assert score.main([*base, '--input', source, '--output', target]) == 0
    outputs.append(read(target))
  assert [row['id'] for row in outputs[0]] == list(range(6))
  np.testing.assert_allclose([row['log_likelihood'] for row in outputs[0]],
                             [row['log_likelihood'] for row in outputs[1]], rtol=1e-6)
  assert all(row['log_likelihood'] < 0 for row in outputs[0])
  target = str(tmp_path / 'predictions.jsonl')
  assert infer.main([*base, '--input', str(tmp_path / 'text.jsonl'), '--output', target,
                     '--max_decode_length', '6']) == 0
  assert all(isinstance(row['prediction'], str) for row in read(target))


def test_eval_gives_the_accuracy_that_training_saw(finished, tmp_path, tiny_base, reviews, capsys):
  """The file is the run's own held-out rows, so both count the same predictions."""
  folder, result = finished
  cache = next((folder.parent / 'cache' / 'tokens').glob('reviews-validation-*'))
  held_out = [{'inputs': row['inputs'], 'targets': row['targets']}
              for row in read(cache / 'rows.jsonl')]
  source = write(tmp_path / 'held_out.jsonl', held_out)
  assert eval_verb.main(['--base', str(tiny_base), '--prompt', result['prompt'], '--input', source,
                         '--output', str(tmp_path / 'answers.jsonl')]) == 0
  values = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert values['accuracy'] == pytest.approx(result['best_value'])
  answers = read(tmp_path / 'answers.jsonl')
  assert 100 * np.mean([row['prediction'] == row['targets'] for row in answers]) == pytest.approx(
      values['accuracy'])


@pytest.mark.parametrize('row, message', [
    ('{"inputs": 3}', r'rows.jsonl, line 1: expected text in "inputs"'),
    ('[1]', r'rows.jsonl, line 1: expected a JSON object'),
    ('{"inputs": ', r'rows.jsonl, line 1: not JSON'),
    ('{"input_tokens": [5, 99999]}', r'rows.jsonl, line 1: input_tokens should be'),
    ('', 'has no rows')])
def test_a_bad_row_is_one_line_and_nothing_is_written(tmp_path, tiny_base, capsys, row, message):
  (tmp_path / 'rows.jsonl').write_text(row + '\n', encoding='utf-8')
  output = tmp_path / 'out.jsonl'
  status = infer.main(['--base', str(tiny_base), '--input', str(tmp_path / 'rows.jsonl'),
                       '--output', str(output)])
  said = capsys.readouterr().err.strip()
  assert status == 1 and len(said.splitlines()) == 1
  assert pytest.importorskip('re').search(message, said)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['rows.jsonl']


def test_a_prompt_of_another_base_is_refused(finished, tmp_path, tiny_base, capsys):
  folder, _ = finished
  base = base_checkpoint.load_base(str(tiny_base))
  other = jax.tree.map(lambda leaf: leaf + 1, base.params)
  hf_safetensors.write(tmp_path / 'other', base.config, other, vocabulary=base.vocabulary)
  source = write(tmp_path / 'rows.jsonl', [{'inputs': 'a film'}])
  assert infer.main(['--base', str(tmp_path / 'other'), '--input', source, '--output',
                     str(tmp_path / 'out.jsonl'), '--prompt',
                     str(folder / 'prompts' / 'best.safetensors')]) == 1
  assert 'fingerprint' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('batching', [batches.TrainBatches, packing.PackedBatches])
def test_a_mixture_is_evaluated_task_by_task(tmp_path, tiny_base, reviews, batching):
  texts = tmp_path / 'texts.jsonl'
  texts.write_text(''.join(json.dumps({'text': f'film {i}', 'label': f'play {i}'}) + '\n'
                           for i in range(40)), encoding='utf-8')
  task = mixture.Mixture([TextFile(str(reviews)), TextFile(str(texts))], mixture.Equal())
  result = trained(tmp_path / 'model', tiny_base, task, 4, batching=batching)
  lines = [json.loads(line) for line in (tmp_path / 'model' / 'metrics.jsonl').open()]
  values = [line for line in lines if line['split'] == 'validation'][-1]
  assert values['task'] == 'reviews+texts'
  assert values['mean'] == pytest.approx(
      (values['reviews/accuracy'] + values['texts/exact_match']) / 2)
  assert result['best_value'] == max(line['mean'] for line in lines if 'mean' in line)
  assert prompt_file.load(result['prompt']).metadata['labels'] is None
  with pytest.raises(ValueError, match='Did you mean reviews/accuracy'):
    trained(tmp_path / 'other', tiny_base, task, 4, metric='review/accuracy')


@pytest.mark.slow
def test_a_mixture_of_metrics_and_losses_needs_a_metric(tmp_path, tiny_base, reviews):
  class Lossy(TextFile):
    """Rows as they are, without metrics: measured by the loss."""

    def build(self, split, vocabulary, lengths, folder):
      super().build(split, vocabulary, lengths, folder)
      meta = json.loads((folder / 'meta.json').read_text('utf-8'))
      (folder / 'meta.json').write_text(json.dumps({**meta, 'metrics': []}), 'utf-8')

  task = mixture.Mixture([TextFile(str(reviews)), Lossy(str(reviews), name='lossy')])
  with pytest.raises(ValueError, match='name one as `metric`'):
    trained(tmp_path / 'model', tiny_base, task, 2)
  result = trained(tmp_path / 'model', tiny_base, task, 4, metric='lossy/loss')
  lines = [json.loads(line) for line in (tmp_path / 'model' / 'metrics.jsonl').open()]
  losses = [line['lossy/loss'] for line in lines if 'lossy/loss' in line]
  assert result['best_value'] == min(losses) and all('mean' not in line for line in lines)


@pytest.mark.slow
def test_labels_are_decoded_on_request(finished, tmp_path, tiny_base, reviews, capsys):
  """A prompt of twelve steps ranks labels, and writes none of them: decoded, all is wrong."""
  result = trained(tmp_path / 'model', tiny_base, reviews, 2, rank_labels=False)
  assert result['best_value'] == 0.0
  _, ranked = finished
  assert ranked['best_value'] > 0
  source = write(tmp_path / 'rows.jsonl', [{'inputs': 'a dull film', 'targets': 'bad'}])
  for flags in ([], ['--decode']):
    assert eval_verb.main(['--base', str(tiny_base), '--prompt', ranked['prompt'], '--input',
                           source, '--output', str(tmp_path / 'out.jsonl'), *flags]) == 0
    prediction = read(tmp_path / 'out.jsonl')[0]['prediction']
    assert (prediction in ('good', 'bad')) == (not flags)
  assert 'accuracy' in capsys.readouterr().out


@pytest.mark.slow
def test_labels_are_trained_to_be_ranked_on_request(tmp_path, tiny_base, reviews):
  """One token an example counts, and among labels a start is near log 2 and soon below it."""
  file = tmp_path / 'words.jsonl'
  file.write_text(reviews.read_text('utf-8').replace('"good"', '"song"').replace('"bad"', '"film"'),
                  encoding='utf-8')
  run_on = functools.partial(trained, tmp_path / 'run', tiny_base, file, loss='labels')
  with pytest.raises(ValueError, match='leave rank_labels True'):
    run_on(rank_labels=False)
  result = run_on()
  lines = [json.loads(line) for line in
           (tmp_path / 'run' / 'metrics.jsonl').read_text('utf-8').splitlines()]
  steps = [line for line in lines if line['split'] == 'train']
  assert {line['tokens'] for line in steps} == {8.0}
  assert steps[0]['loss'] < 3 * np.log(2) and steps[-1]['loss'] < steps[0]['loss']
  assert prompt_file.load(result['prompt']).metadata['labels'] == ['film', 'song']
  with pytest.raises(ValueError, match='holds another run: loss was'):
    trained(tmp_path / 'run', tiny_base, file)


@pytest.mark.slow
def test_a_run_on_few_examples(tmp_path, tiny_base, reviews):
  options = {'train_subset': subsets.FewShot(2), 'eval_subset': subsets.LowData(5)}
  trained(tmp_path, tiny_base, reviews, 4, **options)
  with pytest.raises(ValueError, match='batching was'):  # other examples, another run
    trained(tmp_path, tiny_base, reviews, 8, **{**options, 'train_subset': subsets.FewShot(2, 1)})
  with pytest.raises(ValueError, match='evaluated was'):
    trained(tmp_path, tiny_base, reviews, 8, **{**options, 'eval_subset': subsets.LowData(5, 1)})

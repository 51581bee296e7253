"""Prefix tuning in a whole run, its starts, and its file."""

import json

import jax
import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import optimizers, param_paths, prompted_base
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks.prefix import PLACES
from prompt_tuning_jax.training import prefix_tuning, run
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning, WordActivations

pytestmark = pytest.mark.usefixtures('token_dir')


def trained(folder, base, reviews, steps=6, method=PrefixTuning(3, width=7), **settings):
  return run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(folder), str(base),
                   method, optimizers.adamw(0.01), **{
                       'train_steps': steps, 'batch_size': 8, 'eval_period': 3, 'save_period': 3,
                       'log_period': 1, **settings})


@pytest.mark.parametrize('method', [
    pytest.param(PrefixTuning(3, width=7), marks=pytest.mark.slow), PrefixTuning(3, width=None),
    pytest.param(PrefixTuning(3, ('decoder',), width=None), marks=pytest.mark.slow)],
                         ids=['mlp', 'direct', 'decoder'])
def test_a_run_its_file_and_its_resume(tmp_path, tiny_base, reviews, method, capsys):
  result = trained(tmp_path / 'whole', tiny_base, reviews, method=method)
  for steps in (2, 6):
    trained(tmp_path / 'parts', tiny_base, reviews, steps, method=method)
  one, other = (prompt_file.load(tmp_path / name / 'prompts' / 'last.safetensors')
                for name in ('whole', 'parts'))
  assert {path: leaf.shape for path, leaf in one.params.items()} == {
      f'prefix/{place}': (1, 2, 3, 2, 4) for place in method.places or PLACES}
  for path, leaf in one.params.items():
    np.testing.assert_array_equal(leaf, other.params[path])
  assert (one.metadata['method'], one.metadata['length']) == ('prefix_tuning', 3)
  lines = [json.loads(line) for line in (tmp_path / 'whole' / 'metrics.jsonl').open()]
  losses = [line['loss'] for line in lines if line['split'] == 'train']
  assert losses[-1] < losses[0]
  # The file answers as the run did, on the run's own held-out rows.
  cache = next((tmp_path / 'cache' / 'tokens').glob('reviews-validation-*'))
  rows = tmp_path / 'rows.jsonl'
  rows.write_text((cache / 'rows.jsonl').read_text('utf-8'), encoding='utf-8')
  assert eval_verb.main(['--base', str(tiny_base), '--prompt', result['prompt'], '--input',
                         str(rows)]) == 0
  assert json.loads(capsys.readouterr().out)['accuracy'] == pytest.approx(result['best_value'])


def test_a_start_from_words_is_what_the_base_has_for_them(tiny_base):
  base = base_checkpoint.load_base(str(tiny_base))
  words = Vocabulary.of_base(base)
  ids = np.resize(words.encode('a lovely film'), 5)
  started = {}
  for width in (None, 16):
    method = PrefixTuning(5, width=width, initializer=WordActivations('a lovely film'))
    leaves = method.initial(jax.random.key(0), base, words)['prefix']
    started[width] = method._module(base.config).apply({'params': leaves})
  # The first layer's keys by hand: the normalised embeddings times the kernel.
  flat = param_paths.flatten(base.params)
  for place, layer in (('encoder', 'encoder/layers_0/attention'),
                       ('decoder', 'decoder/layers_0/self_attention')):
    norm = layer.rsplit('/', 1)[0] + ('/pre_attention_layer_norm' if place == 'encoder' else
                                      '/pre_self_attention_layer_norm')
    x = np.asarray(flat['token_embedder/embedding'])[ids]
    x = x / np.sqrt(np.mean(x ** 2, axis=-1, keepdims=True) + 1e-6) * flat[f'{norm}/scale']
    for part, name in enumerate(('key', 'value')):
      expected = (x @ np.asarray(flat[f'{layer}/{name}/kernel'])).reshape(5, 2, 4)
      np.testing.assert_allclose(started[None][place][0, part], expected, atol=1e-4)
  for place in PLACES:  # the MLP is solved for the same start
    np.testing.assert_allclose(started[16][place], started[None][place], atol=2e-3)


@pytest.mark.slow
def test_a_trained_prefix_is_a_start(tmp_path, tiny_base, reviews):
  result = trained(tmp_path / 'first', tiny_base, reviews, 3)
  base = base_checkpoint.load_base(str(tiny_base))
  method = PrefixTuning(3, width=None,
                        initializer=prefix_tuning.prefix_from_file(result['prompt']))
  leaves = method.initial(jax.random.key(0), base, None)
  for path, leaf in prompt_file.load(result['prompt']).params.items():
    np.testing.assert_array_equal(param_paths.flatten(leaves)[path], leaf)
  wrong = PrefixTuning(4, width=None, initializer=method.initializer)
  with pytest.raises(ValueError, match='initial prefix must have the shapes'):
    wrong.initial(jax.random.key(0), base, None)


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: PrefixTuning(3, ('encoder', 'attention')), 'places must be some of'),
    (lambda: PrefixTuning(3, ()), 'places must be some of'),
    (lambda: PrefixTuning(3, 'encoder'), 'places must be some of'),
    (lambda: PrefixTuning(0), 'whole numbers from 1')])
def test_wrong_settings_are_told(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_file_of_other_shapes_is_refused(tmp_path, tiny_base):
  base = base_checkpoint.load_base(str(tiny_base))
  leaves = {'prefix/encoder': np.zeros((2, 2, 3, 2, 4), np.float32)}  # the base has one layer
  prompt_file.save(tmp_path / 'p.safetensors', prompt_file.PromptFile(
      leaves, prompt_file.describe(base, method='prefix_tuning', length=3)))
  with pytest.raises(ValueError, match='this base takes'):
    prompted_base.load(str(tiny_base), str(tmp_path / 'p.safetensors'))

"""Runs whose layers are scanned, computed again or in eight bits end as plain ones do."""

import dataclasses

import numpy as np
import optax
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.networks import int8
from prompt_tuning_jax.networks.execution import Execution
from prompt_tuning_jax.training import lightweight, methods, prefix_tuning, run

pytestmark = pytest.mark.usefixtures('token_dir')
SCANNED = Execution(scan_layers=True, remat_policy='full')


@pytest.fixture(scope='module')
def two_layers(tmp_path_factory, tiny_base):
  """tiny_base's vocabulary, and a network of two layers."""
  folder = tmp_path_factory.mktemp('two_layers') / 'base'
  given = base_checkpoint.load_base(tiny_base)
  config = dataclasses.replace(given.config, num_encoder_layers=2, num_decoder_layers=2)
  base = base_checkpoint.random_base(config, given.vocabulary.file)
  base_checkpoint.write(folder, config, base.params, vocabulary=given.vocabulary)
  return folder


def trained(folder, base, reviews, method, **settings):
  """The file that three steps of descent leave, without dropout."""
  return run.train(
      TextFile(str(reviews)), {'inputs': 16, 'targets': 6}, str(folder), str(base), method,
      optax.sgd(1.0), 3, 4, **{
          'eval_period': 3, 'max_eval_examples': 8, 'dropout_rate': 0.0,
          **settings})['prompt']


@pytest.mark.slow
@pytest.mark.parametrize('method', [
    methods.PromptTuning(length=4), methods.DeepPrompt(length=4),
    prefix_tuning.PrefixTuning(length=3, width=None), lightweight.PartTuning(),
    lightweight.Lora(rank=2, alpha=2.0), lightweight.Ia3(),
], ids=['prompt', 'deep_prompt', 'prefix', 'norm_scales', 'lora', 'ia3'])
def test_a_scanned_run_leaves_what_an_unrolled_one_does(method, tmp_path, two_layers, reviews):
  """Under the same names, for the same base, up to the order of sums."""
  plain, scanned = (prompt_file.load(trained(tmp_path / name, two_layers, reviews, method,
                                             execution=execution))
                    for name, execution in (('plain', Execution()), ('scanned', SCANNED)))
  assert scanned.metadata['base'] == plain.metadata['base']
  assert scanned.params.keys() == plain.params.keys()
  start = base_checkpoint.load_base(two_layers).params
  for path, leaf in plain.params.items():
    assert np.any(leaf != param_paths.flatten(start).get(path, 0))
    np.testing.assert_allclose(scanned.params[path], leaf, atol=1e-5)


@pytest.mark.slow
def test_a_model_that_is_tuned_scanned_is_written_by_layers(tmp_path, two_layers, reviews):
  folder = trained(tmp_path / 'model', two_layers, reviews, methods.ModelTuning(),
                   execution=SCANNED)
  made, start = (param_paths.flatten(base_checkpoint.load_base(path).params)
                 for path in (folder, two_layers))
  assert made.keys() == start.keys() and any('layers_1' in path for path in made)


@pytest.mark.slow
@pytest.mark.parametrize('method', [
    methods.PromptTuning(length=4), lightweight.Lora(rank=2), lightweight.Ia3()],
    ids=['prompt', 'lora', 'ia3'])
def test_what_trains_beside_a_base_in_eight_bits(method, tmp_path, two_layers, reviews, capsys):
  """It belongs to the same base, and is evaluated in eight bits or in full."""
  prompt = trained(tmp_path / 'model', two_layers, reviews, method,
                   execution=SCANNED, parameter_dtype='int8')
  prompt_file.check(prompt_file.load(prompt), base_checkpoint.load_base(two_layers))
  lines = reviews.read_text(encoding='utf-8').splitlines()[:4]
  rows = tmp_path / 'rows.jsonl'
  rows.write_text('\n'.join(lines).replace('"text"', '"inputs"').replace('"label"', '"targets"'),
                  encoding='utf-8')
  for dtype in ('int8', 'float32'):
    assert not eval_verb.main([f'--base={two_layers}', f'--prompt={prompt}', f'--input={rows}',
                               f'--parameter_dtype={dtype}'])
    assert 'accuracy' in capsys.readouterr().out


@pytest.mark.parametrize('method, settings, message', [
    (methods.ModelTuning(), {'parameter_dtype': 'int8'}, 'is of frozen weights, but .* trains'),
    (methods.PromptTuning(4), {'execution': Execution(attention='pallas')}, 'needs a TPU'),
], ids=['model', 'pallas'])
def test_what_cannot_be_is_told_in_one_line(method, settings, message, tmp_path, two_layers,
                                            reviews):
  with pytest.raises(ValueError, match=message) as error:
    trained(tmp_path / 'model', two_layers, reviews, method, **settings)
  assert '\n' not in str(error.value)


def test_weights_that_a_file_replaces_may_have_eight_bits():
  leaf = int8.Quantized(*int8.quantize(np.ones((2, 3))), exchanged=True)
  assert (leaf.shape, leaf.ndim, leaf.dtype) == ((3, 2), 2, np.float32)

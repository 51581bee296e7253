"""The laws of every method: it starts as the base, leaves what is frozen, and is what it saves."""

import json

import jax
import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import launch, optimizers, param_paths, prompted_base
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.prompts.weight_changes import combined
from prompt_tuning_jax.training import methods, run
from prompt_tuning_jax.training.lightweight import Ia3, Lora, PartTuning
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning

pytestmark = pytest.mark.usefixtures('token_dir')
METHODS = {
    'prompt_tuning': methods.PromptTuning(3), 'prefix_tuning': PrefixTuning(3, width=7),
    'lora': Lora(2, 4.0), 'ia3': Ia3(), 'norm_scales': PartTuning(),
    'input_output': PartTuning(('token_embedder/embedding', 'decoder/logits_dense/kernel'))}
AS_BASE = ('lora', 'ia3', 'norm_scales', 'input_output')  # They add nothing to see at first.


def trained(folder, base, reviews, method, steps=6):
  return run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(folder), str(base),
                   method, optimizers.adamw(0.03), steps, 8, eval_period=3, save_period=2,
                   log_period=1)


@pytest.mark.parametrize('name', METHODS)
def test_a_run_of_each(tmp_path, tiny_base, reviews, name, capsys):
  method = METHODS[name]
  result = trained(tmp_path / 'whole', tiny_base, reviews, method)
  for steps in (3, 6):
    trained(tmp_path / 'parts', tiny_base, reviews, method, steps)
  one, other = (prompt_file.load(tmp_path / part / 'prompts' / 'last.safetensors')
                for part in ('whole', 'parts'))
  assert one.params.keys() == other.params.keys()
  for path, leaf in one.params.items():  # resumed = uninterrupted
    np.testing.assert_array_equal(leaf, other.params[path])
  trained(tmp_path / 'one', tiny_base, reviews, method, 1)
  after_one = prompt_file.load(tmp_path / 'one' / 'prompts' / 'last.safetensors')
  assert all(np.any(leaf != one.params[path]) for path, leaf in after_one.params.items())
  # Saved = loaded: what the file answers is what the run measured.
  cache = next((tmp_path / 'cache' / 'tokens').glob('reviews-validation-*'))
  assert eval_verb.main(['--base', str(tiny_base), '--prompt', result['prompt'], '--input',
                         str(cache / 'rows.jsonl')]) == 0
  assert json.loads(capsys.readouterr().out)['accuracy'] == pytest.approx(result['best_value'])
  # Frozen leaves are bit-equal, and something did train.
  base = param_paths.flatten(base_checkpoint.load_base(str(tiny_base)).params)
  loaded = param_paths.flatten(prompted_base.load(
      str(tiny_base), str(tmp_path / 'whole' / 'prompts' / 'last.safetensors')).params)
  changed = {path.removeprefix('lora/').removeprefix('ia3/').removeprefix('ia3_in/')
             .removesuffix('/a').removesuffix('/b') for path in one.params}
  moved = {path for path in base if np.any(np.asarray(loaded[path]) != np.asarray(base[path]))}
  assert moved <= changed and (moved or name in ('prompt_tuning', 'prefix_tuning'))


@pytest.mark.parametrize('name', AS_BASE)
def test_training_starts_from_the_base(tiny_base, name):
  base, method = base_checkpoint.load_base(str(tiny_base)), METHODS[name]
  added = method.initial(jax.random.key(0), base, None)
  started = param_paths.flatten(combined(added, base.params))
  for path, leaf in param_paths.flatten(base.params).items():
    np.testing.assert_array_equal(started[path], leaf)


@pytest.mark.parametrize(('method', 'count'), [
    (methods.PromptTuning(100), 100 * 1024), (Lora(8), 24 * (2 * 8 * 2048) * 3),
    (PrefixTuning(10, width=None), 3 * 24 * 2 * 10 * 1024),
    (Ia3(), 3 * 24 * 2 * 1024 + 2 * 24 * 2816)])
def test_parameters_of_t5_1_1_large(method, count):
  """Prompt tuning's 102,400 are those of Lester et al., table 4; the rest follow from shapes."""
  config = launch.network_named('t5_1_1_large')
  from prompt_tuning_jax.networks.parameters import parameter_specs
  params = param_paths.unflatten({path: jax.ShapeDtypeStruct(spec.shape, np.float32)
                                  for path, spec in parameter_specs(config).items()})
  base = base_checkpoint.Base('large', config, params, None, '')
  if isinstance(method, methods.PromptTuning):
    added = jax.eval_shape(method.model(config).prompt.init, jax.random.key(0))['params']
  else:
    added = jax.eval_shape(lambda key: method.initial(key, base, None), jax.random.key(0))
  assert param_paths.count(added) == count


def test_a_rank_or_a_pattern_that_cannot_be_is_told(tiny_base):
  base = base_checkpoint.load_base(str(tiny_base))
  with pytest.raises(ValueError, match='rank must be a whole number'):
    Lora(0)
  with pytest.raises(ValueError, match='No parameter matches'):
    Lora(kernels=('.*/querry/kernel',)).initial(jax.random.key(0), base, None)
  with pytest.raises(ValueError, match='is no kernel'):
    Lora(kernels=('.*/scale',)).initial(jax.random.key(0), base, None)

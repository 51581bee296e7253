"""WARP: a prompt and the output vectors of labels train alone, and the file says it all."""

import json
import types

import jax
import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import optimizers, param_paths, prompted_base
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks import parameters, t5
from prompt_tuning_jax.training import evaluate, run
from prompt_tuning_jax.training.lightweight import Lora
from prompt_tuning_jax.training.warp import Warp


@pytest.fixture(scope='module')
def coded(tmp_path_factory, reviews):
  """The reviews with labels whose first pieces differ."""
  path = tmp_path_factory.mktemp('coded') / 'coded.jsonl'
  rows = [json.loads(line) for line in reviews.open(encoding='utf-8')]
  name = {'good': 'warm', 'bad': 'dull'}
  path.write_text(''.join(json.dumps({**row, 'label': name[row['label']]}) + '\n' for row in rows),
                  encoding='utf-8')
  return path


@pytest.mark.slow
def test_a_run_changes_the_columns_of_labels_alone(tmp_path, tiny_base, coded, token_dir, capsys):
  result = run.train(TextFile(str(coded)), {'inputs': 24, 'targets': 8}, str(tmp_path / 'run'),
                     str(tiny_base), Warp(2), optimizers.adafactor(), 6, 8, eval_period=3,
                     save_period=3, inspect=False)
  file = prompt_file.load(result['prompt'])
  assert result['trainable_parameters'] == 2 * 8 + 8 * 2 and file.metadata['method'] == 'warp'
  base = base_checkpoint.load_base(str(tiny_base))
  words = Vocabulary.of_base(base)
  columns = sorted(words.encode(label)[0] for label in ('warm', 'dull'))
  loaded = prompted_base.load(str(tiny_base), result['prompt'])
  before, after = map(param_paths.flatten, (base.params, loaded.params))
  for path, leaf in before.items():
    np.testing.assert_array_equal(after[path], leaf)
  layer = base.config.output.removesuffix('kernel')
  change = np.asarray(after[f'{layer}lora_a']) @ np.asarray(after[f'{layer}lora_b'])
  assert np.flatnonzero(change.any(axis=0)).tolist() == columns
  # It scores through `eval`, alone and in a bank, what it scored in the run.
  cache = next((token_dir / 'tokens').glob('coded-validation-*'))
  flags = ['--base', str(tiny_base), '--prompt', result['prompt'], '--input',
           str(cache / 'rows.jsonl')]
  assert eval_verb.main(flags) == 0
  assert json.loads(capsys.readouterr().out)['accuracy'] == pytest.approx(result['best_value'])


def test_what_has_no_vectors_for_labels_is_told(tmp_path, tiny_base, reviews, coded, token_dir):
  train = lambda task: run.train(task, {'inputs': 24, 'targets': 16}, str(tmp_path / 'run'),
                                 str(tiny_base), Warp(2), optimizers.adafactor(), 1, 8)
  alike = tmp_path / 'alike.jsonl'
  alike.write_text(coded.read_text().replace('"dull"}', '"warm film"}', 50), encoding='utf-8')
  with pytest.raises(ValueError, match='first pieces of their own, got dull, warm, warm f'):
    train(TextFile(str(alike)))
  with pytest.raises(ValueError, match='Expected one task whose targets are labels'):
    train(TextFile(str(reviews), targets='text'))


def test_labels_that_targets_have_no_room_for_are_told():
  words = types.SimpleNamespace(framed=lambda ids, _: [*ids, 1],
                                encode={'no': [5], 'certainly': [6, 7, 8]}.get)
  caches = [types.SimpleNamespace(rows=[{'choices': ['no', 'certainly']}],
                                  meta={'lengths': {'targets': 3}})]
  with pytest.raises(ValueError, match="'certainly' takes 4 tokens.* targets' length is 3"):
    evaluate.choices('labels', caches, words, True)
  caches[0].meta['lengths']['targets'] = 4
  assert evaluate.choices('labels', caches, words, True).ids == ((5,), (6,))


def test_a_lora_changes_an_output_layer_that_is_the_embedding_table():
  config = t5.T5Config(40, 8, 2, 1, 1, 4, 16, logits_via_embedding=True)
  params = param_paths.unflatten({path: np.ones(spec.shape, np.float32)
                                  for path, spec in parameters.parameter_specs(config).items()})
  method = Lora(2, kernels=('decoder/logits_dense/kernel', '.*/query/kernel'))
  made = param_paths.flatten(method.initial(jax.random.key(0), Base('tied', config, params, None,
                                                                    ''), None))
  assert made['lora/decoder/logits_dense/kernel/a'].shape == (8, 2)
  assert made['lora/decoder/logits_dense/kernel/b'].shape == (2, 40)
  assert len(made) == 2 * (1 + 3)

"""Inside T5X: its trainer, restore, scores and beams with our networks and prompts, as ours are."""

import functools
import importlib
import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest

from prompt_tuning_jax import optimizers, param_paths, prompted_base, prompted_model
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file, t5x_legacy
from prompt_tuning_jax.data import batches, token_cache
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.networks.bart import BartConfig
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.prompts.virtual_tokens import PLACEMENTS, VirtualTokens
from prompt_tuning_jax.training import run
from prompt_tuning_jax.training.lightweight import Adapters, Lora
from prompt_tuning_jax.training.methods import PromptTuning
from prompt_tuning_jax.training.multitask import MultitaskPrompts
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning
from prompt_tuning_jax.training.warp import Warp

pytest.importorskip('t5x', reason=(
    'There is no T5X to import: install the extra `t5x`, or name checkouts of t5x, airio and '
    'jestimator in T5X_SOURCE.'))
seqio, t5x_train, partitioning, trainer, utils, t5x_bridge = map(importlib.import_module, (
    'seqio', 't5x.train', 't5x.partitioning', 't5x.trainer', 't5x.utils',
    'prompt_tuning_jax.t5x_bridge'))

LENGTHS = {'inputs': 16, 'targets': 8}
STEPS, MORE = 20, 24


@pytest.fixture(scope='module')
def decoder_only(tmp_path_factory, tiny) -> str:
  """A random decoder-only T5X folder with the vocabulary of the tiny base."""
  folder = tmp_path_factory.mktemp('gpt') / 'checkpoint_7'
  config = GPTConfig(vocab_size=192, emb_dim=8, num_heads=2, num_layers=2, head_dim=4, mlp_dim=16)
  base = base_checkpoint.random_base(config, f'{tiny}/spiece.model')
  t5x_legacy.write(folder, base.params, step=7)
  base.vocabulary.write(folder)
  return str(folder)


def saved(method, base: str, path: pathlib.Path, noise: float = 0.5) -> str:
  """A prompt file of this method with random numbers."""
  opened = t5x_bridge.open_base(base)
  leaves = method.initial(jax.random.key(2), opened, t5x_bridge.Vocabulary.of_base(opened))
  leaves = jax.tree.map(lambda leaf: leaf + noise * jax.random.normal(
      jax.random.key(3), leaf.shape), leaves)
  method.save(path / 'random', leaves, opened, {'task': 'reviews', 'labels': ['good', 'bad']})
  return str(path / 'random.safetensors')


def train(folder: pathlib.Path, base: str, task: str, batches_of, method, steps: int):
  """`t5x.train` as gin/t5x/train.gin sets it up, in this process; returns its last state."""
  config = functools.partial(
      utils.DatasetConfig, task, LENGTHS, batch_size=16, shuffle=False, seed=0, pack=False)
  actions = [t5x_bridge.BestPrompt(str(folder))]
  return t5x_train.train(
      model=t5x_bridge.model(base, method, optimizers.adafactor(0.3), z_loss=1e-4),
      model_dir=str(folder),
      train_dataset_cfg=config(split='train'), train_eval_dataset_cfg=None,
      infer_eval_dataset_cfg=config(split='validation'), get_dataset_fn=batches_of,
      checkpoint_cfg=utils.CheckpointConfig(
          save=utils.SaveCheckpointConfig(
              period=10, keep=1, save_dataset=True, state_transformation_fns=[
                  t5x_bridge.PromptFiles(str(folder), method, task, base)]),
          restore=utils.RestoreCheckpointConfig(
              t5x_bridge.t5x_folder(base), 'specific', dtype='float32', fallback_to_scratch=True,
              state_transformation_fns=[t5x_bridge.from_base])),
      partitioner=t5x_bridge.Partitioner(
          1, logical_axis_rules=partitioning.standard_logical_axis_rules(
              additional_rules=[('prompt', None)])),
      trainer_cls=functools.partial(trainer.Trainer, num_microbatches=None,
                                    learning_rate_fn=lambda step: 0.3),
      total_steps=steps, eval_steps=1, eval_period=10, stats_period=1, random_seed=0,
      summarize_config_fn=lambda *args: None, concurrent_metrics=False,
      actions={'INFER_EVAL': actions, 'TRAIN_EVAL': actions})


@pytest.fixture(scope='module')
def trained(tmp_path_factory, tiny, task, reviews):
  """(our folder, T5X's folder, its last state): the same run twice, T5X's in two parts."""
  ours, theirs = tmp_path_factory.mktemp('ours'), tmp_path_factory.mktemp('theirs')
  method, rows = PromptTuning(length=3), TextFile(str(reviews), str(reviews), targets='label')
  run.train(rows, LENGTHS, str(ours), tiny, method, optimizers.adafactor(0.3), MORE, 16,
            eval_period=0, log_period=1, dropout_rate=0.0, inspect=False,
            batching=functools.partial(batches.TrainBatches, buckets=batches.Buckets((), ())))

  def batches_of(cfg, shard, shards, converter):
    words = t5x_bridge.Vocabulary.of_base(t5x_bridge.open_base(tiny))
    cache = token_cache.open_or_build(rows, rows.train_split, words, LENGTHS)
    return t5x_bridge.CachedBatches(batches.TrainBatches(
        cache, cfg.batch_size, cfg.seed, converter.keywords['virtual'], batches.Buckets((), ())))

  for steps in (STEPS, MORE):
    _, state = train(theirs, tiny, task, batches_of, method, steps)
  return ours, theirs, state


def curve(folder: pathlib.Path, tag: str = 'cross_ent_loss') -> dict[int, float]:
  """{step: value} that T5X wrote for TensorBoard."""
  from tensorboard.backend.event_processing import event_accumulator, tag_types
  from tensorboard.util import tensor_util
  events = event_accumulator.EventAccumulator(str(folder / 'train'), {tag_types.TENSORS: 0})
  events.Reload()
  return {event.step: float(tensor_util.make_ndarray(event.tensor_proto))
          for event in events.Tensors(tag)}


def test_the_two_trainers_have_the_same_losses_and_the_same_prompt(trained):
  ours, theirs, state = trained
  lines = map(json.loads, (ours / 'metrics.jsonl').read_text().splitlines())
  expected = {line['step']: line['loss'] for line in lines if line['split'] == 'train'}
  found = curve(theirs)
  assert list(found) == list(expected) == list(range(1, MORE + 1))
  np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-4, rtol=0)
  assert max(expected.values()) - min(expected.values()) > 0.1
  prompts = [prompt_file.load(folder / 'prompts' / 'last.safetensors') for folder in (ours, theirs)]
  leaves = [prompt.params['prompt/embedding'] for prompt in prompts]
  np.testing.assert_allclose(*leaves, atol=1e-3, rtol=0)
  np.testing.assert_array_equal(leaves[1], state.params['prompt']['embedding'])
  same = ('method', 'placement', 'length', 'base', 'vocabulary')
  assert all(prompts[0].metadata[name] == prompts[1].metadata[name] for name in same)


def test_the_prompt_alone_trains_and_has_all_of_the_optimizers_state(trained, tiny):
  _, theirs, state = trained
  params = param_paths.flatten(state.params)
  assert int(state.step) == MORE
  for path, leaf in param_paths.flatten(base_checkpoint.load_base(tiny).params).items():
    np.testing.assert_array_equal(params.pop(path), leaf, err_msg=path)
  assert list(params) == ['prompt/embedding']
  kept = sum(leaf.size for leaf in jax.tree.leaves(state.param_states))
  assert kept < 2 * params['prompt/embedding'].size


def test_best_and_last_prompts_say_what_they_are_and_work_here(trained, tiny):
  folder = trained[1] / 'prompts'
  assert {path.name for path in folder.iterdir()} == {'best.safetensors', 'last.safetensors'}
  best, last = (prompt_file.load(folder / f'{name}.safetensors') for name in ('best', 'last'))
  assert last.metadata['step'] == MORE and last.metadata['metric'] is None
  assert best.metadata['metric']['name'] == 'accuracy' and best.metadata['step'] in (10, 20, 24)
  assert best.metadata['step'] == best.metadata['metric']['step']
  assert best.metadata['labels'] == ['good', 'bad'] and best.metadata['task'] == 'reviews_in_t5x'
  base = prompted_base.load(tiny, str(folder / 'best.safetensors'))
  assert len(base.predictor.score(base.params, [[5, 6, 1]], [[7, 1]])) == 1


def test_the_best_is_kept_and_what_was_not_saved_is_not_taken(tmp_path, tiny):
  method, base = PromptTuning(length=2), t5x_bridge.open_base(tiny)
  prompts, infos = [], {'infos': 0}
  for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (5, 1.0)):
    leaf = np.full((2, 8), loss, np.float32)
    state = {'state': {'step': np.int32(min(step, 4))}, 'target': {
        'prompt': {'embedding': leaf}, 'decoder': {}}}
    files = t5x_bridge.PromptFiles(str(tmp_path), method, 'reviews_in_t5x', tiny)
    assert files(state, infos) == (state, infos)
    action = t5x_bridge.BestPrompt(str(tmp_path), 'loss')
    trainer_state = type('State', (), {'step': np.int32(step)})
    assert not action.run(trainer_state, {'t': {'loss': type('Scalar', (), {'value': loss})}})
    assert not action.run(trainer_state, {'t': {'accuracy': 1.0}})
    prompts.append(prompt_file.load(tmp_path / 'prompts' / 'best.safetensors'))
  assert [prompt.metadata['metric']['value'] for prompt in prompts] == [3.0, 2.0, 2.0, 2.0]
  assert prompts[-1].params['prompt/embedding'][0, 0] == 2.0
  assert prompts[-1].metadata['base']['fingerprint'] == base.fingerprint


def test_a_missing_leaf_of_the_base_is_an_error(tmp_path, tiny):
  params = param_paths.flatten(base_checkpoint.load_base(tiny).params)
  lost = 'encoder/layers_0/mlp/wo/kernel'
  del params[lost]
  t5x_legacy.write(tmp_path / 'checkpoint_0', param_paths.unflatten(params))
  restore = functools.partial(restored, t5x_bridge.model(tiny, PromptTuning(length=2)))
  with pytest.raises(ValueError, match=f'missing: {lost}'):
    restore(tmp_path / 'checkpoint_0')
  params[lost], params['decoder/extra'] = np.zeros((3, 3), np.float32), np.zeros(3, np.float32)
  t5x_legacy.write(tmp_path / 'checkpoint_1', param_paths.unflatten(params))
  with pytest.raises(ValueError, match='not known: decoder/extra'):
    restore(tmp_path / 'checkpoint_1')
  del params['decoder/extra']
  t5x_legacy.write(tmp_path / 'checkpoint_2', param_paths.unflatten(params))
  with pytest.raises(ValueError, match=r'\(3, 3\) does not match expected'):
    restore(tmp_path / 'checkpoint_2')


def restored(model, folder, optimizer=None):
  """The state that T5X restores of a folder, as `t5x.infer` does without an optimizer."""
  partitioner = t5x_bridge.Partitioner(1, logical_axis_rules=(
      *partitioning.standard_logical_axis_rules(), ('prompt', None), ('keys_values', None),
      ('bottleneck', None)))
  shapes = {f'{side}_{what}_tokens': (2, 8) for side, what in (
      ('encoder', 'input'), ('decoder', 'input'), ('decoder', 'target'))}
  initializer = utils.TrainStateInitializer(optimizer, model.get_initial_variables, shapes,
                                            partitioner)
  config = utils.RestoreCheckpointConfig(
      str(folder), 'specific', strict=False, dtype='float32', fallback_to_scratch=True,
      state_transformation_fns=[t5x_bridge.from_base])
  return utils.create_checkpoint_manager_and_restore(
      initializer, partitioner, config, str(folder), jax.random.PRNGKey(0), use_orbax=True)[0]


METHODS = {
    'prompt': PromptTuning(length=3, placement='infix'), 'prefix': PrefixTuning(2, width=None),
    'adapters': Adapters(width=2), 'decoder_only_prompt': PromptTuning(length=3)}


@pytest.mark.parametrize('name', METHODS)
def test_scores_and_beams_with_a_prompt_of_ours_are_ours(name, tmp_path, tiny, decoder_only):
  base = decoder_only if name.startswith('decoder_only') else tiny
  prompt = saved(METHODS[name], base, tmp_path)
  model = t5x_bridge.model(base, prompt=prompt)
  state, here = restored(model, t5x_bridge.t5x_folder(base)), prompted_base.load(base, prompt)
  inputs, targets = [[20, 30, 40, 1], [33, 44, 55, 66, 77, 1]], [[50, 60, 1], [55, 1]]
  virtual = model.FEATURE_CONVERTER_CLS.keywords['virtual']
  assert virtual == here.virtual
  batch = batches.batch_of(inputs, targets, virtual)
  scores = jax.jit(model.score_batch)(state.params, batch)
  np.testing.assert_allclose(scores, here.predictor.score(here.params, inputs, targets), atol=1e-5)
  (loss, _), gradients = jax.jit(jax.value_and_grad(model.loss_fn, has_aux=True))(
      state.params, batch, None)
  np.testing.assert_allclose(loss, prompted_model.loss(here.model, here.params, batch)[0], 1e-5)
  added, rest = t5x_bridge.split(gradients)
  assert any(leaf.any() for leaf in jax.tree.leaves(added))
  assert not any(leaf.any() for leaf in jax.tree.leaves(rest))
  without = jax.jit(t5x_bridge.model(base).score_batch)(
      t5x_bridge.split(state.params)[1], batches.batch_of(inputs, targets))
  assert np.abs(np.asarray(scores) - np.asarray(without)).min() > 1e-3

  beams, size = 3, batch['decoder_input_tokens'].shape[1]
  found, aux = jax.jit(functools.partial(
      model.predict_batch_with_aux, num_decodes=beams, return_all_decodes=True))(
          state.params, batch)
  tokens, expected = jax.jit(lambda params: prompted_model.beam_search(
      here.model, params, batch['encoder_input_tokens'], size, beams))(here.params)
  ended = np.any(np.asarray(tokens) == 1, axis=-1)
  np.testing.assert_array_equal(np.asarray(found)[:, ::-1], tokens)
  # T5X leaves the score of a text without an end as it is.
  expected = np.where(ended, expected, np.asarray(expected) * ((5 + size) / 6) ** 0.6)
  np.testing.assert_allclose(np.asarray(aux['scores'])[:, ::-1], expected, atol=1e-5)


@pytest.mark.parametrize('placement', PLACEMENTS)
def test_the_feature_converter_places_prompts_as_our_batches_do(placement):
  virtual = VirtualTokens(100, 3, placement)
  texts = [[5], [5, 6], [5, 6, 7], [5, 6, 7, 8], [5, 6, 7, 8, 1]]
  features = {key: seqio.Feature(seqio.PassThroughVocabulary(100)) for key in LENGTHS}
  lengths = {'inputs': 6, 'targets': 2}

  def converted(pack, lengths):
    import tensorflow as tf
    rows = tf.data.Dataset.from_generator(
        lambda: ({'inputs': text, 'targets': [9, 1]} for text in texts),
        output_signature=dict.fromkeys(features, tf.TensorSpec([None], tf.int32)))
    converter = t5x_bridge.FeatureConverter(pack=pack, virtual=virtual)
    return list(converter(rows, lengths).as_numpy_iterator())

  expected = batches.batch_of(texts, [[9, 1]] * len(texts), virtual, batches.Buckets((6,), (2,)))
  rows = converted(False, lengths)
  assert len(rows) == len(texts)
  for i, row in enumerate(rows):
    for name, array in expected.items():
      np.testing.assert_array_equal(row[name], array[i], err_msg=name)
  packed = converted(True, {'inputs': 30, 'targets': 10})
  assert len(packed) == 1
  ids, segments = packed[0]['encoder_input_tokens'], packed[0]['encoder_segment_ids']
  for i, text in enumerate(texts):
    np.testing.assert_array_equal(ids[segments == i + 1], virtual.place(np.asarray(text)))


def test_numpy_prompts_of_google_research_are_taken(tmp_path, tiny):
  rows = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  np.save(tmp_path / 'prompt.npy', rows)
  model = t5x_bridge.model(tiny, prompt=str(tmp_path / 'prompt.npy'))
  np.testing.assert_array_equal(
      restored(model, t5x_bridge.t5x_folder(tiny)).params['prompt']['embedding'], rows)
  np.save(tmp_path / 'prompt.npy', rows[:, :7])
  with pytest.raises(ValueError, match='the width is 7, but 8 in this base'):
    t5x_bridge.model(tiny, prompt=str(tmp_path / 'prompt.npy'))


def test_what_does_not_fit_is_told(tiny, decoder_only, test_assets):
  with pytest.raises(ValueError, match='Lora changes weights of the base'):
    t5x_bridge.model(tiny, Lora())
  with pytest.raises(ValueError, match='Warp changes weights of the base'):
    t5x_bridge.model(tiny, Warp())
  with pytest.raises(ValueError, match='MultitaskPrompts changes weights of the base or is of sev'):
    t5x_bridge.model(tiny, MultitaskPrompts())
  with pytest.raises(ValueError, match='brings no vocabulary'):
    t5x_bridge.model(str(test_assets / 'prompt_tuning/test_data/test_t5_1_1_tiny/checkpoint_3'))
  with pytest.raises(ValueError, match='There is no task'):
    t5x_bridge.task('sst22', tiny)
  with pytest.raises(ValueError, match='TRAIN_STEPS counts those of'):
    t5x_bridge.own_steps(7, decoder_only)
  assert t5x_bridge.own_steps(10, decoder_only) == 3 and t5x_bridge.own_steps(10, tiny) == 10


@pytest.mark.parametrize('network', [BartConfig, BertConfig])
def test_a_base_whose_inputs_have_another_form_is_refused(network, tmp_path, request):
  is_bart = network is BartConfig
  file = request.getfixturevalue('bart_file' if is_bart else 'bert_file')
  config = network(vocab_size=320, emb_dim=8, num_heads=2, num_encoder_layers=1, head_dim=4,
                   mlp_dim=16, max_positions=40, **({'num_decoder_layers': 1} if is_bart else {}))
  base = base_checkpoint.random_base(config, str(file))
  base_checkpoint.write(tmp_path / 'base', base.config, base.params, vocabulary=base.vocabulary)
  with pytest.raises(ValueError, match='bases are T5s and decoder-only networks.* our own trainer'):
    t5x_bridge.model(str(tmp_path / 'base'), PromptTuning(length=2))

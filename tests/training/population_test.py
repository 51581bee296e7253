"""Laws of training together: each member is trained as it is alone, whatever the others are."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax import optimizers, param_paths
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.networks import t5
from prompt_tuning_jax.training import lightweight, loop, methods, population, run
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step
from prompt_tuning_jax.training.warp import Warp

CONFIG = t5.T5Config(vocab_size=40, emb_dim=8, num_heads=2, num_encoder_layers=1,
                     num_decoder_layers=1, head_dim=4, mlp_dim=16, dropout_rate=0.0)
TOKEN = jnp.ones((1, 1), jnp.int32)
BASE = CONFIG.network().init(jax.random.key(0), TOKEN, TOKEN, TOKEN)['params']
PATH = 'prompt/embedding'
METHODS = {'adapters': lightweight.Adapters(width=3), 'ia3': lightweight.Ia3(),
           'lora': lightweight.Lora(rank=2)}


def member(seed, length=3, rate=0.3, method=None, optimizer=None, **settings):
  """(recipe, a function that makes its first state)."""
  method = method or methods.PromptTuning(length)
  base = types.SimpleNamespace(config=CONFIG, params=BASE,
                               embedding=BASE['token_embedder']['embedding'])
  optimizer = optimizer or optimizers.adafactor(rate)
  start = lambda: train_state.create(method.initial(jax.random.key(seed), base, None), optimizer)
  return Recipe(method.model(CONFIG), optimizer, seed, **settings), start


def batch(seed, length, width=6, targets=5):
  rng = np.random.default_rng(seed)
  inputs = rng.integers(2, 40, (4, length + width), dtype=np.int32)
  inputs[:, :length] = 40 + np.arange(length)
  inputs[1, -2:] = 0
  words = rng.integers(2, 40, (4, targets), dtype=np.int32)
  weights = np.ones((4, targets), np.float32)
  weights[2, 2:] = 0
  return {'encoder_input_tokens': inputs,
          'decoder_input_tokens': np.pad(words[:, :-1], ((0, 0), (1, 0))),
          'decoder_target_tokens': words, 'decoder_loss_weights': weights}


def alone(recipe, start, given):
  step, state, losses = make_train_step(recipe), start(), []
  for each in given:
    state, metrics = step(state, BASE, each)
    losses.append(float(metrics['loss']))
  return jax.device_get(state), losses


def together(members, given):
  """[(last state, losses)] of members that take their batches together."""
  states = [start() for _, start in members]
  step = population.make_population_step([recipe for recipe, _ in members], states)
  losses = [[] for _ in members]
  for each in zip(*given, strict=True):
    outcomes = step(states, BASE, population.together(each))
    states = [state for state, _ in outcomes]
    for own, (_, metrics) in zip(losses, outcomes, strict=True):
      own.append(float(metrics['loss']))
  return list(zip(jax.device_get(states), losses, strict=True))


def check_same(one, other, tolerance=1e-5):
  assert jax.tree.structure(one[0]) == jax.tree.structure(other[0])
  for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
  np.testing.assert_allclose(one[1], other[1], rtol=tolerance)


MEMBERS = [member(0, 3), member(1, 5, rate=0.1), member(2, 1, optimizer=optimizers.adamw(0.05)),
           member(3, 3, optimizer=optax.sgd(0.1))]
GIVEN = [[batch(10 * k + i, length, 6 + k, 4 + i % 2) for i in range(8)]
         for k, length in enumerate((3, 5, 1, 3))]


@pytest.mark.slow
def test_each_member_is_trained_as_alone_and_their_order_does_not_matter():
  """Seeds, lengths, widths, learning rates and optimizers of their own; dropout 0."""
  alike = [alone(*each, given) for each, given in zip(MEMBERS, GIVEN, strict=True)]
  for one, other in zip(alike, together(MEMBERS, GIVEN), strict=True):
    check_same(one, other)
  for one, other in zip(alike, together(MEMBERS[::-1], GIVEN[::-1])[::-1], strict=True):
    check_same(one, other)
  assert len({round(loss, 3) for _, losses in alike for loss in losses}) > 20  # all differ


@pytest.mark.slow
def test_a_population_of_one_is_the_ordinary_run():
  check_same(alone(*MEMBERS[1], GIVEN[1]), together(MEMBERS[1:2], GIVEN[1:2])[0], 1e-6)


@pytest.mark.slow
def test_members_draw_the_dropout_masks_that_they_draw_alone(monkeypatch):
  """Where the batches are of one width."""
  still = member(4)
  monkeypatch.setitem(globals(), 'CONFIG', t5.T5Config(**{**vars(CONFIG), 'dropout_rate': 0.3}))
  members = [member(seed) for seed in (4, 5)]
  given = [[batch(10 * k + i, 3) for i in range(5)] for k in range(2)]
  outcomes = together(members, given)
  for one, each, own in zip(outcomes, members, given, strict=True):
    check_same(one, alone(*each, own))
  assert abs(outcomes[0][1][0] - alone(*still, given[0])[1][0]) > 1e-3  # There are masks.


@pytest.mark.slow
def test_microbatches_smoothing_and_z_loss_are_as_alone():
  settings = {'num_microbatches': 2, 'label_smoothing': 0.1, 'z_loss': 1e-2}
  members = [member(seed, length, **settings) for seed, length in ((0, 3), (1, 5))]
  for one, each, own in zip(together(members, GIVEN[:2]), members, GIVEN[:2], strict=True):
    check_same(one, alone(*each, own))


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(METHODS))
def test_other_methods_train_together_too(name):
  members = [member(seed, method=METHODS[name], optimizer=optax.sgd(0.1)) for seed in (0, 1)]
  given = [[batch(10 * k + i, 0) for i in range(4)] for k in range(2)]
  for one, each, own in zip(together(members, given), members, given, strict=True):
    check_same(one, alone(*each, own))


@pytest.mark.slow
def test_one_member_that_diverges_leaves_the_others_alone():
  wild = member(1, 3, optimizer=optax.sgd(float('nan')))
  members, given = [MEMBERS[0], wild, MEMBERS[1]], [GIVEN[0], GIVEN[3], GIVEN[1]]
  first, diverged, last = together(members, given)
  assert int(diverged[0].diverged_at) == 0 and int(first[0].diverged_at) == -1
  np.testing.assert_array_equal(diverged[0].trainable['prompt']['embedding'],
                                wild[1]().trainable['prompt']['embedding'])
  check_same(first, alone(*MEMBERS[0], GIVEN[0]))
  check_same(last, alone(*MEMBERS[1], GIVEN[1]))


def test_every_frozen_kernel_is_in_products_of_all_members_rows():
  """No product with a frozen kernel is one of a batch of products: the base is read once."""
  states = [start() for _, start in MEMBERS]
  step = population.make_population_step([recipe for recipe, _ in MEMBERS], states)
  rows = population.together([given[0] for given in GIVEN])
  jaxpr = jax.make_jaxpr(step)(states, BASE, rows)
  kernels = {leaf.shape for path, leaf in param_paths.flatten(BASE).items() if 'kernel' in path}
  found = []

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == 'dot_general':
        shapes = [variable.aval.shape for variable in equation.invars]
        if kernels & set(shapes):
          found.append(equation.params['dimension_numbers'][1])
        assert not any(shape[:1] == (4,) and shape[1:] in kernels for shape in shapes)
      for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(
          x, 'eqns') or hasattr(x, 'jaxpr')):
        if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
          visit(getattr(value, 'jaxpr', value))

  visit(jaxpr.jaxpr)
  assert len(found) >= len([path for path in param_paths.flatten(BASE) if 'kernel' in path])
  assert set(found) == {((), ())}


def arguments(folder, base, reviews, steps=8, length=3, rate=0.3, task=None, **settings):
  return {'task': task or TextFile(str(reviews)),
          'task_feature_lengths': {'inputs': 24, 'targets': 8}, 'model_dir': str(folder),
          'initial_checkpoint_path': str(base), 'method': methods.PromptTuning(length, **settings),
          'optimizer': optimizers.adafactor(rate), 'train_steps': steps, 'batch_size': 4,
          'eval_period': 4, 'save_period': 4, 'log_period': 2, 'dropout_rate': 0.0,
          'max_eval_examples': 8}


def several(folder, base, reviews, steps=8):
  """Runs that differ in length, placement, rate, data, steps, patience and seed."""
  other = folder.parent / 'turned.jsonl'
  if not other.exists():
    rows = [json.loads(line) for line in reviews.read_text('utf-8').splitlines()]
    other.write_text(''.join(json.dumps({'text': f'{row["text"]} , {row["text"]}', 'label': {
        'good': 'bad', 'bad': 'good'}[row['label']]}) + '\n' for row in rows), 'utf-8')
  return {
      'short': {**arguments(folder / 'short', base, reviews, steps, 2), 'seed': 3},
      'long': arguments(folder / 'long', base, reviews, steps, 5, 0.1, placement='end'),
      'other': arguments(folder / 'other', base, reviews, steps, 3, task=TextFile(str(other))),
      'brief': {**arguments(folder / 'brief', base, reviews, steps - 3), 'patience': 1}}


def kept(folder, name, which='last'):
  return prompt_file.load(folder / name / 'prompts' / f'{which}.safetensors').params[PATH]


def lines(folder, name):
  return [json.loads(line) for line in (folder / name / 'metrics.jsonl').open()]


@pytest.mark.slow
@pytest.mark.usefixtures('token_dir')
def test_a_populations_files_are_those_of_single_runs_and_it_resumes_bit_for_bit(
    tmp_path, tiny_base, reviews):
  whole = population.train(population.prepared(several(tmp_path / 'whole', tiny_base, reviews)))
  for steps in (5, 8):
    population.train(population.prepared(several(tmp_path / 'parts', tiny_base, reviews, steps)))
  for name, given in several(tmp_path / 'single', tiny_base, reviews).items():
    single = run.train(**given)
    assert {key: whole[name][key] for key in ('metric', 'best_step', 'steps', 'stopped')} == {
        key: single[key] for key in ('metric', 'best_step', 'steps', 'stopped')}
    assert whole[name]['best_value'] == pytest.approx(single['best_value'])
    for which in ('best', 'last'):
      np.testing.assert_allclose(kept(tmp_path / 'whole', name, which),
                                 kept(tmp_path / 'single', name, which), rtol=1e-4, atol=1e-5)
    one, other = lines(tmp_path / 'whole', name), lines(tmp_path / 'single', name)
    assert [(row['step'], row['split']) for row in one] == [
        (row['step'], row['split']) for row in other]
    np.testing.assert_allclose([row['loss'] for row in one if row['split'] == 'train'],
                               [row['loss'] for row in other if row['split'] == 'train'], rtol=1e-5)
    assert json.loads((tmp_path / 'whole' / name / 'report.json').read_text()) == whole[name]
  for name in ('short', 'long', 'other'):
    np.testing.assert_array_equal(kept(tmp_path / 'whole', name), kept(tmp_path / 'parts', name))


@pytest.mark.slow
@pytest.mark.usefixtures('token_dir')
def test_runs_of_warp_train_together_unless_their_labels_differ(tmp_path, tiny_base, reviews):
  """Which columns are the labels' is a frozen leaf that every run makes for itself."""
  def given(folder, name, good, bad, length, seed):
    path = tmp_path / f'{good}.jsonl'
    path.write_text(reviews.read_text('utf-8').replace('"good"', f'"{good}"')
                    .replace('"bad"', f'"{bad}"'), 'utf-8')
    return {**arguments(folder / name, tiny_base, reviews, task=TextFile(str(path))),
            'method': Warp(length), 'seed': seed}

  members = {'one': ('warm', 'dull', 2, 0), 'two': ('warm', 'dull', 3, 1),
             'other': ('song', 'film', 2, 0)}
  ready = population.prepared({name: given(tmp_path / 'together', name, *member)
                               for name, member in members.items()})
  first, second = population.groups(ready, 3)
  assert (list(first), list(second)) == (['one', 'two'], ['other'])
  population.train(first)
  for name in first:
    run.train(**given(tmp_path / 'alone', name, *members[name]))
    one, other = (prompt_file.load(tmp_path / folder / name / 'prompts' / 'last.safetensors').params
                  for folder in ('together', 'alone'))
    assert one.keys() == other.keys() and len(one) == 3
    for path, leaf in one.items():
      np.testing.assert_allclose(leaf, other[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.usefixtures('token_dir')
def test_a_diverged_member_is_reported_and_the_others_end(tmp_path, tiny_base, reviews, caplog):
  given = {'wild, 10 %': arguments(tmp_path / 'wild', tiny_base, reviews, rate=float('nan')),
           'tame': arguments(tmp_path / 'tame', tiny_base, reviews)}
  outcomes = population.train(population.prepared(given))
  assert isinstance(outcomes['wild, 10 %'], loop.Diverged) and outcomes['tame']['steps'] == 8
  assert not (tmp_path / 'wild' / 'report.json').exists()
  said = 'wild, 10 %: The loss or its gradient was not finite at step 0'
  assert any(record.message.startswith(said) for record in caplog.records)


@pytest.mark.usefixtures('token_dir')
def test_what_cannot_train_together_stands_in_groups_of_its_own(tmp_path, tiny_base, reviews):
  given = {str(i): arguments(tmp_path / str(i), tiny_base, reviews, length=i + 1)
           for i in range(5)}
  given['3']['batch_size'] = 8
  given['4']['batching'] = lambda *args, **more: batches.TrainBatches(
      *args, **more, buckets=batches.Buckets((), ()))
  ready = population.prepared(given)
  leaves = [jax.tree.leaves(training.frozen) for training in ready.values()]
  assert all(a is b for own in leaves for a, b in zip(own, leaves[0], strict=True))
  assert [list(group) for group in population.groups(ready, 2)] == [['0', '1'], ['2', '4'], ['3']]
  with pytest.raises(ValueError, match='cannot train together'):
    population.train(ready)
  losses = {loss: {**arguments(tmp_path / loss, tiny_base, reviews), 'loss': loss}
            for loss in ('targets', 'labels', 'both')}
  ready = population.prepared({**losses, 'again': losses['labels']})
  assert [list(group) for group in population.groups(ready, 4)] == [
      ['targets'], ['labels', 'again'], ['both']]
  assert not any((tmp_path / str(i)).exists() for i in range(5))
  with pytest.raises(ValueError, match='INITIAL_CHECKPOINT_PATH'):
    population.prepared({'0': {**given['0'], 'initial_checkpoint_path': None}})

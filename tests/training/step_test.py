"""Laws of the training step, on a tiny network and made-up batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from prompt_tuning_jax import optimizers, param_paths, prompted_model
from prompt_tuning_jax.networks import t5
from prompt_tuning_jax.training import methods
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step

CONFIG = t5.T5Config(vocab_size=40, emb_dim=8, num_heads=2, num_encoder_layers=1,
                     num_decoder_layers=1, head_dim=4, mlp_dim=16)
METHODS = [methods.PromptTuning(length=3), methods.ModelTuning()]


def made(method, optimizer=None, **settings):
  """(state, frozen, step) for `method`, with random weights."""
  token = jnp.ones((1, 1), jnp.int32)
  params = method.model(CONFIG).init(jax.random.key(0), token, token, token)['params']
  trainable, frozen = param_paths.split(params, method.trainable)
  optimizer = optimizer or optimizers.adafactor()
  step = make_train_step(Recipe(method.model(CONFIG), optimizer, seed=7, **settings))
  return train_state.create(trainable, optimizer), frozen, step


def batch(seed: int, prompt: int = 3) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  inputs = rng.integers(2, 40, (4, 6), dtype=np.int32)
  if prompt:
    inputs[:, :prompt] = 40 + np.arange(prompt)
  targets = rng.integers(2, 40, (4, 5), dtype=np.int32)
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  return {'encoder_input_tokens': inputs, 'decoder_input_tokens': shifted,
          'decoder_target_tokens': targets, 'decoder_loss_weights': np.ones((4, 5), np.float32)}


def leaves(tree) -> dict[str, np.ndarray]:
  # Copied: a donated buffer must not be looked at later.
  return {path: np.array(leaf) for path, leaf in param_paths.flatten(tree).items()}


def test_frozen_leaves_are_bit_equal_after_training_and_the_prompt_is_not():
  state, frozen, step = made(METHODS[0])
  before, prompt = leaves(frozen), leaves(state.trainable)
  for i in range(5):
    state, _ = step(state, frozen, batch(i))
  after = leaves(frozen)
  assert before.keys() == after.keys()
  for path, leaf in before.items():
    np.testing.assert_array_equal(leaf, after[path])
  moved = leaves(state.trainable)
  assert list(moved) == ['prompt/embedding']
  assert np.all(np.any(moved['prompt/embedding'] != prompt['prompt/embedding'], axis=1))


def test_optimizer_state_is_for_the_trainable_leaves_alone():
  state, _, _ = made(METHODS[0], optimizers.adamw())
  sizes = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
  assert sizes <= 2 * 3 * CONFIG.emb_dim + 2


@pytest.mark.parametrize('method', METHODS, ids=lambda m: type(m).__name__)
def test_the_same_seed_gives_the_same_bits(method):
  results = []
  for _ in range(2):
    state, frozen, step = made(method)
    for i in range(3):
      state, _ = step(state, frozen, batch(i, prompt=3 if frozen else 0))
    results.append(leaves(state.trainable))
  for path, leaf in results[0].items():
    np.testing.assert_array_equal(leaf, results[1][path])


def test_the_update_is_the_gradient_of_the_whole_model_at_the_prompt():
  """Differentiating the subtree equals differentiating everything and dropping the rest."""
  method = METHODS[0]
  state, frozen, step = made(method, optax.sgd(1.0))
  prompt = leaves(state.trainable)['prompt/embedding']
  params = param_paths.merge(jax.tree.map(jnp.array, state.trainable), frozen)
  key = jax.random.fold_in(jax.random.key(7), 0)
  gradient = jax.grad(lambda p: prompted_model.loss(method.model(CONFIG), p, batch(0), key)[0])(
      params)
  state, _ = step(state, frozen, batch(0))
  np.testing.assert_allclose(leaves(state.trainable)['prompt/embedding'],
                             prompt - np.asarray(gradient['prompt']['embedding']), rtol=1e-4,
                             atol=1e-3)


@pytest.mark.slow
def test_microbatches_are_one_batch():
  """Also where they have unequal numbers of target tokens; without dropout."""
  uneven = batch(3)
  uneven['decoder_loss_weights'][1, 1:] = 0
  uneven['decoder_loss_weights'][2] = 0
  results = []
  for count in (1, 2, 4):
    state, frozen, _ = made(METHODS[0], optax.sgd(1.0))
    model = METHODS[0].model(dataclasses.replace(CONFIG, dropout_rate=0.0))
    step = make_train_step(Recipe(model, optax.sgd(1.0), 7, num_microbatches=count))
    state, metrics = step(state, frozen, uneven)
    results.append((leaves(state.trainable)['prompt/embedding'], jax.device_get(metrics)))
  for prompt, metrics in results[1:]:
    np.testing.assert_allclose(prompt, results[0][0], rtol=1e-4, atol=1e-5)
    for name, value in results[0][1].items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
  state, frozen, step = made(METHODS[0], num_microbatches=3)
  with pytest.raises(ValueError, match='multiple of num_microbatches, got 4 and 3'):
    step(state, frozen, uneven)


def test_a_loss_that_is_not_finite_stops_updates_and_says_where():
  state, frozen, step = made(METHODS[0])
  state, _ = step(state, frozen, batch(0))
  good = leaves(state.trainable)
  bad = batch(1)
  bad['decoder_loss_weights'][0, 0] = np.nan
  state, _ = step(state, frozen, bad)
  state, _ = step(state, frozen, batch(2))
  assert int(state.diverged_at) == 1 and int(state.step) == 3
  np.testing.assert_array_equal(leaves(state.trainable)['prompt/embedding'],
                                good['prompt/embedding'])


def test_training_lowers_the_loss_of_one_batch():
  state, frozen, step = made(METHODS[0])
  losses = []
  for _ in range(40):
    state, metrics = step(state, frozen, batch(0))
    losses.append(float(metrics['loss']))
  assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1

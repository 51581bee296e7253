"""Laws of scanned layers: they compute what unrolled layers do, whatever is added to a network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import partitioning

from prompt_tuning_jax import param_paths, prompted_model
from prompt_tuning_jax.networks import gpt, layer_stack, parameters, t5
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.prompted_model import Added, PromptedModel

V = 40
CONFIGS = {
    't5': t5.T5Config(vocab_size=V, emb_dim=12, num_heads=2, num_encoder_layers=3,
                      num_decoder_layers=2, head_dim=5, mlp_dim=17),
    'gpt': gpt.GPTConfig(vocab_size=V, emb_dim=12, num_heads=2, num_layers=3, head_dim=5,
                         mlp_dim=17, max_positions=64, use_bias=True, scale_queries=True)}
RNG = np.random.default_rng(0)
INPUTS = RNG.integers(2, V, (3, 9)).astype(np.int32)
INPUTS[1, 5:] = 0
TARGETS = RNG.integers(2, V, (3, 6)).astype(np.int32)
BATCH = {'encoder_input_tokens': INPUTS, 'decoder_target_tokens': TARGETS,
         'decoder_input_tokens': np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1],
         'decoder_loss_weights': np.ones(TARGETS.shape, np.float32)}
PACKED = {**BATCH, 'encoder_segment_ids': np.array([[1] * 4 + [2] * 5] * 3, np.int32),
          'decoder_segment_ids': np.array([[1] * 3 + [2] * 3] * 3, np.int32)}

both = pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)


def random(*shape, scale=0.3):
  return jnp.asarray(RNG.normal(size=shape, scale=scale), jnp.float32)


def random_params(config):
  return param_paths.unflatten({
      path: random(*spec.shape, scale=spec.shape[0] ** -0.5)
      + path.endswith('scale') for path, spec in parameters.parameter_specs(config).items()})


def pair(config, params, **settings):
  """(model, parameters) unrolled, and the same scanned."""
  scanned = dataclasses.replace(config, scan_layers=True, **settings)
  stacked = param_paths.unflatten(layer_stack.scanned(param_paths.flatten(params)))
  return ((PromptedModel(config.network()), params), (PromptedModel(scanned.network()), stacked))


def prefix_of(config):
  return Prefix(rows=np.array([1, 0, 1]), **{
      place: random(layers, 2, 2, 4, config.num_heads, config.head_dim, scale=1)
      for place, layers in config.attentions.items()})


def adapters_of(config):
  sizes = {'down': (12, 3), 'down_bias': (3,), 'up': (3, 12), 'up_bias': (12,)}
  return Adapters({place: {name: random(layers, 2, *size) for name, size in sizes.items()}
                   for place, layers in config.sublayers.items()}, rows=np.array([0, 1, 1]))


def everything(config):
  """Rows for every layer, a prefix and adapters, of each example its own."""
  return Added(random(config.prompted_layers, 3, 12, scale=1), prefix_of(config),
               adapters_of(config))


def with_prompt(batch):
  tokens = batch['encoder_input_tokens'].copy()
  tokens[:, 1:4] = V + np.arange(3)
  return {**batch, 'encoder_input_tokens': tokens}


def close(a, b, tolerance=5e-6):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.max(np.abs(x - y)) <= tolerance * max(1, np.max(np.abs(y)))


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(model, params, batch, trained, added=Added()):
  """Logits, and the gradient of all that is trained of what is added."""
  def loss(trained):
    outputs = prompted_model.logits(model, params, batch, added=added.replace(**trained))
    return jnp.sum(jnp.sin(outputs) * (batch['decoder_target_tokens'] > 0)[..., None]), outputs
  return jax.grad(loss, has_aux=True, allow_int=True)(trained)


def run(model, params, batch, added):
  trained = {name: getattr(added, name) for name in ('virtual_embeddings', 'prefix', 'adapters')}
  gradient, logits = logits_and_gradient(model, params, batch, trained)
  return [leaf for leaf in jax.tree.leaves(gradient) if leaf.dtype == np.float32], logits


@pytest.mark.parametrize('config', [
    CONFIGS['t5'], pytest.param(CONFIGS['gpt'], marks=pytest.mark.slow)], ids=CONFIGS)
def test_scanned_is_unrolled_with_all_that_is_added(config):
  """Logits and gradients of packed rows."""
  unrolled, scanned = pair(config, random_params(config))
  batch, added = with_prompt(PACKED), everything(config)
  gradients, logits = run(*unrolled, batch, added)
  assert all(np.any(leaf) for leaf in gradients)
  close(run(*scanned, batch, added), (gradients, logits))


@pytest.mark.slow
@both
def test_scanned_decoding_is_unrolled(config):
  """Greedily and with beams: the same tokens, from caches whose rows are taken by parents."""
  added = everything(config)
  found = []
  for model, params in pair(config, random_params(config)):
    greedy = prompted_model.generate(model, params, with_prompt(BATCH)['encoder_input_tokens'], 5,
                                     added=added, eos_id=V)
    beams = prompted_model.beam_search(model, params, with_prompt(BATCH)['encoder_input_tokens'], 5,
                                       3, added=added)
    found.append((greedy, beams))
  (greedy, beams), of_scanned = found
  np.testing.assert_array_equal(of_scanned[0][0], greedy[0])
  np.testing.assert_array_equal(of_scanned[1][0], beams[0])
  close(of_scanned, found[0], 1e-5)


@pytest.mark.parametrize('config, scan, policy', [
    pytest.param(CONFIGS['t5'], False, 'minimal', marks=pytest.mark.slow),
    pytest.param(CONFIGS['t5'], True, 'full', marks=pytest.mark.slow),
    (CONFIGS['gpt'], True, 'minimal')], ids=['t5', 't5_scanned', 'gpt_scanned'])
def test_what_is_computed_again_is_the_same(config, scan, policy):
  params = random_params(config)
  plain = pair(config, params)[scan]
  again = dataclasses.replace(plain[0].network.config, remat_policy=policy)
  added = everything(config)
  close(run(PromptedModel(again.network()), plain[1], BATCH, added), run(*plain, BATCH, added))


@pytest.mark.slow
def test_only_remat_computes_again():
  """The backward pass has the products of the forward pass in it only with 'full'."""
  def products(policy):
    config = dataclasses.replace(CONFIGS['t5'], remat_policy=policy)
    params = jax.eval_shape(lambda: random_params(config))
    rows = {'virtual_embeddings': jax.ShapeDtypeStruct((3, 12), jnp.float32)}
    made = logits_and_gradient.trace(PromptedModel(config.network()), params, BATCH, rows)
    return str(made.jaxpr).count('dot_general')
  none, minimal, full = map(products, ('none', 'minimal', 'full'))
  assert none <= minimal < full


def test_dropout_of_scanned_layers_is_drawn_for_each():
  config = dataclasses.replace(CONFIGS['t5'], dropout_rate=0.4)
  _, (model, params) = pair(config, random_params(config))
  draw = jax.jit(lambda key: prompted_model.logits(model, params, BATCH, key))
  first = draw(jax.random.key(0))
  np.testing.assert_array_equal(draw(jax.random.key(0)), first)
  assert np.any(draw(jax.random.key(1)) != first)

  @jax.jit
  def encoded(layer):
    """Only one layer, the same each time, is not the identity: what it adds shows its mask."""
    def alone(path, leaf):
      if "'wo'" in str(path) and 'encoder' in str(path):
        return jnp.zeros_like(leaf).at[layer].set(leaf[0])
      return leaf * ("'out'" not in str(path))
    return model.apply({'params': jax.tree_util.tree_map_with_path(alone, params)}, INPUTS,
                       rngs={'dropout': jax.random.key(0)}, method='encode')

  assert len({np.asarray(encoded(layer)).tobytes() for layer in range(3)}) == 3


def test_paths_of_scanned_layers():
  leaves = {'encoder/layers_1/mlp/wo/kernel': jnp.full((2, 2), 1.0),
            'encoder/layers_0/mlp/wo/kernel': jnp.zeros((2, 2)), 'encoder/norm/scale': jnp.ones(2)}
  stacked = layer_stack.scanned(leaves)
  assert {path: leaf.shape for path, leaf in stacked.items()} == {
      'encoder/layers/mlp/wo/kernel': (2, 2, 2), 'encoder/norm/scale': (2,)}
  back = layer_stack.unrolled(stacked)
  assert back.keys() == leaves.keys()
  for path, leaf in back.items():
    assert leaf.shape == leaves[path].shape and leaf.dtype == leaves[path].dtype
    np.testing.assert_array_equal(np.asarray(leaf), leaves[path])


def test_a_leaf_that_one_layer_lacks_is_told():
  leaf = jnp.zeros(2)
  with pytest.raises(ValueError, match='lora/encoder/layers/a: .* only layers 0, 2 have this one'):
    layer_stack.scanned({f'lora/encoder/layers_{i}/a': leaf for i in (0, 2)})


def test_an_unknown_policy_is_one_line():
  with pytest.raises(ValueError, match="one of .'none', 'minimal', 'full'., got 'all'"):
    dataclasses.replace(CONFIGS['t5'], remat_policy='all')


@both
def test_axes_of_scanned_parameters(config):
  """What initialisation makes has the shapes and axes that loading expects."""
  scanned = dataclasses.replace(config, scan_layers=True)
  token = jnp.ones((1, 1), jnp.int32)
  made = jax.eval_shape(lambda: scanned.network().init(jax.random.key(0), token, token, token))
  shapes = {path: leaf.shape for path, leaf in param_paths.flatten(made['params']).items()}
  axes = param_paths.flatten(partitioning.get_axis_names(made['params_axes']))
  specs = parameters.parameter_specs(scanned)
  assert specs == parameters.parameter_specs(config)
  assert shapes == {path: (len(of), *specs[of[0]].shape) if path not in specs else specs[path].shape
                    for path, of in layer_stack.grouped(specs).items()}
  assert {path: tuple(names) for path, names in axes.items()} == {
      path: parameters.logical_axes(path) for path in shapes}

"""The laws of every method: it starts as the base, leaves what is frozen, and is what it saves."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import launch, optimizers, param_paths, prompted_base, prompted_model
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.networks import gpt, parameters, t5
from prompt_tuning_jax.networks.adapters import Adapters as AdapterLeaves
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.prompts.weight_changes import combined
from prompt_tuning_jax.training import methods, progress, run
from prompt_tuning_jax.training.lightweight import Adapters, Ia3, Lora, PartTuning
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning

METHODS = {
    'prompt_tuning': methods.PromptTuning(3), 'deep_prompt': methods.DeepPrompt(3, 'end'),
    'prefix_tuning': PrefixTuning(3, width=7), 'adapters': Adapters(2, activation='relu'),
    'lora': Lora(2, 4.0), 'ia3': Ia3(),
    'parts': PartTuning(('.*/scale', 'token_embedder/embedding', 'decoder/logits_dense/kernel'))}

V, D, P, LAYERS = 40, 8, 3, 3
CONFIG = t5.T5Config(vocab_size=V, emb_dim=D, num_heads=2, num_encoder_layers=LAYERS,
                     num_decoder_layers=2, head_dim=4, mlp_dim=16, dropout_rate=0.0)
RNG = np.random.default_rng(0)


def random_base(config):
  return base_checkpoint.Base('random', config, param_paths.unflatten({
      path: RNG.normal(size=spec.shape).astype(np.float32)
      * (1 if path.endswith('embedding') else spec.shape[0] ** -0.5)
      for path, spec in parameters.parameter_specs(config).items()}), None, 'fingerprint')


BASE = random_base(CONFIG)
LEFT_TO_RIGHT = random_base(gpt.GPTConfig(V, D, 2, LAYERS, 4, 16, dropout_rate=0.0,
                                          max_positions=32, use_bias=True))
TEXTS = [RNG.integers(2, V, n) for n in (9, 5)]


def batch_of(texts):
  width = max(map(len, texts))
  targets = np.random.default_rng(1).integers(2, V, (len(texts), 6)).astype(np.int32)
  return {'encoder_input_tokens': np.stack([np.pad(text, (0, width - len(text)))
                                            for text in texts]).astype(np.int32),
          'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
          'decoder_target_tokens': targets,
          'decoder_loss_weights': np.ones(targets.shape, np.float32)}


def batch_for(method):
  virtual = method.virtual_tokens(V)
  return batch_of([text if virtual is None else virtual.place(text) for text in TEXTS])


def drawn(tree):
  return jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), tree)


# The other methods' runs are as the first's; a full run has them.
@pytest.mark.parametrize('name', [
    name if name == 'prompt_tuning' else pytest.param(name, marks=pytest.mark.slow)
    for name in METHODS])
def test_a_run_of_each(tmp_path, tiny_base, reviews, token_dir, name, monkeypatch):
  method, saved = METHODS[name], []
  save = type(method).save

  def recorded(self, path, *args, **kwargs):
    save(self, path, *args, **kwargs)
    if path.name == 'last':
      saved.append(prompt_file.load(path.with_suffix('.safetensors')))

  monkeypatch.setattr(type(method), 'save', recorded)
  monkeypatch.setattr(progress.Progress, 'plot', lambda self: None)
  train = functools.partial(
      run.train, TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(tmp_path / 'run'),
      str(tiny_base), method, optimizers.adamw(0.03), 6, 8, eval_period=3, save_period=3)
  result = train()
  # Resumed = uninterrupted: its last state is lost, and the run goes on from the one before.
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '6')
  before, one = saved[0], saved[-1]
  train()
  assert one.params.keys() == saved[-1].params.keys() == before.params.keys()
  for path, leaf in one.params.items():
    np.testing.assert_array_equal(saved[-1].params[path], leaf)
    assert np.any(before.params[path] != leaf), path  # all that trains has moved
  # Saved = loaded: what the file answers is what the run measured.
  loaded = prompted_base.load(str(tiny_base), result['prompt'])
  cache = next(token_dir.glob('**/reviews-validation-*'))
  rows = [json.loads(line) for line in (cache / 'rows.jsonl').open(encoding='utf-8')]
  labels = loaded.metadata['labels']
  inputs = [loaded.tokens('here', row, 'input') for row in rows]
  scores = loaded.predictor.rank(loaded.params, inputs, [labels] * len(rows))
  right = [labels[np.argmax(s)] == row['targets'] for s, row in zip(scores, rows, strict=True)]
  assert 100 * np.mean(right) == pytest.approx(result['best_value'])
  # Frozen leaves are bit-equal, and something did train.
  base = param_paths.flatten(base_checkpoint.load_base(str(tiny_base)).params)
  params = param_paths.flatten(loaded.params)
  moved = {path for path in base if np.any(np.asarray(params[path]) != np.asarray(base[path]))}
  assert moved <= one.params.keys() and bool(moved) == (name == 'parts')


def test_changes_and_adapters_start_from_the_base_and_empty_prompts_are_the_base():
  batch = batch_of(TEXTS)
  logits = lambda method, added: np.asarray(jax.jit(functools.partial(
      prompted_model.logits, method.model(CONFIG)))(combined(added, BASE.params), batch))
  base = logits(methods.ModelTuning(), {})
  for method, added in (
      *((METHODS[name], METHODS[name].initial(jax.random.key(0), BASE, None))
        for name in ('lora', 'ia3', 'adapters', 'parts')),
      (methods.PromptTuning(0), {'prompt': {'embedding': jnp.zeros((0, D))}}),
      (methods.DeepPrompt(0), {'prompt': {'deep_embedding': jnp.zeros((LAYERS, 0, D))}})):
    np.testing.assert_array_equal(logits(method, added), base)


@pytest.mark.parametrize(('base', 'text'), [(BASE, []), (LEFT_TO_RIGHT, [5, 6, 7])],
                         ids=['t5', 'gpt'])
def test_a_deep_prompt_starts_as_a_soft_one(base, text):
  """Where the base reads nothing but the prompt, or the prompt sees nothing of the text."""
  tokens = np.array([[*VirtualTokens(V, P).ids, *text]], np.int32)
  targets = np.array([[5, 9, 1]], np.int32)
  outputs, rows = [], []
  for method in (methods.PromptTuning(P), methods.DeepPrompt(P)):
    added = method.initial(jax.random.key(1), base, None)
    rows += param_paths.flatten(added).values()
    apply = functools.partial(method.model(base.config).apply, enable_dropout=False)
    outputs.append(jax.jit(apply)({'params': {**base.params, **added}}, tokens, targets, targets))
  np.testing.assert_array_equal(rows[1][0], rows[0])
  assert rows[1].shape == (LAYERS, P, D) and np.abs(rows[1][1] - rows[1][0]).max() > 0.1
  np.testing.assert_allclose(outputs[1], outputs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize('method', [methods.DeepPrompt(P), methods.DeepPrompt(P, 'end'),
                                    Adapters(2)], ids=['deep', 'deep_end', 'adapters'])
def test_gradients_reach_every_layer_and_are_those_of_finite_differences(method):
  model, batch = method.model(CONFIG), batch_for(method)
  added = drawn(method.initial(jax.random.key(0), BASE, None))
  loss = lambda added: prompted_model.loss(model, {**BASE.params, **added}, batch)[0]
  slope_of = jax.jit(jax.value_and_grad(loss))
  gradient = slope_of(added)[1]
  for path, leaf in param_paths.flatten(gradient).items():
    assert all(np.any(layer) for layer in leaf), path
  direction = drawn(added)
  norm = np.sqrt(sum(np.sum(leaf ** 2) for leaf in jax.tree.leaves(direction)))
  moved = lambda step: slope_of(jax.tree.map(lambda x, d: x + step * d / norm, added, direction))[0]
  slope = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)),
                                            strict=True)) / norm
  np.testing.assert_allclose((float(moved(0.02)) - float(moved(-0.02))) / 0.04, slope, rtol=0.02,
                             atol=1e-3)


def _two_prompts(shape, first):
  """Rows of two prompts of one bank, and the ids of each, in a bank and alone."""
  rows = RNG.normal(size=shape).astype(np.float32)
  places = ('before', 'end')
  mixed = [VirtualTokens(V, P, place, offset).place(text)
           for place, offset, text in zip(places, (P, 0), TEXTS, strict=True)]
  alone = [VirtualTokens(V, P, place).place(text)
           for place, text in zip(places, TEXTS, strict=True)]
  one = [{'virtual_embeddings': rows[..., start:start + P, :]} for start in (first, 0)]
  return mixed, alone, {'virtual_embeddings': rows}, one


def _two_of(kind):
  """(texts of the mixed batch, texts alone, what the network is given mixed, and for each)."""
  if kind == 'prompts':
    return _two_prompts((2 * P, D), P)
  if kind == 'deep_prompts':
    return _two_prompts((LAYERS, 2 * P, D), P)
  rows = np.array([1, 0], np.int32)
  if kind == 'prefixes':
    leaves = {place: RNG.normal(size=(layers, 2, 2, P, 2, 4)).astype(np.float32)
              for place, layers in CONFIG.attentions.items()}
    make = lambda rows: {'prefix': Prefix(**leaves, rows=rows)}
  else:
    one = jax.eval_shape(Adapters(2)._module(CONFIG).init, jax.random.key(0))['params']
    leaves = drawn(jax.tree.map(lambda leaf: np.empty((leaf.shape[0], 2, *leaf.shape[1:])), one))
    make = lambda rows: {'adapters': AdapterLeaves(leaves, rows)}
  return TEXTS, TEXTS, make(rows), [make(rows[:1]), make(rows[1:])]


@pytest.mark.parametrize('kind', ['prompts', 'deep_prompts', 'prefixes', 'adapters'])
def test_a_mixed_batch_is_each_alone(kind):
  mixed, alone, together, each = _two_of(kind)

  @jax.jit
  def logits(tokens, targets, added):
    return CONFIG.network().apply({'params': BASE.params}, tokens, targets, targets,
                                  enable_dropout=False, **added)

  batch = batch_of(mixed)
  tokens, targets = batch['encoder_input_tokens'], batch['decoder_target_tokens']
  found = np.asarray(logits(tokens, targets, together))
  swapped = np.asarray(logits(tokens[:1], targets[:1], each[1]))
  assert kind.endswith('prompts') or np.abs(found[0] - swapped[0]).max() > 0.05
  singles = batch_of(alone)['encoder_input_tokens']
  for i in range(2):
    one = logits(singles[i:i + 1], targets[i:i + 1], each[i])
    np.testing.assert_allclose(found[i], one[0], rtol=0, atol=2e-5)


def _added(method, name):
  """The shapes of what a method adds to a named network."""
  config = launch.network_named(name)
  params = param_paths.unflatten({path: jax.ShapeDtypeStruct(spec.shape, np.float32)
                                  for path, spec in parameters.parameter_specs(config).items()})
  base = base_checkpoint.Base(name, config, params, None, '')
  return jax.eval_shape(lambda key: method.initial(key, base, None), jax.random.key(0))


@pytest.mark.parametrize(('size', 'count'), [
    ('small', 51_200), ('base', 76_800), ('large', 102_400), ('xl', 204_800), ('xxl', 409_600)])
def test_prompts_have_the_papers_sizes(size, count):
  """Lester et al. 2021, table 4, at length 100; a prompt of every layer has L times as many."""
  config = launch.network_named(f't5_1_1_{size}')
  for method, times in ((methods.PromptTuning(100), 1),
                        (methods.DeepPrompt(100), config.num_encoder_layers)):
    init = method.model(config).prompt.init
    assert param_paths.count(jax.eval_shape(init, jax.random.key(0))['params']) == times * count


@pytest.mark.parametrize(('method', 'name', 'count'), [
    (Ia3(), 't5_1_1_xl', 540_672),  # Liu et al. 2022: of T0-3B, whose shape this is
    (Lora(8), 't5_1_1_xl', 72 * 2 * 8 * (2048 + 2048)),
    (Adapters(64), 't5_1_1_xl', (24 * 2 + 24 * 3) * (2 * 2048 * 64 + 2048 + 64)),
    (Adapters(8, ('cross_attention',)), 't5_1_1_small', 8 * (2 * 512 * 8 + 512 + 8)),
    (PrefixTuning(10, width=None), 't5_1_1_xl', 72 * 2 * 10 * 32 * 64),
    (PrefixTuning(200, width=None), 't5_1_1_small', 24 * 2 * 200 * 6 * 64),
    (PrefixTuning(10, ('encoder',), width=None), 't5_1_1_small', 8 * 2 * 10 * 6 * 64)])
def test_parameters_of_published_networks(method, name, count):
  """IA3's count is the paper's; the others follow from their formulas and the shapes."""
  assert param_paths.count(_added(method, name)) == count


def test_files_of_another_base_and_broken_ones_are_refused(tmp_path, tiny_base):
  base = base_checkpoint.load_base(str(tiny_base))  # of one layer; BASE has three
  path = tmp_path / 'p.safetensors'
  for method, message in ((methods.DeepPrompt(P), 'this base takes'), (Adapters(2), 'takes')):
    method.save(path.with_suffix(''), method.initial(jax.random.key(0), BASE, None), base, {})
    with pytest.raises(ValueError, match=message):
      prompted_base.load(str(tiny_base), str(path))
  method.save(path.with_suffix(''), {'adapter': {'encoder': {'down': np.ones(3)}}}, base, {})
  with pytest.raises(ValueError, match='Expected some of the places'):
    prompted_base.load(str(tiny_base), str(path))
  unknown = prompt_file.load(path)
  prompt_file.save(path, prompt_file.PromptFile(unknown.params,
                                                {**unknown.metadata, 'activation': 'cos'}))
  with pytest.raises(ValueError, match="have the activation 'cos'"):
    prompted_base.load(str(tiny_base), str(path))
  with pytest.raises(ValueError, match='holds no prompt to start from'):
    methods.prompt_from_file(str(path))
  about = {**unknown.metadata, 'length': 4}
  for leaf, message in ((np.ones((3, D)), r'should be \[L, P, D\]'),
                        (np.ones((2, 3, D)), 'has 3 rows, but the metadata says length 4')):
    with pytest.raises(ValueError, match=message):
      prompt_file.save(path, prompt_file.PromptFile({prompt_file.DEEP_EMBEDDING: leaf}, about))


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: Lora(0), 'rank must be a whole number'),
    (lambda: Lora(kernels=('.*/querry/kernel',)).initial(jax.random.key(0), BASE, None),
     'No parameter matches'),
    (lambda: Lora(kernels=('.*/scale',)).initial(jax.random.key(0), BASE, None), 'is no kernel'),
    (lambda: Adapters(0), 'width must be a whole number'),
    (lambda: Adapters(places='encoder_mlp'), 'places must be a list'),
    (lambda: Adapters(places=()), 'places must be a list'),
    (lambda: Adapters(activation='cos'), 'activation must be one of'),
    (lambda: Adapters(places=('mlp',)).model(CONFIG), 'Expected some of the places')])
def test_settings_that_cannot_be_are_told(make, message):
  with pytest.raises(ValueError, match=message):
    make()

"""The laws of the T5 network, and its parameters as the public format that they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.networks import parameters, t5

V = 40
CONFIG = t5.T5Config(vocab_size=V, emb_dim=24, num_heads=3, num_encoder_layers=1,
                     num_decoder_layers=2, head_dim=5, mlp_dim=17, dropout_rate=0.3)
RNG = np.random.default_rng(0)
LENGTHS, TARGET_LENGTHS = (21, 13, 4), (12, 5, 9)

pytestmark = pytest.mark.usefixtures('exact_products')


def random_params(config, seed=0):
  rng = np.random.default_rng(seed)
  return param_paths.unflatten({
      path: rng.normal(size=spec.shape).astype(np.float32)
      * (1 if path.endswith(('scale', 'embedding')) else 0.7 * spec.shape[0] ** -0.5)
      for path, spec in parameters.parameter_specs(config).items()})


def rows(lengths, width, high=V):
  tokens = np.zeros((len(lengths), width), np.int32)
  for i, length in enumerate(lengths):
    tokens[i, :length] = RNG.integers(2, high, length)
  return tokens


def shifted(targets):
  return jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]


PARAMS = random_params(CONFIG)
INPUTS, TARGETS = rows(LENGTHS, 21), rows(TARGET_LENGTHS, 12)


@functools.partial(jax.jit, static_argnames='config')
def run(params, inputs, targets, config=CONFIG, decoder_inputs=None, dropout_key=None, **kwargs):
  """Teacher-forced logits."""
  return t5.Transformer(config).apply(
      {'params': params}, inputs, shifted(targets) if decoder_inputs is None else decoder_inputs,
      targets, enable_dropout=dropout_key is not None,
      rngs=None if dropout_key is None else {'dropout': dropout_key}, **kwargs)


def close(a, b, tolerance=2e-5):
  a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
  assert np.max(np.abs(a - b)) <= tolerance * np.sqrt(np.mean(b ** 2))


def live(logits, targets=TARGETS):
  return np.asarray(logits)[targets > 0]


GOLDEN = t5.T5Config(vocab_size=11, emb_dim=4, num_heads=3, num_encoder_layers=1,
                     num_decoder_layers=1, head_dim=2, mlp_dim=5)
ATTENTION = {
    'query/kernel': ((4, 6), ('embed', 'joined_kv')),
    'key/kernel': ((4, 6), ('embed', 'joined_kv')),
    'value/kernel': ((4, 6), ('embed', 'joined_kv')),
    'out/kernel': ((6, 4), ('joined_kv', 'embed')),
}
GATED = {
    'wi_0/kernel': ((4, 5), ('embed', 'mlp')),
    'wi_1/kernel': ((4, 5), ('embed', 'mlp')),
    'wo/kernel': ((5, 4), ('mlp', 'embed')),
}
NORM = ((4,), ('embed',))
PARAMETERS = {
    'token_embedder/embedding': ((11, 4), ('vocab', 'embed')),
    'encoder/relpos_bias/rel_embedding': ((3, 32), ('heads', 'relpos_buckets')),
    'encoder/layers_0/pre_attention_layer_norm/scale': NORM,
    **{f'encoder/layers_0/attention/{name}': spec for name, spec in ATTENTION.items()},
    'encoder/layers_0/pre_mlp_layer_norm/scale': NORM,
    **{f'encoder/layers_0/mlp/{name}': spec for name, spec in GATED.items()},
    'encoder/encoder_norm/scale': NORM,
    'decoder/relpos_bias/rel_embedding': ((3, 32), ('heads', 'relpos_buckets')),
    'decoder/layers_0/pre_self_attention_layer_norm/scale': NORM,
    **{f'decoder/layers_0/self_attention/{name}': spec for name, spec in ATTENTION.items()},
    'decoder/layers_0/pre_cross_attention_layer_norm/scale': NORM,
    **{f'decoder/layers_0/encoder_decoder_attention/{name}': spec
       for name, spec in ATTENTION.items()},
    'decoder/layers_0/pre_mlp_layer_norm/scale': NORM,
    **{f'decoder/layers_0/mlp/{name}': spec for name, spec in GATED.items()},
    'decoder/decoder_norm/scale': NORM,
    'decoder/logits_dense/kernel': ((4, 11), ('embed', 'vocab')),
}


def specs(config):
  return {path: (spec.shape, spec.axes)
          for path, spec in parameters.parameter_specs(config).items()}


def test_parameters_are_those_of_t5x():
  assert specs(GOLDEN) == PARAMETERS


def test_parameters_of_a_tied_ungated_network():
  config = dataclasses.replace(GOLDEN, mlp_activations=('relu',), logits_via_embedding=True)
  expected = {path.replace('wi_0', 'wi'): spec for path, spec in PARAMETERS.items()
              if 'wi_1' not in path and 'logits_dense' not in path}
  assert specs(config) == expected


def test_what_initialisation_makes_is_what_is_specified():
  token = np.ones((2, 3), np.int32)
  init = functools.partial(t5.Transformer(GOLDEN).init, enable_dropout=False)
  variables = jax.eval_shape(
      init, jax.random.key(0), token, token, token, encoder_segment_ids=token,
      decoder_segment_ids=token, encoder_positions=token, decoder_positions=token)
  made = param_paths.flatten(variables['params'])
  assert {path: leaf.shape for path, leaf in made.items()} == {
      path: shape for path, (shape, _) in PARAMETERS.items()}
  assert all(leaf.dtype == jnp.float32 for leaf in made.values())
  assert set(variables) == {'params', 'params_axes'}


@pytest.mark.parametrize('config, size', [
    (t5.T5Config(32128, 512, 8, 6, 6, 64, 2048, ('relu',), logits_via_embedding=True), 60_506_624),
    (t5.T5Config(32128, 512, 6, 8, 8, 64, 1024), 76_961_152),
    (t5.T5Config(250112, 512, 6, 8, 8, 64, 1024), 300_176_768),
], ids=['t5_small', 't5_1_1_small', 'mt5_small'])
def test_published_networks_have_their_published_size(config, size):
  sizes = [int(np.prod(spec.shape)) for spec in parameters.parameter_specs(config).values()]
  assert sum(sizes) == size


@pytest.mark.parametrize('change, message', [
    (dict(mlp_activations=('gelu', 'swish')), "among .*'gelu'.* got .'gelu', 'swish'."),
    (dict(mlp_activations=()), 'mlp_activations must be among'),
    (dict(dtype='float16'), "dtype must be 'float32' or 'bfloat16', got 'float16'"),
])
def test_errors_are_one_line(change, message):
  with pytest.raises(ValueError, match=message) as error:
    dataclasses.replace(CONFIG, **change)
  assert '\n' not in str(error.value)


def test_a_list_of_activations_is_a_tuple():
  assert hash(dataclasses.replace(CONFIG, mlp_activations=['gelu', 'linear'])) == hash(CONFIG)


def test_padding_changes_nothing():
  wide = run(PARAMS, np.pad(INPUTS, ((0, 0), (0, 11))), np.pad(TARGETS, ((0, 0), (0, 6))))
  close(live(wide[:, :12]), live(run(PARAMS, INPUTS, TARGETS)))


def test_other_rows_change_nothing():
  inputs, targets = rows((9, 21, 17), 21), rows((7, 1, 12), 12)
  inputs[1], targets[1] = INPUTS[1], TARGETS[1]
  np.testing.assert_array_equal(run(PARAMS, inputs, targets)[1], run(PARAMS, INPUTS, TARGETS)[1])


def test_a_target_sees_what_came_before_it():
  at, changed = 6, TARGETS.copy()
  changed[0, at:] = RNG.integers(2, V, 12 - at)
  before, after = run(PARAMS, INPUTS, TARGETS), run(PARAMS, INPUTS, changed)
  np.testing.assert_array_equal(before[0, :at + 1], after[0, :at + 1])
  assert np.all(np.any(before[0, at + 1:] != after[0, at + 1:], axis=-1))


def test_every_parameter_matters():
  """The loss depends on every leaf: none is left out, none is used for another."""
  total = lambda params: jnp.sum(jnp.sin(run(params, INPUTS, TARGETS)))
  gradients = param_paths.flatten(jax.jit(jax.grad(total))(PARAMS))
  assert [path for path, leaf in gradients.items() if not np.any(leaf)] == []
  assert [path for path, leaf in gradients.items() if not np.all(np.isfinite(leaf))] == []


def packed(sequences, width):
  """(tokens, segment ids, positions) [1, width] of the sequences one after another."""
  tokens, segments, positions = np.zeros((3, 1, width), np.int32)
  start = 0
  for i, sequence in enumerate(sequences, 1):
    end = start + len(sequence)
    tokens[0, start:end], segments[0, start:end] = sequence, i
    positions[0, start:end] = np.arange(len(sequence))
    start = end
  return tokens, segments, positions


def test_packed_is_unpacked():
  alone = run(PARAMS, INPUTS, TARGETS)
  texts = [row[:n] for row, n in zip(INPUTS, LENGTHS, strict=True)]
  labels = [row[:n] for row, n in zip(TARGETS, TARGET_LENGTHS, strict=True)]
  inputs, input_segments, input_positions = packed(texts, 41)
  targets, target_segments, target_positions = packed(labels, 30)
  decoder_inputs, _, _ = packed([np.pad(label, (1, 0))[:-1] for label in labels], 30)
  logits = run(PARAMS, inputs, targets, decoder_inputs=decoder_inputs,
               encoder_segment_ids=input_segments, decoder_segment_ids=target_segments,
               encoder_positions=input_positions, decoder_positions=target_positions)
  close(live(logits, targets), live(alone))


def test_targets_of_one_input_are_packed_without_encoder_segments():
  labels = [row[:n] for row, n in zip(TARGETS, TARGET_LENGTHS, strict=True)]
  targets, segments, _ = packed(labels, 26)
  decoder_inputs, _, _ = packed([np.pad(label, (1, 0))[:-1] for label in labels], 26)
  logits = run(PARAMS, INPUTS[:1], targets, decoder_inputs=decoder_inputs,
               decoder_segment_ids=segments)
  close(live(logits, targets), live(run(PARAMS, INPUTS[[0, 0, 0]], TARGETS)))


@functools.partial(jax.jit, static_argnames=('method', 'length', 'mutable'))
def apply(variables, *args, method, length=None, mutable=()):
  """The network's method without dropout; with `length`, step by step."""
  decoding = {} if length is None else dict(decode=True, max_decode_length=length)
  return t5.Transformer(CONFIG).apply(variables, *args, **decoding, enable_dropout=False,
                                      method=method, mutable=list(mutable))


def empty_cache_of_t5x(length):
  """T5X makes it with `__call__`, from inputs as long as it should be."""
  ones = np.ones((3, length), np.int32)
  make = functools.partial(t5.Transformer(CONFIG).apply, decode=True, enable_dropout=False,
                           mutable=['cache'])
  _, state = jax.eval_shape(make, {'params': PARAMS}, INPUTS, ones, ones)
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)


@pytest.mark.parametrize('cross_cache, length', [(True, 12), (False, 20)])
def test_cached_in_steps_of_several_tokens_is_uncached(cross_cache, length):
  variables = {'params': PARAMS}
  encoded, _ = apply(variables, INPUTS, method='encode')
  ones, decoder_inputs, pieces = np.ones((3, 4), np.int32), shifted(TARGETS), []
  if cross_cache:
    _, caches = apply(variables, encoded, INPUTS, ones, ones, method='decode', length=length,
                      mutable=('cache', 'cross_cache'))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(caches['cache']))
  else:
    caches = empty_cache_of_t5x(length)
  for start in range(0, 12, 4):
    step = decoder_inputs[:, start:start + 4]
    out, updated = apply({**variables, **caches}, encoded, INPUTS, step, ones, method='decode',
                         length=length, mutable=('cache',))
    caches = {**caches, **updated}
    pieces.append(out)
  close(live(np.concatenate(pieces, 1)), live(run(PARAMS, INPUTS, TARGETS)))


@pytest.mark.parametrize('segments, decode, message', [
    ('decoder_segment_ids', True, 'one example a row'),
    ('encoder_segment_ids', True, 'one example a row'),
    ('encoder_segment_ids', False, 'need decoder_segment_ids'),
])
def test_segments_that_have_no_meaning(segments, decode, message):
  tokens = np.ones((1, 2), np.int32)
  with pytest.raises(ValueError, match=message):
    t5.Transformer(GOLDEN).apply(
        {'params': random_params(GOLDEN)}, np.ones((1, 2, 4)), tokens, tokens, tokens,
        **{segments: tokens}, decode=decode, enable_dropout=False, method='decode',
        mutable=['cache'])


def test_bfloat16_is_close_to_float32():
  config = dataclasses.replace(CONFIG, mlp_activations=('relu',), logits_via_embedding=True)
  params = random_params(config)
  exact = live(run(params, INPUTS, TARGETS, config))
  rounded = run(params, INPUTS, TARGETS, dataclasses.replace(config, dtype='bfloat16'))
  assert rounded.dtype == jnp.float32 and np.any(live(rounded) != exact)
  difference = np.sqrt(np.mean((live(rounded) - exact) ** 2) / np.mean(exact ** 2))
  assert difference < 0.05


def test_bfloat16_parameters_are_float32_parameters_rounded():
  stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
  rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), stored)
  close(live(run(stored, INPUTS, TARGETS)), live(run(rounded, INPUTS, TARGETS)), 1e-6)


def test_dropout_is_a_function_of_its_key():
  first, same, other = (run(PARAMS, INPUTS, TARGETS, dropout_key=jax.random.key(i))
                        for i in (0, 0, 1))
  np.testing.assert_array_equal(first, same)
  plain = run(PARAMS, INPUTS, TARGETS)
  for a, b in ((first, other), (first, plain)):
    assert np.all(np.any(live(a) != live(b), axis=-1))


def drawn_masks(jaxpr):
  """Shapes of all random bits that a program draws."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'random_bits':
      yield equation.outvars[0].aval.shape
    for inner in core.jaxprs_in_params(equation.params):
      yield from drawn_masks(inner)


def test_dropout_stands_where_t5x_has_it():
  """Broadcast over query positions, but for the states that leave the encoder."""
  batch, length, target_length, heads, features, hidden = 3, 21, 12, 3, 24, 17
  attention = lambda keys: (batch, heads, 1, keys)
  feature, mlp = (batch, 1, features), (batch, 1, hidden)
  encoder = [feature, *[attention(length), feature, mlp, feature], (batch, length, features)]
  decoder = [feature, *2 * [attention(target_length), feature, attention(length), feature, mlp,
                            feature], feature]
  key = jax.random.key(0)
  program = jax.make_jaxpr(lambda key: run(PARAMS, INPUTS, TARGETS, dropout_key=key))(key)
  assert list(drawn_masks(program.jaxpr)) == encoder + decoder
  program = jax.make_jaxpr(lambda: run(PARAMS, INPUTS, TARGETS))()
  assert list(drawn_masks(program.jaxpr)) == []


def test_without_dropout_the_key_does_not_matter():
  config = dataclasses.replace(CONFIG, dropout_rate=0.0)
  np.testing.assert_array_equal(
      run(PARAMS, INPUTS, TARGETS, config, dropout_key=jax.random.key(0)),
      run(PARAMS, INPUTS, TARGETS))


R = 6
VIRTUAL = RNG.normal(size=(R, 24)).astype(np.float32)


def test_without_virtual_ids_virtual_rows_change_nothing():
  plain = run(PARAMS, INPUTS, TARGETS)
  for table in (VIRTUAL, VIRTUAL[:0]):
    np.testing.assert_array_equal(run(PARAMS, INPUTS, TARGETS, virtual_embeddings=table), plain)


def test_virtual_rows_are_rows_of_a_larger_table():
  """In the encoder's tokens and in the decoder's."""
  inputs, decoder_inputs = rows(LENGTHS, 21, V + R), shifted(rows(TARGET_LENGTHS, 12, V + R))
  assert np.any(inputs >= V) and np.any(decoder_inputs >= V)
  larger = jax.tree.map(np.copy, PARAMS)
  larger['token_embedder']['embedding'] = np.concatenate(
      [PARAMS['token_embedder']['embedding'], VIRTUAL])
  larger['decoder']['logits_dense']['kernel'] = np.pad(
      PARAMS['decoder']['logits_dense']['kernel'], ((0, 0), (0, R)))
  expected = run(larger, inputs, TARGETS, dataclasses.replace(CONFIG, vocab_size=V + R),
                 decoder_inputs=decoder_inputs)
  logits = run(PARAMS, inputs, TARGETS, decoder_inputs=decoder_inputs, virtual_embeddings=VIRTUAL)
  assert logits.shape == (3, 12, V)
  close(live(logits), live(expected)[:, :V], 1e-6)

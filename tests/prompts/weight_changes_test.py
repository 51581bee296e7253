"""Changed kernels are what the papers define, and nothing is changed by ones and zeros."""

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.networks import int8, layers
from prompt_tuning_jax.networks.bart import BartConfig
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.prompts.weight_changes import combined, of_rows, stacked

RNG = np.random.default_rng(0)
draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
KERNEL, BIAS, X = draw(4, 6), draw(6), draw(3, 5, 4)
FROZEN = {'encoder': {'query': {'kernel': KERNEL}, 'wo': {'kernel': draw(5, 4)}}}
A, B, OUT, IN = draw(4, 2), draw(2, 6), draw(6), draw(4)
CHANGES = {'lora/dense/kernel/a': A, 'lora/dense/kernel/b': B, 'ia3/dense/kernel': OUT,
           'ia3_in/dense/kernel': IN}


def output(changes, kernel=KERNEL, x=X, dtype=jnp.float32):
  """Of a layer with a bias."""
  params = combined(param_paths.unflatten(changes), {'dense': {'kernel': kernel, 'bias': BIAS}})
  assert params['dense']['kernel'] is kernel
  layer = layers.Dense(6, ('embed', 'joined_kv'), dtype, use_bias=True)
  return layer.apply({'params': params['dense']}, x)


@pytest.mark.parametrize(('kinds', 'expected'), [
    ((), X @ KERNEL + BIAS), (('lora',), X @ KERNEL + X @ A @ B + BIAS),
    (('ia3',), (X @ KERNEL + BIAS) * OUT), (('ia3_in',), (X * IN) @ KERNEL + BIAS),
    (('lora', 'ia3', 'ia3_in'), ((X * IN) @ (KERNEL + A @ B) + BIAS) * OUT)])
def test_changes_are_what_the_papers_define_alone_and_in_a_batch(kinds, expected):
  changes = {path: leaf for path, leaf in CHANGES.items() if path.partition('/')[0] in kinds}
  np.testing.assert_allclose(output(changes), expected, rtol=1e-4, atol=1e-5)
  if kinds:
    each = of_rows(stacked([{}, param_paths.unflatten(changes)]), np.array([0, 1, 1]))
    mixed = layers.Dense(6, ('embed', 'joined_kv'), use_bias=True).apply(
        {'params': {'kernel': KERNEL, 'bias': BIAS}, 'changes': each['dense']}, X)
    np.testing.assert_allclose(mixed[0], (X @ KERNEL + BIAS)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mixed[1:], expected[1:], rtol=1e-4, atol=1e-5)


def test_changes_smaller_than_the_steps_of_a_dtype_are_not_lost():
  """Of bfloat16 near 1 these are 1 / 128, of eight bits 1 / 127: sums with the kernel lose all."""
  ones, x = np.ones((4, 6), np.float32), np.ones((1, 1, 4), np.float32)
  small = {'lora/dense/kernel/a': np.full((4, 1), 1e-3, np.float32),
           'lora/dense/kernel/b': np.ones((1, 6), np.float32)}
  eight_bits = int8.Quantized(*int8.quantize(ones.T), exchanged=True)
  for kernel, dtype in ((jnp.asarray(ones, jnp.bfloat16), jnp.float32),
                        (eight_bits, jnp.float32)):
    gain = output(small, kernel, x, dtype) - output({}, kernel, x, dtype)
    np.testing.assert_allclose(gain, np.full((1, 1, 6), 4e-3), rtol=1e-2)
  scaled = output({'ia3/dense/kernel': np.full(6, 1.003, np.float32)}, 100 * ones, x, jnp.bfloat16)
  assert np.all(scaled > output({}, 100 * ones, x, jnp.bfloat16))  # 400 becomes 402


def test_without_changes_it_is_merge():
  beside = {'prompt': {'embedding': np.ones((2, 4))}}
  tree, expected = combined(beside, FROZEN), param_paths.merge(beside, FROZEN)
  assert param_paths.flatten(tree).keys() == param_paths.flatten(expected).keys()


@pytest.mark.parametrize(('trained', 'message'), [
    ({'ia3': {'decoder': {'kernel': np.ones(6)}}},
     'ia3 changes decoder/kernel, which the base does not have'),
    ({'lora': {'token_embedder': {'embedding': {'a': np.ones((4, 2)), 'b': np.ones((2, 6))}}}},
     'lora/token_embedder/embedding/a does not change a kernel'),
    ({'ia3': {'encoder': {'query': {'kernel': np.ones(())}}}}, 'does not scale axis -1'),
    ({'lora': {'encoder': {'query': {'kernel': {'a': np.ones((4, 2)), 'b': np.ones(6)}}}}},
     'do not make'),
    ({'ia3': {'encoder': {'query': {'kernel': np.ones(4)}}}}, 'does not scale axis -1'),
    ({'lora': {'encoder': {'query': {'kernel': {'a': np.ones((4, 2)), 'b': np.ones((3, 6))}}}}},
     'do not make'),
    ({'lora': {'encoder': {'query': {'kernel': {'a': np.ones((4, 2))}}}}}, 'needs both, a and b'),
    ({'encoder': {'query': {'kernel': 1}}}, 'Both trees have')])
def test_changes_that_do_not_fit_are_refused(trained, message):
  with pytest.raises(ValueError, match=message):
    combined(trained, FROZEN)


@pytest.mark.parametrize('config', [
    T5Config(40, 8, 2, 1, 1, 4, 16),
    GPTConfig(40, 8, 2, 1, 4, 16, ('gelu',), max_positions=20, use_bias=True)])
def test_a_batch_that_mixes_changes_is_each_alone(config):
  base = param_paths.unflatten({path: draw(*spec.shape) / np.sqrt(spec.shape[0])
                                for path, spec in parameter_specs(config).items()})
  query, wo = 'decoder/layers_0/self_attention/query/kernel', 'decoder/layers_0/mlp/wo/kernel'
  key = 'decoder/layers_0/self_attention/key/kernel'
  changes = [param_paths.unflatten(leaves) for leaves in (
      {f'lora/{query}/a': draw(8, 2), f'lora/{query}/b': draw(2, 8), f'ia3/{key}': draw(8)},
      {}, {f'lora/{query}/a': draw(8, 3), f'lora/{query}/b': draw(3, 8), f'lora/{wo}/a':
           draw(16, 1), f'lora/{wo}/b': draw(1, 8)}, {f'ia3_in/{wo}': draw(16)})]
  rows = np.array([2, 0, 1, 3, 0])
  tokens = [RNG.integers(1, 40, (5, length)) for length in (6, 4, 4)]
  model = config.network()
  run = lambda variables, *tokens: np.asarray(
      model.apply(variables, *tokens, enable_dropout=False))
  mixed = run({'params': base, 'changes': of_rows(stacked(changes), rows)}, *tokens)
  assert np.abs(mixed - run({'params': base}, *tokens)).max(axis=(1, 2))[[0, 1, 3, 4]].min() > 0.01
  for i, row in enumerate(rows):
    alone = run({'params': combined(changes[row], base)}, *(x[i:i + 1] for x in tokens))
    np.testing.assert_allclose(mixed[i], alone[0], rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match='prompt/embedding does not change a kernel'):
    stacked([{'prompt': {'embedding': draw(2, 8)}}])


TIED = {'t5': T5Config(40, 8, 2, 1, 1, 4, 16, logits_via_embedding=True),
        'gpt': GPTConfig(40, 8, 2, 1, 4, 16, logits_via_embedding=True, scale_logits=False),
        'bart': BartConfig(40, 8, 2, 1, 1, 4, 16, max_positions=24),
        'bert': BertConfig(40, 8, 2, 1, 4, 16, max_positions=24, mask_id=4, end_id=3)}


@pytest.mark.parametrize('kind', [
    pytest.param(kind, marks=pytest.mark.slow) if kind in ('gpt', 'bart') else kind
    for kind in TIED])
def test_a_tied_output_layer_changes_and_the_embeddings_of_inputs_do_not(kind):
  """A change of one column, for each example and for all: that word's logits alone are others, by
  the product that the change is."""
  config, word = TIED[kind], 7
  base = param_paths.unflatten({path: draw(*spec.shape) / np.sqrt(spec.shape[0])
                                for path, spec in parameter_specs(config).items()})
  assert config.output not in param_paths.flatten(base)
  a, b = draw(8, 1), np.eye(1, 40, word, dtype=np.float32)
  change = param_paths.unflatten({f'lora/{config.output}/a': a, f'lora/{config.output}/b': b})
  tokens = [RNG.integers(5, 40, (3, length)) for length in (6, 4, 4)]
  tokens[0][:, 1], tokens[0][:, 3], tokens[0][:, 2] = 4, 4, word  # BERT's masks; an input of it
  tokens[2][:, 2:] = 0
  run = lambda variables: np.asarray(
      config.network().apply(variables, *tokens, enable_dropout=False))[:, :2]
  before, after = run({'params': base}), run({'params': combined(change, base)})
  others = np.arange(40) != word
  np.testing.assert_array_equal(after[..., others], before[..., others])
  # What was added is linear in the change, and as large as the embedding's own product.
  again = run({'params': combined(param_paths.unflatten({
      f'lora/{config.output}/a': -3 * a, f'lora/{config.output}/b': b}), base)})
  np.testing.assert_allclose(again[..., word] - before[..., word],
                             -3 * (after[..., word] - before[..., word]), rtol=1e-4, atol=1e-5)
  table = base
  for name in config.embedding.split('/'):
    table = table[name]
  own = combined(param_paths.unflatten({f'lora/{config.output}/a': table[word][:, None],
                                        f'lora/{config.output}/b': b}), base)
  bias = base.get('decoder', base.get('head', {})).get('logits_bias', np.zeros(40))[word]
  np.testing.assert_allclose(run({'params': own})[..., word] - bias,
                             2 * (before[..., word] - bias), rtol=1e-4, atol=1e-5)
  mixed = run({'params': base, 'changes': of_rows(stacked([{}, change]), np.array([1, 0, 1]))})
  np.testing.assert_allclose(mixed[[0, 2]], after[[0, 2]], rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(mixed[1], before[1])
  for path in {'decoder/logits_dense/kernel', 'head/logits_dense/kernel',
               'encoder/logits_dense/kernel'} - {config.output}:
    with pytest.raises(ValueError, match='which the base does not have'):
      combined(param_paths.unflatten({f'lora/{path}/a': a, f'lora/{path}/b': b}), base)
  with pytest.raises(ValueError, match=r'do not make \(8, 40\)'):
    combined(param_paths.unflatten({f'lora/{config.output}/a': a[1:],
                                    f'lora/{config.output}/b': b}), base)

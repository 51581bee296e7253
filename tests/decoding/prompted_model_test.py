"""The laws of decoding with a prompted model: greedy, sampled, in chunks, and with beams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import objectives, param_paths, prompted_model
from prompt_tuning_jax.checkpoints.base_checkpoint import load_base
from prompt_tuning_jax.decoding import stop_strings, token_choice
from prompt_tuning_jax.decoding.beam_search import BrevityPenalty
from prompt_tuning_jax.networks import parameters, t5
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.prompted_model import Added, PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens

V, D, P = 40, 24, 5
WIDTH = 16 + P
CONFIG = t5.T5Config(vocab_size=V, emb_dim=D, num_heads=3, num_encoder_layers=1,
                     num_decoder_layers=1, head_dim=5, mlp_dim=17)

pytestmark = pytest.mark.usefixtures('exact_products')


def random_base():
  rng = np.random.default_rng(1)
  base = {path: rng.normal(size=spec.shape).astype(np.float32)
          * (1 if path.endswith(('scale', 'embedding')) else 0.7 * spec.shape[0] ** -0.5)
          for path, spec in parameters.parameter_specs(CONFIG).items()}
  base['decoder/logits_dense/kernel'][:, 1] *= 1.5  # so that some texts end
  return param_paths.unflatten(base)


BASE = random_base()
PROMPT = np.random.default_rng(0).normal(size=(P, D)).astype(np.float32)
MODEL = PromptedModel(t5.Transformer(CONFIG), SoftPrompt(P, D))
PARAMS = {**BASE, 'prompt': {'embedding': PROMPT}}
logits = jax.jit(prompted_model.logits, static_argnums=0)
predict = jax.jit(prompted_model.predict, static_argnums=(0, 3))
generate = jax.jit(prompted_model.generate, static_argnums=(0, 3), static_argnames='repeats')
start_decoding = jax.jit(prompted_model.start_decoding, static_argnums=(0, 3),
                         static_argnames='repeats')
continue_decoding = jax.jit(prompted_model.continue_decoding, static_argnums=0)
beam_search = jax.jit(prompted_model.beam_search, static_argnums=(0, 3, 4))


def padded(rows, width):
  return np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int32)


_RNG = np.random.default_rng(5)
MANY = [VirtualTokens(V, P, 'before').place(_RNG.integers(2, V, n))
        for n in (16, 9, 3, 5, 12, 7, 1, 16)]


def test_cached_greedy_decoding_is_the_uncached_argmax():
  inputs = padded(MANY, WIDTH)
  tokens = np.asarray(predict(MODEL, PARAMS, inputs, 14))
  assert tokens.shape == (8, 14) and tokens.dtype == np.int32
  ended = np.any(tokens == 1, axis=1)
  assert 0 < np.sum(ended) < 8, 'some texts should end, some not'
  outputs = logits(MODEL, PARAMS, {
      'encoder_input_tokens': inputs, 'decoder_target_tokens': np.ones_like(tokens),
      'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]})
  for row, best in zip(tokens, np.argmax(outputs, -1), strict=True):
    size = list(row).index(1) + 1 if 1 in row else 14
    np.testing.assert_array_equal(row[:size], best[:size])
    assert not np.any(row[size:])


def test_predictions_do_not_depend_on_the_batch_padding_or_limit():
  tokens = np.asarray(predict(MODEL, PARAMS, padded(MANY, WIDTH), 14))
  alone = predict(MODEL, PARAMS, padded(MANY[::-1], WIDTH + 9), 6)
  np.testing.assert_array_equal(alone, tokens[::-1, :6])


def sampling(seeds, temperature=1.0, top_k=0, top_p=1.0):
  full = lambda value, dtype: jnp.broadcast_to(jnp.asarray(value, dtype), (len(seeds),))
  return token_choice.Sampling(full(temperature, jnp.float32), full(top_k, jnp.int32),
                               full(top_p, jnp.float32), jnp.asarray(seeds, jnp.uint32))


def test_narrow_sampling_and_one_beam_are_greedy():
  inputs = padded(MANY, WIDTH)
  greedy, expected = generate(MODEL, PARAMS, inputs, 14)
  for settings in (dict(temperature=0.0), dict(top_k=1), dict(top_p=1e-6)):
    tokens, scores = generate(MODEL, PARAMS, inputs, 14, sampling(range(8), **settings))
    np.testing.assert_array_equal(tokens, greedy)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
  tokens, scores = beam_search(MODEL, PARAMS, inputs, 14, 1, BrevityPenalty(0.0))
  np.testing.assert_array_equal(tokens[:, 0], greedy)
  np.testing.assert_allclose(scores[:, 0], expected, rtol=1e-5)


def scored_without_a_cache(inputs, tokens):
  """log p of generated tokens, by teacher forcing; one that is 0 may be a token, not padding."""
  tokens = np.asarray(tokens)
  sizes = [list(row).index(1) + 1 if 1 in row else len(row) for row in tokens]
  outputs = logits(MODEL, PARAMS, {
      'encoder_input_tokens': inputs, 'decoder_target_tokens': np.ones_like(tokens),
      'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1]})
  weights = np.arange(tokens.shape[1]) < np.array(sizes)[:, None]
  return np.sum(objectives.token_log_likelihood(outputs, tokens) * weights, -1), np.array(sizes)


def test_samples_and_beams_score_as_without_a_cache():
  """And each example is encoded once for its three rows."""
  inputs = padded(MANY, WIDTH)
  repeated = np.repeat(inputs, 3, axis=0)
  tokens, scores = generate(MODEL, PARAMS, inputs, 14, sampling(range(24), 1.3, 20, 0.95),
                            repeats=3)
  assert len({tuple(row) for row in tokens.tolist()}) > 20
  expected, sizes = scored_without_a_cache(repeated, tokens)
  np.testing.assert_allclose(scores, expected, rtol=2e-5)
  assert 0 < np.sum(sizes < 14) < 24
  again, _ = generate(MODEL, PARAMS, repeated, 14, sampling(range(24), 1.3, 20, 0.95))
  np.testing.assert_array_equal(again, tokens)
  tokens, scores = beam_search(MODEL, PARAMS, inputs, 14, 3, BrevityPenalty(1.0))
  expected, sizes = scored_without_a_cache(repeated, tokens.reshape(24, 14))
  np.testing.assert_allclose(scores.ravel(), 6 * expected / (5 + sizes), rtol=2e-5)
  assert 0 < np.sum(sizes < 14)


def test_encoded_inputs_are_not_kept_beside_their_keys_and_values():
  decoding = start_decoding(MODEL, PARAMS, padded(MANY, WIDTH), 14, repeats=2)
  assert decoding.encoded is None
  assert {leaf.shape[0] for leaf in jax.tree.leaves(decoding.kept)} == {16}


def test_a_mixed_batch_is_each_row_alone_and_chunks_are_all_at_once():
  """Settings, seeds, limits and stop strings, of each row its own; two rows of each example."""
  inputs = padded(MANY, WIDTH)
  table, lengths = np.arange(V, dtype=np.uint8)[:, None] + 60, np.ones(V, np.int32)
  lengths[:2] = 0
  texts = [[], ['F', 'GH'], ['MM'], ['a', 'b', 'c', 'd'], [], ['Z'], ['e', 'f', 'g'], ['K', 'L']]
  stops = stop_strings.of_rows(texts, table, lengths)
  rng = np.random.default_rng(3)
  choose = sampling(range(100, 116), rng.choice([0, 0.5, 2], 16), rng.choice([0, 5], 16),
                    rng.choice([0.8, 1], 16))
  limits = rng.integers(4, 15, 16)
  run = functools.partial(generate, MODEL, PARAMS, repeats=2)
  tokens, scores = run(inputs, 14, choose, limits, stops=stops)
  order = rng.permutation(8)
  rows = np.stack([2 * order, 2 * order + 1], 1).ravel()
  turned = run(inputs[order], 14, jax.tree.map(lambda x: x[rows], choose), limits[rows],
               stops=stops.replace(strings=stops.strings[order]))
  np.testing.assert_array_equal(turned[0], tokens[rows])
  np.testing.assert_allclose(turned[1], scores[rows], rtol=1e-5)
  without, _ = run(inputs, 14, choose, limits)
  for row, (mine, full) in enumerate(zip(np.asarray(tokens), np.asarray(without), strict=True)):
    size = next((n for n in range(1, 15) if any(
        stop in ''.join(chr(60 + i) for i in full[:n] if i > 1) for stop in texts[row // 2])), 14)
    np.testing.assert_array_equal(mine[:size], full[:size])
    assert not np.any(mine[size:]) and not np.any(full[limits[row]:])
  assert np.any(tokens != without)
  decoding = start_decoding(MODEL, PARAMS, inputs, 14, repeats=2, stops=stops)
  seen = 0
  while not np.all(decoding.state.ended):
    decoding = continue_decoding(MODEL, PARAMS, decoding, choose, limits, 3)
    made = np.asarray(decoding.state.tokens)
    seen += 3
    np.testing.assert_array_equal(made[:, :seen], tokens[:, :seen])
  np.testing.assert_array_equal(decoding.state.tokens, tokens)
  np.testing.assert_allclose(decoding.state.log_likelihood, scores, rtol=1e-5)


def test_each_example_has_its_own_addition_in_every_row_it_is_decoded_in():
  """Prefixes, by number; and a prompt given as data is the one that the module owns."""
  inputs = padded(MANY, WIDTH)[:4]
  model = PromptedModel(t5.Transformer(CONFIG))
  heads = (2, 3, CONFIG.num_heads, CONFIG.head_dim)
  of_place = lambda seed: 1.5 * np.random.default_rng(seed).normal(
      size=(1, 2, *heads)).astype(np.float32)
  added = Added(virtual_embeddings=PROMPT, prefix=Prefix(
      of_place(0), of_place(1), of_place(2), rows=np.array([0, 1, 1, 0])))
  search = functools.partial(beam_search, model, BASE)
  tokens, scores = search(inputs, 10, 3, added=added)
  order = np.array([1, 3, 0, 2])
  turned = search(inputs[order], 10, 3, added=added.replace(
      prefix=added.prefix.replace(rows=added.prefix.rows[order])))
  np.testing.assert_array_equal(turned[0], tokens[order])
  np.testing.assert_allclose(turned[1], scores[order], rtol=1e-5)
  other, _ = search(inputs, 10, 3, added=added.replace(
      prefix=added.prefix.replace(rows=1 - added.prefix.rows)))
  assert np.any(other != tokens)
  np.testing.assert_array_equal(generate(model, BASE, inputs, 14,
                                         added=Added(virtual_embeddings=PROMPT))[0],
                                generate(MODEL, PARAMS, padded(MANY, WIDTH), 14)[0][:4])


def test_beams_of_a_real_checkpoint_are_those_of_t5x(test_assets):
  """Nothing ends there in 5 tokens: T5X then gives its live beams, the worst first, unpenalised."""
  golden = np.load(test_assets / 'golden/t5x_tiny_logits.npz', allow_pickle=False)
  config = t5.T5Config(32128, 4, 2, 2, 2, 2, 8, relative_attention_num_buckets=4,
                       relative_attention_max_distance=8)
  base = load_base(test_assets / 'prompt_tuning/test_data/test_t5_1_1_tiny/checkpoint_3',
                   config=config)
  penalty = BrevityPenalty()
  tokens, scores = beam_search(PromptedModel(t5.Transformer(config)), base.params,
                               golden['encoder_input_tokens'], 5, 4, penalty)
  np.testing.assert_array_equal(tokens[:, ::-1], golden['beam4_decodes'])
  expected = penalty.score(golden['beam4_scores'], 5)
  np.testing.assert_allclose(scores[:, ::-1], expected, rtol=1e-5)

"""Prefixes of different lengths in one batch, and none at all."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.networks import parameters, t5
from prompt_tuning_jax.networks.prefix import PLACES, Prefix

CONFIG = t5.T5Config(vocab_size=40, emb_dim=24, num_heads=3, num_encoder_layers=1,
                     num_decoder_layers=2, head_dim=5, mlp_dim=17, dropout_rate=0.0)
RNG = np.random.default_rng(0)
PARAMS = param_paths.unflatten({
    path: RNG.normal(size=spec.shape).astype(np.float32) * spec.shape[0] ** -0.5
    for path, spec in parameters.parameter_specs(CONFIG).items()})
INPUTS, TARGETS = (RNG.integers(2, 40, (3, width)).astype(np.int32) for width in (9, 7))
INPUTS[1, 6:] = 0
ALL = {place: RNG.normal(size=(layers, 2, 2, 4, 3, 5)).astype(np.float32)
       for place, layers in zip(PLACES, (1, 2, 2), strict=True)}


@jax.jit
def logits(prefix, inputs=INPUTS, targets=TARGETS):
  return t5.Transformer(CONFIG).apply({'params': PARAMS}, inputs, targets, targets,
                                      enable_dropout=False, prefix=prefix)


def alone(row, length, places=PLACES):
  return Prefix(**{place: ALL[place][:, :, row:row + 1, :length] for place in places})


@pytest.mark.parametrize('places', [PLACES, ('encoder',), ('decoder',), ('cross',)])
def test_a_batch_that_mixes_prefixes_is_each_alone(places):
  rows, lengths = np.array([0, 1, 1], np.int32), np.array([4, 2], np.int32)
  mixed = logits(Prefix(**{place: ALL[place] for place in places}, rows=rows,
                        lengths=dict.fromkeys(places, lengths)))
  for i, row in enumerate(rows):
    one = logits(alone(row, lengths[row], places), INPUTS[i:i + 1], TARGETS[i:i + 1])
    np.testing.assert_allclose(mixed[i], one[0], rtol=0, atol=2e-5)
  assert np.abs(mixed - logits(Prefix())).max() > .1


def test_a_prefix_of_no_length_is_the_base_model():
  base = logits(Prefix())
  np.testing.assert_array_equal(logits(alone(0, 0)), base)
  nothing = Prefix(**ALL, rows=np.zeros(3, np.int32),
                   lengths=dict.fromkeys(ALL, np.zeros(2, np.int32)))
  np.testing.assert_allclose(logits(nothing), base, rtol=0, atol=1e-5)


def test_a_prefix_shifts_no_position():
  """Keys that are never looked at change nothing, however many: positions and biases stay."""
  far = alone(0, 4)
  far = far.replace(**{place: np.concatenate([
      np.full_like(getattr(far, place)[:, :1], 0), getattr(far, place)[:, 1:]], axis=1)
                       for place in PLACES})
  # With keys 0, a prefix takes weight exp(0) each; with values 0 it only dilutes. Compare two
  # orders of the same rows: attention is a set of keys, so nothing may change.
  order = [2, 0, 3, 1]
  turned = far.replace(**{place: getattr(far, place)[:, :, :, order] for place in PLACES})
  np.testing.assert_allclose(logits(far), logits(turned), rtol=0, atol=2e-5)

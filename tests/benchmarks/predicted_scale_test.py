"""The prediction for other machines: its FLOPs are those that arithmetic gives."""

import dataclasses
import importlib.util
import pathlib

import pytest

from prompt_tuning_jax import launch

_file = pathlib.Path(__file__).resolve().parents[2] / 'benchmarks' / 'predicted_scale.py'
_spec = importlib.util.spec_from_file_location('predicted_scale', _file)
predicted_scale = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(predicted_scale)


@pytest.mark.parametrize('layers', [1, 2])
def test_a_step_costs_four_flops_a_parameter_and_token_and_attention(layers):
  rows = 2
  config = predicted_scale.with_layers(
      dataclasses.replace(launch.network_named('t5_1_1_small'), dropout_rate=0.0), layers)
  inputs = rows * (predicted_scale.PROMPT + predicted_scale.INPUTS)
  targets = rows * predicted_scale.TARGETS
  joined = config.num_heads * config.head_dim
  attention, mlp = config.emb_dim * joined, 3 * config.emb_dim * config.mlp_dim
  # So few targets attend to the inputs as they are, D wide, without keys and values of them.
  weights = layers * (inputs + 2 * targets) * 4 * attention + layers * (inputs + targets) * mlp
  weights += targets * config.emb_dim * config.vocab_size
  pairs = joined * (inputs ** 2 + targets ** 2) + (
      config.num_heads * config.emb_dim * inputs * targets)
  # Two products forward, four backward, 2 FLOPs each.
  expected = 4 * weights + 12 * layers * pairs / rows
  counted = predicted_scale.flops(config, rows)
  assert expected < counted < 1.06 * expected  # the rest is norms, softmaxes, the loss

"""Predicts the step time and memory of prompt tuning on machines that are not at hand.

  python benchmarks/predicted_scale.py

Nothing here was measured on such a machine. The method, for each network, machine and preset of
gin/partitioning, all of T5 1.1, with a prompt of 100, 512 input and 32 target tokens, 32 rows:

FLOPs   XLA's count of the step (`jax.jit(…).lower(…).cost_analysis()`) for one and for two layers
        of the real widths, and a straight line from there, without dropout. It comes to some 4 a
        parameter and token (forward 2, backward 2: frozen weights need no gradient) and attention.
Memory  of a device: its part of the weights, by `Partitioner.sharding_for`; what JAX keeps from
        the forward pass for the backward pass (`jax.make_jaxpr` of `jax.vjp`, one and two layers,
        a straight line), its rows alone, and of heads and hidden units its part; with fsdp the two
        largest weights whole. XLA may keep less. Prompt and optimizer state are kilobytes.
Links   fsdp: the other devices' parts of the weights, in the forward and in the backward pass.
        tensor: the bytes of collectives in the compiled program of a narrow network
        (`partitioning.collectives`, eight virtual devices), which are whole activations, per layer
        and token; a ring moves 2 (n - 1) / n of them. data: the prompt's gradient, kilobytes.
Time    no less than max(FLOPs / peak, bytes / bandwidth, fsdp's gathering) + tensor's exchanges,
        which wait for each other; bytes are the weights read twice, and what is kept written and
        read. `expected` takes half of the peak for FLOPs, an assumption: XLA reaches 40 to 60 % for
        large T5s. Latency is left out, which small networks wait for most.

Of the presets and numbers of microbatches that leave a tenth of the memory free, the fastest is
shown, with weights in bfloat16 and in int8 (which are computed with in bfloat16).

Machines, a chip, as their makers give them (dense bfloat16; links out, one way):
  TPU v5e    197 TFLOP/s,  16 GB,  819 GB/s, links 1600 Gbit/s both ways; v5e-8 is 8 chips
  TPU v5p    459 TFLOP/s,  95 GB, 2765 GB/s, links 4800 Gbit/s both ways; v5p-16 is 16
             cores, 8 chips (cloud.google.com/tpu/docs/v5e, …/v5p)
  H200 SXM   989 TFLOP/s, 141 GB, 4800 GB/s, NVLink 900 GB/s both ways (nvidia.com)
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from prompt_tuning_jax import launch, param_paths, partitioning, prompted_model
from prompt_tuning_jax.networks import parameters
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt

SIZES = ('small', 'base', 'large', 'xl', 'xxl')
DEVICES = 8
PROMPT, INPUTS, TARGETS = 100, 512, 32
FREE, SHARE_OF_PEAK = 0.1, 0.5
PRESETS = {'data': Partitioner(), 'fsdp': Partitioner(1, True), 'tensor': Partitioner(None),
           'fsdp_tensor': Partitioner(2, True)}
OUTPUT = pathlib.Path(__file__).with_suffix('.json')


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak FLOP/s, bytes of memory, bytes/s of memory, bytes/s out of its links."""

  flops: float
  memory: float
  bandwidth: float
  links: float


MACHINES = {'v5e-8': Chip(197e12, 16e9, 819e9, 1600e9 / 8 / 2),
            'v5p-16': Chip(459e12, 95e9, 2765e9, 4800e9 / 8 / 2),
            '8xH200': Chip(989e12, 141e9, 4800e9, 900e9 / 2)}


def step_of(config, rows: int, inputs: int, targets: int):
  """(a function of (prompt, frozen, batch) -> loss, shapes of these)."""
  model = PromptedModel(config.network(), SoftPrompt(PROMPT, config.emb_dim))
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
  batch = {'encoder_input_tokens': shape(rows, PROMPT + inputs),
           **dict.fromkeys(('decoder_input_tokens', 'decoder_target_tokens'),
                           shape(rows, targets)),
           'decoder_loss_weights': jax.ShapeDtypeStruct((rows, targets), jnp.float32)}
  frozen = param_paths.unflatten({
      path: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(config.dtype))
      for path, spec in parameters.parameter_specs(config).items()})
  prompt = {'prompt': {'embedding': jax.ShapeDtypeStruct((PROMPT, config.emb_dim), jnp.float32)}}

  def loss(prompt, frozen, batch):
    return prompted_model.loss(model, param_paths.merge(prompt, frozen), batch,
                               jax.random.key(0))[0]

  return loss, (prompt, frozen, batch)


def with_layers(config, count: int):
  return dataclasses.replace(config, num_encoder_layers=count, num_decoder_layers=count)


def extrapolated(count, config) -> float:
  """What `count` would give for all layers, from one and two of them."""
  one, two = (count(with_layers(config, layers)) for layers in (1, 2))
  return one + (config.num_encoder_layers - 1) * (two - one)


def flops(config, rows: int) -> float:
  """Of a step of these layers, all devices together."""
  loss, shapes = step_of(config, rows, INPUTS, TARGETS)
  return jax.jit(jax.grad(loss)).lower(*shapes).cost_analysis()['flops']


def kept(config, model_parallelism: int) -> float:
  """Bytes for each row that the forward pass leaves for the backward pass, on one of the devices
  that share it."""
  rows = 7  # no size of a network
  loss, (prompt, frozen, batch) = step_of(config, rows, INPUTS, TARGETS)
  program = jax.make_jaxpr(
      lambda prompt, frozen, batch: jax.vjp(lambda p: loss(p, frozen, batch), prompt)[1])(
          prompt, frozen, batch).jaxpr
  own = set(program.invars)
  split = {config.num_heads, config.mlp_dim, config.vocab_size}
  total = 0.0
  for value in {id(value): value for value in program.outvars}.values():
    if not value.aval.shape or value in own:  # a number, or a weight itself
      continue
    of_all = math.prod(value.aval.shape) * value.aval.dtype.itemsize
    has_part = split & set(value.aval.shape) and rows in value.aval.shape
    total += of_all / (model_parallelism if has_part else 1)
  return total / rows


def exchanged() -> dict[str, float]:
  """Activations that tensor parallelism all-reduces, in a layer of an encoder and a decoder.

  {'inputs', 'targets'}: how many vectors of emb_dim numbers for each position of inputs (prompt
  included) and of targets. Counted in a narrow network.
  """
  def count(layers: int, targets: int) -> float:
    config = with_layers(dataclasses.replace(
        launch.network_named('t5_1_1_small'), emb_dim=16, num_heads=8, head_dim=8, mlp_dim=32,
        vocab_size=64, dtype='float32'), layers)
    loss, (prompt, frozen, batch) = step_of(config, rows := 4, 28, targets)
    partitioner = PRESETS['tensor']
    place = partitioner.sharding_for(parameters.logical_axes)
    frozen = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path, leaf.shape))
              for path, leaf in param_paths.flatten(frozen).items()}
    program = partitioner.jit(jax.grad(loss)).lower(
        prompt, param_paths.unflatten(frozen), batch).compile().as_text()
    return partitioning.collectives(program)['all-reduce'] / (4 * rows * config.emb_dim)

  few = count(2, 8) - count(1, 8)
  more = count(2, 24) - count(1, 24)
  of_targets = (more - few) / 16
  return {'inputs': (few - 8 * of_targets) / (PROMPT + 28), 'targets': of_targets}


def predictions(config, chip: Chip, known: dict, rows: int, weight_bytes: int) -> Iterator[dict]:
  """What each preset would take, in microbatches of a few sizes."""
  specs = parameters.parameter_specs(config)
  sizes = {path: math.prod(spec.shape) * weight_bytes for path, spec in specs.items()}
  for name, partitioner in PRESETS.items():
    place = partitioner.sharding_for(parameters.logical_axes)
    held = sum(math.prod(place(path, spec.shape).shard_shape(spec.shape)) * weight_bytes
               for path, spec in specs.items())
    model = DEVICES // partitioner.copies
    if rows % partitioner.copies:
      continue
    for parts in (1, 2, 4, 8, 16, 32):
      if rows // partitioner.copies % parts:
        break
      own_rows = rows // partitioner.copies // parts
      kept_bytes = known['kept'][str(model)] * own_rows
      memory = held + kept_bytes
      gathered = 0.0
      if partitioner.fully_sharded:
        memory += sum(sorted(sizes.values())[-2:]) / model
        gathered = 2 * parts * (sum(sizes.values()) / model - held)
      positions = (known['exchanged']['inputs'] * (PROMPT + INPUTS)
                   + known['exchanged']['targets'] * TARGETS)
      reduced = (0 if model == 1 else 2 * (model - 1) / model * positions * config.emb_dim * 2
                 * config.num_encoder_layers * rows / partitioner.copies)
      compute = known['flops'] / DEVICES / chip.flops
      read = (2 * sum(sizes.values()) / model * parts + 2 * kept_bytes * parts) / chip.bandwidth
      bound = max(compute, read, gathered / chip.links) + reduced / chip.links
      expected = (max(compute / SHARE_OF_PEAK, read, gathered / chip.links)
                  + reduced / chip.links)
      yield {'preset': name, 'model_parallelism': model, 'microbatches': parts,
             'weights_gb': held / 1e9, 'kept_gb': kept_bytes / 1e9, 'memory_gb': memory / 1e9,
             'compute_ms': 1e3 * compute, 'memory_ms': 1e3 * read,
             'links_ms': 1e3 * (gathered + reduced) / chip.links, 'at_least_ms': 1e3 * bound,
             'expected_ms': 1e3 * expected, 'fits': memory < (1 - FREE) * chip.memory}


def table(rows: list[dict]) -> str:
  """As Markdown."""
  lines = ['| network | machine | weights | preset | microbatches | GB a device | compute, memory, '
           'links: ms | at least: ms | expected: ms |', '|' + '---|' * 9]
  for row in rows:
    best = row['best']
    what = 'fits in none' if best is None else ' | '.join([
        best['preset'], str(best['microbatches']),
        f'{best["memory_gb"]:.1f} ({best["weights_gb"]:.1f} weights)',
        ', '.join(f'{best[name]:.2g}' for name in ('compute_ms', 'memory_ms', 'links_ms')),
        f'{best["at_least_ms"]:.3g}', f'{best["expected_ms"]:.3g}'])
    lines.append(f'| {row["network"]} | {row["machine"]} | {row["weights"]} | {what} |')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument('--sizes', nargs='+', default=SIZES, choices=SIZES)
  parser.add_argument('--output', default=str(OUTPUT))
  flags = parser.parse_args()
  os.environ['JAX_NUM_CPU_DEVICES'] = str(DEVICES)
  jax.config.update('jax_platforms', 'cpu')
  rows, counted = [], {}
  vectors = exchanged()
  for size in flags.sizes:
    name = f't5_1_1_{size}'
    config = dataclasses.replace(launch.network_named(name), dtype='bfloat16', dropout_rate=0.0)
    counted[name] = known = {
        'flops': extrapolated(lambda c: flops(c, flags.batch_size), config),
        'kept': {str(DEVICES // each.copies): extrapolated(
            lambda c, each=each: kept(c, DEVICES // each.copies), config)
                 for each in (PRESETS['data'], PRESETS['fsdp_tensor'], PRESETS['tensor'])},
        'exchanged': vectors}
    for machine, chip in MACHINES.items():
      for weights, weight_bytes in (('bfloat16', 2), ('int8', 1)):
        every = predictions(config, chip, known, flags.batch_size, weight_bytes)
        best = min((each for each in every if each['fits']),
                   key=lambda each: each['expected_ms'], default=None)
        rows.append({'network': name, 'machine': machine, 'weights': weights, 'best': best})
  print(table(rows))
  pathlib.Path(flags.output).write_text(json.dumps(
      {'batch_size': flags.batch_size, 'prompt': PROMPT, 'inputs': INPUTS, 'targets': TARGETS,
       'share_of_peak': SHARE_OF_PEAK, 'counted': counted, 'rows': rows}, indent=1) + '\n', 'utf-8')


if __name__ == '__main__':
  main()

"""Step time, MFU, roofline and memory of prompt tuning on an accelerator, beside PEFT.

  python benchmarks/accelerator.py --output=benchmarks/accelerator.json   # where there is one
  python benchmarks/accelerator.py --dry_run                              # anywhere: shapes alone

T5 1.1 from small to XXL with random weights in bfloat16 (XXL's in int8), bfloat16 activations,
dropout, a prompt of 100 before 512 input tokens, 32 target tokens. Each size has a process of its
own, and so has PEFT's. It needs neither TensorFlow nor SeqIO.

MFU     4 FLOPs for each parameter and the tokens that it sees (2 forward, 2 backward: a frozen
        weight needs no gradient of its own), over the step's time and the chip's peak. Lookups and
        the products of attention are not counted.
Roof    the least time that a step can take: those FLOPs and attention's over the peak, or the bytes
        of all weights, read forward and backward, over the memory's bandwidth, whichever is more.
Memory  of the compiled program (arguments and temporaries), and the device's own peak.
PEFT    the same network in torch: bfloat16, sdpa, torch.compile of each block (PyTorch's "regional
        compilation": a fraction of the minutes that the whole takes), dropout, prompt for the
        encoder alone, AdamW.

The two sides take turns (A B A B …) of --steps_a_turn steps, none of which waits for the one
before, as in training; a step's time is that part of a turn's, the ratio is that of medians.

Processes start and compile one size after another or, with --at_once, all together, where the
device has room for all (kernels are then chosen on a busy device); steps are timed one at a time.
A side that fails is told, and the others go on. --dry_run lowers the step for CUDA and for
TPUs and, with --compile, compiles it for the machine at hand, whose compiler then says what memory
it takes; a CPU's computes bfloat16 in float32, so it takes more than an accelerator.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')  # torch needs some memory, too

import jax
import jax.numpy as jnp
import numpy as np
import turns

from prompt_tuning_jax import launch, optimizers, param_paths
from prompt_tuning_jax.networks import int8, parameters
from prompt_tuning_jax.networks.execution import Execution
from prompt_tuning_jax.training import methods
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.step import Recipe, make_train_step

SIZES = ('small', 'base', 'large', 'xl', 'xxl')
# By the start of `device_kind`, the first that fits: dense bfloat16 FLOP/s and bytes/s, as the
# makers give them (nvidia.com; cloud.google.com/tpu/docs/system-architecture-tpu-vm).
PEAKS = {
    'NVIDIA H200': (989e12, 4.8e12), 'NVIDIA H100 PCIe': (756e12, 2.0e12),
    'NVIDIA H100 NVL': (835e12, 3.9e12), 'NVIDIA H100': (989e12, 3.35e12),
    'NVIDIA A100': (312e12, 2.04e12), 'TPU v6 lite': (918e12, 1.64e12),
    'TPU v5 lite': (197e12, 0.819e12), 'TPU v5': (459e12, 2.765e12),
    'TPU v4': (275e12, 1.2e12)}
PLATFORMS = {'cuda': 'triton', 'tpu': 'pallas'}  # what --dry_run lowers, with which attention


def peaks(device_kind: str) -> tuple[float, float] | None:
  """(FLOP/s, bytes/s) of a chip, None for one that is not in the table."""
  return next((peak for start, peak in PEAKS.items() if device_kind.startswith(start)), None)


def configuration(size: str, flags: argparse.Namespace, attention: str) -> Any:
  """The network with the settings of a large one."""
  config, unrolled = launch.network_named(f't5_1_1_{size}'), size in flags.unrolled
  return dataclasses.replace(
      config, dtype='bfloat16', dropout_rate=flags.dropout_rate, scan_layers=not unrolled,
      remat_policy=flags.remat_policy or ('none' if unrolled else 'minimal'), attention=attention)


def parameter_dtype(size: str, flags: argparse.Namespace) -> str:
  return flags.parameter_dtype or ('int8' if size == 'xxl' else 'bfloat16')


def step_and_shapes(config: Any, dtype: str, flags: argparse.Namespace) -> tuple[Any, tuple]:
  """(the compiled step, shapes of its arguments: state, frozen leaves, batch)."""
  optimizer = optimizers.adafactor()
  model = methods.PromptTuning(flags.prompt_length).model(config)
  step = make_train_step(Recipe(model, optimizer, z_loss=1e-4))
  rows = jax.ShapeDtypeStruct((flags.prompt_length, config.emb_dim), jnp.float32)
  state = jax.eval_shape(lambda rows: train_state.create({'prompt': {'embedding': rows}},
                                                         optimizer), rows)
  tokens = lambda width, dtype=jnp.int32: jax.ShapeDtypeStruct((flags.batch_size, width), dtype)
  batch = {'encoder_input_tokens': tokens(flags.prompt_length + flags.input_length),
           'decoder_input_tokens': tokens(flags.target_length),
           'decoder_target_tokens': tokens(flags.target_length),
           'decoder_loss_weights': tokens(flags.target_length, jnp.float32)}
  return step, (state, parameters.shapes(config, dtype), batch)


def arrays(shapes: tuple, vocab_size: int) -> tuple:
  """Random arrays of these shapes, made on the device leaf by leaf."""
  state, frozen, batch = shapes
  keys = iter(jax.random.split(jax.random.key(0), 10_000))

  @jax.jit
  def normal(key, like):
    scale = 1.0 if len(like.shape) < 2 else like.shape[-2] ** -0.5
    return (scale * jax.random.normal(key, like.shape, jnp.float32)).astype(like.dtype)

  def leaf(like: Any) -> Any:
    zeros = jnp.zeros(like.shape, like.dtype)
    if not isinstance(like, int8.Quantized):
      return normal(next(keys), zeros)
    values = jax.random.randint(next(keys), like.values.shape, -127, 128, jnp.int8)
    scale = jnp.full(like.scale.shape, like.shape[-2] ** -0.5 / 73, jnp.float32)
    return like.replace(values=values, scale=scale)

  rng = np.random.default_rng(0)
  size = next(iter(jax.tree.leaves(state.trainable))).shape[0]
  made = {name: rng.integers(3, vocab_size, x.shape, dtype=np.int32) for name, x in batch.items()
          if x.dtype == jnp.int32}
  made['encoder_input_tokens'][:, :size] = vocab_size + np.arange(size)
  made['decoder_loss_weights'] = np.ones(batch['decoder_loss_weights'].shape, np.float32)
  start = train_state.create(jax.tree.map(lambda x: normal(next(keys), jnp.zeros(
      x.shape, x.dtype)), state.trainable), optimizers.adafactor())
  frozen = {path: leaf(like) for path, like in param_paths.flatten(frozen).items()}
  return start, param_paths.unflatten(frozen), jax.device_put(made)


def model_flops(config: Any, flags: argparse.Namespace) -> float:
  """4 FLOPs for each parameter of a product and each token that it sees, of one step."""
  inputs = flags.batch_size * (flags.prompt_length + flags.input_length)
  targets = flags.batch_size * flags.target_length
  total = 0
  for path, spec in parameters.parameter_specs(config).items():
    if path.endswith('/kernel'):
      of_inputs = path.startswith('encoder/') or any(
          f'encoder_decoder_attention/{name}/' in path for name in ('key', 'value'))
      total += 4 * math.prod(spec.shape) * (inputs if of_inputs else targets)
  return total


def attention_flops(config: Any, flags: argparse.Namespace) -> float:
  """Those of queries with keys and of weights with values, of one step: 2 forward, 4 backward."""
  inputs, targets = flags.prompt_length + flags.input_length, flags.target_length
  pairs = (config.num_encoder_layers * inputs ** 2
           + config.num_decoder_layers * (targets ** 2 + targets * inputs))
  return 6 * 2 * flags.batch_size * config.num_heads * config.head_dim * pairs


def weight_bytes(shapes: tuple) -> int:
  """Of all frozen leaves but the table that is looked up in, read twice."""
  leaves = param_paths.flatten(shapes[1])
  return 2 * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for path, of in leaves.items()
                 if 'token_embedder' not in path for leaf in jax.tree.leaves(of))


def memory(compiled: Any) -> dict[str, int]:
  """Bytes of a compiled program; arguments that are given back are counted once."""
  found = compiled.memory_analysis()
  kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return {'arguments_and_outputs': kept, 'temporaries': found.temp_size_in_bytes,
          'total': kept + found.temp_size_in_bytes}


def dry_run(size: str, flags: argparse.Namespace, platforms: dict[str, str]) -> dict[str, Any]:
  """What is known of a step from shapes: it is lowered for the platforms, nothing is allocated."""
  dtype, result = parameter_dtype(size, flags), {}
  for platform, attention in platforms.items():
    config = configuration(size, flags, attention)
    step, shapes = step_and_shapes(config, dtype, flags)
    start = time.perf_counter()
    lowered = step.trace(*shapes).lower(lowering_platforms=(platform,))
    result[platform] = {'attention': attention, 'seconds_to_lower': time.perf_counter() - start,
                        'bytes_of_program': len(lowered.as_text())}
  count = lambda leaf: math.prod(leaf.shape)
  specs = parameters.parameter_specs(config)
  result |= {'parameter_dtype': dtype, 'parameters': sum(map(count, specs.values())),
             'model_flops': model_flops(config, flags),
             'argument_bytes': sum(count(leaf) * leaf.dtype.itemsize
                                   for leaf in jax.tree.leaves(shapes))}
  if flags.compile:
    step, shapes = step_and_shapes(configuration(size, flags, 'xla'), dtype, flags)
    start = time.perf_counter()
    result['compiled'] = {'for': jax.devices()[0].device_kind,
                          'memory': memory(step.lower(*shapes).compile()),
                          'seconds': time.perf_counter() - start}
  return result


def our_run(size: str, flags: argparse.Namespace) -> tuple[turns.Run, dict[str, Any]]:
  """(a function that takes a turn's steps and waits for them, what is known of a step)."""
  config, dtype = configuration(size, flags, 'xla'), parameter_dtype(size, flags)
  config = Execution(config.scan_layers, config.remat_policy, flags.attention).applied(config)
  step, shapes = step_and_shapes(config, dtype, flags)
  start = time.perf_counter()
  compiled = step.lower(*shapes).compile()
  known = {'parameter_dtype': dtype, 'attention': config.attention, 'jax': jax.__version__,
           'scan_layers': config.scan_layers, 'remat_policy': config.remat_policy,
           'batch_size': flags.batch_size, 'input_length': flags.input_length,
           'steps_a_turn': flags.steps_a_turn,
           'xla_flags': os.environ.get('XLA_FLAGS', ''),
           'device': jax.devices()[0].device_kind,
           'seconds_to_compile': time.perf_counter() - start, 'memory': memory(compiled),
           'model_flops': model_flops(config, flags),
           'attention_flops': attention_flops(config, flags), 'weight_bytes': weight_bytes(shapes)}
  state, frozen, batch = arrays(shapes, config.vocab_size)
  held = [state]

  def run() -> None:
    for _ in range(flags.steps_a_turn):
      held[0], metrics = compiled(held[0], frozen, batch)
    known['loss'] = float(jax.block_until_ready(metrics)['loss'])

  return run, known


def peft_run(size: str, flags: argparse.Namespace, device: str = 'cuda',
             ) -> tuple[turns.Run, dict[str, Any]]:
  """As `our_run`, by PEFT; raises ImportError where it or a GPU for torch is missing."""
  import peft
  import torch
  import transformers
  if device == 'cuda' and not torch.cuda.is_available():
    raise ImportError('torch has no GPU')
  config = launch.network_named(f't5_1_1_{size}')
  with torch.device(device):
    torch.set_default_dtype(torch.bfloat16)
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=config.vocab_size, d_model=config.emb_dim, d_kv=config.head_dim,
        d_ff=config.mlp_dim, num_layers=config.num_encoder_layers, num_heads=config.num_heads,
        feed_forward_proj='gated-gelu', tie_word_embeddings=False, decoder_start_token_id=0,
        dropout_rate=flags.dropout_rate, use_cache=False, attn_implementation='sdpa'))
    torch.set_default_dtype(torch.float32)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(
        task_type='SEQ_2_SEQ_LM', num_virtual_tokens=flags.prompt_length,
        num_transformer_submodules=1))
    model.train()
    tokens = lambda width: torch.randint(3, config.vocab_size, (flags.batch_size, width))
    inputs, labels = tokens(flags.input_length), tokens(flags.target_length)
    mask = torch.ones_like(inputs)
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
  if flags.peft_compile == 'blocks':
    for block in (*base.encoder.block, *base.decoder.block):
      block.compile()
  elif flags.peft_compile == 'model':
    model = torch.compile(model)

  def run() -> None:
    for _ in range(flags.steps_a_turn):
      optimizer.zero_grad()
      model(input_ids=inputs, attention_mask=mask, labels=labels).loss.backward()
      optimizer.step()
    if device == 'cuda':
      torch.cuda.synchronize()

  return run, {'torch': torch.__version__, 'transformers': transformers.__version__,
               'peft': peft.__version__, 'compiled': flags.peft_compile}


def side(flags: argparse.Namespace) -> turns.Run:
  """A side's step, after one that compiles; writes what is known of it to --output."""
  try:
    run, known = (our_run if flags.side == 'ours' else peft_run)(flags.alone, flags)
    run()
  except ImportError as error:
    run, known = (lambda: None), {'without': str(error)}
  if flags.side == 'ours':
    stats = jax.devices()[0].memory_stats() or {}
    known['peak_bytes'] = stats.get('peak_bytes_in_use')
  pathlib.Path(flags.output).write_text(json.dumps(known), encoding='utf-8')
  return run


def measure(sizes: Sequence[str], flags: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
  """{size: what is known and was timed}; the processes of these sizes are there all at once."""
  sides = {size: ('ours', 'peft') if size in flags.peft_sizes else ('ours',) for size in sizes}
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    file = lambda *of: pathlib.Path(folder, '-'.join(of))
    runs = {size: {name: stack.enter_context(turns.Apart(
        __file__, *argv, f'--alone={size}', f'--side={name}', f'--output={file(size, name)}'))
        for name in of} for size, of in sides.items()}
    results = {}
    for size, of_size in runs.items():  # until all are ready
      for name, run in list(of_size.items()):
        try:
          run.turn()
          known = json.loads(file(size, name).read_text('utf-8'))
        except SystemExit as error:  # its own message stands above
          known = {'without': str(error)}
        results.setdefault(size, {})[name] = known
        if 'without' in known:
          of_size.pop(name).__exit__()  # and gives back its memory
    return {size: timed(of_size, results[size], flags) for size, of_size in runs.items()}


def timed(runs: dict[str, turns.Apart], known: dict[str, Any],
          flags: argparse.Namespace) -> dict[str, Any]:
  """What is known of a size, with times of its sides; where ours failed it is 'without'."""
  ours, peft = known['ours'], known.get('peft')
  if 'ours' not in runs:
    return {**ours, 'peft': peft}
  taken = turns.take_turns(runs, flags.repeats)['seconds']
  seconds = {name: [turn / flags.steps_a_turn for turn in of] for name, of in taken.items()}
  medians = {name: statistics.median(times) for name, times in seconds.items()}
  return {**ours, 'medians': medians, 'seconds': seconds, 'peft': peft,
          **against(peaks(ours['device']), ours, medians)}


def against(peak: tuple[float, float] | None, known: dict[str, Any],
            medians: dict[str, float]) -> dict[str, Any]:
  """MFU, the roof and the ratio to PEFT; None for what cannot be told."""
  time_of, result = medians['ours'], {'mfu': None, 'roof_seconds': None, 'roof': None}
  if peak:
    of_flops = (known['model_flops'] + known['attention_flops']) / peak[0]
    of_bytes = known['weight_bytes'] / peak[1]
    result = {'mfu': known['model_flops'] / time_of / peak[0],
              'roof_seconds': max(of_flops, of_bytes),
              'roof': 'FLOPs' if of_flops > of_bytes else 'bytes'}
  result['times_as_fast_as_peft'] = medians['peft'] / time_of if 'peft' in medians else None
  return result


def table(results: dict[str, dict[str, Any]]) -> str:
  """The results as lines of a table."""
  number = lambda value, form: 'unknown' if value is None else format(value, form)
  done = {size: of for size, of in results.items() if 'without' not in of}
  if 'argument_bytes' in next(iter(results.values())):
    rows = [('network', 'parameters', 'TFLOP a step', 'arguments, GB', 'compiled, GB', 'seconds')]
    rows += [(size, f'{of["parameters"]:,}', f'{of["model_flops"] / 1e12:.2f}',
              f'{of["argument_bytes"] / 1e9:.2f}',
              number(of.get('compiled') and of['compiled']['memory']['total'] / 1e9, '.2f'),
              number(of.get('compiled') and of['compiled']['seconds'], '.0f'))
             for size, of in results.items()]
  else:
    rows = [('network', 'weights', 'attention', 'step, ms', 'roof, ms', 'MFU', 'memory, GB',
             'times PEFT')]
    rows += [(size, of['parameter_dtype'], of['attention'], f'{1e3 * of["medians"]["ours"]:.1f}',
              number(of['roof_seconds'] and 1e3 * of['roof_seconds'], '.1f'),
              number(of['mfu'], '.1%'), f'{of["memory"]["total"] / 1e9:.1f}',
              number(of['times_as_fast_as_peft'], '.2f')) for size, of in done.items()]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
                   for row in rows)


def parser() -> argparse.ArgumentParser:
  made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = made.add_argument
  add('--sizes', nargs='+', default=SIZES, choices=SIZES)
  add('--alone', choices=SIZES, help=argparse.SUPPRESS)
  add('--side', default='ours', choices=('ours', 'peft'), help=argparse.SUPPRESS)
  add('--batch_size', type=int, default=8)
  add('--input_length', type=int, default=512)
  add('--prompt_length', type=int, default=100)
  add('--target_length', type=int, default=32)
  add('--dropout_rate', type=float, default=0.1)
  add('--parameter_dtype', choices=('float32', 'bfloat16', 'int8'))
  add('--remat_policy', help="default: 'minimal', 'none' where unrolled")
  add('--attention', default='auto')
  add('--unrolled', nargs='*', default=(), choices=SIZES,
      help='whose layers are compiled each: a faster step after a longer compilation')
  add('--peft_sizes', nargs='*', default=SIZES[:-1], choices=SIZES, help='beside which PEFT is run')
  add('--peft_compile', default='blocks', choices=('blocks', 'model', 'none'))
  add('--at_once', action='store_true', help='all sizes are on the device together')
  add('--repeats', type=int, default=20, help='turns of each side')
  add('--steps_a_turn', type=int, default=5)
  add('--dry_run', action='store_true', help='lower for accelerators, from shapes alone')
  add('--compile', action='store_true', help='with --dry_run: compile for this machine, too')
  add('--output', metavar='FILE.json')
  return made


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  flags = parser().parse_args(argv)
  if flags.alone:
    return turns.serve(lambda: side(flags))
  if flags.dry_run:
    results = {size: dry_run(size, flags, PLATFORMS) for size in flags.sizes}
  else:
    results = {}
    for sizes in [flags.sizes] if flags.at_once else [[size] for size in flags.sizes]:
      results |= measure(sizes, flags, argv)
  print(table(results))
  if flags.output:
    pathlib.Path(flags.output).write_text(json.dumps(results, indent=1) + '\n', encoding='utf-8')
  if failed := [size for size, of in results.items() if 'without' in of]:
    raise SystemExit(f'{", ".join(failed)} failed: see above.')


if __name__ == '__main__':
  main()

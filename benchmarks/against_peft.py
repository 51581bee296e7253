"""A training step against PEFT's (torch, eager): same shapes, dropout, threads and processor.

  python benchmarks/against_peft.py --output=benchmarks/against_peft.json

Prompt tuning and prefix tuning of T5 with random, untied float32 weights; AdamW on what trains
alone. Each side has a process of its own, and they take turns, a step behind --settle that are not
timed; a ratio is that of their median times. Ours splits a batch over a virtual device for each
thread, which share one copy of the base (--devices=1: a single device takes it whole). Where other
programs run beside it, the clock is unfair to torch, whose threads wait for each other after every
operation: the processor's time, which is recorded too, says more there. Peak memory is measured in
other processes (`peak_memory.measured`). GLIBC_TUNABLES in the environment holds for every side,
and is recorded.

What is compared with what:

  prompt_tuning  ours and PEFT's: P trained embeddings before the encoder's input.
  prefix_tuning  ours trains keys and values of every layer of encoder, decoder and
                 cross-attention, as Li & Liang (2021) do; PEFT's are of the decoder's
                 self-attention alone, so its encoder is never differentiated. `decoder_prefix` is
                 ours of the same places as PEFT's; what the full prefix takes beyond it is the
                 encoder's share, and the cross-attention's.

Two settings make PEFT do what is compared: a prompt for the encoder alone
(num_transformer_submodules=1; else half of its rows get no gradient), and a token_dim of heads *
d_kv (its prefix fails where that is not d_model, as in t5-v1.1-small).
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform

import jax
import numpy as np
import peak_memory
from method_step_time import make_batch, prepare
from prediction import record
from turns import Apart, compared, serve

from prompt_tuning_jax import launch, optimizers
from prompt_tuning_jax.training import methods, prefix_tuning

THREADS = 2
PACKAGES = ('jax', 'flax', 'numpy', 'torch', 'transformers', 'peft')
LEARNING_RATE = 1e-3
# {method: {run: what makes its step}}; of two runs the first is compared with the second.
METHODS = {'prompt_tuning': ('peft', 'ours'),
           'prefix_tuning': ('peft', 'ours', 'decoder_prefix')}
MIB = 2 ** 20


def our_step(method: str, run: str, flags: argparse.Namespace):
  """A function that takes one of our steps and waits for it."""
  config = dataclasses.replace(launch.network_named(flags.network),
                               dropout_rate=flags.dropout_rate, logits_via_embedding=False)
  if method == 'prompt_tuning':
    trained, prompt = methods.PromptTuning(flags.prompt_length), flags.prompt_length
  else:
    places = ('decoder',) if run == 'decoder_prefix' else None
    trained, prompt = prefix_tuning.PrefixTuning(flags.prompt_length, places, width=None), 0
  batch = make_batch(flags.batch_size, flags.input_length + prompt, flags.target_length, prompt,
                     config.vocab_size)
  return prepare(trained, optimizers.adamw(LEARNING_RATE), config, batch)


def peft_step(method: str, flags: argparse.Namespace):
  """The same of PEFT."""
  import peft
  import torch
  import transformers
  torch.set_num_threads(THREADS)
  shape = launch.network_named(flags.network)
  config = transformers.T5Config(
      vocab_size=shape.vocab_size, d_model=shape.emb_dim, d_kv=shape.head_dim, d_ff=shape.mlp_dim,
      num_layers=shape.num_encoder_layers, num_decoder_layers=shape.num_decoder_layers,
      num_heads=shape.num_heads, dropout_rate=flags.dropout_rate, feed_forward_proj='gated-gelu',
      tie_word_embeddings=False, decoder_start_token_id=0)
  network = transformers.AutoModelForSeq2SeqLM.from_config(
      config, attn_implementation=flags.torch_attention)
  common = {'task_type': 'SEQ_2_SEQ_LM', 'num_virtual_tokens': flags.prompt_length,
            'num_transformer_submodules': 1}
  if method == 'prompt_tuning':
    adapter = peft.PromptTuningConfig(**common)
  else:
    adapter = peft.PrefixTuningConfig(
        **common, num_layers=shape.num_decoder_layers, num_attention_heads=shape.num_heads,
        token_dim=shape.num_heads * shape.head_dim)
  model = peft.get_peft_model(network, adapter).train()
  trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
  optimizer = torch.optim.AdamW(trained, LEARNING_RATE)
  batch = make_batch(flags.batch_size, flags.input_length, flags.target_length, 0,
                     shape.vocab_size)
  inputs, labels = (torch.from_numpy(batch[name]).long()
                    for name in ('encoder_input_tokens', 'decoder_target_tokens'))

  def run():
    model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=labels).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)  # as `optimizers.adamw` does
    optimizer.step()
    optimizer.zero_grad()

  return run


def step(method: str, run: str, flags: argparse.Namespace):
  """One side's step."""
  return peft_step(method, flags) if run == 'peft' else our_step(method, run, flags)


def alone(method: str, run: str, flags: argparse.Namespace) -> list[str]:
  """The command of a process that makes this run alone."""
  settings = [f'--{name}={getattr(flags, name)}' for name in (
      'batch_size', 'input_length', 'prompt_length', 'target_length', 'dropout_rate',
      'torch_attention', 'devices')]
  return [__file__, f'--networks={flags.network}', f'--alone={run}', f'--methods={method}',
          *settings]


def times(method: str, flags: argparse.Namespace) -> dict:
  """Seconds of a step of each run and how many of ours fit into one of PEFT's."""
  with contextlib.ExitStack() as processes:
    runs = {name: processes.enter_context(Apart(*alone(method, name, flags), '--serve'))
            for name in METHODS[method]}
    taken = compared(runs, {f'{name}_speedup': ('peft', name) for name in runs if name != 'peft'},
                     flags.repeats, flags.settle)
  seconds = taken['seconds']
  seconds['examples_per_second'] = {name: flags.batch_size / median
                                    for name, median in seconds['medians'].items()}
  return taken


def memory(method: str, flags: argparse.Namespace) -> dict:
  """Bytes of each run in a process of its own, and ours as a share of PEFT's."""
  found = {run: peak_memory.of_process(*alone(method, run, flags)) for run in METHODS[method][:2]}
  return {'bytes': found, 'ratios': {kind: found['ours'][kind] / found['peft'][kind]
                                     for kind in found['ours']}}


def table(results: dict) -> str:
  """Markdown: a line for each method of each network."""
  lines = ['| network | method | PEFT s/step | ours s/step | speedup | quartiles | peak MiB PEFT '
           '| ours | ratio | steps alone |', '|---|---|---|---|---|---|---|---|---|---|']
  for network, by_method in results.items():
    for method, found in by_method.items():
      seconds, peak = found['time']['seconds'], found['memory']
      for run in METHODS[method][1:]:
        ratio = seconds['ratios'][f'{run}_speedup']
        cells = [network, method if run == 'ours' else run, f'{seconds["medians"]["peft"]:.3f}',
                 f'{seconds["medians"][run]:.3f}', f'{ratio["of_medians"]:.2f}',
                 f'{ratio["quartiles"][0]:.2f}-{ratio["quartiles"][2]:.2f}']
        cells += ['', '', '', ''] if run != 'ours' else [
            *(f'{peak["bytes"][side]["steps"] / MIB:.0f}' for side in ('peft', 'ours')),
            *(f'{peak["ratios"][kind]:.2f}' for kind in ('steps', 'steps_alone'))]
        lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def plot(results: dict, output: pathlib.Path):
  """Examples a second and peak memory, PEFT beside ours."""
  from matplotlib import figure
  groups = [(f'{network}\n{method}', found) for network, by_method in results.items()
            for method, found in by_method.items()]
  picture = figure.Figure(figsize=(9, 3.2), layout='constrained')
  speed, peak = picture.subplots(1, 2)
  sides = {'peft': 'PEFT (torch, eager)', 'ours': 'prompt_tuning_jax'}
  for i, (side, label) in enumerate(sides.items()):
    at = np.arange(len(groups)) + 0.38 * i
    rates = [found['time']['seconds']['examples_per_second'][side] for _, found in groups]
    peaks = [found['memory']['bytes'][side]['steps'] / MIB for _, found in groups]
    for axes, heights, form in ((speed, rates, '%.1f'), (peak, peaks, '%.0f')):
      axes.bar_label(axes.bar(at, heights, 0.36, label=label), fmt=form, fontsize=7)
  for axes, title in ((speed, 'examples a second'), (peak, 'peak memory, MiB')):
    axes.set_xticks(np.arange(len(groups)) + 0.19, [name for name, _ in groups], fontsize=6)
    axes.set_title(title, fontsize=9)
    axes.spines[['top', 'right']].set_visible(False)
  speed.legend(fontsize=7, frameon=False)
  picture.savefig(output, dpi=120)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--networks', nargs='+', default=['t5_1_1_small', 't5_1_1_base'])
  parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--input_length', type=int, default=128)
  parser.add_argument('--prompt_length', type=int, default=100)
  parser.add_argument('--target_length', type=int, default=8)
  parser.add_argument('--dropout_rate', type=float, default=0.1)
  parser.add_argument('--torch_attention', default='sdpa', choices=('sdpa', 'eager'),
                      help="transformers' implementation; sdpa is its default")
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--settle', type=int, default=2,
                      help='steps of the same side before one that is timed')
  parser.add_argument('--devices', type=int, default=THREADS,
                      help='virtual devices that ours splits a batch over')
  parser.add_argument('--alone', metavar='RUN', help='print the memory of this run alone')
  parser.add_argument('--serve', action='store_true', help='or take its turns (`turns.serve`)')
  parser.add_argument('--output', type=pathlib.Path, metavar='FILE.json')
  flags = parser.parse_args()
  # JAX makes a thread for each core that it may use.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-THREADS:])
  jax.config.update('jax_num_cpu_devices', flags.devices)
  if flags.alone:
    flags.network, = flags.networks
    method, = flags.methods
    make = functools.partial(step, method, flags.alone, flags)
    if flags.serve:
      serve(make)
    else:
      print(json.dumps(peak_memory.measured(make)))
    return
  settings = {name: value for name, value in vars(flags).items()
              if name not in ('networks', 'methods', 'alone', 'serve', 'output')}
  settings |= {'threads': THREADS, 'processor': platform.processor() or platform.machine(),
               'device': jax.devices()[0].device_kind,
               'glibc_tunables': os.environ.get('GLIBC_TUNABLES', ''),
               'versions': {name: importlib.metadata.version(name) for name in PACKAGES}}
  results = {}
  for network in flags.networks:
    flags.network = network
    for method in flags.methods:
      found = {'time': times(method, flags), 'memory': memory(method, flags)}
      results.setdefault(network, {})[method] = found
      if flags.output:
        record(flags.output, (network, method), {
            **found, 'settings': settings, 'load_average': os.getloadavg()[0]})
  print(table(results))
  if flags.output:
    plot(json.loads(flags.output.read_text('utf-8')), flags.output.with_suffix('.png'))


if __name__ == '__main__':
  main()

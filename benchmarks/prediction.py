"""Four comparisons of prediction: what takes turns is the same network on the same shapes.

  python benchmarks/prediction.py --only generation --networks mini

  mixed       a batch of 16 rows with 16 prompts against 16 rows with one prompt
  generation  greedy tokens per second against Hugging Face's `generate` with PEFT's prompt tuning;
              ours in float32, and with weights of eight bits (PEFT has no such for processors)
  rank        four labels of each input against the score of one label
  ensemble    5 prompts' answers to 1, 2, 4 examples in one batch against 5 runs, one a prompt

Weights are random, float32. In each comparison the runs take turns (A B A B …) in one process after
a warm-up; a ratio is given by that of the medians and by the quartiles of the ratios of the turns.
Times are those of a caller: they have the making of the batch in them. The processor's time stands
beside the clock's, which says little where others use the machine, and least with several threads
of torch: each of them waits for all at the end of every operation. Compare on a machine that does
nothing else, or with --threads=1. Writes --output, where other comparisons, and those of other
--threads and networks, stay as they are.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from turns import compared

from prompt_tuning_jax import launch, param_paths, prompted_model
from prompt_tuning_jax.checkpoints import base_checkpoint, peft_adapter
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.checkpoints.prompt_file import EMBEDDING, PromptFile
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.networks import int8
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.prompted_model import PromptedModel

ROWS = 16
LABEL_LENGTHS = (3, 2, 3, 2)  # tokens, the end-of-sequence id among them
TARGET_LENGTH = 8
NEVER = -1  # an end-of-sequence id that no token has, so that every text is as long as it may be
PACKAGES = ('jax', 'flax', 'numpy', 'torch', 'transformers', 'peft')



class Bench:
  """A network with random weights, and what is run on it."""

  def __init__(self, network: str, flags: argparse.Namespace):
    config = launch.network_named(network)
    self.model, self.flags = PromptedModel(config.network()), flags
    token = jnp.ones((1, 1), jnp.int32)
    params = jax.jit(config.network().init)(jax.random.key(0), token, token, token)['params']
    self.base = Base(network, config, params, None, '')
    self.rng = np.random.default_rng(0)
    jit = lambda function, *static: jax.jit(functools.partial(function, self.model),
                                            static_argnames=static)
    self._log_likelihood = jit(prompted_model.log_likelihood)
    self._generate = jit(prompted_model.generate, 'max_length')
    self._rank = jit(prompted_model.candidate_log_likelihoods, 'most')

  def texts(self, count: int, length: int) -> list[np.ndarray]:
    """Random ids, none of which is special."""
    return list(self.rng.integers(3, self.base.config.vocab_size, (count, length), np.int32))

  def prompts(self, count: int) -> PromptBank:
    """A bank of soft prompts '0', '1', …"""
    shape = (self.flags.prompt_length, self.base.config.emb_dim)
    return PromptBank(self.base, {str(i): PromptFile({
        EMBEDDING: self.rng.normal(size=shape).astype(np.float32)}) for i in range(count)})

  def prefixes(self, count: int) -> PromptBank:
    """A bank of prefixes '0', '1', … of every attention."""
    config = self.base.config
    leaf = lambda layers: self.rng.normal(size=(
        layers, 2, self.flags.prefix_length, config.num_heads, config.head_dim)).astype(np.float32)
    return PromptBank(self.base, {str(i): PromptFile({
        f'prefix/{place}': leaf(layers) for place, layers in config.attentions.items()})
                                  for i in range(count)})

  def _batch(self, bank: PromptBank, names, inputs, targets):
    slots = [bank.slot(name) for name in names]
    batch = batches.batch_of(inputs, targets, [slot.virtual for slot in slots])
    return batch, bank.added(slots)

  def score(self, bank: PromptBank, names, inputs, targets) -> np.ndarray:
    """log p(target | input): [B]."""
    batch, added = self._batch(bank, names, inputs, targets)
    return np.asarray(self._log_likelihood(self.base.params, batch, added=added))

  def generate(self, bank: PromptBank, names, inputs, params=None) -> np.ndarray:
    """[B, new_tokens] ids, of other parameters than the base's if they are given."""
    batch, added = self._batch(bank, names, inputs, [[1]] * len(inputs))
    params = self.base.params if params is None else params
    return np.asarray(self._generate(params, batch['encoder_input_tokens'],
                                     max_length=self.flags.new_tokens, eos_id=NEVER,
                                     added=added)[0])

  def rank(self, bank: PromptBank, names, inputs, labels) -> np.ndarray:
    """log p(label | input) of the same labels for each input: [B, C]."""
    batch, added = self._batch(bank, names, inputs, [[1]] * len(inputs))
    width = batches.round_up(sum(map(len, labels)), batches.Buckets().targets)
    packed = batches.side_by_side([labels] * len(inputs), width)
    return np.asarray(self._rank(self.base.params, batch['encoder_input_tokens'],
                                 packed['candidates'], packed['segments'], most=len(labels),
                                 added=added))


def mixed(bench: Bench) -> dict:
  """16 prompts in a batch against one: of the same bank, and of a bank that has no other."""
  flags, results = bench.flags, {}
  inputs, targets = bench.texts(ROWS, flags.input_length), bench.texts(ROWS, TARGET_LENGTH)
  names = [str(i) for i in range(ROWS)]
  for kind, make in (('prompts', bench.prompts), ('prefixes', bench.prefixes)):
    many, one = make(ROWS), make(1)
    cases = {'16_different': (many, names), '16_of_one': (many, ['0'] * ROWS),
             'bank_of_one': (one, ['0'] * ROWS)}
    calls = {'score': lambda *case: bench.score(*case, inputs, targets),
             'generate': lambda *case: bench.generate(*case, inputs)}
    for verb, call in calls.items():
      runs = {name: functools.partial(call, *case) for name, case in cases.items()}
      results[f'{verb}_{kind}'] = compared(runs, {
          'different_to_one': ('16_different', '16_of_one'),
          'different_to_bank_of_one': ('16_different', 'bank_of_one')}, flags.repeats)
  return results


def generation(bench: Bench) -> dict:
  """Greedy decoding against Hugging Face and PEFT, which have to give the same tokens."""
  flags, results = bench.flags, {}
  bank = bench.prompts(1)
  theirs = _hugging_face(bench.base, bank.files['0'])
  small = _in_eight_bits(bench.base.params)
  for rows in flags.generation_rows:
    inputs = bench.texts(rows, flags.generation_input_length)
    ours = functools.partial(bench.generate, bank, ['0'] * len(inputs), inputs)
    runs = {'hugging_face': functools.partial(theirs, inputs, flags.new_tokens), 'ours': ours,
            'ours_int8': functools.partial(ours, small)}
    tokens = {name: run() for name, run in runs.items()}
    if not np.array_equal(tokens['hugging_face'], tokens['ours']):
      raise SystemExit(f'The tokens differ: {tokens}')
    result = compared(runs, {'speedup': ('hugging_face', 'ours'),
                             'int8_speedup': ('hugging_face', 'ours_int8')}, flags.repeats)
    result['tokens_per_second'] = {name: rows * flags.new_tokens / seconds
                                   for name, seconds in result['seconds']['medians'].items()}
    results[f'{rows}_rows'] = result
  return results


def _in_eight_bits(params):
  """The parameters as `--parameter_dtype=int8` loads them."""
  return param_paths.unflatten({
      path: int8.quantized(leaf, int8.is_kernel(path)) if int8.is_small(path) else leaf
      for path, leaf in param_paths.flatten(params).items()})


def _hugging_face(base: Base, prompt: PromptFile) -> Callable[[list, int], np.ndarray]:
  """(inputs, new tokens) -> [B, new tokens] of the same weights and prompt in PEFT."""
  import peft
  import torch
  import transformers
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  with tempfile.TemporaryDirectory() as folder:
    base_checkpoint.write(f'{folder}/base', base.config, base.params)
    peft_adapter.write(pathlib.Path(folder) / 'prompt', prompt, None, False)
    network = transformers.T5ForConditionalGeneration.from_pretrained(f'{folder}/base')
    model = peft.PeftModel.from_pretrained(network, f'{folder}/prompt').eval()
  network.generation_config.eos_token_id = None  # as NEVER

  def run(inputs, new_tokens):
    ids = torch.from_numpy(np.stack(inputs)).long()
    with torch.inference_mode():
      made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            max_new_tokens=new_tokens, pad_token_id=0)
    return made[:, 1:].numpy()

  return run


def rank(bench: Bench) -> dict:
  """Four labels against one. The scores of the first label are the same."""
  flags, bank, names = bench.flags, bench.prompts(1), ['0'] * ROWS
  inputs = bench.texts(ROWS, flags.input_length)
  labels = [bench.texts(1, length)[0] for length in LABEL_LENGTHS]
  runs = {'four_labels': lambda: bench.rank(bank, names, inputs, labels),
          'one_label': lambda: bench.score(bank, names, inputs, [labels[0]] * ROWS)}
  np.testing.assert_allclose(runs['four_labels']()[:, 0], runs['one_label'](), rtol=1e-4)
  return {'score': compared(runs, {'four_to_one': ('four_labels', 'one_label')}, flags.repeats)}


def ensemble(bench: Bench) -> dict:
  """5 prompts together against one after another, for labels and for generated texts."""
  flags, results = bench.flags, {}
  bank = bench.prompts(flags.members)
  labels = [bench.texts(1, length)[0] for length in LABEL_LENGTHS[:2]]
  calls = {'rank': lambda *batch: bench.rank(bank, *batch, labels),
           'generate': lambda *batch: bench.generate(bank, *batch)}
  for length in flags.ensemble_input_lengths:
    for count in flags.ensemble_examples:
      inputs = bench.texts(count, length)
      for verb, call in calls.items():
        apart = functools.partial(_apart, call, list(bank.files), inputs)
        together = functools.partial(
            call, [name for name in bank.files for _ in inputs], inputs * len(bank.files))
        np.testing.assert_allclose(np.concatenate(apart()), together(), rtol=1e-4)
        results[f'{verb}_{count}_of_{length}_tokens'] = compared(
            {'apart': apart, 'together': together}, {'speedup': ('apart', 'together')},
            flags.repeats)
  return results


def _apart(call, names: list[str], inputs: list[np.ndarray]) -> list[np.ndarray]:
  return [call([name] * len(inputs), inputs) for name in names]


COMPARISONS = {'mixed': mixed, 'generation': generation, 'rank': rank, 'ensemble': ensemble}


def record(output: pathlib.Path, place: tuple[str, ...], entry: dict) -> None:
  """Puts an entry in its place in a file, and leaves the others as they are."""
  written = json.loads(output.read_text('utf-8')) if output.exists() else {}
  inner = written
  for name in place[:-1]:
    inner = inner.setdefault(name, {})
  inner[place[-1]] = entry
  output.write_text(json.dumps(written, indent=1) + '\n', encoding='utf-8')


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', nargs='+', choices=COMPARISONS, default=list(COMPARISONS))
  parser.add_argument('--networks', nargs='+', default=['t5_1_1_small', 'mini'])
  parser.add_argument('--input_length', type=int, default=128)
  parser.add_argument('--prompt_length', type=int, default=100)
  parser.add_argument('--prefix_length', type=int, default=10)
  parser.add_argument('--new_tokens', type=int, default=32)
  parser.add_argument('--generation_rows', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--generation_input_length', type=int, default=64)
  parser.add_argument('--members', type=int, default=5)
  parser.add_argument('--ensemble_examples', type=int, nargs='+', default=[1, 2, 4])
  parser.add_argument('--ensemble_input_lengths', type=int, nargs='+', default=[16, 128])
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--threads', type=int, default=len(os.sched_getaffinity(0)),
                      help='cores of JAX and torch alike (default: all)')
  parser.add_argument('--output', type=pathlib.Path, metavar='FILE.json')
  flags = parser.parse_args()
  # JAX makes a thread for each core that it may use.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-flags.threads:])
  settings = {name: value for name, value in vars(flags).items()
              if name not in ('only', 'networks', 'output')}
  settings |= {'processor': platform.machine(), 'device': jax.devices()[0].device_kind,
               'versions': {name: importlib.metadata.version(name) for name in PACKAGES}}
  for only in flags.only:
    for network in flags.networks:
      found = COMPARISONS[only](Bench(network, flags))
      print(json.dumps({only: {network: found}}), flush=True)
      if flags.output:
        record(flags.output, (only, f'{flags.threads}_threads', network), {
            'settings': settings, 'load_average': os.getloadavg()[0], 'results': found})


if __name__ == '__main__':
  main()

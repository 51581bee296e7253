"""Prompt tuning of SST-2 from its texts to its accuracy, against PEFT with transformers' Trainer.

  TFDS_DATA_DIR=… python benchmarks/end_to_end.py --vocabulary=spiece.model

All sides stand in one process and take turns (A B C D A B …) on the same rows, in float32, with the
same random weights of an untied T5, the same vocabulary, length of prompt, batch size, dropout and
optimizer (Adafactor). Ours splits a batch over --devices virtual devices, which share one copy of
the base. A turn tokenises, trains an epoch and evaluates:

  ours        the token cache, batches in buckets, prefetch, the training step; evaluation by
              ranking the labels, as `train` does unless told otherwise
  peft        PEFT's prompt tuning in Seq2SeqTrainer; DataCollatorForSeq2Seq pads each batch to
              its longest text; evaluation by generating at most as many tokens as the longest
              label has, the usual way there
  ours_fixed  ours with batching/fixed.gin: training batches padded to 512 tokens, --fixed_rows
  peft_fixed  PEFT's with padding='max_length', training and evaluation, as many rows

Both evaluations measure the accuracy of labels. Ranking reads the labels without generating them;
`generating_rows_per_second` is ours when it generates as PEFT does. Before any timing the sides are
checked to do the same work: equal tokens, and equal losses without dropout. The first turn, in
which XLA compiles each width of batch once, does not count (`compilation_seconds`, of ours). A
ratio is that of rows a second, by the medians of turns, by the clock and by the processor's time,
which says more where others use the machine. Tokenising begins with an empty token cache;
`warm_seconds` is with a full one. Writes --output and a plot.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
from end_to_end_sides import FILES, Ours, Peft
from turns import CLOCKS, timed

from prompt_tuning_jax import launch
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training.run import load_base

SIDES = ('ours', 'peft', 'ours_fixed', 'peft_fixed')
PACKAGES = ('jax', 'flax', 'numpy', 'torch', 'transformers', 'peft')
# Reads TFDS in a process of its own: TensorFlow's threads and memory stay out of the comparison.
READ = """
import json, sys
import tensorflow_datasets as tfds
folder, *parts = sys.argv[1:]
for part in parts:
  split, file, count = part.split(':')
  with open(f'{folder}/{file}', 'w', encoding='utf-8') as rows:
    part = tfds.load('glue/sst2:2.0.0', split=f'{split}[:{count}]', download=False)
    for row in tfds.as_numpy(part):
      text, label = row['sentence'].decode(), ('negative', 'positive')[row['label']]
      rows.write(json.dumps({'text': text, 'label': label}) + '\\n')
"""

Part = Callable[[], object]


def read_rows(folder: pathlib.Path, count: int, eval_count: int) -> None:
  """Writes the first rows of both splits as files of ours."""
  subprocess.run([sys.executable, '-c', READ, str(folder), f'train:{FILES["train"]}:{count}',
                  f'validation:{FILES["validation"]}:{eval_count}'], check=True)


def check_same_work(ours: Ours, theirs: Peft) -> dict[str, float]:
  """Raises SystemExit where tokens or losses differ; the losses."""
  for split in FILES:
    if ours.ids(split) != theirs.ids(split):
      raise SystemExit(f'The sides have different tokens of {split}.')
  losses = {'ours': ours.loss(), 'peft': theirs.loss()}
  if not np.isclose(*losses.values(), rtol=1e-3):
    raise SystemExit(f'The sides have different losses: {losses}')
  return losses


def take_turns(sides: dict[str, dict[str, Part]], turns: int) -> Iterator[dict]:
  """{side: {part: {clock: [seconds, …]}}} after each turn but the first."""
  taken = {name: {part: {clock: [] for clock in CLOCKS} for part in parts}
           for name, parts in sides.items()}
  for turn in range(turns + 1):
    for name, parts in sides.items():
      for part, run in parts.items():
        for clock, seconds in timed(run).items():
          taken[name][part][clock].append(seconds)
      whole = {clock: round(sum(taken[name][part][clock][-1] for part in parts), 1)
               for clock in CLOCKS}
      print(f'turn {turn}, {name}: {whole}', file=sys.stderr, flush=True)
    if turn:
      yield taken


def summary(taken: dict, rows: dict[str, dict[str, int]]) -> dict:
  """Medians, rows a second of each part, and how many times as fast ours is.

  `whole` is of as many rows of both splits as ours has, whatever a side has taken.
  """
  result = {}
  for clock in CLOCKS:
    medians = {name: {part: statistics.median(times[clock][1:]) for part, times in parts.items()}
               for name, parts in taken.items()}
    rates = {}
    for name, parts in medians.items():
      own, wanted = rows[name], rows['ours']
      count = sum(wanted.values())
      whole = (parts['tokenise'] * count / sum(own.values())
               + parts['train'] * wanted['train'] / own['train']
               + parts['evaluate'] * wanted['validation'] / own['validation'])
      rates[name] = {'train': own['train'] / parts['train'],
                     'evaluate': own['validation'] / parts['evaluate'], 'whole': count / whole}
    ratios = {name: {part: rates['ours'][part] / rate for part, rate in parts.items()}
              for name, parts in rates.items() if name != 'ours'}
    result[clock] = {'medians': medians, 'rows_per_second': rates, 'ours_to': ratios}
  first = {part: times['seconds'][0] for part, times in taken['ours'].items()}
  later = result['seconds']['medians']['ours']
  result['compilation_seconds'] = sum(first[part] - later[part] for part in ('train', 'evaluate'))
  return result


def table(result: dict) -> str:
  """Markdown: a line for each side."""
  lines = ['| side | tokenise s | training rows/s | evaluated rows/s | whole rows/s | ours is so '
           'many times as fast: training | evaluation | whole | whole, by the processor |',
           '|' + '---|' * 9]
  seconds, processor = result['seconds'], result['processor_seconds']
  for name, rates in seconds['rows_per_second'].items():
    ratios = seconds['ours_to'].get(name)
    cells = [name, f'{seconds["medians"][name]["tokenise"]:.2f}',
             *(f'{rates[part]:.1f}' for part in ('train', 'evaluate', 'whole')),
             *(f'{ratios[part]:.2f}' if ratios else '' for part in ('train', 'evaluate', 'whole')),
             f'{processor["ours_to"][name]["whole"]:.2f}' if ratios else '']
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def plot(result: dict, output: pathlib.Path) -> None:
  """Rows a second of each part and side."""
  from matplotlib import figure
  rates = result['seconds']['rows_per_second']
  picture = figure.Figure(figsize=(9, 3), layout='constrained')
  axes = picture.subplots(1, 3)
  for axis, part in zip(axes, ('train', 'evaluate', 'whole'), strict=True):
    bars = axis.bar(list(rates), [rate[part] for rate in rates.values()],
                    color=['C1' if 'peft' in name else 'C0' for name in rates])
    axis.bar_label(bars, fmt='%.1f', fontsize=7)
    axis.set_title(f'{part}: rows a second', fontsize=9)
    axis.tick_params(labelsize=7)
    axis.spines[['top', 'right']].set_visible(False)
  picture.savefig(output, dpi=120)


def measure(flags: argparse.Namespace, folder: pathlib.Path) -> Iterator[dict]:
  """What is known after each turn."""
  (folder / 'few').mkdir()
  read_rows(folder, flags.rows, flags.eval_rows)
  read_rows(folder / 'few', flags.fixed_rows, flags.fixed_rows)
  random = base_checkpoint.random_base(launch.network_named(flags.network), flags.vocabulary)
  base_folder = folder / 'base'
  base_checkpoint.write(base_folder, random.config, random.params, vocabulary=random.vocabulary)
  del random
  base = load_base(str(base_folder))
  prompt = np.asarray(base.embedding[:flags.prompt_length], np.float32)
  words = Vocabulary.of_base(base)
  flags.label_tokens = 1 + max(len(words.encode(label)) for label in ('negative', 'positive'))
  ours, theirs = Ours(base, prompt, folder, flags), Peft(base_folder, prompt, folder, flags)
  losses = check_same_work(ours, theirs)
  few = (prompt, folder / 'few', flags, True)
  make = {'ours': lambda: ours, 'ours_fixed': lambda: Ours(base, *few),
          'peft': lambda: theirs, 'peft_fixed': lambda: Peft(base_folder, *few)}
  made = {name: make[name]() for name in flags.sides}
  sides = {name: {part: getattr(side, part) for part in ('tokenise', 'train', 'evaluate')}
           for name, side in made.items()}
  sides['ours'] |= {'warm': functools.partial(ours.tokenise, warm=True),
                    'generating': functools.partial(ours.evaluate, rank_labels=False)}
  rows = {name: {'train': flags.fixed_rows if 'fixed' in name else flags.rows,
                 'validation': flags.fixed_rows if 'fixed' in name else flags.eval_rows}
          for name in made}
  for taken in take_turns(sides, flags.turns):
    median = lambda part, of=taken['ours']: statistics.median(of[part]['seconds'][1:])
    yield {**summary(taken, rows), 'losses_of_the_first_batch': losses, 'rows': rows,
           'warm_seconds': median('warm'),
           'generating_rows_per_second': flags.eval_rows / median('generating'),
           'mean_tokens': float(np.mean(ours.caches['train'].input_lengths)), 'all': taken}


def main():
  assets = os.environ.get('PROMPT_TUNING_TEST_ASSETS', '')
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--vocabulary', metavar='FILE', required=not assets,
                      default=f'{assets}/prompt_tuning/test_data/t5_vocab',
                      help='a SentencePiece file of 32,000 pieces '
                      '(default: in $PROMPT_TUNING_TEST_ASSETS)')
  parser.add_argument('--network', default='t5_1_1_small')
  parser.add_argument('--rows', type=int, default=256, help='training rows')
  parser.add_argument('--eval_rows', type=int, default=128)
  parser.add_argument('--fixed_rows', type=int, default=16, help='of each, padded to 512 tokens')
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--prompt_length', type=int, default=100)
  parser.add_argument('--turns', type=int, default=5)
  parser.add_argument('--sides', nargs='+', choices=SIDES, default=list(SIDES),
                      help='ours and others (default: all)')
  parser.add_argument('--threads', type=int, default=2,
                      help='cores of JAX and torch alike; with 1, torch does not wait in circles')
  parser.add_argument('--devices', type=int, metavar='N',
                      help='virtual devices that ours splits a batch over (default: --threads)')
  parser.add_argument('--output', type=pathlib.Path, metavar='FILE.json')
  flags = parser.parse_args()
  flags.sides = [side for side in SIDES if side in ('ours', *flags.sides)]
  if flags.turns < 1 or min(flags.rows, flags.fixed_rows) < flags.batch_size:
    parser.error('a turn needs --rows and --fixed_rows of a batch at least, and --turns of 1')
  if flags.eval_rows % flags.batch_size or flags.fixed_rows % flags.batch_size:
    parser.error('--eval_rows and --fixed_rows must be whole batches: Trainer drops what is left')
  flags.devices = flags.devices or flags.threads
  if flags.batch_size % flags.devices:
    parser.error('--devices must divide --batch_size')
  # JAX makes a thread for each core that it may use.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-flags.threads:])
  jax.config.update('jax_num_cpu_devices', flags.devices)
  settings = {name: value for name, value in vars(flags).items()
              if name not in ('output', 'vocabulary')}
  settings |= {'processor': platform.machine(),
               'device': jax.devices()[0].device_kind, 'load_average': os.getloadavg()[0],
               'versions': {name: importlib.metadata.version(name) for name in PACKAGES}}
  with tempfile.TemporaryDirectory() as folder:
    for result in measure(flags, pathlib.Path(folder)):
      result = {'settings': settings, **result}
      if flags.output:
        flags.output.write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
  print(table(result))
  if flags.output:
    plot(result, flags.output.with_suffix('.png'))


if __name__ == '__main__':
  main()

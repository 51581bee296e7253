"""Looks into a prompt: `python -m prompt_tuning_jax.inspect --prompt=… --base=… --output=…`."""

import sys

from prompt_tuning_jax import launch, verb

ABOUT = ('Writes a report of a trained prompt, one HTML file that needs nothing else: the words '
         'that its tokens lie nearest to, their sizes, principal components and, if asked for, '
         'other prompts and the attention that it receives (Lester et al. 2021, section 7). Of '
         'other methods it has what applies.')


def parser():
  """The flags of this verb."""
  made = verb.bare_parser('inspect', ABOUT)
  add = made.add_argument
  add('--prompt', required=True, type=verb.path, metavar='FILE',
      help='a prompt file, .npy or PEFT folder')
  add('--output', type=verb.path, metavar='FILE.html', help='where the report goes')
  add('--json', action='store_true', help='print all numbers of the report as JSON')
  add('--base', metavar='NAME_OR_FOLDER',
      help='a bundled base (mini), or a T5X or Hugging Face folder: for words and attention')
  add('--prompts', nargs='+', default=[], type=verb.path, metavar='PROMPT_OR_FOLDER',
      help='to compare with: of other tasks or seeds')
  add('--nearest', type=int, default=5, metavar='N', help='nearest words of a token (default 5)')
  add('--input', type=verb.path, metavar='FILE.jsonl',
      help='examples to measure attention on: "inputs", and "targets" (or what the model writes)')
  add('--text', nargs='+', default=[], metavar='TEXT', help='the same for inputs given here')
  add('--num_examples', type=int, default=32, metavar='N',
      help='how many rows of --input are taken (default 32)')
  add('--batch_size', type=int, default=8, metavar='N')
  add('--max_input_length', type=int, default=512, metavar='TOKENS')
  add('--max_decode_length', type=int, default=64, metavar='TOKENS')
  add('--network', metavar='NAME', help='such as t5_1_1_base, for a T5X folder')
  add('--vocabulary', type=verb.path, metavar='FILE',
      help="the base's SentencePiece file, tokenizer.json or vocab.txt, if not beside it")
  return made


def check(flags) -> None:
  """Raises ValueError for flags that cannot be."""
  if not flags.output and not flags.json:
    raise ValueError('Name the report with --output=FILE.html, or print its numbers with --json.')
  if flags.output and not flags.output.endswith('.html'):
    raise ValueError(f'--output should end in .html, got {flags.output}.')
  if (flags.input or flags.text) and not flags.base:
    raise ValueError('Attention is measured in the base: add --base.')
  if (flags.network or flags.vocabulary) and not flags.base:
    raise ValueError('--network and --vocabulary belong to a base: add --base.')
  for name in ('nearest', 'num_examples', 'batch_size', 'max_input_length', 'max_decode_length'):
    if getattr(flags, name) < 1:
      raise ValueError(f'--{name} must be at least 1, got {getattr(flags, name)}.')
  verb.check_files([flags.input] if flags.input else [], flags.output)


def look(flags) -> dict:
  """The findings (`analysis.findings`) that flags ask for."""
  from prompt_tuning_jax import param_paths, prompted_base
  from prompt_tuning_jax.analysis import findings
  if not flags.base:
    return findings.of_file(flags.prompt, flags.prompts, count=flags.nearest)
  network = launch.network_named(flags.network) if flags.network else None
  prompted = prompted_base.load(
      flags.base, flags.prompt, network=network, vocabulary_file=flags.vocabulary,
      batch_size=flags.batch_size, max_decode_length=flags.max_decode_length)
  leaves = param_paths.flatten(prompted.untuned)
  table = leaves[prompted.model.network.config.embedding][:prompted.vocabulary.size]
  found = findings.of_file(flags.prompt, flags.prompts, table=table, vocabulary=prompted.vocabulary,
                           count=flags.nearest, base=leaves)
  if flags.input or flags.text:
    found['attention'] = attention(flags, prompted)
  if not found.get('attention'):
    found['notes'].append(
        'Attention: no position of this file can receive any.' if flags.input or flags.text else
        'Attention: it needs examples (--input or --text).')
  return found


def attention(flags, prompted) -> dict | None:
  """The attention that the prompt receives in examples; None if it has no positions."""
  import functools
  import itertools

  import jax

  from prompt_tuning_jax import jsonl, predictor
  from prompt_tuning_jax.analysis import attention_mass, findings
  from prompt_tuning_jax.data import batches
  rows = [('--text', {'inputs': text}) for text in flags.text]
  if flags.input:
    rows += itertools.islice(jsonl.rows(flags.input), flags.num_examples)
  if not rows:
    raise ValueError(f'{flags.input} has no rows.')
  params, length = prompted.params, prompted.virtual.length if prompted.virtual else 0
  inputs = [prompted.tokens(place, row, 'input', flags.max_input_length) for place, row in rows]
  if not all('targets' in row or 'target_tokens' in row for _, row in rows):
    answers = prompted.predictor.generate(params, inputs)
    rows = [(place, {'targets': answer} if 'targets' not in row and 'target_tokens' not in row
             else row) for (place, row), answer in zip(rows, answers, strict=True)]
  targets = [prompted.tokens(place, row, 'target', flags.max_decode_length) for place, row in rows]
  config = prompted.model.network.config
  predictor.check_positions(config, [length + len(ids) for ids in inputs], list(map(len, targets)))
  predictor.check_masks(config, inputs, map(len, targets))
  measure = jax.jit(functools.partial(attention_mass.of_batch, prompted.model, length))
  masses = [measure(params, batches.batch_of(inputs[i:i + flags.batch_size],
                                             targets[i:i + flags.batch_size], prompted.virtual))
            for i in range(0, len(rows), flags.batch_size)]
  total = attention_mass.total(masses)
  return findings.attention(total, len(rows)) if total else None


def inspect(flags) -> None:
  """Writes and prints what flags ask for."""
  import json

  from prompt_tuning_jax.analysis import html_report
  found = look(flags)
  if flags.json:
    print(json.dumps(found, ensure_ascii=False, indent=1))
  if flags.output:
    html_report.write(flags.output, found)
    print(f'the report is in {flags.output}', file=sys.stderr)


def main(argv: list[str]) -> int:
  """Returns the exit status."""
  flags = parser().parse_args(argv)
  launch.set_up_process()

  def work() -> None:
    check(flags)
    inspect(flags)

  return verb.exit_status(work)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

"""Steering: how well vectors recover sentences, by their number and the sentences' length.

  python benchmarks/recovery.py --input=sentences.jsonl --output=benchmarks/recovery.json

The sentences are the "inputs" of the rows (or "targets", where there are none), as many of each
length in pieces as there are, up to --of_each. Exact match and BLEU are of what the base writes
greedily from the vectors, token accuracy is teacher-forced.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import numpy as np

from prompt_tuning_jax import jsonl, prompted_base
from prompt_tuning_jax.steering import Settings, Steerer
from prompt_tuning_jax.tasks.text_metrics import bleu


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--base', default='mini')
  add('--input', required=True)
  add('--lengths', type=int, nargs='+', default=[8, 12, 16], help='pieces of a sentence')
  add('--vectors', type=int, nargs='+', default=[1, 4, 16])
  add('--of_each', type=int, default=8, help='sentences of a length')
  add('--steps', type=int, default=500)
  add('--learning_rate', type=float, default=4.0)
  add('--output', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  prompted = prompted_base.load(flags.base, prompts={})
  words = prompted.vocabulary
  table = dataclasses.replace(prompted.bank.base, params=prompted.untuned).embedding
  texts = [row.get('inputs') or row['targets'] for _, row in jsonl.rows(flags.input)]
  encoded = [ids for ids in words.encode_many(texts) if words.unk_id not in ids]
  results = []
  for vectors in flags.vectors:
    settings = Settings(vectors, flags.steps, flags.learning_rate)
    for length in flags.lengths:
      steerer = Steerer(prompted.model, prompted.params, words, settings, flags.of_each, length + 1)
      chosen = [ids for ids in encoded if len(ids) == length][:flags.of_each]
      targets = [[*ids, words.eos_id] for ids in chosen]
      began = time.perf_counter()
      found = steerer(table, [[words.eos_id]] * len(targets), targets)
      seconds = time.perf_counter() - began
      written = [words.decode(ids) for ids in found.tokens]
      exact = [ids[:len(target)].tolist() == target
               for ids, target in zip(found.tokens, targets, strict=True)]
      results.append({
          'vectors': vectors, 'length': length, 'sentences': len(targets),
          'exact_match': 100 * float(np.mean(exact)),
          'token_accuracy': 100 * float(found.accuracy.mean()),
          **bleu([[words.decode(ids)] for ids in chosen], written),
          'loss': float(found.loss.mean()), 'seconds': seconds})
      print(json.dumps(results[-1]), flush=True)
  flags.output.write_text(json.dumps({
      'base': flags.base, 'steps': flags.steps, 'learning_rate': flags.learning_rate,
      'results': results}, indent=1) + '\n')


if __name__ == '__main__':
  main()

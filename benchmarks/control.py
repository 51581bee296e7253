"""Controlled generation: how much of an attribute it gives, and what that costs in perplexity.

  python benchmarks/control.py --base=mini --examples=sentences.jsonl --label=novel \
    --attribute=novels.safetensors --against=wiki.safetensors --output=benchmarks/control.json

Texts are continuations of the beginnings of held-out sentences (the last rows of --examples, whose
"targets" are two labels). Whether a text is of --label says naive Bayes over pieces, trained on the
other rows, which knows nothing of the base; its own accuracy on the held-out sentences is printed.
Perplexity is of the text under the base alone. Weighted decoding takes the two prompts; PPLM the
words that tell the label best, by the same classifier.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import numpy as np

from prompt_tuning_jax import jsonl, prompted_base
from prompt_tuning_jax.controlled import Perturbed, Weighted
from prompt_tuning_jax.predictor import DecodingSettings


@dataclasses.dataclass(frozen=True)
class NaiveBayes:
  """log p(piece | label) - log p(piece | not label): [V], each piece counted once a text."""

  ratio: np.ndarray
  counts: np.ndarray

  @classmethod
  def trained(cls, texts: list[list[int]], is_label: list[bool], size: int) -> 'NaiveBayes':
    seen = np.ones((2, size))
    for ids, label in zip(texts, is_label, strict=True):
      seen[int(label), sorted(set(ids))] += 1
    log_p = np.log(seen / seen.sum(axis=1, keepdims=True))
    return cls(log_p[1] - log_p[0], seen.sum(axis=0))

  def __call__(self, ids: list[int]) -> bool:
    return float(self.ratio[sorted(set(ids))].sum()) > 0

  def bag(self, count: int, words: list[int]) -> tuple[int, ...]:
    """The words that say most: how much, times how often."""
    weight = self.ratio * self.counts
    return tuple(sorted(words, key=lambda word: -weight[word])[:count])


def measure(prompted, inputs, names, control, judge, decoding) -> dict:
  """Samples a text for each input and measures them."""
  words, predictor = prompted.vocabulary, prompted.predictor
  slots = [prompted.bank.slot(None)] * len(inputs)
  began = time.perf_counter()
  found = predictor.generate_with(prompted.params, inputs, decoding, slots, control=control)
  seconds = time.perf_counter() - began
  texts = [words.encode(row[0].text) for row in found]
  targets = [[*ids, words.eos_id] if not ids else ids for ids in texts]
  log_p = predictor.score(prompted.params, inputs, targets, slots)
  pieces = sum(map(len, targets))
  return {**names, 'attribute': 100 * float(np.mean([judge(ids) for ids in texts])),
          'perplexity': float(np.exp(-np.sum(log_p) / pieces)), 'pieces': pieces / len(texts),
          'seconds': seconds, 'text': found[0][0].text}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  add = parser.add_argument
  add('--base', default='mini')
  for name in ('attribute', 'against', 'examples', 'label'):
    add(f'--{name}', required=True)
  add('--texts', type=int, default=64, help='continued (the last rows of --examples)')
  add('--begin', type=int, default=6, help='pieces of a sentence that are given')
  add('--length', type=int, default=24, help='pieces of a text, at most')
  add('--weights', type=float, nargs='*', default=[0.0, 0.5, 1.0, 2.0, 4.0])
  add('--step_sizes', type=float, nargs='*', default=[0.02, 0.1, 0.3])
  add('--bag', type=int, default=20, help='words of PPLM')
  add('--output', type=pathlib.Path, required=True)
  flags = parser.parse_args()
  prompts = {'attribute': flags.attribute, 'against': flags.against}
  prompted = prompted_base.load(flags.base, prompts=prompts, batch_size=flags.texts,
                                max_decode_length=flags.length)
  from prompt_tuning_jax.training.discrete_prompt import words
  rows = [row for _, row in jsonl.rows(flags.examples)]
  ids = [prompted.vocabulary.encode(row['inputs']) for row in rows]
  is_label = [row['targets'] == flags.label for row in rows]
  trained = len(rows) - flags.texts
  judge = NaiveBayes.trained(ids[:trained], is_label[:trained], prompted.vocabulary.size)
  right = np.mean([judge(each) == label for each, label in zip(
      ids[trained:], is_label[trained:], strict=True)])
  print(f'the classifier is right about {100 * right:.1f} % of {flags.texts} held-out sentences')
  inputs = [each[:flags.begin] + [prompted.vocabulary.eos_id] for each in ids[trained:]]
  bag = judge.bag(flags.bag, words(prompted.vocabulary).tolist())
  print('the bag:', ' '.join(prompted.vocabulary.piece(word) for word in bag))
  slot = prompted.bank.slot
  ways = [({'way': 'weighted', 'strength': weight},
           Weighted(slot('attribute'), weight, slot('against'))) for weight in flags.weights]
  ways += [({'way': 'pplm', 'strength': size}, Perturbed(bag, size)) for size in flags.step_sizes]
  decoding, results = DecodingSettings(temperature=1.0, top_p=0.9), []
  for names, control in ways:
    results.append(measure(prompted, inputs, names, control, judge, decoding))
    shown = results[-1]
    print(f'{shown["way"]:9} {shown["strength"]:5} attribute {shown["attribute"]:5.1f} %  '
          f'perplexity {shown["perplexity"]:8.1f}  {shown["pieces"]:4.1f} pieces  '
          f'{shown["seconds"]:5.1f} s  {shown["text"]!r}', flush=True)
  flags.output.write_text(json.dumps({
      'classifier': 100 * right, 'texts': flags.texts, 'results': results}, indent=1) + '\n')


if __name__ == '__main__':
  main()

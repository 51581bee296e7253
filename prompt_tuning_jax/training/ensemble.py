"""How well several prompts of one task do: each, on average, the best, and together.

All answer in the same batches, over one base (Lester et al. 2021, section 6 and Table 3).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax import ranking
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.predictor import Predictor, Tokens
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.types import PyTree

Metrics = Callable[[Sequence[str]], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Answers:
  """The texts that each member gives, and that all give together; one an example.

  `mean_probability` is None where texts were generated, not chosen.
  """

  members: dict[str, list[str]]
  majority_vote: list[str]
  mean_probability: list[str] | None


def answers(predictor: Predictor, params: PyTree, bank: PromptBank, inputs: Sequence[Tokens],
            choices: Sequence[Sequence[str]] | None) -> Answers:
  """Asks every prompt of the bank for every input, several of them in one batch.

  With `choices` of each input the most probable is the answer; without, texts are generated.
  """
  names, count = list(bank.files), len(bank.files)
  slots = [bank.slot(name) for _ in inputs for name in names]
  every = [tokens for tokens in inputs for _ in names]
  if choices is None:
    texts = predictor.generate(params, every, slots)
    rows = [texts[i:i + count] for i in range(0, len(texts), count)]
    return Answers(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)),
                   list(map(ranking.majority_vote, rows)), None)
  ranked = predictor.rank(params, every, [
      prompt_file.written(bank.files[name].metadata, row) for row in choices for name in names],
                          slots)
  rows, together, votes = [], [], []
  for i, options in enumerate(choices):
    scores = np.stack(ranked[i * count:(i + 1) * count])
    rows.append([options[j] for j in scores.argmax(axis=-1)])
    weights = ranking.probabilities(scores).max(axis=-1).tolist()
    votes.append(ranking.majority_vote(rows[-1], weights))
    together.append(options[int(ranking.mean_probability(scores).argmax())])
  return Answers(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)), votes, together)


def report(given: Answers, metrics: Metrics, rank: Callable[[Mapping[str, float]], float],
           ) -> dict[str, Any]:
  """The metrics of each member, their average, the best member's, and those of both ranking.

  Args:
    metrics: texts, one an example -> {metric: value}.
    rank: of a member's metrics, larger being better.
  """
  members = {name: dict(metrics(texts)) for name, texts in given.members.items()}
  best = max(members, key=lambda name: rank(members[name]))
  values = list(members.values())
  average = {metric: float(np.mean([each[metric] for each in values])) for metric in values[0]}
  together = {'majority_vote': dict(metrics(given.majority_vote))}
  if given.mean_probability is not None:
    together['mean_probability'] = dict(metrics(given.mean_probability))
  return {'members': members, 'average': average, 'best': {'prompt': best, **members[best]},
          **together}


def table(result: Mapping[str, Any]) -> str:
  """The report as the paper's Table 3 has it: a line each."""
  rows = {'average': result['average'], f'best ({result["best"]["prompt"]})': result['best']}
  rows |= {name.replace('_', ' '): result[name] for name in ('majority_vote', 'mean_probability')
           if name in result}
  names = list(result['average'])
  width = max(map(len, rows))
  lines = [' ' * width + ''.join(f'{name:>14}' for name in names)]
  lines += [f'{row:<{width}}' + ''.join(f'{values[name]:>14.4g}' for name in names)
            for row, values in rows.items()]
  return '\n'.join(lines)

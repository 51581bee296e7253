"""Answers of a prompted model to any number of inputs: ranked choices, generated text, scores.

Inputs are sorted by length into batches of a few static shapes, so padding is little and nothing
compiles twice; answers come back in the order of the inputs.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import prompted_model
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import Array, Batch, PyTree

Tokens = np.ndarray | Sequence[int]
NO_TARGET = (1,)


def check_positions(config: Any, longest: int) -> None:
  """Raises ValueError where a network with learned positions has too few for an example.

  `longest` counts its input, prompt and target; the last target token is never read.
  """
  if config.max_positions is not None and longest - 1 > config.max_positions:
    raise ValueError(f'The network has {config.max_positions} positions, but an input with its '
                     f'prompt and target takes up to {longest - 1}: lower the most tokens of '
                     'inputs or targets, or the length of the prompt.')


class Predictor:
  """Runs one model over lists of token ids (unpadded, end-of-sequence id included)."""

  def __init__(self, model: PromptedModel, vocabulary: Vocabulary,
               virtual: VirtualTokens | None = None, batch_size: int = 32,
               max_decode_length: int = 64, partitioner: Partitioner = Partitioner()):
    self._vocabulary, self._virtual = vocabulary, virtual
    self._batch_size, self._partitioner = batch_size, partitioner
    self._config, self._max_decode_length = model.network.config, max_decode_length
    self._rank = jax.jit(functools.partial(prompted_model.candidate_log_likelihoods, model),
                         static_argnames='most')
    self._score = jax.jit(functools.partial(prompted_model.log_likelihood, model))
    self._predict = jax.jit(functools.partial(prompted_model.predict, model,
                                              max_length=max_decode_length,
                                              eos_id=vocabulary.eos_id))

  def placing(self, virtual: VirtualTokens | None) -> 'Predictor':
    """The same predictor, nothing compiled anew, with another prompt's ids in the inputs."""
    other = copy.copy(self)
    other._virtual = virtual
    return other

  def rank(self, params: PyTree, inputs: Sequence[Tokens],
           choices: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """log p(choice | input) in nats for each choice of each input: one [C] array an input.

    Every input is encoded once, however many choices it has.
    """
    ids = self._choice_ids(choices)
    most = max(map(len, ids))
    together = batches.round_up(max(sum(map(len, row)) for row in ids), batches.Buckets().targets)
    longest = max(len(tokens) for row in ids for tokens in row)
    self._check_positions(inputs, [longest] * len(inputs))

    def run(rows, batch):
      put = self._partitioner.put_batch(
          {**batch, **batches.side_by_side([ids[i] for i in rows], together)})
      return self._rank(params, put['encoder_input_tokens'], put['candidates'], put['segments'],
                        most=most)

    return [scores[:len(row)] for scores, row in zip(self._run(inputs, run), ids, strict=True)]

  def generate(self, params: PyTree, inputs: Sequence[Tokens]) -> list[str]:
    """The most probable text, token by token, of each input."""
    self._check_positions(inputs, [self._max_decode_length] * len(inputs))
    put = self._partitioner.put_batch
    run = lambda _, batch: self._predict(params, put(batch)['encoder_input_tokens'])
    return [self._vocabulary.decode(tokens) for tokens in self._run(inputs, run)]

  def score(self, params: PyTree, inputs: Sequence[Tokens],
            targets: Sequence[Tokens]) -> np.ndarray:
    """log p(target | input) in nats, summed over the target's tokens: [n] float32."""
    self._check_positions(inputs, list(map(len, targets)))
    run = lambda _, batch: self._score(params, self._partitioner.put_batch(batch))
    return np.array(self._run(inputs, run, targets), np.float32)

  def _check_positions(self, inputs: Sequence[Tokens], targets: Sequence[int]) -> None:
    prompt = self._virtual.length if self._virtual else 0
    check_positions(self._config, max(
        (len(tokens) + prompt + length for tokens, length in zip(inputs, targets, strict=True)),
        default=0))

  def _choice_ids(self, choices: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    encode = functools.lru_cache(maxsize=None)(
        lambda text: [*self._vocabulary.encode(text), self._vocabulary.eos_id])
    return [[encode(text) for text in row] for row in choices]

  def _run(self, inputs: Sequence[Tokens], run: Callable[[list[int], Batch], Array],
           targets: Sequence[Tokens] | None = None) -> list:
    """run(indices, batch) over all inputs in batches; results in the order of the inputs."""
    results = [None] * len(inputs)
    waiting: list[tuple[list[int], Array]] = []
    for live, rows in self._groups(inputs):
      batch = batches.batch_of([inputs[i] for i in rows],
                               [targets[i] if targets else NO_TARGET for i in rows], self._virtual)
      waiting.append((live, run(rows, batch)))
      if len(waiting) > 2:  # the device works on the next batches while this one is fetched
        _collect(results, *waiting.pop(0))
    for item in waiting:
      _collect(results, *item)
    return results

  def _groups(self, inputs: Sequence[Tokens]) -> Iterator[tuple[list[int], list[int]]]:
    """(indices answered, indices of a full batch), the longest inputs first.

    The last batch is filled up with copies of its last row.
    """
    order = sorted(range(len(inputs)), key=lambda i: (-len(inputs[i]), i))
    for start in range(0, len(order), self._batch_size):
      live = order[start:start + self._batch_size]
      yield live, live + [live[-1]] * (self._batch_size - len(live))


def _collect(results: list, live: list[int], outputs: Array) -> None:
  for i, output in zip(live, np.asarray(outputs), strict=False):
    results[i] = output

"""Prompt design: a frozen model with a written description and some solved examples; no training.

The text stands where a soft prompt would, so it is one: its rows are its words' embeddings. All
else (batches, evaluation, the file, serving) is as for any prompt. Brown et al. 2020; the baseline
of Lester et al. 2021, figure 1.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import Array, PyTree

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptDesign:
  """A description, then `examples` of the training split, then the input.

  Args:
    description: what is to be done, in words; may be ''.
    examples: k, how many solved examples. Where the task has labels they take turns, so that each
      has as many examples as any other, or one less; the draw and its order come from `seed`.
    template: how an example is written, with {inputs} and {targets}.
    separator: between the description and the examples.
    context_length: most tokens of description, examples, input and target together; examples that
      do not fit beside the longest that these may be are left out, from the last.
    rows, text: set by `for_data`.
  """

  description: str = ''
  examples: int = 8
  template: str = '{inputs} {targets}'
  separator: str = ' '
  context_length: int = 1024
  seed: int = 0
  rows: np.ndarray | None = None
  text: str = ''

  trainable = ()

  def for_data(self, caches: Sequence[TokenCache], base: Base, vocabulary: Any) -> 'PromptDesign':
    """This method with the examples of one task's training split."""
    if len(caches) > 1:
      raise ValueError('A prompt is designed for one task, got a mixture of '
                       f'{len(caches)}: give MIXTURE_OR_TASK_NAME.')
    lengths = caches[0].meta['lengths']
    room = self.context_length - lengths['inputs'] - lengths['targets']
    solved = [_written(self.template, caches[0].rows[i])
              for i in chosen(caches[0].rows, self.examples, self.seed)]
    kept, ids = solved, []
    while True:
      text = self.separator.join(filter(None, [self.description, *kept]))
      ids = vocabulary.encode(text) if text else []
      if len(ids) <= room or not kept:
        break
      kept = kept[:-1]
    if not ids or len(ids) > room:
      raise ValueError(
          f'The description and its examples have {len(ids)} tokens, expected from 1 to {room}: '
          f"context_length={self.context_length} less the task's lengths. Change DESCRIPTION, "
          'EXAMPLES, context_length or TASK_FEATURE_LENGTHS.')
    if len(kept) < len(solved):
      logger.warning('%d of %d examples fit into %d tokens.', len(kept), len(solved),
                     self.context_length)
    return dataclasses.replace(
        self, text=text, rows=np.asarray(base.embedding[np.asarray(ids)], np.float32))

  def model(self, config: Any) -> PromptedModel:
    """The network with the text before its inputs."""
    return PromptedModel(config.network(), SoftPrompt(*self.rows.shape))

  def virtual_tokens(self, num_embeddings: int) -> VirtualTokens:
    """What the data path writes into each input."""
    return VirtualTokens(num_embeddings, len(self.rows))

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """The text's embeddings."""
    return {'prompt': {'embedding': self.rows}}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the text and its embeddings as the prompt file `path`.safetensors."""
    metadata = prompt_file.describe(base, method='prompt_design', length=len(self.rows), **about)
    prompt_file.save(path.with_suffix('.safetensors'), prompt_file.PromptFile(
        {prompt_file.EMBEDDING: self.rows}, {**metadata, 'text': self.text}))


def chosen(rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
  """`count` rows in random order (all if there are fewer), the labels taking turns."""
  if not rows:
    raise ValueError('The task keeps no texts of its examples (it has no metrics), so none can be '
                     'shown: choose a task with metrics.')
  rng = np.random.default_rng([seed, 4])
  order = rng.permutation(len(rows)).tolist()
  if not rows[0].get('choices'):
    return order[:count]
  waiting: dict[str, list[int]] = {}
  for i in order:
    waiting.setdefault(rows[i]['targets'], []).append(i)
  turns = [of for _, of in sorted(waiting.items())]
  rounds = [of[turn] for turn in range(max(map(len, turns))) for of in turns if turn < len(of)]
  picked = rounds[:count]
  return [picked[i] for i in rng.permutation(len(picked))]


def _written(template: str, row: Mapping[str, Any]) -> str:
  try:
    return template.format(inputs=row['inputs'], targets=row['targets'])
  except (KeyError, IndexError, ValueError) as error:
    raise ValueError(f'An example is written with {{inputs}} and {{targets}}, got the template '
                     f'{template!r} ({error}).') from None

"""Prompt design: a frozen model with a written description and some solved examples; no training.

The text stands where a soft prompt would, so it is one: its rows are its words' embeddings. All
else (batches, evaluation, the file, serving) is as for any prompt. Brown et al. 2020; the baseline
of Lester et al. 2021, figure 1.
"""

import bisect
import dataclasses
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax import tokenizer_file
from prompt_tuning_jax.checkpoints import processes
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.training.methods import save_file
from prompt_tuning_jax.types import Array, PyTree

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PromptDesign:
  """A description, then `examples` of the training split, then the input.

  Args:
    description: what is to be done, in words; may be ''.
    examples: k, how many solved examples. Where the task has labels they take turns, so that each
      has as many examples as any other, or one less; the draw and its order are the run's seed's.
    template: how an example is written, with {inputs} and {targets}. For a masked language model it
      is its input, with the target where the mask is (Gao et al. 2021, section 6).
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
  rows: np.ndarray | None = dataclasses.field(default=None, compare=False)
  text: str = ''

  trainable = ()

  def __post_init__(self):
    for name in ('description', 'template', 'separator'):
      if not isinstance(getattr(self, name), str):
        raise ValueError(f'{name} of a designed prompt should be a text, got '
                         f'{getattr(self, name)!r}.')
    if type(self.examples) is not int or self.examples < 0:
      raise ValueError(f'EXAMPLES should be a whole number from 0, got {self.examples!r}.')

  def for_data(self, caches: Sequence[TokenCache], base: Base, vocabulary: Any,
               seed: int) -> 'PromptDesign':
    """This method with the examples of one task's training split."""
    if len(caches) > 1:
      raise ValueError(f'A prompt is designed for one task, got a mixture of {len(caches)}: leave '
                       'out task/mixture.gin, and name one with MIXTURE_OR_TASK_NAME.')
    lengths = caches[0].meta['lengths']
    room = self.context_length - lengths['inputs'] - lengths['targets']
    rows = caches[0].rows
    picked = chosen(rows, self.examples, seed)
    mask = tokenizer_file.BERT['mask_token'] if base.config.is_masked_lm else None
    if mask and self.template != PromptDesign.template and any(mask in rows[i]['inputs']
                                                               for i in picked):
      raise ValueError(f'Examples for {base.name} are their inputs, with the target where the mask '
                       f'is: leave out the template {self.template!r}.')
    solved = [_written(self.template, rows[i], mask) for i in picked[:max(room, 0)]]
    text_of = lambda count: self.separator.join(filter(None, [self.description, *solved[:count]]))
    ids_of = lambda count: vocabulary.encode(text_of(count)) if text_of(count) else []
    fits = lambda count: len(ids_of(count)) <= room
    kept = bisect.bisect_left(range(1, len(solved) + 1), True, key=lambda count: not fits(count))
    ids = ids_of(kept)
    if not ids or len(ids) > room:
      raise ValueError(
          f'The description and its examples have {len(ids)} tokens, expected from 1 to {room}: '
          f"context_length={self.context_length} less the task's lengths. Change DESCRIPTION, "
          'EXAMPLES, context_length or TASK_FEATURE_LENGTHS.')
    if kept < len(picked):
      logger.warning('%d of %d examples fit into %d tokens.', kept, len(picked),
                     self.context_length)
    rows = np.asarray(processes.whole(base.embedding[np.asarray(ids)]), np.float32)
    return dataclasses.replace(self, text=text_of(kept), rows=rows)

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
    save_file(path, {'prompt': {'embedding': self.rows}}, base, about, method='prompt_design',
              length=len(self.rows), text=self.text)


def chosen(rows: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[int]:
  """`count` rows in random order (all if there are fewer), the labels taking turns."""
  if not count:
    return []
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
  turns = list(waiting.values())  # In the order of the draw.
  rounds = [of[turn] for turn in range(max(map(len, turns))) for of in turns if turn < len(of)]
  picked = rounds[:count]
  return [picked[i] for i in rng.permutation(len(picked))]


def _written(template: str, row: Mapping[str, Any], mask: str | None) -> str:
  if mask and mask in row['inputs']:
    before, *behind = row['inputs'].split(mask)  # Several masks, if so, are those of one target.
    return ' '.join(f'{before}{row["targets"]}{"".join(behind)}'.split())
  try:
    return template.format(inputs=row['inputs'], targets=row['targets'])
  except (KeyError, IndexError, ValueError, AttributeError) as error:
    raise ValueError(f'An example is written with {{inputs}} and {{targets}}, got the template '
                     f'{template!r} ({error}).') from None

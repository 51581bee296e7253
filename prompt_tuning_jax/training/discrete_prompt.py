"""A prompt that is text, found by search: AutoPrompt, and search without gradients.

What is found is a soft prompt whose rows are words' embeddings, so all else (batches, evaluation,
the file, serving) is as for any prompt. It is searched for in the training loop, a step of search
(`word_search`) being in the place of a step of an optimizer.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import processes, prompt_file
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.methods import placed_tokens, save_file
from prompt_tuning_jax.training.word_search import WordSearch
from prompt_tuning_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class DiscretePrompt:
  """`length` words before the input of a frozen model, found by `search`.

  Args:
    length: P, how many words (pieces of the vocabulary).
    placement: where they stand (`prompts.virtual_tokens`): the template.
    text: what the search starts from; positions that it leaves are filled by words drawn at random.
    search: what is tried in a step, and what is kept.
    decode, table: set by `for_data`; from ids to text, and the base's embeddings [V, D] float32.
  """

  length: int = 10
  placement: str = 'before'
  text: str = ''
  search: WordSearch = WordSearch()
  decode: Callable | None = dataclasses.field(default=None, compare=False, repr=False)
  table: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)

  trainable = ('prompt/.*',)

  virtual_tokens = placed_tokens

  def __post_init__(self):
    if type(self.length) is not int or self.length < 1:
      raise ValueError(f'A prompt of words needs a PROMPT_LENGTH from 1, got {self.length!r}.')
    if not isinstance(self.text, str):
      raise ValueError(f'START_TEXT should be a text, got {self.text!r}: put it in quotes.')

  def for_data(self, caches: Sequence[TokenCache], base: Base, vocabulary: Any,
               seed: int) -> 'DiscretePrompt':
    """This method with the words of the base."""
    found = words(vocabulary)
    if not len(found):
      raise ValueError('The vocabulary has no pieces that are text.')
    table = np.asarray(processes.whole(base.embedding), np.float32)
    return dataclasses.replace(self, decode=vocabulary.decode, table=table,
                               search=dataclasses.replace(self.search, words=found))

  def model(self, config: Any) -> PromptedModel:
    """The network with the words before its inputs."""
    return PromptedModel(config.network(), SoftPrompt(self.length, config.emb_dim))

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """The embeddings of the words that the search starts from."""
    given = vocabulary.encode(self.text) if self.text else []
    if len(given) > self.length:
      raise ValueError(f'START_TEXT has {len(given)} tokens, and PROMPT_LENGTH is {self.length}: '
                       'shorten the one or raise the other.')
    drawn = jax.random.choice(key, self.search.words, (self.length - len(given),))
    ids = np.concatenate([given, drawn]).astype(np.int32)
    return {'prompt': {'embedding': jnp.asarray(self.table[ids])}}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the prompt file `path`.safetensors: the words as `text`, their ids as `tokens`, and
    their embeddings, which are what answers."""
    ids = [] if self.table is None else self.ids(trained)  # A dry run has no words.
    text = self.decode(ids) if ids else ''
    save_file(path, trained, base, about, method='discrete_prompt', placement=self.placement,
              length=self.length, text=text, tokens=ids)

  def ids(self, trained: PyTree) -> list[int]:
    """The words of a prompt; of words that have one embedding the first."""
    rows = np.asarray(param_paths.flatten(trained)[prompt_file.EMBEDDING])
    alike = lambda row: np.flatnonzero(self.table[:, 0] == row[0])  # Few, found fast.
    return [next(int(i) for i in alike(row) if np.array_equal(self.table[i], row)) for row in rows]


def words(vocabulary: Any) -> np.ndarray:
  """The ids [W] int32 whose pieces are text: no special ids, no sentinels, no parts of characters.
  """
  pieces, lengths = vocabulary.bytes_of_ids()
  special = {vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, *vocabulary.untrained}
  sentinels = range(vocabulary.size - vocabulary.extra_ids, vocabulary.size)
  texts = (bytes(piece[:length]).decode('utf-8', 'replace').strip()
           for piece, length in zip(pieces, lengths, strict=True))
  return np.array([i for i, text in enumerate(texts)
                   if text and text.isprintable() and '\ufffd' not in text
                   and i not in special and i not in sentinels], np.int32)

"""A base with a prompt file, ready to answer: what eval, infer and score start from."""

import dataclasses
from typing import Any

import numpy as np

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks import t5
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedBase:
  """A predictor with its parameters, vocabulary and the prompt's metadata ({} without one)."""

  predictor: Predictor
  params: PyTree
  vocabulary: Vocabulary
  metadata: dict[str, Any]

  def tokens(self, place: str, row: dict[str, Any], name: str,
             max_length: int | None = None) -> np.ndarray:
    """A row's text `{name}s`, or its ids `{name}_tokens`, as ids ending in EOS: [n] int32.

    Ids that are given are taken as they are: whoever gives them writes the end-of-sequence id.
    `place` says in an error where the row stands.
    """
    ids, text = row.get(f'{name}_tokens'), row.get(f'{name}s')
    if ids is not None:
      size = self.vocabulary.size
      if (not isinstance(ids, list) or not ids
          or not all(type(i) is int and 0 < i < size for i in ids)):
        raise ValueError(f'{place}: {name}_tokens should be a list of ids from 1 to {size - 1}, '
                         f'got {str(ids)[:40]}.')
      return np.asarray(ids[:max_length], np.int32)
    if not isinstance(text, str):
      raise ValueError(f'{place}: expected text in "{name}s" or ids in "{name}_tokens", got the '
                       f'fields {sorted(row)}.')
    ids = self.vocabulary.encode(text)
    kept = ids if max_length is None else ids[:max_length - 1]
    return np.asarray([*kept, self.vocabulary.eos_id], np.int32)


def load(base: str, prompt: str | None = None, *, network: t5.T5Config | None = None,
         vocabulary_file: str | None = None, dtype: str = 'float32', batch_size: int = 32,
         max_decode_length: int = 64) -> PromptedBase:
  """Reads base and prompt, and checks that they belong together (ValueError if not).

  Every device has a copy of the base. `batch_size` is rounded up to a multiple of the devices.
  """
  file = prompt_file.load(prompt) if prompt else None
  partitioner = Partitioner()
  batch_size += -batch_size % partitioner.mesh.size
  loaded = base_checkpoint.load_base(base, config=network, vocabulary_file=vocabulary_file,
                                     dtype=dtype,
                                     sharding_for=partitioner.sharding_for(t5.logical_axes))
  if loaded.vocabulary is None:
    raise ValueError(f'The base {base} brings no vocabulary: give its SentencePiece file with '
                     '--vocabulary.')
  vocabulary = Vocabulary(loaded.vocabulary.file, loaded.vocabulary.extra_ids)
  config = dataclasses.replace(loaded.config, dtype=dtype)
  module = virtual = None
  params, metadata = loaded.params, {}
  if file:
    prompt_file.check(file, loaded)
    length = len(file.params.get(prompt_file.EMBEDDING, ()))
    module, metadata = SoftPrompt(length, config.emb_dim), file.metadata
    virtual = VirtualTokens(config.vocab_size, length, metadata.get('placement', 'before'))
    params = param_paths.merge(params, param_paths.unflatten(file.params))
  predictor = Predictor(PromptedModel(t5.Transformer(config), module), vocabulary, virtual,
                        batch_size, max_decode_length, partitioner)
  return PromptedBase(predictor, params, vocabulary, metadata)

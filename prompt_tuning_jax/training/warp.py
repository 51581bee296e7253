"""Input-output tuning with few numbers: a prompt, and an output vector for each label
(Hambardzumyan et al. 2021, "WARP")."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.training.evaluate import first_pieces
from prompt_tuning_jax.training.methods import placed_tokens, save_file
from prompt_tuning_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Warp:
  """A soft prompt and verbaliser vectors train, nothing else.

  A label's vector is the output layer's column of its first piece, and what trains is added to that
  column: `a` [D, C] of a change a b of the layer, whose b [C, V], fixed, picks the columns. So the
  file is a prompt with a LoRA of one layer, and is served as such. Where that layer is the
  embedding table (BERT), the embeddings of inputs stay as they are.

  Args:
    length, placement, initializer: the prompt's, as of `methods.PromptTuning`.
    columns: set by `for_data`, the ids of the labels' first pieces.
  """

  length: int = 20
  placement: str = 'before'
  initializer: Callable = initializers.SampledVocabulary()
  columns: tuple[int, ...] = ()

  trainable = ('lora/.*/a|prompt/.*',)  # one pattern: a dry run has no labels, and so no vectors

  virtual_tokens = placed_tokens

  def for_data(self, caches: Sequence[TokenCache], base: Base, vocabulary: Any,
               seed: int) -> 'Warp':
    """This method for the labels of one task."""
    return dataclasses.replace(self, columns=tuple(
        ids[-1] for ids in first_pieces(caches, vocabulary)))

  def model(self, config: Any) -> PromptedModel:
    """The network with the prompt before its inputs."""
    return PromptedModel(config.network(), SoftPrompt(self.length, config.emb_dim))

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """The prompt, and labels' vectors that are the base's own."""
    width, size = base.config.emb_dim, base.config.vocab_size
    prompt = self.initializer(key, self.length, base.embedding, vocabulary)
    return param_paths.unflatten({
        'prompt/embedding': prompt,
        f'lora/{base.config.output}/a': jnp.zeros((width, len(self.columns))),
        f'lora/{base.config.output}/b': self._picks(size)})

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the prompt and the vectors as `path`.safetensors."""
    leaves = param_paths.flatten(trained)
    if self.columns:  # A dry run has no labels.
      leaves[f'lora/{base.config.output}/b'] = self._picks(base.config.vocab_size)
    save_file(path, param_paths.unflatten(leaves), base, about, method='warp',
              placement=self.placement, length=self.length)

  def _picks(self, size: int) -> Array:
    """[C, V]: 1 at each label's column."""
    return jnp.zeros((len(self.columns), size)).at[
        jnp.arange(len(self.columns)), jnp.array(self.columns, jnp.int32)].set(1.0)

"""Ways to adapt a base: which leaves train, what is added to the model, what is saved."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import hf_safetensors, prompt_file
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.prompts.soft_prompt import SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import PyTree


def prompt_from_file(path: str) -> initializers.FromArray:
  """The initializer that starts from a trained prompt: a prompt file, or a .npy array [P, D]."""
  return initializers.FromArray(prompt_file.load(path).params[prompt_file.EMBEDDING])


def bare_network(method: Any, config: Any) -> PromptedModel:
  """The `model` of a method that puts no modules around the network."""
  return PromptedModel(config.network())


def no_virtual_tokens(method: Any, num_embeddings: int) -> None:
  """The `virtual_tokens` of a method that writes nothing into the inputs."""


@dataclasses.dataclass(frozen=True)
class PromptTuning:
  """A soft prompt before a frozen model (Lester et al. 2021)."""

  length: int = 100
  placement: str = 'before'
  initializer: Callable = initializers.SampledVocabulary()

  trainable = ('prompt/.*',)

  def model(self, config: Any) -> PromptedModel:
    """The network with this method's modules around it."""
    return PromptedModel(config.network(), SoftPrompt(self.length, config.emb_dim))

  def virtual_tokens(self, num_embeddings: int) -> VirtualTokens:
    """What the data path writes into each input."""
    return VirtualTokens(num_embeddings, self.length, self.placement)

  def initial(self, key, base: Base, vocabulary: Any) -> PyTree:
    """The leaves this method adds to the base's tree, from the base's embedding table."""
    return {'prompt': {'embedding': self.initializer(key, self.length, base.embedding, vocabulary)}}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the prompt as `path`.safetensors; `about` has its task, labels and metric."""
    metadata = prompt_file.describe(base, placement=self.placement, length=self.length, **about)
    leaves = param_paths.flatten(jax.device_get(trained))
    prompt_file.save(path.with_suffix('.safetensors'), prompt_file.PromptFile(leaves, metadata))


@dataclasses.dataclass(frozen=True)
class ModelTuning:
  """All weights train: the baseline of both papers, and how a base is pretrained."""

  trainable = ('.*',)

  model, virtual_tokens = bare_network, no_virtual_tokens

  def initial(self, key, base: Base, vocabulary: Any) -> PyTree:
    """Adds nothing."""
    return {}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the whole model as the Hugging Face folder `path`."""
    hf_safetensors.write(path, base.config, trained, vocabulary=base.vocabulary, replace=True)

"""Ways to adapt a base: which leaves train, what is added to the model, what is saved."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.networks import layer_stack
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.prompts.soft_prompt import LayeredPrompt, SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import Array, PyTree


def prompt_from_file(path: str) -> initializers.FromArray:
  """The initializer that starts from a trained prompt: a prompt file, or a .npy array [P, D]."""
  params = prompt_file.load(path).params
  if prompt_file.EMBEDDING not in params:
    raise ValueError(f'{path} holds no prompt to start from: expected {prompt_file.EMBEDDING}, got '
                     f'{next(iter(params))} and {len(params) - 1} others.')
  return initializers.FromArray(params[prompt_file.EMBEDDING])


def save_file(path: pathlib.Path, leaves: PyTree, base: Base, about: Mapping[str, Any],
              **described: Any) -> None:
  """Writes trained leaves and what they belong to as `path`.safetensors.

  `about` has task, labels and metric, `described` what the method adds (`prompt_file.describe`).
  """
  flat = layer_stack.unrolled(param_paths.flatten(jax.device_get(leaves)))
  prompt_file.save(path.with_name(f'{path.name}.safetensors'), prompt_file.PromptFile(
      flat, prompt_file.describe(base, **{**about, **described})))


def description(method: Any) -> dict[str, Any]:
  """A method's name and plain settings: a resumed run must have the same."""
  return {'name': type(method).__name__, **{
      field.name: _plain(getattr(method, field.name)) for field in dataclasses.fields(method)}}


def _plain(value: Any) -> Any:
  """A setting as JSON keeps it; None for one, such as an array, that it does not keep."""
  if isinstance(value, list | tuple):
    return [_plain(each) for each in value]
  if dataclasses.is_dataclass(value):
    return description(value)
  return value if isinstance(value, str | int | float | bool) else None


def bare_network(method: Any, config: Any) -> PromptedModel:
  """The `model` of a method that puts no modules around the network."""
  return PromptedModel(config.network())


def any_data(method: Any, caches: Sequence[TokenCache], base: Base, vocabulary: Any,
             seed: int) -> Any:
  """The `for_data` of a method that takes nothing from the training data."""
  return method


def check_length(length: Any) -> None:
  """Raises ValueError for what is no length of a prompt that trains."""
  if type(length) is not int or length < 1:
    raise ValueError(f'PROMPT_LENGTH should be a whole number of at least 1, got {length!r}.')


def placed_tokens(method: Any, num_embeddings: int) -> VirtualTokens:
  """The `virtual_tokens` of a method with a prompt: what the data path writes into each input."""
  check_length(method.length)
  return VirtualTokens(num_embeddings, method.length, method.placement)


def no_virtual_tokens(method: Any, num_embeddings: int) -> None:
  """The `virtual_tokens` of a method that writes nothing into the inputs."""


@dataclasses.dataclass(frozen=True)
class PromptTuning:
  """A soft prompt before a frozen model (Lester et al. 2021)."""

  length: int = 100
  placement: str = 'before'
  initializer: Callable = initializers.SampledVocabulary()

  trainable = ('prompt/.*',)

  for_data, virtual_tokens = any_data, placed_tokens

  def model(self, config: Any) -> PromptedModel:
    """The network with this method's modules around it."""
    return PromptedModel(config.network(), SoftPrompt(self.length, config.emb_dim))

  def initial(self, key, base: Base, vocabulary: Any) -> PyTree:
    """The leaves this method adds to the base's tree, from the base's embedding table."""
    return {'prompt': {'embedding': self.initializer(key, self.length, base.embedding, vocabulary)}}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the prompt as `path`.safetensors."""
    save_file(path, trained, base, about, placement=self.placement, length=self.length)


@dataclasses.dataclass(frozen=True)
class DeepPrompt:
  """A prompt with rows of its own for every layer (Liu et al. 2022, "P-Tuning v2", section 3.2).

  The first layer starts as the prompt that `initializer` makes, every other one from the hidden
  states that the frozen base has for that prompt alone. Training so starts near the soft prompt of
  the same rows: hidden states grow from layer to layer, and rows of the embedding table would be
  of another size than all that a deep layer reads. In a network that looks to the left alone, a
  prompt placed 'before' starts as exactly that soft prompt.
  """

  length: int = 100
  placement: str = 'before'
  initializer: Callable = initializers.SampledVocabulary()

  trainable = ('prompt/.*',)

  for_data, virtual_tokens = any_data, placed_tokens

  def model(self, config: Any) -> PromptedModel:
    """The network with this method's modules around it."""
    return PromptedModel(config.network(),
                         LayeredPrompt(config.prompted_layers, self.length, config.emb_dim))

  def initial(self, key, base: Base, vocabulary: Any) -> PyTree:
    """The leaves this method adds to the base's tree."""
    first = self.initializer(key, self.length, base.embedding, vocabulary)
    return {'prompt': {'deep_embedding': jnp.stack([first, *_hidden_states(first, base)])}}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the prompt as `path`.safetensors."""
    save_file(path, trained, base, about, method='deep_prompt', placement=self.placement,
              length=self.length)


@dataclasses.dataclass(frozen=True)
class ModelTuning:
  """All weights train: the baseline of both papers, and how a base is pretrained."""

  trainable = ('.*',)

  for_data, model, virtual_tokens = any_data, bare_network, no_virtual_tokens

  def initial(self, key, base: Base, vocabulary: Any) -> PyTree:
    """Adds nothing."""
    return {}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the whole model as the folder `path`, a base like the one that it came from."""
    base_checkpoint.write(path, base.config, trained, vocabulary=base.vocabulary, replace=True)


def _hidden_states(first: Array, base: Base) -> list[Array]:
  """What each layer but the last makes of a prompt [P, D] that is all of the input: [P, D] float32.
  """
  config = base.config
  tokens = VirtualTokens(config.vocab_size, len(first)).ids[None]
  _, captured = base.apply(
      tokens, enable_dropout=False, virtual_embeddings=first, method='encode',
      mutable=['intermediates'],
      capture_intermediates=lambda module, _: re.fullmatch(r'layers_\d+', module.name or ''))
  layers = captured['intermediates'][config.prompted_stack]
  # Where a layer returns more than its output, the output is the first.
  outputs = [jax.tree.leaves(layers[f'layers_{i}'])[0] for i in range(config.prompted_layers - 1)]
  return [output[0].astype(jnp.float32) for output in outputs]

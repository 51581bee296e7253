"""Prefix tuning: trained keys and values in every attention of a frozen model (Li & Liang 2021)."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints import processes, prompt_file
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.networks.prefix import PLACES
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.places import layers_at
from prompt_tuning_jax.prompts.prefix import DirectPrefix, ReparameterizedPrefix
from prompt_tuning_jax.training.methods import any_data, no_virtual_tokens, save_file
from prompt_tuning_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class WordActivations:
  """The keys and values that the base itself has for a text, over and over until P are full.

  In low-data settings real words, best those of the task, are the better start (section 7.4).
  """

  text: str

  def __call__(self, length: int, base: Base, vocabulary: Any) -> dict[str, np.ndarray]:
    """-> {place: [L, 2, P, N, H] float32}, all places."""
    pieces = vocabulary.encode(self.text) if isinstance(self.text, str) else ()
    if not pieces:
      raise ValueError(f'A prefix starts from a text with tokens in the vocabulary, got '
                       f'{self.text!r}.')
    tokens = np.resize(np.asarray(pieces, np.int32), length)[None]
    _, captured = base.apply(
        tokens, tokens, tokens, enable_dropout=False,
        capture_intermediates=lambda module, _: module.name in ('key', 'value'),
        mutable=['intermediates'])
    return {place: self._stacked(captured['intermediates'][stack], attention, base.config)
            for place, (stack, attention) in base.config.attention_modules.items()}

  def _stacked(self, layers: Mapping[str, Any], attention: str, config: Any) -> np.ndarray:
    """[L, 2, P, N, H] of the layers of one stack."""
    of = lambda i, name: np.asarray(processes.whole(
        layers[f'layers_{i}'][attention][name]['__call__'][0][0]), np.float32)
    count = sum(name.startswith('layers_') for name in layers)
    stacked = np.stack([[of(i, 'key'), of(i, 'value')] for i in range(count)])
    return stacked.reshape(*stacked.shape[:3], config.num_heads, config.head_dim)


def prefix_from_file(path: str) -> Callable[..., dict[str, np.ndarray]]:
  """The initializer that starts from a trained prefix."""
  def initializer(length: int, base: Base, vocabulary: Any) -> dict[str, np.ndarray]:
    del length, base, vocabulary
    return prompt_file.load(path).under('prefix')
  return initializer


@dataclasses.dataclass(frozen=True)
class PrefixTuning:
  """A prefix of `length` positions before the keys of attentions.

  Args:
    places: which attentions, some of `networks.prefix.PLACES`; None is all that the network has.
    width: of the MLP that makes the prefix while training (512 for table-to-text and 800 for
      summaries in the paper); None trains keys and values directly.
    initializer: (length, base, vocabulary) -> {place: [L, 2, P, N, H]}; None starts at random.
  """

  length: int = 10
  places: Sequence[str] | None = None
  width: int | None = 512
  initializer: Callable[..., Mapping[str, np.ndarray]] | None = None

  trainable = ('prefix/.*',)

  def __post_init__(self):
    places = PLACES if self.places is None else self.places
    if isinstance(places, str) or not places or set(places) - set(PLACES):
      raise ValueError(f'places must be some of {PLACES}, or None for all that the network has, '
                       f'got {places!r}.')
    if type(self.length) is not int or self.length < 1 or self.width is not None and self.width < 1:
      raise ValueError('PROMPT_LENGTH and width must be whole numbers from 1 (width may be None), '
                       f'got {self.length!r} and {self.width!r}.')

  def model(self, config: Any) -> PromptedModel:
    """The network with this method's modules around it."""
    return PromptedModel(config.network(), prefix=self._module(config))

  for_data, virtual_tokens = any_data, no_virtual_tokens

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """The leaves this method adds to the base's tree."""
    module = self._module(base.config)
    leaves = module.init(key)['params']
    if self.initializer is None:
      return {'prefix': leaves}
    wanted = {place: np.asarray(array) for place, array in
              self.initializer(self.length, base, vocabulary).items() if place in leaves}
    shapes = jax.tree.map(jnp.shape, module.apply({'params': leaves}))
    if {place: array.shape for place, array in wanted.items()} != shapes:
      raise ValueError(f'The initial prefix must have the shapes {shapes}, got '
                       f'{ {place: array.shape for place, array in wanted.items()} }.')
    if self.width is None:
      return {'prefix': wanted}
    return {'prefix': {place: _mlp_that_gives(leaves[place], array)
                       for place, array in wanted.items()}}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes keys and values as `path`.safetensors; an MLP is not kept."""
    made = self._module(base.config).apply({'params': trained['prefix']})
    save_file(path, {'prefix': made}, base, about, method='prefix_tuning', length=self.length)

  def _module(self, config: Any) -> nn.Module:
    layers = layers_at(self.places, config.attentions)
    shape = (self.length, layers, config.num_heads, config.head_dim)
    if self.width is None:
      return DirectPrefix(*shape)
    return ReparameterizedPrefix(*shape, config.emb_dim, self.width)


def _mlp_that_gives(leaves: PyTree, wanted: np.ndarray) -> PyTree:
  """The MLP of one place with its last layer solved for: its output is `wanted` [L, 2, P, N, H].

  There are more columns (the width) than rows (P) to solve for, so that the fit is exact, unless
  the width is below P.
  """
  target = wanted.transpose(2, 0, 1, 3, 4).reshape(wanted.shape[2], -1)
  hidden = np.tanh(np.asarray(leaves['embedding']) @ np.asarray(leaves['wi']['kernel'])
                   + np.asarray(leaves['wi']['bias']))
  kernel = np.linalg.lstsq(hidden.astype(np.float64), target.astype(np.float64), rcond=None)[0]
  return {**leaves, 'wo': {'kernel': jnp.asarray(kernel, jnp.float32),
                           'bias': leaves['wo']['bias']}}

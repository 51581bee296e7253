"""Lightweight fine-tuning: small changes of frozen weights, small networks between them, or few of
the weights themselves."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.networks import layer_stack, layers
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.adapters import BottleneckAdapters
from prompt_tuning_jax.prompts.places import layers_at
from prompt_tuning_jax.training.methods import any_data, bare_network, no_virtual_tokens, save_file
from prompt_tuning_jax.types import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Lora:
  """A product of two thin matrices is added to some kernels (Hu et al. 2022).

  Args:
    rank: r, their common width.
    alpha: alpha / r scales the product; it is in the spread that `a` starts with, so that the
      leaves are the change itself.
    kernels: patterns of whole parameter paths; the paper changes queries and values. An output
      layer that is the embedding table goes by the path that it has elsewhere (`config.output`).
  """

  rank: int = 8
  alpha: float = 16.0
  kernels: Sequence[str] = (r'.*/(query|value)/kernel',)

  trainable = ('lora/.*',)

  def __post_init__(self):
    if type(self.rank) is not int or self.rank < 1:
      raise ValueError(f'rank must be a whole number from 1, got {self.rank!r}.')

  for_data, model, virtual_tokens = any_data, bare_network, no_virtual_tokens

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """a is random and b is 0: training starts from the base model."""
    kernels, config = _by_layer(base), base.config
    kernels.setdefault(config.output, jax.ShapeDtypeStruct((config.emb_dim, config.vocab_size),
                                                           jnp.float32))
    leaves = {}
    for i, path in enumerate(param_paths.matching(self.kernels, kernels)):
      inputs, outputs = _kernel_shape(path, kernels[path])
      spread = (self.alpha / self.rank) * (inputs ** -0.5)
      leaves[f'lora/{path}/a'] = spread * jax.random.normal(
          jax.random.fold_in(key, i), (inputs, self.rank))
      leaves[f'lora/{path}/b'] = jnp.zeros((self.rank, outputs))
    return _as_layers_are(leaves, config)

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the matrices as `path`.safetensors."""
    save_file(path, trained, base, about, method='lora')


@dataclasses.dataclass(frozen=True)
class Ia3:
  """Keys, values and the MLPs' hidden activations are scaled by trained vectors (Liu et al. 2022).

  `outputs` are the kernels whose outputs, `inputs` those whose inputs are scaled.
  """

  outputs: Sequence[str] = (r'.*/(key|value)/kernel',)
  inputs: Sequence[str] = (r'.*/mlp/wo/kernel',)

  trainable = ('ia3/.*', 'ia3_in/.*')

  for_data, model, virtual_tokens = any_data, bare_network, no_virtual_tokens

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """Ones: training starts from the base model."""
    kernels, leaves = _by_layer(base), {}
    for kind, patterns, axis in (('ia3', self.outputs, 1), ('ia3_in', self.inputs, 0)):
      for path in param_paths.matching(patterns, kernels):
        leaves[f'{kind}/{path}'] = jnp.ones(_kernel_shape(path, kernels[path])[axis])
    return _as_layers_are(leaves, base.config)

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the vectors as `path`.safetensors."""
    save_file(path, trained, base, about, method='ia3')


@dataclasses.dataclass(frozen=True)
class Adapters:
  """Small networks behind the sub-layers of a frozen network (Houlsby et al. 2019).

  The paper also trains the layer norms, and a head that a text-to-text network has no need of;
  here the base stays as it is.

  Args:
    width: r, the bottleneck.
    places: behind which sub-layers, such as ('encoder_mlp', 'decoder_mlp'); None is all that the
      network has.
    activation: a name among `networks.layers.ACTIVATIONS`.
  """

  width: int = 64
  places: Sequence[str] | None = None
  activation: str = 'gelu'

  trainable = ('adapter/.*',)

  def __post_init__(self):
    if type(self.width) is not int or self.width < 1:
      raise ValueError(f'width must be a whole number from 1, got {self.width!r}.')
    if isinstance(self.places, str) or self.places is not None and not self.places:
      raise ValueError('places must be a list of sub-layers such as ("encoder_mlp",), or None for '
                       f'all, got {self.places!r}.')
    if self.activation not in layers.ACTIVATIONS:
      raise ValueError(f'activation must be one of {tuple(layers.ACTIVATIONS)}, got '
                       f'{self.activation!r}.')

  def model(self, config: Any) -> PromptedModel:
    """The network with this method's modules around it."""
    return PromptedModel(config.network(), adapter=self._module(config))

  for_data, virtual_tokens = any_data, no_virtual_tokens

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """The last kernel of each is 0: training starts from the base model."""
    return {'adapter': self._module(base.config).init(key)['params']}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the adapters as `path`.safetensors."""
    save_file(path, trained, base, about, method='adapters', activation=self.activation)

  def _module(self, config: Any) -> BottleneckAdapters:
    return BottleneckAdapters(self.width, config.emb_dim, layers_at(self.places, config.sublayers),
                              self.activation)


@dataclasses.dataclass(frozen=True)
class PartTuning:
  """Some of the base's own weights train, and only they are kept.

  `trainable` are patterns of whole parameter paths: the norms' scales (what a T5, which has no
  biases, has of BitFit, Ben Zaken et al. 2022), or the embedding table and the output layer.
  """

  trainable: Sequence[str] = (r'.*/scale',)

  for_data, model, virtual_tokens = any_data, bare_network, no_virtual_tokens

  def initial(self, key: Array, base: Base, vocabulary: Any) -> PyTree:
    """Adds nothing."""
    return {}

  def save(self, path: pathlib.Path, trained: PyTree, base: Base, about: Mapping[str, Any]):
    """Writes the weights that trained as `path`.safetensors."""
    save_file(path, trained, base, about, method='part_tuning')


def _kernel_shape(path: str, kernel: Array) -> tuple[int, int]:
  if not path.endswith('/kernel'):
    raise ValueError(f'{path} is no kernel, of which LoRA and IA3 are changes.')
  return kernel.shape


def _by_layer(base: Base) -> dict[str, Any]:
  """{path: leaf}, sorted, of single layers: what starts at random starts alike if scanned."""
  return dict(sorted(layer_stack.unrolled(param_paths.flatten(base.params)).items()))


def _as_layers_are(leaves: Mapping[str, Array], config: Any) -> PyTree:
  """The tree of leaves of single layers, those of all layers as one where these are scanned."""
  return param_paths.unflatten(layer_stack.scanned(leaves) if config.scan_layers else leaves)

"""Many trained prompts beside one frozen base, any of them for any example of a batch.

A bank is a value: adding to it makes another. What is on the device has room to spare, so that
mostly another bank's arrays have the same shapes and nothing is compiled anew.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.networks import layers
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.prompted_model import Added
from prompt_tuning_jax.prompts import adapters, prefix, weight_changes
from prompt_tuning_jax.prompts.places import layers_at
from prompt_tuning_jax.prompts.soft_prompt import LayeredPrompt, SoftPrompt
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Slot:
  """What a bank adds for one example: ids in its input, and rows of prefixes, adapters, changes.

  Row 0 of each adds nothing, and so does the slot of the base alone, `Slot()`.
  """

  virtual: VirtualTokens | None = None
  prefix: int = 0
  adapter: int = 0
  change: int = 0

  @property
  def length(self) -> int:
    """How many tokens it adds to an input."""
    return self.virtual.length if self.virtual else 0


@dataclasses.dataclass(frozen=True, eq=False)
class PromptBank:
  """Prompt files {name: file} that belong to `base`, whose parameters are not needed.

  Takes soft prompts of any lengths and placements, prefixes, adapters (of one activation), LoRA and
  IA3. There is place for at least `room` virtual tokens, whatever the files take.

  Raises:
    ValueError: naming the file that does not belong to the base, or takes the place of the base's
      own leaves, so that it cannot share them.
  """

  base: Base
  files: Mapping[str, PromptFile] = dataclasses.field(default_factory=dict)
  room: int = 0

  def __post_init__(self):
    object.__setattr__(self, 'base', dataclasses.replace(self.base, params=None))
    object.__setattr__(self, 'files', dict(self.files))
    for name, file in self.files.items():
      self.check(name, file)
    activations = set(map(activation_of, self.files.values())) - {None}
    if len(activations) > 1:
      raise ValueError(f'The adapters of a bank need one activation, got {sorted(activations)}.')

  def check(self, name: str, file: PromptFile) -> None:
    """Raises ValueError, naming it, for a file that the bank cannot take."""
    try:
      prompt_file.check(file, self.base)
      parts(file, self.base.config)
      check_kinds(file)
      _check_changes(file, self.base.config)
    except ValueError as error:
      raise ValueError(f'{name}: {error}') from None

  def replaced(self, added: Mapping[str, PromptFile] | None = None,
               removed: Sequence[str] = ()) -> 'PromptBank':
    """The bank with other files; `self` stays as it is, and so do batches under way."""
    files = {name: file for name, file in self.files.items() if name not in removed}
    return dataclasses.replace(self, files={**files, **(added or {})})

  def slot(self, name: str | None) -> Slot:
    """Where a prompt is; None is the base alone. Raises KeyError for a name it does not have."""
    return self._slots[name] if name is not None else Slot()

  def added(self, slots: Sequence[Slot]) -> Added:
    """What the model takes for a batch of examples that have these slots."""
    rows = lambda kind: np.array([getattr(slot, kind) for slot in slots], np.int32)
    stored = self._stored
    return stored.replace(
        prefix=stored.prefix.replace(rows=rows('prefix')) if self._with('prefix') else Prefix(),
        adapters=(stored.adapters.replace(rows=rows('adapter')) if self._with('adapter')
                  else Adapters()),
        change_rows=rows('change') if stored.changes else None)

  @property
  def longest(self) -> int:
    """The most tokens that a prompt adds to an input."""
    return max((slot.length for slot in self._slots.values()), default=0)

  @property
  def virtual_tokens(self) -> int:
    """How many virtual tokens all of its prompts have."""
    return sum(slot.length for slot in self._slots.values())

  def _with(self, kind: str) -> list[str]:
    """The names, in order, of the files that have leaves of a kind."""
    return [name for name, file in self.files.items() if kind in map(_kind, file.params)]

  @functools.cached_property
  def _slots(self) -> dict[str, Slot]:
    slots, offset = {}, 0
    row = {kind: {name: i for i, name in enumerate(self._with(kind), 1)}
           for kind in ('prefix', 'adapter', 'change')}
    for name, file in self.files.items():
      virtual = None
      if (rows := file.params.get(prompt_file.EMBEDDING)) is not None:
        virtual = VirtualTokens(self.base.config.vocab_size, len(rows),
                                file.metadata.get('placement') or 'before', offset)
        offset += len(rows)
      slots[name] = Slot(virtual, **{kind: rows.get(name, 0) for kind, rows in row.items()})
    return slots

  @functools.cached_property
  def _stored(self) -> Added:
    return Added(self._embeddings(), self._prefixes(), self._adapters(), self._changes())

  def _embeddings(self) -> Array | None:
    names = self._with('prompt')
    if not names:
      return None
    rows = np.concatenate([self.files[name].params[prompt_file.EMBEDDING] for name in names])
    room = _capacity(max(len(rows), self.room)) - len(rows)
    return jnp.asarray(np.pad(rows, ((0, room), (0, 0)), constant_values=np.nan))

  def _prefixes(self) -> Prefix:
    names, config = self._with('prefix'), self.base.config
    if not names:
      return Prefix()
    leaves = [self.files[name].under('prefix') for name in names]
    count, length = _capacity(len(names) + 1), max(x.shape[2] for of in leaves for x in of.values())
    stacks, lengths = {}, {}
    for place, number in config.attentions.items():
      if any(place in of for of in leaves):
        stacks[place] = np.zeros((number, 2, count, length, config.num_heads, config.head_dim),
                                 np.float32)
        lengths[place] = np.zeros(count, np.int32)
      for i, of in enumerate(leaves, 1):
        if place in of:
          own = of[place].shape[2]
          stacks[place][:, :, i, :own], lengths[place][i] = of[place], own
    return Prefix(**jax.tree.map(jnp.asarray, stacks), lengths=jax.tree.map(jnp.asarray, lengths))

  def _adapters(self) -> Adapters:
    names = self._with('adapter')
    if not names:
      return Adapters()
    trees = [param_paths.unflatten(self.files[name].under('adapter')) for name in names]
    count, stacks = _capacity(len(names) + 1), {}
    for i, tree in enumerate(trees, 1):
      for place, leaves in tree.items():
        for leaf, x in leaves.items():
          shapes = [of[place][leaf].shape for of in trees if place in of]
          shape = tuple(map(max, zip(*shapes, strict=True)))  # Widths may differ.
          stack = stacks.setdefault(place, {}).setdefault(
              leaf, np.zeros((shape[0], count, *shape[1:]), np.float32))
          stack[(slice(None), i, *map(slice, x.shape[1:]))] = x
    activation = self.files[names[0]].metadata.get('activation', 'gelu')
    return Adapters(jax.tree.map(jnp.asarray, stacks), activation=activation)

  def _changes(self) -> dict[str, Array]:
    names = self._with('change')
    trees = [param_paths.unflatten({path: leaf for path, leaf in self.files[name].params.items()
                                    if _kind(path) == 'change'}) for name in names]
    spare = _capacity(len(names) + 1) - 1 - len(names)
    return weight_changes.stacked([{}, *trees, *[{}] * spare]) if names else {}


def activation_of(file: PromptFile) -> str | None:
  """That of its adapters, which all adapters of a bank must have; None where it has none."""
  return file.metadata.get('activation', 'gelu') if file.under('adapter') else None


def check_kinds(file: PromptFile) -> None:
  """Raises ValueError for a file that no bank can take, whatever the base."""
  for path in file.params:
    if _kind(path) is None:
      raise ValueError(
          f'it holds {path}, which the whole batch would have: batches of several prompts take '
          'soft prompts, prefixes, adapters, LoRA and IA3. Use it alone, with --prompt.')


def parts(file: PromptFile, config: Any) -> tuple[dict[str, nn.Module], VirtualTokens | None]:
  """The modules that own a file's leaves, and the ids of its prompt.

  Raises ValueError where the leaves are not those of such modules around this network.
  """
  modules, virtual = {}, None
  if (rows := file.params.get(prompt_file.EMBEDDING)) is not None:
    modules['prompt'] = SoftPrompt(len(rows), config.emb_dim)
  elif (rows := file.params.get(prompt_file.DEEP_EMBEDDING)) is not None:
    modules['prompt'] = LayeredPrompt(config.prompted_layers, rows.shape[1], config.emb_dim)
  if rows is not None:
    virtual = VirtualTokens(config.vocab_size, rows.shape[-2],
                            file.metadata.get('placement') or 'before')
  if prefixes := file.under('prefix'):
    first = next(iter(prefixes.values()))
    length = first.shape[2] if first.ndim > 2 else 0
    modules['prefix'] = prefix.DirectPrefix(length, layers_at(prefixes, config.attentions),
                                            config.num_heads, config.head_dim)
  if leaves := file.under('adapter'):
    modules['adapter'] = _adapters_of(leaves, file.metadata.get('activation', 'gelu'), config)
  expected = {}
  for name, module in modules.items():
    leaves = jax.eval_shape(module.init, jax.random.key(0))['params']
    expected.update(param_paths.flatten({name: leaves}))
  expected = {path: tuple(leaf.shape) for path, leaf in expected.items()}
  found = {path: leaf.shape for path, leaf in file.params.items()
           if path.partition('/')[0] in modules}
  if found != expected:
    raise ValueError(f'The prompt file holds {found}, but this base takes {expected}.')
  return modules, virtual


def _adapters_of(leaves: Mapping[str, Array], activation: str,
                 config: Any) -> adapters.BottleneckAdapters:
  """The module of a file's adapters {PLACE/NAME: leaf}; their width is that of any of them."""
  if activation not in layers.ACTIVATIONS:
    raise ValueError(f'The adapters have the activation {activation!r}; this version knows '
                     f'{tuple(layers.ACTIVATIONS)}.')
  width = next((leaf.shape[-1] for path, leaf in leaves.items()
                if path.endswith('/down') and leaf.ndim), 0)
  places = {path.partition('/')[0] for path in leaves}
  return adapters.BottleneckAdapters(width, config.emb_dim, layers_at(places, config.sublayers),
                                     activation)


def _check_changes(file: PromptFile, config: Any) -> None:
  """Raises ValueError where changes of kernels do not fit the network's."""
  changes = {path: leaf for path, leaf in file.params.items() if _kind(path) == 'change'}
  if changes and config.scan_layers:
    raise ValueError('LoRA and IA3 of a batch that mixes prompts take layers that are not scanned: '
                     'read the base without scan_layers.')
  if changes:
    kernels = param_paths.unflatten({path: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
                                     for path, spec in parameter_specs(config).items()})
    jax.eval_shape(weight_changes.combined, param_paths.unflatten(changes), kernels)


def _kind(path: str) -> str | None:
  """What a leaf is for a bank; None is what it cannot take."""
  first = path.partition('/')[0]
  if first in ('prefix', 'adapter'):
    return first
  if first in weight_changes.KINDS:
    return 'change'
  return 'prompt' if path == prompt_file.EMBEDDING else None


def _capacity(count: int) -> int:
  """The next power of two: room for some more."""
  return 1 << max(count - 1, 0).bit_length()

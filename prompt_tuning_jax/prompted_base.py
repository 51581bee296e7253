"""A base with a prompt file, ready to answer: what eval, infer and score start from."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import param_paths, prompt_bank
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks.parameters import logical_axes
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.prompt_bank import PromptBank, Slot
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.prompts.weight_changes import combined
from prompt_tuning_jax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class PromptedBase:
  """A predictor with its parameters, vocabulary and the prompt's metadata ({} without one).

  With a `bank`, every example names its prompt; without one all have the prompt that was loaded.
  `untuned` are the base's parameters alone, `identity` is what answers depend on, as JSON. `model`
  and `virtual` are what the predictor runs and writes into its inputs.
  """

  predictor: Predictor
  params: PyTree
  vocabulary: Vocabulary
  metadata: dict[str, Any]
  bank: PromptBank | None = None
  untuned: PyTree = None
  identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  model: PromptedModel | None = None
  virtual: VirtualTokens | None = None

  def slots(self, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Slot] | None:
    """The slots of [(place, fields), …]; None without a bank."""
    if self.bank is None:
      named = [place for place, row in rows if 'prompt' in row]
      if named and not self.identity.get('prompt'):
        raise ValueError(f'{named[0]} names a "prompt", but there is none: give --prompts=FOLDER '
                         '(or --prompt, one for all rows).')
      return None
    return [
        self.bank.slot(self.name(place, row)) for place, row in rows]

  def name(self, place: str, row: Mapping[str, Any]) -> str:
    """The prompt of the bank that a row's field "prompt" names.

    Raises ValueError with the nearest name for one that the bank does not have.
    """
    name = row.get('prompt')
    if not isinstance(name, str) or name not in self.bank.files:
      near = difflib.get_close_matches(str(name), self.bank.files, 1)
      what = ('there is no field "prompt"' if 'prompt' not in row else
              f'there is no prompt {str(name)[:40]!r}')
      hint = f' Did you mean {near[0]}?' if near else ''
      raise ValueError(f'{place}: {what}; the prompts are {", ".join(self.bank.files)}.{hint}')
    return name

  def about(self, place: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The metadata of a row's prompt."""
    return self.bank.files[self.name(place, row)].metadata if self.bank else self.metadata

  def labels(self, place: str, row: Mapping[str, Any]) -> list[str]:
    """The labels of a row's prompt; ValueError where it has none."""
    labels = self.about(place, row).get('labels')
    if not labels:
      raise ValueError(f'{place}: the prompt names no labels to rank: give --labels.')
    return labels

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
      cut = max_length is not None and len(ids) > max_length
      return np.asarray([*ids[:max_length - 1], ids[-1]] if cut else ids, np.int32)
    if not isinstance(text, str):
      raise ValueError(f'{place}: expected text in "{name}s" or ids in "{name}_tokens", got the '
                       f'fields {sorted(row)}.')
    ids = self.vocabulary.framed(self.vocabulary.encode(text), f'{name}s', max_length)
    return np.asarray(ids, np.int32)


def load(base: str, prompt: str | None = None, *, prompts: str | Mapping[str, str] | None = None,
         network: Any = None, vocabulary_file: str | None = None, dtype: str = 'float32',
         parameter_dtype: str | None = None, batch_size: int = 32,
         max_decode_length: int = 64, partitioner: Partitioner = Partitioner()) -> PromptedBase:
  """Reads base and prompts, and checks that they belong together (ValueError if not).

  `prompt` is one file, of any method; `prompts` {name: file}, or a folder of them, make a bank.
  `parameter_dtype` is that of the base's parameters, such as 'int8'; None is `dtype`.
  `partitioner` says how base and batches are split over devices.
  """
  file = prompt_file.load(prompt) if prompt else None
  files = None if prompts is None else read_prompts(prompts)
  loaded = base_checkpoint.load_base(base, config=network, vocabulary_file=vocabulary_file,
                                     dtype=parameter_dtype or dtype,
                                     sharding_for=partitioner.sharding_for(logical_axes))
  vocabulary = Vocabulary.of_base(loaded)
  config = dataclasses.replace(loaded.config, dtype=dtype)
  modules, virtual, params, metadata = {}, None, loaded.params, {}
  if file:
    prompt_file.check(file, loaded)
    metadata = file.metadata
    modules, virtual = prompt_bank.parts(file, config)
    params = _with_leaves(file, params)
  bank = None if files is None else PromptBank(loaded, files)
  model = PromptedModel(config.network(), **modules)
  predictor = Predictor(model, vocabulary, virtual, batch_size, max_decode_length, partitioner,
                        bank)
  identity = {'base': loaded.fingerprint, 'vocabulary': vocabulary.sha256, 'dtype': dtype,
              'parameter_dtype': parameter_dtype or dtype,
              'network': str(loaded.config),
              'prompt': file and file.sha256, 'batch_size': batch_size,
              'prompts': files and {name: each.sha256 for name, each in files.items()}}
  return PromptedBase(predictor, params, vocabulary, metadata, bank, loaded.params, identity,
                      model, virtual)


def read_prompts(prompts: str | Mapping[str, str]) -> dict[str, prompt_file.PromptFile]:
  """{name: file} of such paths, or of a folder's prompt files by name.

  Raises ValueError for an empty folder, or the first file that is none.
  """
  if isinstance(prompts, str):
    prompts = prompt_file.in_folder(prompts)
  return {name: prompt_file.load(path) for name, path in prompts.items()}


def _with_leaves(file: prompt_file.PromptFile, params: PyTree) -> PyTree:
  """The base's parameters with a file's: leaves beside them, changes of them, or in their place."""
  leaves, taken = param_paths.flatten(params), {}
  for path, leaf in file.params.items():
    if path in leaves:
      if leaf.shape != leaves[path].shape:
        raise ValueError(f'The prompt file holds {path} {list(leaf.shape)}, but in this base it is '
                         f'{list(leaves[path].shape)}.')
      leaf = jax.device_put(leaf.astype(leaves[path].dtype), leaves.pop(path).sharding)
    taken[path] = leaf
  return combined(param_paths.unflatten(taken), param_paths.unflatten(leaves))

"""Soft prompts read from files and folders, to be compared: named, and all of one base."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax import cloud_storage
from prompt_tuning_jax.analysis import similarity
from prompt_tuning_jax.checkpoints import peft_adapter, prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.types import Array

SUFFIXES = ('.safetensors', '.npy')
KEPT = ('format_version', 'placement', 'length', 'base', 'vocabulary')  # what an average inherits


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedPrompt:
  """A soft prompt [P, D] float32; `name` is its task, or its path where it has none.

  Where several have one task, the end of the path tells them apart.
  """

  name: str
  path: pathlib.Path
  embedding: np.ndarray
  metadata: dict[str, Any]

  @property
  def task(self) -> str:
    """The task it was trained on; '' where the file does not say."""
    return ' '.join((self.metadata.get('task') or '').split())


def read(paths: Iterable[str], target: str | None = None,
         ) -> tuple[list[TrainedPrompt], TrainedPrompt | None, list[str]]:
  """Reads prompt files and those in folders: (prompts, the target, why files were left out).

  Of a run's best.safetensors and last.safetensors in a folder, the best is taken. The target is no
  source, nor is what a folder holds of its task. Raises ValueError for a named file that holds no
  soft prompt or belongs to another base; one that was found in a folder is left out.
  """
  chosen = _read_one(pathlib.Path(cloud_storage.fetch(target)).resolve(), []) if target else None
  prompts, left_out = [chosen] if chosen else [], []
  for path, is_named in _files(paths).items():
    if chosen and path == chosen.path:
      continue
    try:
      made = _read_one(path, prompts)
      if chosen and not is_named and made.task and made.task == chosen.task:
        raise ValueError(f"{path} is a prompt of the target's own task.")
      if not is_named and 'sources' in made.metadata:
        raise ValueError(f'{path} is an average of others.')
      prompts.append(made)
    except (ValueError, OSError) as error:
      if is_named:
        raise
      left_out.append(str(error))
  named = _with_names(prompts)
  return (named[1:], named[0], left_out) if chosen else (named, None, left_out)


def average(sources: Sequence[TrainedPrompt], weights: Array) -> PromptFile:
  """The weighted average of sources, a prompt for a target to start from.

  It belongs to their base and to no task; `sources` in its metadata has names and weights.
  """
  embedding = similarity.weighted_average([source.embedding for source in sources], weights)
  about = next((source.metadata for source in sources if source.metadata), {})
  made_of = [{'name': source.name, 'weight': float(weight)}
             for source, weight in zip(sources, weights, strict=True)]
  return PromptFile({prompt_file.EMBEDDING: embedding},
                    {**{key: about[key] for key in KEPT if key in about},
                     'method': 'prompt_tuning', 'sources': made_of})


def _files(paths: Iterable[str]) -> dict[pathlib.Path, bool]:
  """{file: whether it was named, not found in a folder}, each file once."""
  files: dict[pathlib.Path, bool] = {}
  for given in paths:
    path = pathlib.Path(cloud_storage.fetch(given))
    if not path.is_dir() or peft_adapter.is_folder(path):
      files[path.resolve()] = True
      continue
    inside = sorted(path.rglob('*'))
    adapters = {found for found in inside if found.is_dir() and peft_adapter.is_folder(found)}
    for found in inside:
      is_prompt = found in adapters or found.suffix in SUFFIXES and found.is_file()
      is_hidden = any(part.startswith('.') for part in found.relative_to(path).parts)
      is_part = not adapters.isdisjoint(found.parents)
      if is_prompt and not is_hidden and not is_part and not _is_last(found):
        files.setdefault(found.resolve(), False)
  return files


def _is_last(path: pathlib.Path) -> bool:
  """Whether it is a run's last prompt, alone or of several tasks, and there is a best."""
  return (path.name == 'last.safetensors' and path.with_name('best.safetensors').exists()
          or path.parent.name == 'last' and (path.parent.parent / 'best' / path.name).exists())


def _read_one(path: pathlib.Path, others: Sequence[TrainedPrompt]) -> TrainedPrompt:
  """Reads a prompt; raises ValueError if it holds none, or does not belong with the others."""
  file = prompt_file.load(path)
  embedding = file.params.get(prompt_file.EMBEDDING)
  if embedding is None:
    raise ValueError(f'{path} holds no soft prompt {prompt_file.EMBEDDING}, but '
                     f'{next(iter(file.params))}: only files of prompt tuning can be compared.')
  made = TrainedPrompt('', path, embedding, file.metadata)
  for other in others:
    widths = embedding.shape[1], other.embedding.shape[1]
    if widths[0] != widths[1]:
      raise ValueError(f'{path} is a prompt {widths[0]} wide, but {other.path} is {widths[1]} '
                       'wide: only prompts of one base can be compared.')
    bases = [(prompt.metadata.get('base') or {}).get('fingerprint') for prompt in (made, other)]
    if None not in bases and bases[0] != bases[1]:
      raise ValueError(f'{path} was trained on the base {_base_of(made)}, but {other.path} on '
                       f'{_base_of(other)}: only prompts of one base can be compared.')
  return made


def _base_of(prompt: TrainedPrompt) -> str:
  base = prompt.metadata['base']
  return f'{base.get("name")} ({str(base["fingerprint"])[:12]})'


def _with_names(prompts: Sequence[TrainedPrompt]) -> list[TrainedPrompt]:
  labels = [prompt.task or prompt.path.name for prompt in prompts]
  named = []
  for prompt, label in zip(prompts, labels, strict=True):
    alike = [other.path for other, its in zip(prompts, labels, strict=True)
             if its == label and other is not prompt]
    name = label
    if alike:
      tail = _distinct_tail(prompt.path, alike)
      name = f'{prompt.task} ({tail})' if prompt.task else tail
    named.append(dataclasses.replace(prompt, name=name))
  return named


def _distinct_tail(path: pathlib.Path, others: Sequence[pathlib.Path]) -> str:
  """The shortest end of a path that is not the end of any other."""
  tails = ('/'.join(path.parts[-n:]) for n in range(1, len(path.parts)))
  return next((tail for tail in tails if not any(
      other.as_posix().endswith('/' + tail) for other in others)), path.as_posix())

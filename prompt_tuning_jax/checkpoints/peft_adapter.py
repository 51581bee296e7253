"""Folders of PEFT's prompt tuning: adapter_config.json and adapter_model.safetensors.

The rows stand under `prompt_embeddings`. For an encoder-decoder PEFT's own folders hold [2 P, D],
rows for an encoder and for a decoder, but its prompt tuning only ever uses the first P; here P are
written (num_transformer_submodules is 1). PEFT puts a prompt before the text and nowhere else.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np

from prompt_tuning_jax.checkpoints import prompt_file, safetensors_file
from prompt_tuning_jax.checkpoints.atomic_write import atomic_folder
from prompt_tuning_jax.checkpoints.hf_config import read_json, write_json
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile

CONFIG, WEIGHTS, PICKLE = 'adapter_config.json', 'adapter_model.safetensors', 'adapter_model.bin'
ROWS = 'prompt_embeddings'
KIND = 'PROMPT_TUNING'
TASK_TYPES = ('SEQ_2_SEQ_LM', 'CAUSAL_LM')  # of networks with and without an encoder
DTYPES = ('float32', 'float16', 'bfloat16')

Path = str | os.PathLike


def is_folder(folder: Path) -> bool:
  """Whether it is a folder of PEFT's, of whatever kind."""
  return (pathlib.Path(folder) / CONFIG).is_file()


def is_decoder_only(folder: Path) -> bool:
  """Whether the prompt of a folder belongs to a network without encoder; ValueError as `read`."""
  return _config(pathlib.Path(folder) / CONFIG)['task_type'] == TASK_TYPES[1]


def read(folder: Path) -> PromptFile:
  """Reads a folder as prompt/embedding: [P, D] float32, of P num_virtual_tokens.

  Metadata is what `write` kept of it; a folder of PEFT's own names its base, but has neither
  fingerprint nor labels. `prompt_file.load` checks both. Raises a one-line ValueError for an
  adapter of another kind and for anything malformed.
  """
  folder = pathlib.Path(folder)
  path = folder / CONFIG
  config = _config(path)
  length, width = (_positive(path, config, key) for key in ('num_virtual_tokens', 'token_dim'))
  is_second = config['task_type'] == TASK_TYPES[0]
  submodules = _positive(path, config, 'num_transformer_submodules', 2 if is_second else 1)
  if submodules > 1 and not is_second:
    raise ValueError(f'{path}: num_transformer_submodules is {submodules}, expected 1 for the '
                     f'task_type {TASK_TYPES[1]}.')
  header = _header(folder)
  rows = _rows(header, (length * submodules, width))[:length]
  if prompt_file.KEY in header.metadata:
    metadata = prompt_file._metadata(header.path, header)
  else:
    name = config.get('base_model_name_or_path')
    metadata = {'format_version': prompt_file.FORMAT_VERSION, 'method': 'prompt_tuning',
                'placement': 'before', 'length': length, 'base': {'d_model': width}}
    if isinstance(name, str) and name:
      metadata['base']['name'] = name
  return PromptFile({prompt_file.EMBEDDING: rows}, metadata)


def write(folder: Path, prompt: PromptFile, base_name: str | None, is_decoder_only: bool):
  """Writes what PEFT opens and `read` reads, the prompt's metadata included, whole or not at all.

  An older folder of these two files is replaced. Raises ValueError for any other that is not
  empty, and for what PEFT's prompt tuning cannot do: more or other than a soft prompt before the
  text.

  Args:
    base_name: what PEFT loads as the base, a folder or a name on Hugging Face's hub.
  """
  rows = rows_before_text(prompt)
  check_replaceable(folder)
  config = {'base_model_name_or_path': base_name, 'inference_mode': True,
            'num_transformer_submodules': 1, 'num_virtual_tokens': len(rows), 'peft_type': KIND,
            'prompt_tuning_init': 'RANDOM', 'task_type': TASK_TYPES[is_decoder_only],
            'token_dim': rows.shape[1]}
  about = {'format': 'pt'}
  if prompt.metadata:
    about[prompt_file.KEY] = json.dumps(prompt.metadata, allow_nan=False)
  with atomic_folder(folder, replace=True) as temporary:
    write_json(temporary / CONFIG, config)
    safetensors_file.write(temporary / WEIGHTS, {ROWS: ('float32', rows.shape)}, lambda _: rows,
                           about)


def soft_prompt(prompt: PromptFile, taker: str) -> np.ndarray:
  """The rows [P, D] float32 of a file that holds a soft prompt and nothing beside it.

  Raises ValueError for others, saying what `taker` takes: half of what was trained together would
  be another model.
  """
  others = sorted(set(prompt.params) - {prompt_file.EMBEDDING})
  if others or not prompt.params:
    more = f' and {len(others) - 1} more' if others[1:] else ''
    raise ValueError(f'{taker} takes a soft prompt alone ({prompt_file.EMBEDDING}: prompt tuning '
                     'at the input), no prefix, adapter, LoRA or prompt of every layer; this file '
                     f'holds {"".join(others[:1]) or "nothing"}{more}.')
  return np.asarray(prompt.params[prompt_file.EMBEDDING], np.float32)


def rows_before_text(prompt: PromptFile) -> np.ndarray:
  """The rows [P, D] of a prompt that PEFT can hold; raises ValueError for one that it cannot."""
  rows = soft_prompt(prompt, 'PEFT')
  placement = prompt.metadata.get('placement') or 'before'
  if placement != 'before':
    raise ValueError(f"PEFT takes prompts of the placement 'before', got one placed {placement!r}: "
                     'train one that stands before the text.')
  return rows


def check_replaceable(folder: Path):
  """Raises ValueError where writing a folder would delete anything but an older one like it."""
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    return
  others = sorted({path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS})
  if others:
    raise ValueError(f'{folder} exists and holds {others[0]}, which is nothing of a PEFT prompt: '
                     'write to another folder.')


def _config(path: pathlib.Path) -> dict[str, Any]:
  """adapter_config.json, known to be of prompt tuning for a task type that is known here."""
  config = read_json(path)
  kind, task = config.get('peft_type'), config.get('task_type')
  if kind != KIND:
    raise ValueError(f'{path}: peft_type is {kind!r}, expected {KIND!r}: of PEFT only prompt '
                     'tuning can be read.')
  if task not in TASK_TYPES:
    raise ValueError(f'{path}: task_type is {task!r}, expected one of {TASK_TYPES}: only prompts '
                     'of networks that write text can be read.')
  return config


def _positive(path: pathlib.Path, config: dict[str, Any], key: str,
              default: int | None = None) -> int:
  value = config.get(key)
  value = default if value is None else value
  if type(value) is not int or value < 1:
    raise ValueError(f'{path}: {key} should be a positive whole number, got {value!r}.')
  return value


def _header(folder: pathlib.Path) -> safetensors_file.Header:
  path = folder / WEIGHTS
  if path.is_file():
    return safetensors_file.read_header(path)
  if (folder / PICKLE).is_file():
    raise ValueError(f'{folder / PICKLE} is a pickle, which may run code and is not read: open it '
                     f'in PEFT and save it again with safe_serialization=True as {WEIGHTS}.')
  raise ValueError(f'{folder} has a {CONFIG} but no {WEIGHTS}: copy the folder again.')


def _rows(header: safetensors_file.Header, shape: tuple[int, int]) -> np.ndarray:
  """All rows as float32."""
  path = header.path
  if set(header.tensors) != {ROWS}:
    raise ValueError(f'{path} should hold {ROWS} and nothing else, got '
                     f'{", ".join(sorted(header.tensors)[:3]) or "nothing"}.')
  entry = header.tensors[ROWS]
  if entry.dtype not in DTYPES:
    raise ValueError(f'{path}: {ROWS} is {entry.dtype}, expected one of {", ".join(DTYPES)}.')
  if entry.shape != shape:
    raise ValueError(f'{path}: {ROWS} is {list(entry.shape)}, but {CONFIG} says {list(shape)} '
                     '(num_virtual_tokens x num_transformer_submodules, token_dim).')
  return header.read(ROWS).astype(np.float32)

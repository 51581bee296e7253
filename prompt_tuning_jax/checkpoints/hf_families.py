"""The table of the kinds of Hugging Face folders that are read and written."""

import pathlib
from typing import Any

from prompt_tuning_jax.checkpoints import hf_bart, hf_bert, hf_config, hf_gpt2, hf_t5
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile, read_json
from prompt_tuning_jax.checkpoints.hf_family import Family

# A network is written as the first that has its configuration's class.
FAMILIES = (hf_t5.T5, hf_t5.MT5, hf_gpt2.GPT2, hf_bart.BART, hf_bert.BERT)
DEFAULT = hf_t5.T5  # of a config.json without model_type, and of a folder without config.json


def of_type(model_type: str) -> Family | None:
  """The family of that name in config.json, or None."""
  return next((family for family in FAMILIES if family.model_type == model_type), None)


def of_folder(folder: pathlib.Path) -> Family:
  """The family that config.json names; raises ValueError for another."""
  path = folder / 'config.json'
  kind = read_json(path).get('model_type', DEFAULT.model_type)
  if not (family := of_type(kind)):
    raise ValueError(f'{path}: model_type is {kind!r}, expected one of '
                     f'{[family.model_type for family in FAMILIES]}.')
  return family


def of_configuration(config: Any) -> Family:
  """The family that a network is read and written as; raises ValueError for none."""
  for family in FAMILIES:
    if isinstance(config, family.configuration):
      return family
  raise ValueError(f'Hugging Face has no network of a {type(config).__name__}; there are those of '
                   f'{sorted({family.configuration.__name__ for family in FAMILIES})}.')


def has_network(config: Any) -> bool:
  """Whether a network can be written as a Hugging Face folder."""
  return any(isinstance(config, family.configuration) and family.fits(config)
             for family in FAMILIES)


def read_config(folder: pathlib.Path) -> Any:
  """The network that a folder's config.json describes."""
  path = folder / 'config.json'
  return of_folder(folder).read_config(path, read_json(path))


def find_vocabulary(folder: pathlib.Path) -> VocabularyFile | None:
  """The vocabulary that lies in a folder, with or without a config.json; None where there is none.
  """
  path = folder / 'config.json'
  kind = read_json(path).get('model_type') if path.is_file() else None
  family = of_type(kind) or DEFAULT
  return hf_config.find_vocabulary(folder, family.vocabulary_files, family.extra_ids)

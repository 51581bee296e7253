"""Which TFDS data the tasks of this package read, and whether it is there. Without TensorFlow."""

import ast
import json
import os
import pathlib
from collections.abc import Sequence

from etils import epath


def declared() -> dict[str, list[str]]:
  """{task: 'dataset/config:version' names} of every file's literal TFDS_DATASETS."""
  datasets = {}
  for path in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    for node in ast.parse(path.read_bytes()).body:
      if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'TFDS_DATASETS':
        datasets.update(ast.literal_eval(node.value))
  return datasets


def data_dir(given: str | None = None) -> str:
  """The folder TFDS reads: as given, else $TFDS_DATA_DIR, else TFDS's default."""
  return os.path.expanduser(given or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')


def missing(names: Sequence[str], folder: str) -> list[str]:
  """Those of the data sets that have not been prepared in `folder`."""
  return [name for name in names if _info(name, folder) is None]


def rows(names: Sequence[str], split: str, folder: str) -> int | None:
  """Rows of a split of all these prepared data sets together; None if one has no such split."""
  sizes = [_rows_of_splits(name, folder).get(split) for name in names]
  return sum(sizes) if sizes and None not in sizes else None


def how_to_prepare(task: str, names: Sequence[str], catalogue: Sequence[str], folder: str) -> str:
  """One line for the user; `catalogue` are the data sets that TFDS can make."""
  needed = missing(names, folder)
  if needed[0].partition(':')[0].partition('/')[0] in catalogue:
    how = (f'run `TFDS_DATA_DIR={folder} python -c "import tensorflow_datasets as tfds; '
           f"tfds.load('{needed[0]}')\"` where there is a network")
  else:
    how = 'build it there as a TFDS data set of that name (the TFDS catalogue does not have it)'
  return (f'Task {task} needs {", ".join(needed)}, not prepared in {folder}: give '
          f'--tfds_data_dir=FOLDER that has it, or {how}.')


def _info(name: str, folder: str) -> epath.Path | None:
  """The newest description of a data set, whose version may be left out or a wildcard."""
  dataset, _, version = name.partition(':')
  found = sorted((epath.Path(folder) / dataset).glob(f'{version or "*"}/dataset_info.json'))
  return found[-1] if found else None


def _rows_of_splits(name: str, folder: str) -> dict[str, int]:
  splits = json.loads(_info(name, folder).read_text(encoding='utf-8')).get('splits', [])
  return {split['name']: sum(map(int, split.get('shardLengths', []))) for split in splits}

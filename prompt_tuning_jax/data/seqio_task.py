"""A SeqIO task or mixture as a source of examples, tokenised by a process of its own.

Neither SeqIO nor TensorFlow is imported here: `build` starts `seqio_builder`, which does.
"""

import ast
import collections
import concurrent.futures
import dataclasses
import difflib
import fnmatch
import hashlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from prompt_tuning_jax.data import token_cache

logger = logging.getLogger(__name__)

BUILDER = 'prompt_tuning_jax.data.seqio_builder'
BUNDLED = 'prompt_tuning_jax.tasks'
TOKENISING = tuple(f'prompt_tuning_jax.{name}' for name in (
    'data.vocabulary', 'data.tokenizer', 'data.byte_level_bpe', 'data.word_piece',
    'tokenizer_file'))
MOST_PROCESSES = 16
BLOCK = 1024  # Rows; what is tokenised apart begins at a multiple.
LEAST_ROWS = 8 * BLOCK  # Fewer are tokenised sooner than another TensorFlow starts.


@dataclasses.dataclass(frozen=True)
class SeqioTask:
  """A task or mixture that SeqIO knows by `name` once `modules` have been imported.

  Args:
    modules: modules that register it, besides our own; of a package, every file is imported.
    tfds_data_dir: where prepared TFDS data lies; default $TFDS_DATA_DIR or ~/tensorflow_datasets.
    train_split, eval_split: SeqIO's names; eval_split None evaluates nothing.
    max_examples: keeps the first so many of each split.
    sentinel: begins every target with <extra_id_0>, as a base that has only filled in spans expects
      (Lester et al. 2021, section 3.2: "span corruption + sentinel").
    template: what inputs are written into, at its '{}': '{} It was [MASK].' for a BERT, whose
      answer stands under the mask. Of long texts, which are cut, it should stand in front.
  """

  name: str
  modules: tuple[str, ...] = (BUNDLED,)
  tfds_data_dir: str | None = None
  train_split: str = 'train'
  eval_split: str | None = 'validation'
  max_examples: int | None = None
  sentinel: bool = False
  template: str = '{}'

  def __post_init__(self):
    if not isinstance(self.name, str) or not self.name:
      raise ValueError(f"A task's name should be a text such as 'sst2', got {self.name!r}.")
    given = (self.modules,) if isinstance(self.modules, str) else self.modules
    object.__setattr__(self, 'modules', tuple(dict.fromkeys((BUNDLED, *given))))
    if self.max_examples is not None and self.max_examples < 1:
      raise ValueError(f'max_examples must be 1 or more, got {self.max_examples}.')
    check_template(self.template)

  def key_parts(self, split: str) -> dict[str, Any]:
    """What the tokens depend on besides split, vocabulary and lengths: code and data.

    Raises:
      ValueError: a task module does not exist, or TFDS data has not been prepared.
    """
    del split
    sources = [path for module in self.modules for path in module_files(module)]
    for module in (BUILDER, __name__, token_cache.__name__, *TOKENISING):
      sources += module_files(module)
    code = hashlib.sha256()
    for path in sources:
      code.update(path.read_bytes())
    return {'kind': 'seqio', 'modules': list(self.modules), 'code': code.hexdigest(),
            'max_examples': self.max_examples, 'sentinel': self.sentinel,
            'template': self.template, 'data': self._data()}

  def build(self, split: str, vocabulary, lengths: Mapping[str, int],
            folder: str | os.PathLike) -> None:
    """Writes a split's tokens into `folder` through `CacheWriter`, in a process of its own.

    Raises:
      ValueError: one line that says what is wrong with the task, its split or its data.
    """
    self.key_parts(split)  # Fails at once where modules or data are missing.
    request = {'task': self.name, 'modules': list(self.modules), 'split': split,
               'vocabulary': {'file': vocabulary.file, 'extra_ids': vocabulary.extra_ids},
               'lengths': dict(lengths), 'folder': str(folder), 'max_examples': self.max_examples,
               'sentinel': self.sentinel, 'template': self.template}
    blocks = [] if self.max_examples else self._blocks(split)
    if len(blocks) < 2:
      replies = [self._run(request)]
    else:
      parts = [f'{folder}/block{i}' for i in range(len(blocks))]
      with concurrent.futures.ThreadPoolExecutor(len(blocks)) as pool:
        replies = list(pool.map(self._run, [
            {**request, 'folder': part, 'block': block}
            for part, block in zip(parts, blocks, strict=True)]))
      _join(parts, folder)
    for warning in replies[0]['warnings']:
      logger.warning('%s', warning)

  def _run(self, request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply of a `seqio_builder` process; raises its error as a ValueError."""
    environment = {
        **os.environ, 'TFDS_DATA_DIR': tfds_data_dir(self.tfds_data_dir),
        'PYTHONPATH': os.pathsep.join(path or os.getcwd() for path in sys.path),
        # The accelerator belongs to the training process.
        'CUDA_VISIBLE_DEVICES': '-1', 'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '3'}
    done = subprocess.run([sys.executable, '-m', BUILDER, json.dumps(request)], env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    try:
      reply = json.loads(done.stdout)
    except json.JSONDecodeError:
      said = done.stderr.strip().splitlines()
      how = (f'was killed by signal {-done.returncode} (9 is often: out of memory)'
             if done.returncode < 0 else f'ended with status {done.returncode}: '
             f'{said[-1] if said else "it said nothing"}')
      reply = {'error': f'the process that tokenises {self.name} {how}'}
    if 'error' in reply:
      raise ValueError(reply['error'])
    return reply

  def _blocks(self, split: str) -> list[tuple[int, int | None]]:
    """Ranges of source rows that processes tokenise side by side; [] where that is not worth it.

    Only for our own tasks, which look at rows one by one or in groups of 1,024 and do not care
    where a block begins, and only for whole splits. The last block has no end: a source may have
    more rows than the data set (one for each of several answers), or fewer (a part of a split).
    """
    sizes = [_split_sizes(name, tfds_data_dir(self.tfds_data_dir)).get(split)
             for name in _declared((BUNDLED,)).get(self.name, ())]
    if not sizes or None in sizes:
      return []
    workers = min(_cores(), MOST_PROCESSES, sum(sizes) // LEAST_ROWS)
    if workers < 2:
      return []
    size = -(-sum(sizes) // workers // BLOCK) * BLOCK
    starts = list(range(0, sum(sizes), size))
    return list(zip(starts, [*starts[1:], None], strict=True))

  def _data(self) -> dict[str, str] | str:
    """{TFDS name: SHA-256 of its description}, or the data folder of tasks that do not tell."""
    folder = tfds_data_dir(self.tfds_data_dir)
    declared = _declared(self.modules)
    if self.name not in declared and self.modules == (BUNDLED,):
      near = difflib.get_close_matches(self.name, declared, 3, cutoff=0.5) or sorted(declared)[:3]
      raise ValueError(f'There is no task {self.name!r}: is it {", ".join(near)}, or does another '
                       'module register it (SeqioTask.modules)? Ours are listed by `python -m '
                       'prompt_tuning_jax.tasks`.')
    if self.name not in declared or '://' in folder:  # The builder looks into those.
      return folder
    check_prepared(declared[self.name], folder)
    return {name: hashlib.sha256(b''.join(path.read_bytes() for path in _infos(name, folder)))
            .hexdigest() for name in declared[self.name]}


def tfds_data_dir(given: str | None = None) -> str:
  """The folder TFDS reads: as given, else $TFDS_DATA_DIR, else TFDS's default."""
  return os.path.expanduser(given or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')


def check_prepared(names: Iterable[str], folder: str) -> None:
  """Raises a ValueError that says what to run if a 'dataset/config:version' is not in `folder`."""
  missing = [name for name in names if not _infos(name, folder)]
  if not missing:
    return
  dataset = missing[0].split(':')[0]
  if dataset.startswith('local_text/'):
    how = (f'build a TFDS dataset `{dataset}` with a feature `text` and the splits train and '
           'validation there')
  else:
    how = (f'run `TFDS_DATA_DIR={folder} python -c "import tensorflow_datasets as tfds; '
           f"tfds.load('{missing[0]}')\"` (or `tfds build {dataset}`) where there is a network")
  raise ValueError(f'TFDS data {", ".join(missing)} has not been prepared in {folder}: set '
                   f'TFDS_DATA_DIR to the folder that has it, or {how}.')


def module_files(module: str) -> list[pathlib.Path]:
  """A module's file, or every Python file of a package's folder, found without importing it."""
  try:
    spec = importlib.util.find_spec(module)
  except ModuleNotFoundError:
    spec = None
  if spec is None or not (spec.origin or spec.submodule_search_locations):
    raise ValueError(f'There is no task module {module!r}: install it, or run where it can be '
                     'imported (PYTHONPATH).')
  if not spec.submodule_search_locations:
    return [pathlib.Path(spec.origin)]
  folders = map(pathlib.Path, spec.submodule_search_locations)
  return sorted(path for folder in folders for path in folder.glob('*.py'))


def _infos(name: str, folder: str) -> list[epath.Path]:
  """Descriptions of the prepared datasets that a name, perhaps with a wildcard version, means."""
  dataset, _, version = name.partition(':')
  if not re.fullmatch(r'[\w./*-]+', dataset + version):
    return []
  try:
    versions = [each for each in (epath.Path(folder) / dataset).iterdir()
                if fnmatch.fnmatchcase(each.name, version or '*')]
    return sorted(info for each in versions if (info := each / 'dataset_info.json').exists())
  except OSError:
    return []


def _cores() -> int:
  """Those that this process may use."""
  affinity = getattr(os, 'sched_getaffinity', None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def _declared(modules: Iterable[str]) -> dict[str, list[str]]:
  """TFDS names of the tasks that the modules' TFDS_DATASETS list."""
  declared = {}
  for module in modules:
    for path in module_files(module):
      declared.update(_declared_datasets(path))
  return declared


def _split_sizes(name: str, folder: str) -> dict[str, int]:
  """{split: rows} of a prepared TFDS dataset."""
  infos = _infos(name, folder)
  splits = json.loads(infos[-1].read_text()).get('splits', ()) if infos else ()
  return {split['name']: sum(map(int, split.get('shardLengths', ()))) for split in splits}


def _join(parts: list[str], folder: str | os.PathLike) -> None:
  """One cache of those of successive blocks, which are removed; a block may be empty."""
  writer, cut, hidden = token_cache.CacheWriter(folder), collections.Counter(), None
  for part in parts:
    meta = token_cache.open_cache(part).meta
    if not meta['num_examples']:
      shutil.rmtree(part)
      continue
    if hidden is None and meta['first_hidden'] is not None:
      hidden = writer.num_examples + meta['first_hidden']
    writer.extend(part)
    cut.update(meta['num_cut'])
    shutil.rmtree(part)
  about = {key: meta[key] for key in ('metrics', 'postprocessor', 'tasks', 'sentinel')}
  writer.close(**about, num_cut=dict(cut), first_hidden=hidden)


def _declared_datasets(path: pathlib.Path) -> dict[str, list[str]]:
  """The literal TFDS_DATASETS of a source file; empty if it has none."""
  for node in ast.parse(path.read_bytes()).body:
    if isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == 'TFDS_DATASETS' for target in node.targets):
      return ast.literal_eval(node.value)
  return {}


def check_template(template: str) -> None:
  """Raises ValueError for what inputs cannot be written into."""
  if not isinstance(template, str) or template.count('{}') != 1:
    raise ValueError("template should be a text with one '{}', where inputs stand, got "
                     f'{template!r}.')

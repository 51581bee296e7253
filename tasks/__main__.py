"""Which tasks there are: `python -m prompt_tuning_jax.tasks`; with names, what their rows are.

Reads prepared data only and never downloads.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence

from prompt_tuning_jax.tasks import prepared

SHOWN = 600  # Characters of a text.


def main(argv: list[str]) -> int:
  """Returns the exit status: 1 for data that is not there, 2 for a task that is not."""
  parser = argparse.ArgumentParser(
      prog='python -m prompt_tuning_jax.tasks', allow_abbrev=False,
      description='Lists the tasks, or shows an example of those named. Sizes are rows of the data '
                  'sets; ? is a split that the prepared data lacks or whose size is not known.')
  parser.add_argument('names', nargs='*', metavar='TASK', help='show these')
  parser.add_argument('--tfds_data_dir', metavar='FOLDER',
                      help='prepared data (default $TFDS_DATA_DIR or ~/tensorflow_datasets)')
  flags = parser.parse_args(argv)
  folder, datasets = prepared.data_dir(flags.tfds_data_dir), prepared.declared()
  for name in flags.names:
    if name not in datasets:
      nearest = difflib.get_close_matches(name, datasets, 1, cutoff=0)[0]
      print(f'There is no task {name!r}: is it {nearest!r}? Without names, all are listed.',
            file=sys.stderr)
      return 2
  os.environ['TFDS_DATA_DIR'] = folder  # TFDS reads it when it is imported.
  unprepared = [name for name in flags.names if prepared.missing(datasets[name], folder)]
  with _quiet():
    if unprepared:
      import tensorflow_datasets as tfds
      lines = [prepared.how_to_prepare(unprepared[0], datasets[unprepared[0]],
                                       tfds.list_builders(with_community_datasets=False), folder)]
    else:
      _import_tasks()
      lines = ([line for name in flags.names for line in _shown(name, datasets, folder)]
               if flags.names else _table(datasets, folder))
  print('\n'.join(lines), file=sys.stderr if unprepared else sys.stdout)
  return int(bool(unprepared))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TensorFlow writes to the standard error past Python. An exception's traceback comes later."""
  os.environ.update(TF_CPP_MIN_LOG_LEVEL='3', CUDA_VISIBLE_DEVICES='-1')
  sys.stderr.flush()
  kept = os.dup(2)
  with open(os.devnull, 'wb') as nowhere:
    os.dup2(nowhere.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)


def _import_tasks() -> None:
  package = importlib.import_module('prompt_tuning_jax.tasks')
  for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f'{package.__name__}.{module.name}')


def _find(name: str):
  import seqio
  return seqio.get_mixture_or_task(name)


def _table(datasets: Mapping[str, Sequence[str]], folder: str) -> list[str]:
  """A line for each task, with all its names."""
  names_of: dict[tuple, list[str]] = {}
  for name in sorted(datasets, key=lambda name: (len(name), name)):
    names_of.setdefault(_identity(_find(name)), []).append(name)
  rows = [('TASK', 'METRICS', 'SPLITS')]
  for name, *others in sorted(names_of.values()):
    missing = prepared.missing(datasets[name], folder)
    rows.append((', '.join([name, *others]), _metrics(_find(name)),
                 f'not prepared: {", ".join(missing)}' if missing else
                 _told(_sizes(_find(name), datasets[name], folder))))
  widths = [max(len(row[i]) for row in rows) for i in range(2)]
  return [f'{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}' for row in rows]


def _identity(task) -> tuple:
  """The same for the several names of a task; a mixture has one name."""
  if not hasattr(task, 'source'):
    return (task.name,)
  return tuple(map(id, (task.source, *task.preprocessors, *task.metric_fns)))


def _metrics(task) -> str:
  functions = getattr(task, 'metric_fns', ())
  return ', '.join(getattr(f, 'func', f).__name__ for f in functions) or '-'


def _sizes(task, names: Sequence[str], folder: str) -> dict[str, int | None]:
  """{split: rows}; to be called only where the data is prepared: else TFDS asks the network."""
  sizes = {}
  for split in task.splits:
    try:
      sizes[split] = task.num_input_examples(split) or prepared.rows(names, split, folder)
    except (KeyError, TypeError, ValueError):  # No such split; in a mixture, one of no known size.
      sizes[split] = None
  return sizes


def _told(sizes: Mapping[str, int | None]) -> str:
  return ', '.join(f'{split} {size:,}' if size else f'{split} ?' for split, size in sizes.items())


def _shown(name: str, datasets: Mapping[str, Sequence[str]], folder: str) -> list[str]:
  """A task's facts and its example, a line each."""
  import seqio

  from prompt_tuning_jax.tasks import example
  task, sizes = _find(name), _sizes(_find(name), datasets[name], folder)
  others = [other for other in datasets
            if other != name and _identity(_find(other)) == _identity(task)]
  facts = {'data': ', '.join(datasets[name]) or 'none: made up in its file',
           'splits': _told(sizes), 'metrics': _metrics(task)}
  if not hasattr(task, 'source'):
    facts['tasks'] = ', '.join(sorted(part.name for part in seqio.get_subtasks(task)))
  else:
    labels = getattr(task.postprocessor, 'keywords', {}).get('label_classes')
    facts |= {'labels': ', '.join(labels)} if labels else {}
    known = [split for split in ('validation', *sizes) if sizes.get(split)] or list(sizes)
    facts |= {'example': f'the first of {known[0]}', **example.first(task, known[0])}
  title = f'{name} (also {", ".join(others)})' if others else name
  return [title, *(f'  {key:8} {_line(value)}' for key, value in facts.items()), '']


def _line(text: str) -> str:
  text = text.replace('\n', '\\n')
  return text if len(text) <= SHOWN else f'{text[:SHOWN]} … ({len(text):,} characters)'


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

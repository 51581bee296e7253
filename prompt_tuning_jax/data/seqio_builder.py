"""The process that runs SeqIO: `python -m prompt_tuning_jax.data.seqio_builder REQUEST`.

REQUEST is what `SeqioTask.build` writes as JSON. Tokens go to `folder` through `CacheWriter`; the
answer on standard output is one JSON object, {"num_examples", "warnings"} or {"error"}. The only
file of the package that imports SeqIO and TensorFlow.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import pkgutil
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from prompt_tuning_jax.data.seqio_task import check_prepared, tfds_data_dir
from prompt_tuning_jax.data.token_cache import (
    FEATURES,
    SENTINEL,
    CacheWriter,
    without_sentinel,
)
from prompt_tuning_jax.data.vocabulary import Vocabulary

Row = tuple[np.ndarray, np.ndarray, dict[str, Any] | None]
HIDDEN = '<unk>'  # T5's target of examples whose label a benchmark keeps to itself.
MOST_REPEATS = 20  # A mixture's epoch may be so many times larger than its tasks together.


def main(argv: list[str]) -> int:
  answer_to = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # Whatever libraries print must not mix with the answer.
  threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
  try:
    answer = build(**json.loads(argv[0]))
  except Exception as error:  # Told in one line; the stack goes to standard error.
    traceback.print_exc()
    answer = {'error': _one_line(error)}
  answer_to.write(json.dumps(answer))
  answer_to.close()
  return int('error' in answer)


def _end_with(parent: int) -> None:
  """Ends this process once the one that started it has ended, killed or not."""
  while os.getppid() == parent:
    time.sleep(1)
  os._exit(1)


def _one_line(error: Exception) -> str:
  """Our own errors as they are, others with their place."""
  place = traceback.extract_tb(error.__traceback__)[-1]
  file = pathlib.Path(place.filename)
  if isinstance(error, ValueError) and file.parent == pathlib.Path(__file__).parent:
    return str(error)
  message = (str(error).strip().splitlines() or [''])[0]
  return f'Tokenising failed: {type(error).__name__}: {message} ({file.name}, line {place.lineno}).'


def build(task: str, modules: list[str], split: str, vocabulary: Mapping[str, Any],
          lengths: Mapping[str, int], folder: str, max_examples: int | None,
          sentinel: bool = False, template: str = '{}',
          block: tuple[int, int | None] | None = None) -> dict[str, Any]:
  """Tokenises a split, or the source's rows [start, stop) of it, into `folder`.

  The other arguments are those of `SeqioTask`.
  """
  _quiet_tensorflow()
  import_tasks(modules)
  provider, words = find(task), Vocabulary(**vocabulary)
  if sentinel and not words.extra_ids:
    raise ValueError('The vocabulary has no sentinels to begin targets with: leave out `sentinel`.')
  if block:
    provider = provider.replace(source=_part(provider.source, *block))
  parts = _tasks_with_split(provider, split)
  metas = {part.name: _evaluation(part) for part in parts}
  # Tasks evaluated in the same way can be evaluated together; others are trained on only.
  shared = all(meta == metas[parts[0].name] for meta in metas.values())
  meta = metas[parts[0].name] if shared else {'metrics': [], 'postprocessor': None}
  cut = dict.fromkeys(FEATURES, 0)
  streams = {part.name: _rows(_rewritten(part, sentinel, template), split, words, lengths,
                              max_examples, bool(meta['metrics']), cut) for part in parts}
  rows = (streams[task] if len(parts) == 1 and parts[0].name == task
          else _mix(provider, parts, streams, max_examples))
  writer, hidden = CacheWriter(folder), None
  hidden_text = f'{SENTINEL} {HIDDEN}' if sentinel else HIDDEN
  pieces = words.encode(hidden_text)
  is_whole = len(words.framed(pieces, 'targets')) <= lengths['targets']
  hidden_target = words.framed(pieces, 'targets', lengths['targets'])
  for inputs, targets, row in rows:
    if hidden is None and np.array_equal(targets, hidden_target) and (
        is_whole or row is not None and row['targets'] == hidden_text):  # others are cut alike
      hidden = writer.num_examples
    writer.add(inputs, targets, row)
  writer.close(**meta, num_cut=cut, tasks=sorted(metas), first_hidden=hidden,
               sentinel=sentinel)
  warnings = [] if shared else [
      f'The tasks of {task} have different metrics: name one of {", ".join(sorted(metas))} to '
      'evaluate it.']
  return {'num_examples': writer.num_examples, 'warnings': warnings}


def _rewritten(task, sentinel: bool, template: str):
  """The task with inputs in the template, and SENTINEL, if so, before every target and choice."""
  import seqio
  import tensorflow as tf
  if not sentinel and template == '{}':
    return task
  head, tail = template.split('{}')

  def add(row):
    before = lambda text: tf.strings.join([SENTINEL, text], separator=' ')
    changed = {key: before(row[key]) for key in ('targets', 'choices') if sentinel and key in row}
    if 'inputs' in row:
      changed['inputs'] = tf.strings.join([head, row['inputs'], tail])
    return {**row, **changed}

  steps = list(task.preprocessors)
  names = [getattr(step, 'func', step) for step in steps]
  if seqio.preprocessors.tokenize not in names:
    raise ValueError(f'Task {task.name} has no step seqio.preprocessors.tokenize, before which '
                     'texts are changed: leave out `sentinel` and `template`.')
  steps.insert(names.index(seqio.preprocessors.tokenize), lambda dataset: dataset.map(add))
  return task.replace(preprocessors=steps)


def _part(source, start: int, stop: int | None):
  """The rows [start, stop) of a data source; all from `start` on where `stop` is None."""
  import seqio

  def rows(split: str, shuffle_files: bool, seed: int | None = None):
    return source.get_dataset(split, shuffle=shuffle_files, seed=seed).skip(start).take(
        -1 if stop is None else stop - start)

  return seqio.FunctionDataSource(rows, splits=tuple(source.splits))


def _quiet_tensorflow() -> None:
  import absl.logging
  import tensorflow as tf
  absl.logging.set_verbosity(absl.logging.ERROR)
  tf.get_logger().setLevel('ERROR')
  tf.config.set_visible_devices([], 'GPU')


def import_tasks(modules: Iterable[str]) -> None:
  """Imports modules that register tasks; of a package, every file."""
  for name in modules:
    try:
      module = importlib.import_module(name)
      for child in pkgutil.iter_modules(getattr(module, '__path__', [])):
        importlib.import_module(f'{name}.{child.name}')
    except ImportError as error:
      raise ValueError(f'Task module {name!r} cannot be imported: {error}.') from error


def find(name: str):
  """SeqIO's task or mixture of that name; raises ValueError with the nearest names."""
  import seqio
  try:
    return seqio.get_mixture_or_task(name)
  except ValueError:
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    close = difflib.get_close_matches(name, known) or known[:5]
    raise ValueError(f'SeqIO knows no task or mixture {name!r}: is it {", ".join(close)}, or does '
                     'another module register it (SeqioTask.modules)?') from None


def _tasks_with_split(provider, split: str) -> list:
  """The task, or a mixture's tasks, that have the split, once their data is there."""
  import seqio
  tasks = list(seqio.get_subtasks(provider))
  for task in tasks:
    dataset = getattr(task.source, 'tfds_dataset', None)
    if dataset is not None and dataset.name:
      check_prepared([dataset.name], dataset.data_dir or tfds_data_dir())
  name = split.split('[')[0]
  having = [task for task in tasks if name in task.splits or split in task.splits]
  if not having:
    raise ValueError(f'{provider.name} has no split {split!r}, but '
                     f'{", ".join(sorted({s for task in tasks for s in task.splits}))}.')
  return having


def _rows(task, split: str, words: Vocabulary, lengths: Mapping[str, int],
          max_examples: int | None, evaluated: bool, cut: dict[str, int]) -> Iterator[Row]:
  """Trimmed tokens with EOS of every example; counts in `cut` what was trimmed."""
  import seqio
  features = {
      key: dataclasses.replace(feature, vocabulary=words.as_seqio())
      if hasattr(feature, 'vocabulary') else feature
      for key, feature in task.output_features.items()}
  if 'targets' not in features or not set(features) <= set(FEATURES):
    raise ValueError(f'Task {task.name} has the features {", ".join(features)}; expected targets '
                     'and, except for language models, inputs.')
  assert isinstance(task, seqio.Task)
  # Tasks leave room for what texts begin with.
  room = {key: lengths[key] - len(words.begins(key)) for key in features}
  try:
    dataset = task.replace(output_features=features).get_dataset(
        sequence_length=room, split=split, shuffle=False, seed=0,
        num_epochs=1)
  except KeyError as error:
    raise ValueError(_missing_field(task, split, str(error))) from error
  except ValueError as error:
    if 'Unknown split' not in str(error):
      raise
    raise ValueError(f'The prepared data of {task.name} has no split {split!r}: '
                     f'{str(error).splitlines()[0]}') from error
  if max_examples is not None:
    dataset = dataset.take(max_examples)
  for place, example in _numbered(dataset, f'{task.name}, {split}'):
    tokens = {}
    for key in FEATURES:
      ids = np.asarray(example.get(key, ()), np.int32)
      text = example.get(f'{key}_pretokenized')
      if key in features and features[key].add_eos:
        _check_text(key, ids[ids != words.eos_id], text, place)
        ids = _with_eos(ids, words.eos_id, room[key])
        cut[key] += _is_cut(ids, text, words, room[key])
        ids = np.concatenate([np.asarray(words.begins(key), np.int32), ids])
      tokens[key] = ids
    yield tokens['inputs'], tokens['targets'], (
        _row(task, example, tokens, words) if evaluated else None)


def _missing_field(task, split: str, message: str) -> str:
  """What a preprocessor looked for, and what there is."""
  looked_for = re.findall(r"'(\w+)'", message.splitlines()[-1] or message)
  fields = sorted(task.source.get_dataset(split, shuffle=False, seed=0).element_spec)
  return (f'{task.name}, {split}: the rows have no field {looked_for[-1] if looked_for else "?"}, '
          f'but {", ".join(fields)}: is this the data set (and version) that the task is for?')


def _numbered(dataset, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
  """('TASK, SPLIT, row N', example); what a preprocessor refuses is told with its place."""
  import tensorflow as tf
  examples, i = dataset.as_numpy_iterator(), 0
  while True:
    place = f'{name}, row {i}'
    try:
      example = next(examples, None)
    except (tf.errors.InvalidArgumentError, tf.errors.DataLossError) as error:
      # Read ahead and in parallel, so it may be a few rows further on.
      said = next((line for line in error.message.splitlines() if line.strip()), '')
      raise ValueError(f'{place} or soon after: {said.strip()}') from error
    if example is None:
      return
    yield place, example
    i += 1


def _check_text(key: str, ids: np.ndarray, text: bytes | None, place: str) -> None:
  """Raises ValueError for an empty target, and for text that is not UTF-8."""
  if key == 'targets' and not len(ids):
    raise ValueError(f'{place}: the target is empty ({text!r}): correct the data, or drop such '
                     'rows in the task.')
  if isinstance(text, bytes):
    try:
      text.decode('utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{place}: the {key} are not UTF-8 ({error.reason} at byte {error.start}): '
                       f'{text[max(0, error.start - 20):error.start + 20]!r}.') from None


def _with_eos(ids: np.ndarray, eos: int, length: int) -> np.ndarray:
  ids = ids[:length]
  if len(ids) and ids[-1] == eos:
    return ids
  return np.append(ids[:length - 1], np.int32(eos))


def _is_cut(ids: np.ndarray, text: bytes | None, words: Vocabulary, length: int) -> bool:
  """Whether a text has more tokens than were kept; only full rows have to be looked at."""
  if len(ids) < length or not isinstance(text, bytes):
    return False
  return len(words.encode(text.decode('utf-8', 'replace'))) + 1 > length


def _row(task, example: Mapping[str, Any], tokens: Mapping[str, np.ndarray],
         words: Vocabulary) -> dict[str, Any]:
  """What evaluation needs of an example (see `CacheWriter.add`)."""
  plain = {key: _plain(value) for key, value in example.items()}
  texts = {key: plain.get(f'{key}_pretokenized', words.decode(tokens[key])) for key in FEATURES}
  hidden = {*FEATURES, 'choices', *(f'{key}_pretokenized' for key in FEATURES)}
  other = {key: value for key, value in plain.items() if key not in hidden}
  target = without_sentinel(texts['targets'])
  if task.postprocessor:
    target = task.postprocess_fn(target, example={**other, **texts}, is_target=True)
  row = {**texts, 'target': _plain(target), 'example': other}
  if 'choices' in plain:
    row['choices'] = plain['choices']
  return row


def _mix(mixture, tasks: list, streams: Mapping[str, Iterator[Row]],
         max_examples: int | None) -> Iterator[Row]:
  """One epoch of a mixture: tasks at their rates, every example of each at least once.

  Tasks with few examples for their rate are repeated; with `max_examples` all together have so
  many. Rows of the tasks stand evenly between one another.
  """
  rows = {name: list(stream) for name, stream in streams.items()}
  rates = {task.name: float(mixture.get_rate(task)) for task in tasks}
  rows = {name: some for name, some in rows.items() if some and rates[name] > 0}
  if not rows:
    raise ValueError(f'The tasks of mixture {mixture.name} have no examples, or rates of 0.')
  size = sum(map(len, rows.values()))
  share = {name: rates[name] / sum(rates[name] for name in rows) for name in rows}
  total = max_examples or max(len(some) / share[name] for name, some in rows.items())
  if total > MOST_REPEATS * max(size, max_examples or 0):
    raise ValueError(f'Showing every example of mixture {mixture.name} at its rates takes '
                     f'{total:.0f} examples of {size}: set max_examples or more even rates.')
  counts = {name: max(1, round(total * share[name])) for name in rows}
  places = [((i + 0.5) / count, name, i) for name, count in counts.items() for i in range(count)]
  for _, name, i in sorted(places):
    yield rows[name][i % len(rows[name])]


def _evaluation(task) -> dict[str, Any]:
  """The names under which the training process finds a task's metrics and postprocessor."""
  if task.metric_objs and not task.metric_fns:
    raise ValueError(f'Task {task.name} has metric_objs: give it metric_fns(targets, predictions).')
  metrics = [_name(function, task.name) for function in task.predict_metric_fns]
  if len(metrics) != len(task.metric_fns):
    raise ValueError(f'Task {task.name} has metrics of scores: only functions of '
                     '(targets, predictions) can be computed.')
  if not metrics or task.postprocessor is None:
    return {'metrics': metrics, 'postprocessor': None}
  function, kwargs = task.postprocessor, {}
  if isinstance(function, functools.partial):
    if function.args:
      raise ValueError(f'The postprocessor of {task.name} is a partial with positional arguments: '
                       'give them by keyword.')
    function, kwargs = function.func, function.keywords
  return {'metrics': metrics,
          'postprocessor': {'name': _name(function, task.name),
                            'kwargs': {key: _plain(value) for key, value in kwargs.items()}}}


def _name(function: Callable, task: str) -> str:
  """'module:qualname' of a function that another process can import."""
  name = f'{getattr(function, "__module__", "?")}:{getattr(function, "__qualname__", "?")}'
  if '<' in name or '?' in name or name.startswith('__main__:'):
    raise ValueError(f'Task {task} uses {name}, which cannot be found by name: define it at the '
                     'top of a module that does not import SeqIO.')
  return name


def _plain(value: Any) -> Any:
  """An example's field as JSON knows it."""
  if isinstance(value, bytes):
    return value.decode('utf-8', 'replace')
  if isinstance(value, np.ndarray | np.generic):
    return _plain(value.tolist())
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  return value


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))

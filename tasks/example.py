"""What one row of a SeqIO task looks like, as texts."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import seqio

LENGTHS = {'inputs': 160, 'targets': 160}  # Of a row that is made of tokens, here bytes.
EXTRA_IDS = 100


def first(task: seqio.Task, split: str) -> dict[str, str]:
  """A split's first row before it is tokenised.

  Returns:
    'inputs' and 'targets', 'choices' if there are any, and if the task has a postprocessor,
    'answer', what it makes of the target, and 'metrics', the names of their numbers.
  """
  steps = list(task.preprocessors)
  if seqio.preprocessors.tokenize not in steps:
    return _of_tokens(task, split)
  dataset = task.source.get_dataset(split, shuffle=False)
  for step in steps[:steps.index(seqio.preprocessors.tokenize)]:
    known = {'sequence_length': LENGTHS, 'output_features': task.output_features}
    dataset = step(dataset, **{key: value for key, value in known.items()
                               if key in inspect.signature(step).parameters})
  row = _plain(next(dataset.as_numpy_iterator()))
  shown = texts = {key: row.pop(key) for key in LENGTHS if key in row}
  if 'choices' in row:
    shown = {**shown, 'choices': ', '.join(row.pop('choices'))}
  if task.postprocessor:
    target, prediction = (task.postprocess_fn(texts['targets'], example={**row, **texts},
                                              is_target=side) for side in (True, False))
    shown = {**shown, 'answer': repr(target),
             'metrics': ', '.join(name for function in task.metric_fns
                                  for name in _numbers(function, target, prediction))}
  return shown


def _numbers(function: Callable, target: Any, prediction: Any) -> list[str]:
  """The names of a metric's numbers, or its own where one example does not tell them."""
  try:
    return list(function([target], [prediction])) or [function.__name__]
  except ValueError:  # A package is missing, or the example has no reference.
    return [function.__name__]


def _of_tokens(task: seqio.Task, split: str) -> dict[str, str]:
  """A task that tokenises by itself is run with short lengths, and bytes instead of pieces."""
  vocabulary = seqio.ByteVocabulary(EXTRA_IDS)
  features = {key: seqio.Feature(vocabulary) for key in task.output_features}
  row = next(task.replace(output_features=features).get_dataset(
      {key: LENGTHS[key] for key in features}, split, shuffle=False).as_numpy_iterator())
  top = vocabulary.vocab_size - 1
  texts = {key: b''.join(b'<extra_id_%d>' % (top - i) if i > top - EXTRA_IDS else bytes([i - 3])
                         for i in row[key].tolist() if i > 2) for key in features}
  return {'length': f'{LENGTHS["targets"]} tokens, here bytes', **_plain(texts)}


def _plain(value: Any) -> Any:
  """Bytes as texts, arrays as lists."""
  if isinstance(value, Mapping):
    return {key: _plain(item) for key, item in value.items()}
  if hasattr(value, 'tolist'):
    return _plain(value.tolist())
  if isinstance(value, list):
    return [_plain(item) for item in value]
  return value.decode('utf-8', 'replace') if isinstance(value, bytes) else value

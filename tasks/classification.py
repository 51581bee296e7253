"""Classification as text in T5's form, `key: value key: value`, without the task's name.

T5 begins its inputs with the task's name ("sst2 sentence: …"); a prompt takes the place of that
word (Lester et al. 2021, appendix).
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import text_to_text
from prompt_tuning_jax.tasks.postprocessors import label_to_class_id

UNLABELLED = '<unk>'  # T5's target of test examples, whose label is -1.
KEPT = ('idx', 'group')  # Features that postprocessors and metrics may want to see.
Row = dict[str, tf.Tensor]


def register(names: Iterable[str], source: seqio.DataSource, fields: Sequence[str],
             labels: Sequence[str], metrics: Sequence[Callable],
             prepare: Callable[[Row], Row] | None = None,
             postprocess: Callable = label_to_class_id) -> None:
  """Adds a task under each of `names`.

  Args:
    fields: text features that the input shows, in this order; T5 mostly sorts them by name.
    labels: the label texts in the order of the class ids.
    metrics: functions (targets, predictions) of what `postprocess` gives.
    prepare: makes the `fields` and 'label' from a source's row where it has others.
    postprocess: (text, *, label_classes, example, is_target) -> class id.
  """
  text_to_text.register(
      names, source,
      functools.partial(verbalize, fields=tuple(fields), labels=tuple(labels), prepare=prepare),
      metrics, functools.partial(postprocess, label_classes=list(labels)))


def verbalize(dataset: tf.data.Dataset, fields: tuple[str, ...], labels: tuple[str, ...],
              prepare: Callable[[Row], Row] | None = None) -> tf.data.Dataset:
  """{*fields, 'label', 'idx', …} -> {'inputs', 'targets', 'choices', 'label', 'idx', …}."""

  def to_text(example: Row) -> Row:
    row = prepare(example) if prepare else example
    words = [part for field in fields for part in (f'{field}:', row[field])]
    label = tf.cast(row['label'], tf.int64)
    tf.debugging.Assert(-1 <= label and label < len(labels), [
        'label', label, f'is not among 0 to {len(labels) - 1} ({", ".join(labels)}), nor -1'])
    # A place that is there whatever the label, or the lookup's error may be told first.
    place = tf.where((0 <= label) & (label < len(labels)), label, len(labels))
    return {'inputs': tf.strings.join(words, separator=' '),
            'targets': tf.gather((*labels, UNLABELLED), place),
            'choices': tf.constant(labels), 'label': label,
            **{key: row[key] for key in KEPT if key in row}}

  return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def rename(row: Row, **old_of_new: str) -> Row:
  """The row with further names for its features: rename(row, premise='sentence1')."""
  return {**row, **{new: row[old] for new, old in old_of_new.items()}}

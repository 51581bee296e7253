"""Classification as text in T5's form, `key: value key: value`, without the task's name.

T5 begins its inputs with the task's name ("sst2 sentence: …"); a prompt takes the place of that
word (Lester et al. 2021, appendix).
"""

import functools
from collections.abc import Callable, Iterable, Sequence

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks.features import FEATURES
from prompt_tuning_jax.tasks.postprocessors import label_to_class_id

UNLABELLED = '<unk>'  # T5's target of test examples, whose label is -1.


def register(names: Iterable[str], source: seqio.DataSource, fields: Sequence[str],
             labels: Sequence[str], metrics: Sequence[Callable]) -> None:
  """Adds a task under each of `names`.

  Args:
    fields: text features that the input shows, sorted by name as T5 does.
    labels: the label texts in the order of the class ids.
    metrics: functions (targets, predictions) of class ids.
  """
  for name in names:
    seqio.TaskRegistry.add(
        name, source=source, output_features=FEATURES, metric_fns=list(metrics),
        preprocessors=[
            functools.partial(verbalize, fields=tuple(fields), labels=tuple(labels)),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim],
        postprocess_fn=functools.partial(label_to_class_id, label_classes=list(labels)))


def verbalize(dataset: tf.data.Dataset, fields: tuple[str, ...],
              labels: tuple[str, ...]) -> tf.data.Dataset:
  """{*fields, 'label', 'idx'} -> {'inputs', 'targets', 'choices', 'idx', 'label'}."""

  def to_text(example: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    words = [part for field in sorted(fields) for part in (f'{field}:', example[field])]
    label = tf.cast(example['label'], tf.int64)
    known = (label >= 0) & (label < len(labels))
    text = {'inputs': tf.strings.join(words, separator=' '),
            'targets': tf.where(known, tf.gather(labels, tf.clip_by_value(label, 0,
                                                                          len(labels) - 1)),
                                UNLABELLED),
            'choices': tf.constant(labels), 'label': label}
    return {**text, 'idx': example['idx']} if 'idx' in example else text

  return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

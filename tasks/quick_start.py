"""`quick_start`: is a sentence from a novel or from an article? Made up here, nothing to load."""

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import classification, metrics, sentences

TFDS_DATASETS = {'quick_start': []}


def sentence_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
  """{'sentence', 'label', 'idx'} of `sentences.examples`, in their order."""
  del shuffle_files, seed
  rows = sentences.examples(split)
  return tf.data.Dataset.from_tensor_slices({
      'sentence': [row['sentence'] for row in rows],
      'label': [sentences.LABELS.index(row['label']) for row in rows],
      'idx': list(range(len(rows)))})


classification.register(
    ('quick_start',),
    seqio.FunctionDataSource(sentence_dataset, splits=tuple(sentences.SIZES),
                             num_input_examples=dict(sentences.SIZES)),
    fields=('sentence',), labels=sentences.LABELS, metrics=(metrics.accuracy,))

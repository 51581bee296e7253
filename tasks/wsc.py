"""SuperGLUE's Winograd schemas (Levesque et al. 2012), as `super_glue_wsc` or `wsc`.

What does the pronoun between *stars* refer to? The target is the referent, so that only rows whose
candidate is right can be trained on (Raffel et al. 2020, section 2.4): the training split has no
others. Evaluation is on all rows: does the prediction agree with the candidate, and should it?
"""

import re

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from prompt_tuning_jax.tasks import metrics, postprocessors, text_to_text
from prompt_tuning_jax.tasks.classification import UNLABELLED, Row

TFDS_DATASETS = {
    'wsc': ['super_glue/wsc.fixed:1.0.2'],
    'super_glue_wsc': ['super_glue/wsc.fixed:1.0.2'],
}


def candidates(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
  """Rows of TFDS; of the training split those with a right candidate, label 1."""
  del shuffle_files, seed
  dataset = tfds.load(*TFDS_DATASETS['wsc'], split=split, shuffle_files=False, download=False)
  if split.partition('[')[0] == 'train':
    return dataset.filter(lambda row: row['label'] == 1)
  return dataset


def to_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """{'text', 'span1_text', 'span2_text', 'span2_index', 'label', 'idx'} -> texts, 'referent'."""

  def row_to_text(row: Row) -> Row:
    marked = tf.numpy_function(
        lambda text, pronoun, index: mark_pronoun(text.decode(), pronoun.decode(), int(index)),
        [row['text'], row['span2_text'], row['span2_index']], tf.string, stateful=False)
    return {'inputs': tf.ensure_shape(marked, []),
            'targets': tf.where(row['label'] < 0, UNLABELLED, row['span1_text']),
            'referent': row['span1_text'], 'label': row['label'], 'idx': row['idx']}

  return dataset.map(row_to_text, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def mark_pronoun(text: str, pronoun: str, index: int) -> str:
  """Puts stars around the pronoun at word `index`, without the punctuation beside it.

  Words are parted by spaces. One row of the data counts them otherwise, so the pronoun nearest to
  that place is taken. ValueError if the text does not have it.
  """
  found = list(re.finditer(rf'(?<!\w){re.escape(pronoun)}(?!\w)', text))
  if not found:
    raise ValueError(f'Pronoun {pronoun!r} does not occur in {text!r}.')
  span = min(found, key=lambda match: abs(len(text[:match.end()].split()) - 1 - index))
  return f'{text[:span.start()]}*{span.group()}*{text[span.end():]}'


text_to_text.register(
    ('wsc', 'super_glue_wsc'),
    seqio.FunctionDataSource(candidates, splits=('train', 'validation', 'test')), to_text,
    (metrics.accuracy,), postprocessors.referent_agrees)

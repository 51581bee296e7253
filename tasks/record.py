"""SuperGLUE's ReCoRD (Zhang et al. 2018), as `super_glue_record` or `record`.

Which entity of a passage belongs where the query says @placeholder? Several may be right (other
spellings of one, mostly): a training example for each, one evaluation example for all. Evaluation
ranks the passage's entities.
"""

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from prompt_tuning_jax.tasks import metrics, postprocessors, text_to_text
from prompt_tuning_jax.tasks.classification import UNLABELLED, Row

TFDS_DATASETS = {
    'record': ['super_glue/record:1.0.2'],
    'super_glue_record': ['super_glue/record:1.0.2'],
}


def queries(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
  """Rows of TFDS with 'targets': every right answer in turn (training) or the first.

  A row without answers (the test split) is kept, with '<unk>'.
  """
  del shuffle_files, seed
  dataset = tfds.load(*TFDS_DATASETS['record'], split=split, shuffle_files=False, download=False)
  most = -1 if split.partition('[')[0] == 'train' else 1

  def one_each(row: Row) -> tf.data.Dataset:
    answers = tf.unique(row['answers']).y
    texts = tf.cond(tf.size(answers) > 0, lambda: answers, lambda: tf.constant([UNLABELLED]))
    return tf.data.Dataset.from_tensor_slices(texts).take(most).map(
        lambda text: {**row, 'targets': text})

  return dataset.flat_map(one_each)


def to_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """{'query', 'entities', 'passage', 'answers', 'targets', 'idx'} -> texts and 'choices'."""

  def row_to_text(row: Row) -> Row:
    # The passage's summary is marked as '\n@highlight\n' and a sentence, often without a full stop.
    passage = tf.strings.regex_replace(row['passage'], r'([.?!"\'])\n@highlight\n', r'\1 ')
    passage = tf.strings.regex_replace(passage, r'\n@highlight\n', '. ')
    entities = tf.unique(row['entities']).y
    parts = ['query:', row['query'], 'entities:',
             tf.strings.reduce_join(entities, separator=', '), 'passage:', passage]
    return {'inputs': tf.strings.join(parts, separator=' '), 'targets': row['targets'],
            'choices': entities, 'answers': row['answers'],
            'idx': tf.stack([row['idx']['passage'], row['idx']['query']])}

  return dataset.map(row_to_text, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


text_to_text.register(
    ('record', 'super_glue_record'),
    seqio.FunctionDataSource(queries, splits=('train', 'validation', 'test')), to_text,
    (metrics.record_em_f1,), postprocessors.right_answers)

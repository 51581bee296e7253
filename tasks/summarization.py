"""Summaries: XSum, CNN/Daily Mail, SciTLDR and DialogSum, measured by ROUGE.

T5's input is `summarize: ` and the document; a prompt takes the place of that word, so that the
input is the document alone. SciTLDR and DialogSum may have several references: training has an
example for each; in evaluation the best one counts, that with the highest ROUGE-1 (Cachola et al.
2020 for SciTLDR), which for DialogSum's test split is the best of three.
"""

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import references, text_metrics, text_to_text

TFDS_DATASETS = {
    'xsum': ['xsum:1.1.0'],
    'cnn_dailymail': ['cnn_dailymail:3.4.0'],
    'scitldr': ['scitldr:1.0.0'],
    'dialogsum': ['dialogsum:1.0.0'],
}
Example = dict[str, tf.Tensor]


def xsum(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """{'document', 'summary'} -> texts."""
  return _pairs(dataset, 'document', 'summary')


def cnn_dailymail(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """{'article', 'highlights'} -> texts; the highlights are lines."""
  return _pairs(dataset, 'article', 'highlights')


def scitldr(row: Example) -> Example:
  """{'source' [S], 'target' [R]}: the sentences of an abstract and its summaries."""
  sentences = tf.strings.strip(row['source'])
  return {'inputs': tf.strings.reduce_join(sentences, separator=' '), 'references': row['target']}


def dialogsum(row: Example) -> Example:
  """{'dialogue', 'references' [R]}."""
  return {'inputs': row['dialogue'], 'references': row['references']}


def _pairs(dataset: tf.data.Dataset, document: str, summary: str) -> tf.data.Dataset:
  return references.first_as_target(dataset.map(
      lambda row: {'inputs': row[document], 'references': row[summary][None]},
      num_parallel_calls=tf.data.AUTOTUNE, deterministic=True))


for name, source, to_text in (
    ('xsum', seqio.TfdsDataSource(*TFDS_DATASETS['xsum']), xsum),
    ('cnn_dailymail', seqio.TfdsDataSource(*TFDS_DATASETS['cnn_dailymail']), cnn_dailymail),
    ('scitldr', references.source(*TFDS_DATASETS['scitldr'], scitldr), references.first_as_target),
    ('dialogsum', references.source(*TFDS_DATASETS['dialogsum'], dialogsum),
     references.first_as_target),
):
  text_to_text.register((name,), source, to_text, (text_metrics.rouge,), text_metrics.references)

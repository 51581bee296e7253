"""GLUE's nine tasks (Wang et al. 2019), as `glue_sst2` or `sst2` and so on.

`glue_mrpc_as_qqp` has MRPC's rows with QQP's labels, for prompts trained on QQP, and
`glue_qqp_as_mrpc` the other way round; the fields keep their own names (Lester et al. 2021,
section 5). MNLI's split `validation` is validation_matched.
"""

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import classification, metrics, postprocessors, text_to_text

TFDS_DATASETS = {
    'cola': ['glue/cola:2.0.0'],
    'mnli': ['glue/mnli:2.0.0'],
    'mrpc': ['glue/mrpc:2.0.0'],
    'qnli': ['glue/qnli:2.0.0'],
    'qqp': ['glue/qqp:2.0.0'],
    'rte': ['glue/rte:2.0.0'],
    'sst2': ['glue/sst2:2.0.0'],
    'stsb': ['glue/stsb:2.0.0'],
    'wnli': ['glue/wnli:2.0.0'],
    'glue_cola': ['glue/cola:2.0.0'],
    'glue_mnli': ['glue/mnli:2.0.0'],
    'glue_mnli_matched': ['glue/mnli_matched:2.0.0'],
    'glue_mnli_mismatched': ['glue/mnli_mismatched:2.0.0'],
    'glue_mrpc': ['glue/mrpc:2.0.0'],
    'glue_mrpc_as_qqp': ['glue/mrpc:2.0.0'],
    'glue_qnli': ['glue/qnli:2.0.0'],
    'glue_qqp': ['glue/qqp:2.0.0'],
    'glue_qqp_as_mrpc': ['glue/qqp:2.0.0'],
    'glue_rte': ['glue/rte:2.0.0'],
    'glue_sst2': ['glue/sst2:2.0.0'],
    'glue_stsb': ['glue/stsb:2.0.0'],
    'glue_wnli': ['glue/wnli:2.0.0'],
}
MNLI_SPLITS = {'train': 'train', 'validation': 'validation_matched', **{
    name: name for name in ('validation_matched', 'validation_mismatched', 'test_matched',
                            'test_mismatched')}}
SENTENCES, QUESTIONS = ('sentence1', 'sentence2'), ('question1', 'question2')
EQUIVALENT, DUPLICATE = ('not_equivalent', 'equivalent'), ('not_duplicate', 'duplicate')
RIGHT, RIGHT_AND_F1 = (metrics.accuracy,), (metrics.accuracy, metrics.f1)


def similarity_text(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """STS-B's {'sentence1', 'sentence2', 'label', 'idx'} -> texts, a score of 3.83 being '3.8'.

  T5 rounds to a fifth, the steps of most of the scores, so that there are 26 texts to learn.
  """

  def to_text(row: classification.Row) -> classification.Row:
    score = tf.strings.as_string(tf.round(row['label'] * 5) / 5, precision=1)
    return {'inputs': tf.strings.join(
                ['sentence1:', row['sentence1'], 'sentence2:', row['sentence2']], separator=' '),
            'targets': tf.where(row['label'] >= 0, score, classification.UNLABELLED),
            'label': row['label'], 'idx': row['idx']}

  return dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _register(name: str, *args, **kwargs) -> None:
  names = [key for key in (name, f'glue_{name}') if key in TFDS_DATASETS]
  source = seqio.TfdsDataSource(*TFDS_DATASETS[names[0]],
                                splits=MNLI_SPLITS if name == 'mnli' else None)
  classification.register(names, source, *args, **kwargs)


_register('cola', ('sentence',), ('unacceptable', 'acceptable'),
          (metrics.matthews_correlation, metrics.accuracy))
_register('sst2', ('sentence',), ('negative', 'positive'), RIGHT)
_register('mrpc', SENTENCES, EQUIVALENT, RIGHT_AND_F1)
_register('qqp', QUESTIONS, DUPLICATE, (metrics.f1, metrics.accuracy))
_register('mrpc_as_qqp', SENTENCES, DUPLICATE, RIGHT_AND_F1)
_register('qqp_as_mrpc', QUESTIONS, EQUIVALENT, RIGHT_AND_F1)
for mnli in ('mnli', 'mnli_matched', 'mnli_mismatched'):
  _register(mnli, ('hypothesis', 'premise'), ('entailment', 'neutral', 'contradiction'), RIGHT)
_register('qnli', ('question', 'sentence'), ('entailment', 'not_entailment'), RIGHT)
_register('rte', SENTENCES, ('entailment', 'not_entailment'), RIGHT)
_register('wnli', SENTENCES, ('not_entailment', 'entailment'), RIGHT)
text_to_text.register(
    ('stsb', 'glue_stsb'), seqio.TfdsDataSource(*TFDS_DATASETS['stsb']), similarity_text,
    (metrics.pearson_correlation, metrics.spearman_correlation), postprocessors.similarity_score)

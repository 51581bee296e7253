"""SuperGLUE (Wang et al. 2019), as `super_glue_boolq` or `boolq` and so on; see record and wsc too.

The diagnostics AX-b and AX-g have only a test split and are answered by a prompt trained on
`super_glue_rte`, hence written in RTE's words (AX-b calls its premise sentence1).
"""

import functools

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import classification, metrics, postprocessors

TFDS_DATASETS = {
    'axb': ['super_glue/axb:1.0.2'],
    'axg': ['super_glue/axg:1.0.2'],
    'boolq': ['super_glue/boolq:1.0.2'],
    'cb': ['super_glue/cb:1.0.2'],
    'copa': ['super_glue/copa:1.0.2'],
    'multirc': ['super_glue/multirc:1.0.2'],
    'wic': ['super_glue/wic:1.0.2'],
    'super_glue_axb': ['super_glue/axb:1.0.2'],
    'super_glue_axg': ['super_glue/axg:1.0.2'],
    'super_glue_boolq': ['super_glue/boolq:1.0.2'],
    'super_glue_cb': ['super_glue/cb:1.0.2'],
    'super_glue_copa': ['super_glue/copa:1.0.2'],
    'super_glue_multirc': ['super_glue/multirc:1.0.2'],
    'super_glue_rte': ['super_glue/rte:1.0.2'],
    'super_glue_wic': ['super_glue/wic:1.0.2'],
}
PAIR, ENTAILMENT = ('hypothesis', 'premise'), ('entailment', 'not_entailment')
BOOLEAN = ('False', 'True')


def with_question(row: classification.Row) -> classification.Row:
  """MultiRC's answers belong together where paragraph and question are the same."""
  idx = row['idx']
  return {**row, 'idx': tf.stack([idx['paragraph'], idx['question'], idx['answer']]),
          'group': tf.stack([idx['paragraph'], idx['question']])}


def with_pair(row: classification.Row) -> classification.Row:
  """AX-g's rows 2k and 2k + 1 are the same but for the gender."""
  return {**row, 'group': row['idx'] // 2}


def _register(name: str, *args, **kwargs) -> None:
  names = [key for key in (name, f'super_glue_{name}') if key in TFDS_DATASETS]
  classification.register(names, seqio.TfdsDataSource(*TFDS_DATASETS[names[0]]), *args, **kwargs)


_register('boolq', ('passage', 'question'), BOOLEAN, (metrics.accuracy,))
_register('cb', PAIR, ('entailment', 'contradiction', 'neutral'),
          (metrics.mean_f1, metrics.accuracy))
_register('copa', ('choice1', 'choice2', 'premise', 'question'), ('choice1', 'choice2'),
          (metrics.accuracy,))
_register('multirc', ('question', 'answer', 'paragraph'), BOOLEAN,
          (metrics.f1_of_answers, metrics.exact_match_of_questions), prepare=with_question,
          postprocess=postprocessors.grouped_class_id)
_register('rte', PAIR, ENTAILMENT, (metrics.accuracy,))
_register('wic', ('sentence1', 'sentence2', 'word'), BOOLEAN, (metrics.accuracy,))
_register('axb', PAIR, ENTAILMENT, (metrics.matthews_correlation, metrics.accuracy),
          prepare=functools.partial(classification.rename, premise='sentence1',
                                    hypothesis='sentence2'))
_register('axg', PAIR, ENTAILMENT, (metrics.accuracy, metrics.gender_parity), prepare=with_pair,
          postprocess=postprocessors.grouped_class_id)

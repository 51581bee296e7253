"""SuperGLUE: BoolQ and CommitmentBank (Wang et al. 2019), as `super_glue_boolq` or `boolq`, …"""

import seqio

from prompt_tuning_jax.tasks import classification, metrics

TFDS_DATASETS = {
    'boolq': ['super_glue/boolq:1.0.2'],
    'cb': ['super_glue/cb:1.0.2'],
    'super_glue_boolq': ['super_glue/boolq:1.0.2'],
    'super_glue_cb': ['super_glue/cb:1.0.2'],
}

classification.register(
    ('boolq', 'super_glue_boolq'), seqio.TfdsDataSource(*TFDS_DATASETS['boolq']),
    fields=('passage', 'question'), labels=('False', 'True'), metrics=(metrics.accuracy,))

classification.register(
    ('cb', 'super_glue_cb'), seqio.TfdsDataSource(*TFDS_DATASETS['cb']),
    fields=('hypothesis', 'premise'), labels=('entailment', 'contradiction', 'neutral'),
    metrics=(metrics.mean_f1, metrics.accuracy))

"""GLUE: CoLA, MRPC, RTE and SST-2 (Wang et al. 2019), as `glue_sst2` or `sst2` and so on."""

import seqio

from prompt_tuning_jax.tasks import classification, metrics

TFDS_DATASETS = {
    'cola': ['glue/cola:2.0.0'],
    'mrpc': ['glue/mrpc:2.0.0'],
    'rte': ['glue/rte:2.0.0'],
    'sst2': ['glue/sst2:2.0.0'],
    'glue_cola': ['glue/cola:2.0.0'],
    'glue_mrpc': ['glue/mrpc:2.0.0'],
    'glue_rte': ['glue/rte:2.0.0'],
    'glue_sst2': ['glue/sst2:2.0.0'],
}

classification.register(
    ('cola', 'glue_cola'), seqio.TfdsDataSource(*TFDS_DATASETS['cola']),
    fields=('sentence',), labels=('unacceptable', 'acceptable'),
    metrics=(metrics.matthews_correlation, metrics.accuracy))

classification.register(
    ('mrpc', 'glue_mrpc'), seqio.TfdsDataSource(*TFDS_DATASETS['mrpc']),
    fields=('sentence1', 'sentence2'), labels=('not_equivalent', 'equivalent'),
    metrics=(metrics.accuracy, metrics.f1))

classification.register(
    ('rte', 'glue_rte'), seqio.TfdsDataSource(*TFDS_DATASETS['rte']),
    fields=('sentence1', 'sentence2'), labels=('entailment', 'not_entailment'),
    metrics=(metrics.accuracy,))

classification.register(
    ('sst2', 'glue_sst2'), seqio.TfdsDataSource(*TFDS_DATASETS['sst2']),
    fields=('sentence',), labels=('negative', 'positive'), metrics=(metrics.accuracy,))

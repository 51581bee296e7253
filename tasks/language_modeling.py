"""Pretraining tasks over plain text, an objective and its text a name: `prefix_lm_wiki`, …

T5's span corruption, also without sentinels in the targets, and prefix LM (Raffel et al. 2020;
Lester et al. 2021 adapt T5 with the latter on C4), plain LM, BERT's masked tokens, for a T5 and for
a BERT (Devlin et al. 2019), and BART's text infilling and sentence permutation, alone and together
(Lewis et al. 2020).
"""

import functools

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import pretraining
from prompt_tuning_jax.tasks.features import FEATURES

TFDS_DATASETS = {
    'span_corruption_novels': ['local_text/novels:1.0.0'],
    'span_corruption_wiki': ['local_text/wiki:1.0.0'],
    'span_corruption_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'span_corruption_c4': ['c4/en:3.0.1'],
    'span_corruption_no_sentinels_novels': ['local_text/novels:1.0.0'],
    'span_corruption_no_sentinels_wiki': ['local_text/wiki:1.0.0'],
    'span_corruption_no_sentinels_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'prefix_lm_novels': ['local_text/novels:1.0.0'],
    'prefix_lm_wiki': ['local_text/wiki:1.0.0'],
    'prefix_lm_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'prefix_lm_c4': ['c4/en:3.0.1'],
    'lm_novels': ['local_text/novels:1.0.0'],
    'lm_wiki': ['local_text/wiki:1.0.0'],
    'lm_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'masked_lm_novels': ['local_text/novels:1.0.0'],
    'masked_lm_wiki': ['local_text/wiki:1.0.0'],
    'masked_lm_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'masked_tokens_novels': ['local_text/novels:1.0.0'],
    'masked_tokens_wiki': ['local_text/wiki:1.0.0'],
    'masked_tokens_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'text_infilling_novels': ['local_text/novels:1.0.0'],
    'text_infilling_wiki': ['local_text/wiki:1.0.0'],
    'text_infilling_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'sentence_permutation_novels': ['local_text/novels:1.0.0'],
    'sentence_permutation_wiki': ['local_text/wiki:1.0.0'],
    'sentence_permutation_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'bart_denoising_novels': ['local_text/novels:1.0.0'],
    'bart_denoising_wiki': ['local_text/wiki:1.0.0'],
    'bart_denoising_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
}
OBJECTIVES = {
    'span_corruption': pretraining.span_corruption,
    'span_corruption_no_sentinels': functools.partial(
        pretraining.span_corruption, target_sentinels=False),
    'prefix_lm': pretraining.prefix_lm,
    'lm': pretraining.language_model,
    'masked_lm': pretraining.masked_lm,
    'masked_tokens': pretraining.masked_tokens,
    'text_infilling': functools.partial(pretraining.bart_denoising, permute=False),
    'sentence_permutation': functools.partial(pretraining.bart_denoising, infill=False),
    'bart_denoising': pretraining.bart_denoising,
}


class MixedTexts(seqio.FunctionDataSource):
  """{'text'} of several TFDS datasets, mixed in proportion to their sizes, in a fixed order."""

  def __init__(self, names: tuple[str, ...]):
    self._sources = [seqio.TfdsDataSource(name) for name in names]
    super().__init__(self._mixed, splits=('train', 'validation'))

  def num_input_examples(self, split: str) -> int:
    return sum(source.num_input_examples(split) for source in self._sources)

  def _mixed(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # Which texts are joined decides what examples there are.
    datasets = [source.get_dataset(split, shuffle=False) for source in self._sources]
    sizes = np.array([dataset.cardinality().numpy() for dataset in datasets], np.float64)
    return tf.data.Dataset.sample_from_datasets(datasets, (sizes / sizes.sum()).tolist(), seed=0)


TEXTS = {
    'novels': seqio.TfdsDataSource('local_text/novels:1.0.0'),
    'wiki': seqio.TfdsDataSource('local_text/wiki:1.0.0'),
    'local_text': MixedTexts(('local_text/novels:1.0.0', 'local_text/wiki:1.0.0')),
    'c4': seqio.TfdsDataSource('c4/en:3.0.1'),
}

for objective, preprocessor in OBJECTIVES.items():
  for text, source in TEXTS.items():
    if (task := f'{objective}_{text}') in TFDS_DATASETS:
      seqio.TaskRegistry.add(
          task, source=source, preprocessors=[preprocessor], metric_fns=[],
          output_features={'targets': FEATURES['targets']} if objective == 'lm' else FEATURES)

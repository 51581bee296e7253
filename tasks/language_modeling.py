"""Pretraining tasks: span corruption and prefix LM over text.

Texts are tokenised, joined end to end and cut into blocks, so that inputs are full. The noise of an
example is always the same: it depends on its place in the text and on `seed`.
"""

import functools

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from prompt_tuning_jax.tasks import noise
from prompt_tuning_jax.tasks.features import FEATURES

TFDS_DATASETS = {
    'span_corruption_novels': ['local_text/novels:1.0.0'],
    'span_corruption_wiki': ['local_text/wiki:1.0.0'],
    'span_corruption_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
    'prefix_lm_novels': ['local_text/novels:1.0.0'],
    'prefix_lm_wiki': ['local_text/wiki:1.0.0'],
    'prefix_lm_local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0'],
}
TEXTS_PER_GROUP = 1024  # Joined texts; only a group's last block is shorter than the others.


def texts(split: str, shuffle_files: bool, seed: int | None = None, *,
          names: tuple[str, ...]) -> tf.data.Dataset:
  """{'text'} of several TFDS datasets, mixed in proportion to their sizes, in a fixed order."""
  del shuffle_files, seed
  # The order of files must not change: which texts are joined decides what examples there are.
  datasets = [tfds.load(name, split=split, shuffle_files=False, download=False) for name in names]
  if len(datasets) == 1:
    return datasets[0]
  sizes = np.array([dataset.cardinality().numpy() for dataset in datasets], np.float64)
  return tf.data.Dataset.sample_from_datasets(datasets, (sizes / sizes.sum()).tolist(), seed=0)


def span_corruption(dataset: tf.data.Dataset, sequence_length: dict[str, int],
                    output_features: dict[str, seqio.Feature], seed: int = 0,
                    noise_density: float = noise.NOISE_DENSITY,
                    mean_span_length: float = noise.MEAN_SPAN_LENGTH) -> tf.data.Dataset:
  """{'text'} -> {'inputs', 'targets'} with spans replaced by sentinels, EOS included."""
  vocabulary = output_features['inputs'].vocabulary
  lengths = sequence_length['inputs'], sequence_length['targets']
  length = noise.raw_length(*lengths, noise_density, mean_span_length)
  _, spans = noise.noise_counts(length, noise_density, mean_span_length)
  if spans > vocabulary.extra_ids:
    raise ValueError(f'Inputs of {lengths[0]} tokens have {spans} spans, the vocabulary only '
                     f'{vocabulary.extra_ids} sentinels: shorten the inputs or lengthen the spans.')

  def corrupt(block: np.ndarray, rng: np.random.Generator):
    mask = noise.span_mask(*block.shape, rng, noise_density, mean_span_length)
    return noise.span_corruption(block, mask, first_sentinel=vocabulary.vocab_size - 1)

  return _map_blocks(dataset, vocabulary, length, lengths, corrupt, seed)


def prefix_lm(dataset: tf.data.Dataset, sequence_length: dict[str, int],
              output_features: dict[str, seqio.Feature], seed: int = 0) -> tf.data.Dataset:
  """{'text'} -> {'inputs', 'targets'}, a text split at a random place, EOS on both sides."""
  lengths = sequence_length['inputs'], sequence_length['targets']
  length = noise.prefix_raw_length(*lengths)

  def split(block: np.ndarray, rng: np.random.Generator):
    points = noise.prefix_split_points(*block.shape, *lengths, rng)
    return noise.split_at(block, points)

  return _map_blocks(dataset, output_features['inputs'].vocabulary, length, lengths, split, seed)


def _map_blocks(dataset, vocabulary, length: int, lengths: tuple[int, int], make,
                seed: int) -> tf.data.Dataset:
  """Texts -> tokens joined -> blocks [N, length] -> make(block, rng) -> rows padded with 0."""

  def rows_of(group: np.int64, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([seed, int(group)])
    ids = [np.array(vocabulary.encode(text.decode('utf-8')), np.int32) for text in texts]
    padded = [tuple(np.pad(side, ((0, 0), (0, width - side.shape[1])))
                    for side, width in zip(make(block, rng), lengths, strict=True))
              for block in noise.chunks(np.concatenate(ids), length)]
    if not padded:
      return tuple(np.zeros((0, width), np.int32) for width in lengths)
    return tuple(np.concatenate(side) for side in zip(*padded, strict=True))

  def group_to_rows(group: tf.Tensor, texts: tf.Tensor) -> dict[str, tf.Tensor]:
    sides = tf.numpy_function(rows_of, [group, texts], [tf.int32, tf.int32])
    return {key: tf.ensure_shape(side, [None, width])
            for key, side, width in zip(('inputs', 'targets'), sides, lengths, strict=True)}

  def drop_padding(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {key: tf.boolean_mask(ids, ids != 0) for key, ids in row.items()}

  return (dataset.map(lambda example: example['text']).batch(TEXTS_PER_GROUP).enumerate()
          .map(group_to_rows, num_parallel_calls=2, deterministic=True).unbatch()
          .map(drop_padding, num_parallel_calls=2, deterministic=True))


for task, names in TFDS_DATASETS.items():
  seqio.TaskRegistry.add(
      task,
      source=seqio.FunctionDataSource(functools.partial(texts, names=tuple(names)),
                                      splits=('train', 'validation')),
      preprocessors=[span_corruption if task.startswith('span') else prefix_lm],
      output_features=FEATURES,
      metric_fns=[])

"""Inputs with several reference texts: trained on one by one, evaluated all at once."""

import functools
from collections.abc import Callable, Mapping

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

Example = dict[str, tf.Tensor]
SPLITS = {'train': 'train', 'validation': 'validation', 'test': 'test'}


def source(dataset: str, to_example: Callable[[Example], Example],
           splits: Mapping[str, str] = SPLITS, merge: bool = False) -> seqio.DataSource:
  """A source of {'inputs', 'references'} that knows whether it is read for training.

  Args:
    dataset: a TFDS name.
    to_example: TFDS's row -> {'inputs': [], 'references': [R]}.
    splits: what a split is in TFDS, one name or several joined by `+`.
    merge: whether several rows may have one input. In evaluation they are one example then, with
      the references of all.
  """
  return seqio.FunctionDataSource(
      functools.partial(examples, dataset=dataset, to_example=to_example, splits=dict(splits),
                        merge=merge), splits=tuple(splits))


def examples(split: str, shuffle_files: bool, seed: int | None = None, *, dataset: str,
             to_example: Callable[[Example], Example], splits: Mapping[str, str],
             merge: bool) -> tf.data.Dataset:
  """Training: an example for each reference. Other splits: one for each input, with all of them."""
  del shuffle_files, seed
  name, bracket, part = split.partition('[')  # 'test[:100]' is TFDS's way to read a part.
  if bracket and '%' not in part and '+' in splits[name]:  # It would be so many of each.
    raise ValueError(f'{split}: {name} is {splits[name].replace("+", " and ")}; take a share of '
                     f'it, such as {name}[:10%], or a part of one of them.')
  rows = tfds.load(dataset, split='+'.join(one + bracket + part for one in splits[name].split('+')),
                   shuffle_files=False, download=False)
  texts = rows.map(to_example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
  if name == 'train':
    return texts.flat_map(one_by_one)
  return merged(texts) if merge else texts


def one_by_one(example: Example) -> tf.data.Dataset:
  """An example for each reference; one with an empty reference where there is none."""
  texts = example['references']
  texts = tf.cond(tf.size(texts) > 0, lambda: texts, lambda: tf.constant(['']))
  return tf.data.Dataset.from_tensor_slices(texts).map(
      lambda text: {**example, 'references': text[None]})


def merged(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Examples with the same inputs become one, in the order of the first ones."""
  texts: dict[bytes, list[bytes]] = {}
  for example in dataset.as_numpy_iterator():
    texts.setdefault(example['inputs'], []).extend(example['references'])
  return tf.data.Dataset.from_tensor_slices(
      {'inputs': list(texts), 'references': tf.ragged.constant(list(texts.values()), tf.string)})


def first_as_target(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Adds 'targets', the first reference; empty where there is none."""
  return dataset.map(
      lambda example: {**example, 'targets': tf.concat([example['references'], ['']], 0)[0]},
      num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

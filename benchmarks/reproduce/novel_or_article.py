"""`novel_or_article`: is a sentence from a novel or from an article? The quick start's question, on
real text: whole sentences of local_text/novels and local_text/wiki, as many of each.

A small base has read such text, so a prompt can teach it the task; unlike the quick start's
sentences, which are made up from lists of words, some of these are hard.
"""

import itertools
import re
from collections.abc import Iterator

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import classification, metrics

TFDS_DATASETS = {'novel_or_article': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0']}
LABELS = ('novel', 'article')
OF_EACH = {'train': 2000, 'validation': 200}
EVERY = 7  # sentences: neighbours say much the same
WORDS = (6, 30)
SENTENCE = re.compile(r'(?<=[.!?] )["“A-Z][^.!?\n]*[.!?]["”]?(?= )')


def sentences(name: str, split: str) -> Iterator[str]:
  """OF_EACH sentences of a data set of texts, in its order."""
  texts = seqio.TfdsDataSource(name).get_dataset(split, shuffle=False).as_numpy_iterator()
  whole = (sentence for row in texts for sentence in SENTENCE.findall(row['text'].decode())
           if WORDS[0] <= len(sentence.split()) <= WORDS[1])
  return itertools.islice(whole, 0, EVERY * OF_EACH[split], EVERY)


def sentence_dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
  """{'sentence', 'label', 'idx'}, the labels taking turns."""
  del shuffle_files, seed
  rows = [text for pair in zip(*(
      sentences(name, split) for name in TFDS_DATASETS['novel_or_article']), strict=True)
          for text in pair]
  return tf.data.Dataset.from_tensor_slices({
      'sentence': rows, 'label': [i % 2 for i in range(len(rows))], 'idx': list(range(len(rows)))})


classification.register(
    ('novel_or_article',),
    seqio.FunctionDataSource(sentence_dataset, splits=tuple(OF_EACH), num_input_examples={
        split: len(LABELS) * count for split, count in OF_EACH.items()}),
    fields=('sentence',), labels=LABELS, metrics=(metrics.accuracy,))

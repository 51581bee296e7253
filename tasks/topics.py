"""Topics, questions and reviews: AG News (Zhang et al. 2015), TREC (Li & Roth 2002) and IMDB
(Maas et al. 2011), as `ag_news`, `trec` (6 kinds), `trec_fine` (47 kinds) and `imdb`.

They come without a validation split. Ours is the last tenth of their training data, so that the
choice of the best prompt does not look at the test split.
"""

import functools

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import classification, metrics

TFDS_DATASETS = {
    'ag_news': ['ag_news_subset:1.0.0'],
    'imdb': ['imdb_reviews/plain_text:1.0.0'],
    'trec': ['trec:1.0.0'],
    'trec_fine': ['trec:1.0.0'],
}
SPLITS = {'train': 'train[:90%]', 'validation': 'train[90%:]', 'test': 'test'}
TREC_LABELS = ('description', 'entity', 'abbreviation', 'human', 'number', 'location')
# TREC's short forms in TFDS's order, which takes the 50 kinds' second parts alone: 'other' is one
# class of entities, locations and numbers, 'description' one of things and of people.
TREC_FINE_LABELS = (
    'manner', 'creative work', 'animal', 'expansion', 'individual', 'group', 'title', 'definition',
    'date', 'reason', 'event', 'state', 'description', 'count', 'other', 'letter', 'religion',
    'food', 'country', 'color', 'equivalent term', 'city', 'body', 'disease or medicine',
    'mountain', 'money', 'product', 'period', 'substance', 'sport', 'plant', 'technique',
    'volume or size', 'instrument', 'abbreviation', 'speed', 'word', 'language', 'percentage',
    'code', 'distance', 'temperature', 'symbol', 'order', 'vehicle', 'weight', 'currency')


def news_text(row: classification.Row) -> classification.Row:
  """Title and description as one text; some copies of the data have both in the description."""
  parts = tf.strings.strip(tf.stack([row['title'], row['description']]))
  parts = tf.boolean_mask(parts, tf.strings.length(parts) > 0)
  return {'text': tf.strings.reduce_join(parts, separator=' '), 'label': row['label']}


def review_text(row: classification.Row) -> classification.Row:
  """Line breaks are spaces: T5's vocabulary has no '<'."""
  return {**row, 'text': tf.strings.regex_replace(row['text'], r'(\s*<br\s*/?>\s*)+', ' ')}


def _register(name: str, labels: tuple[str, ...], prepare) -> None:
  classification.register(
      (name,), seqio.TfdsDataSource(*TFDS_DATASETS[name], splits=SPLITS), ('text',), labels,
      (metrics.accuracy,), prepare)


_register('ag_news', ('world', 'sports', 'business', 'technology'), news_text)
_register('imdb', ('negative', 'positive'), review_text)
_register('trec', TREC_LABELS, functools.partial(classification.rename, label='label-coarse'))
_register('trec_fine', TREC_FINE_LABELS,
          functools.partial(classification.rename, label='label-fine'))

"""AG News, TREC and IMDB rows, read by hand, and splits that share nothing."""

import itertools
import os
import pathlib

import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache

DATA = {'ag_news': 'ag_news_subset/1.0.0', 'imdb': 'imdb_reviews/plain_text/1.0.0',
        'trec': 'trec/1.0.0', 'trec_fine': 'trec/1.0.0'}
# The first row of each split.
ROWS = {
    ('ag_news', 'train'): (
        'text: Hamilton Sundstrand wins NASA contract WINDSOR LOCKS, Conn. -- NASA has selected '
        'Hamilton Sundstrand to be the prime contractor for a space program that could be worth '
        r'more than \$800 million over 10 years.', 'technology'),
    ('ag_news', 'test'): (
        "text: Carolina's Davis Done for the Season CHARLOTTE, N.C. (Sports Network) - Carolina "
        'Panthers  running back Stephen Davis will miss the remainder of the  season after being '
        'placed on injured reserve Saturday.', 'sports'),
    ('imdb', 'train'): (
        'text: This thing was bad. Really bad. I mean, low budget can sometimes be very inspiring, '
        "but not this. The story was so off-the-shelf, the alien's behaviour so illogical, the "
        'characters so clichéed. I found nothing good in it. And I did try.', 'negative'),
    ('trec', 'train'): ('text: Who was Camp David named for ?', 'human'),
    ('trec', 'test'): ('text: Where is the volcano Mauna Loa ?', 'location'),
    ('trec_fine', 'validation'): (
        "text: What Georgia town did Scarlett O 'Hara condemn as being full of pushy people ?",
        'city'),
    ('trec_fine', 'test'): ('text: Where is the volcano Mauna Loa ?', 'other'),
}


def prepared(task):
  data = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere')) / DATA[task]
  if not (data / 'dataset_info.json').exists():
    pytest.skip(f'set TFDS_DATA_DIR to a folder with {DATA[task]}')


def build(folder, task, split, size=40):
  prepared(task)
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], split, {'file': 'bytes', 'extra_ids': 100},
                      {'inputs': 20000, 'targets': 60}, str(folder / split), max_examples=size)
  return token_cache.open_cache(folder / split)


@pytest.mark.parametrize('task,split', ROWS, ids=list(map('-'.join, ROWS)))
def test_rows(tmp_path, task, split):
  cache = build(tmp_path, task, split)
  assert (cache.rows[0]['inputs'], cache.rows[0]['targets']) == ROWS[task, split]
  for row in cache.rows:
    assert '<br' not in row['inputs']
    assert row['targets'] == row['choices'][row['example']['label']]
    assert row['target'] == row['example']['label'] == cache.postprocess(row['targets'], row)
  targets = [row['target'] for row in cache.rows]
  assert [function(targets, targets) for function in cache.metric_fns()] == [{'accuracy': 100.0}]


def read(task, split, feature):
  prepared(task)
  import tensorflow_datasets as tfds

  from prompt_tuning_jax.tasks import topics
  rows = tfds.load(topics.TFDS_DATASETS[task][0], split=split, download=False)
  return [row[feature] for row in rows.as_numpy_iterator()]


def test_labels_of_trec_fit_one_another():
  coarse, fine = (read('trec', 'train', f'label-{size}') for size in ('coarse', 'fine'))
  from prompt_tuning_jax.tasks.topics import TREC_FINE_LABELS, TREC_LABELS
  kinds = {}
  for one, other in zip(coarse, fine, strict=True):
    kinds.setdefault(TREC_FINE_LABELS[other], set()).add(TREC_LABELS[one])
  assert len(kinds) == len(set(TREC_FINE_LABELS)) == 47
  assert kinds.pop('other') == {'entity', 'location', 'number'}
  assert kinds.pop('description') == {'description', 'human'}
  for kind, parts in {
      'description': 'manner, definition, reason', 'abbreviation': 'abbreviation, expansion',
      'human': 'individual, group, title', 'location': 'city, country, mountain, state',
      'number': 'code, count, date, distance, money, order, percentage, period, speed, '
                'temperature, volume or size, weight'}.items():
    for part in parts.split(', '):
      assert kinds.pop(part) == {kind}, part
  assert len(kinds) == 21 and all(parts == {'entity'} for parts in kinds.values())


@pytest.mark.slow
def test_validation_is_the_part_of_the_training_data_that_is_not_trained_on(tmp_path):
  whole = read('trec', 'train', 'text')
  parts = {'train': whole[:4907], 'validation': whole[4907:]}
  assert len(parts['validation']) == 545
  for task, (split, texts) in itertools.product(('trec', 'trec_fine'), parts.items()):
    cache = build(tmp_path / task, task, split, 5000 if split == 'validation' else 20)
    assert [row['inputs'] for row in cache.rows] == [
        f'text: {text.decode()}' for text in texts][:cache.num_examples]
    assert cache.num_examples == {'train': 20, 'validation': 545}[split]
  import seqio
  assert all(set(seqio.get_mixture_or_task(task).splits) == {'train', 'validation', 'test'}
             for task in DATA)


def test_texts_made_up():
  tf = pytest.importorskip('tensorflow')
  from prompt_tuning_jax.tasks import topics
  rows = tf.data.Dataset.from_tensor_slices({
      'title': [' Title', '', 'Only'], 'description': [' Text. ', 'Text.', ''],
      'label': [0, 1, 2]}).map(topics.news_text)
  assert [row['text'] for row in rows.as_numpy_iterator()] == [b'Title Text.', b'Text.', b'Only']
  review = topics.review_text({'text': tf.constant('One.<br /><br />Two <br/> <br>3 < 4'),
                               'label': tf.constant(0)})
  assert review['text'].numpy() == b'One. Two 3 < 4'


def test_labels_are_in_the_order_of_tfds():
  tfds = pytest.importorskip('tensorflow_datasets')
  from prompt_tuning_jax.tasks import topics
  short = dict(zip(topics.TREC_FINE_LABELS, (
      'manner cremat animal exp ind gr title def date reason event state desc count other letter '
      'religion food country color termeq city body dismed mount money product period substance '
      'sport plant techmeth volsize instru abb speed word lang perc code dist temp symbol ord veh '
      'weight currency').split(), strict=True))
  assert all(label == name or label[:2] == name[:2] or name in (
      'termeq', 'dismed', 'techmeth') for label, name in short.items())
  try:
    features = tfds.builder('trec:1.0.0').info.features
  except tfds.core.DatasetNotFoundError as error:
    pytest.skip(str(error).splitlines()[0])
  assert features['label-fine'].names == list(short.values())
  assert features['label-coarse'].names == ['DESC', 'ENTY', 'ABBR', 'HUM', 'NUM', 'LOC']

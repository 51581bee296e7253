"""Tables and triples as text, against rows read by TFDS; DART's two forms say the same."""

import collections
import json
import os
import pathlib

import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary

seqio = pytest.importorskip('seqio')
from prompt_tuning_jax.tasks import references, table_to_text, text_metrics  # noqa: E402

BYTES = Vocabulary('bytes')
# (task, split): inputs, first reference, number of references of the first example.
GOLDEN = {
    ('e2e_nlg', 'train'): (
        'name : The Waterman | food : English | familyFriendly : yes | near : Crowne Plaza Hotel',
        'Located near Crowne Plaza Hotel is The Waterman which has English food and is child '
        'friendly.', 1),
    ('e2e_nlg', 'validation'): (
        'name : The Punter | eatType : coffee shop | food : English | priceRange : £20-25 | '
        'customer rating : high | familyFriendly : yes | near : Café Sicilia',
        'For English food with a high customer Rating, kids Friendly and a price range of £20-25, '
        'visit The Punter, a coffee shop near Café Sicilia.', 11),
    ('e2e_cleaned', 'validation'): (
        'name : The Eagle | eatType : coffee shop | food : Chinese | priceRange : cheap | '
        'area : city centre | familyFriendly : no | near : Burger King',
        'The Eagle is a highly recommended and inexpensive, adult-only coffee shop that serves '
        'Chinese. It is located near Burger King in the center. of town.', None),
    ('web_nlg', 'train'): (
        'Above_the_Veil : language : English_language', 'Above the Veil is written in English.', 1),
    ('web_nlg', 'validation'): (
        'Bhajji : country : India | India : demonym : Indian_people | India : leaderName : '
        'Sumitra_Mahajan | Bhajji : region : Karnataka | Karnataka : leaderName : Vajubhai_Vala',
        'Indians is the name given to people from India and the leaders are Sumitra Mahajan and '
        'Vajubhai Vala. Bhajji is from the Karnataka region of India.', 3),
    ('web_nlg', 'test_unseen'): (
        '103_Hera : discoverer : James_Craig_Watson | James_Craig_Watson : deathCause : '
        'Peritonitis',
        'James Craig Watson, who died of peritonitis, was the discoverer of 103 Hera.', 3),
    ('dart', 'validation'): ('Antioch, California : elevation : 13.0',
                             'Antioch, California is 13.0 metres above sea level.', None),
    ('dart_grouped', 'test'): ('1973 : supporting_actor : NOT AWARDED',
                               'In 1973 supporting actor not awarded.', 1),
}


def prepared(task):
  dataset, version = table_to_text.TFDS_DATASETS[task][0].split(':')
  folder = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere'), dataset, version)
  if not (folder / 'dataset_info.json').exists():
    pytest.skip(f'set TFDS_DATA_DIR to a folder with {dataset}:{version}')


def texts(task, split):
  """[(inputs, references)] of a task's source."""
  prepared(task)
  dataset = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False, seed=0)
  return [(row['inputs'].decode(), [text.decode() for text in row['references']])
          for row in dataset.as_numpy_iterator()]


def raw(task, split):
  import tensorflow_datasets as tfds
  prepared(task)
  return tfds.load(table_to_text.TFDS_DATASETS[task][0], split=split,
                   download=False).as_numpy_iterator()


@pytest.mark.parametrize(('task', 'split'), [
    pytest.param(*key, marks=pytest.mark.slow) if key == ('dart', 'validation') else key
    for key in GOLDEN])
def test_golden_rows(tmp_path, task, split):
  prepared(task)
  inputs, target, count = GOLDEN[task, split]
  folder = tmp_path / 'cache'
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], split, {'file': 'bytes', 'extra_ids': 100},
                      {'inputs': 3000, 'targets': 1000}, str(folder), max_examples=20)
  cache = token_cache.open_cache(folder)
  row = cache.rows[0]
  assert cache.num_examples == 20
  assert row['inputs'] == inputs == BYTES.decode(cache.inputs(0))
  assert row['targets'] == target == row['target'][0] == BYTES.decode(cache.targets(0))
  assert count is None or len(row['target']) == count
  few = task in ('web_nlg', 'dart', 'dart_grouped')
  assert all(row['target'] == row['example']['references'][:3 if few else None]
             for row in cache.rows)
  assert cache.postprocess('A text.', row) == 'A text.'
  assert split != 'train' or all(len(row['target']) == 1 for row in cache.rows)
  assert cache.metric_fns() == [text_metrics.bleu]
  targets = [row['target'] for row in cache.rows]
  assert text_metrics.bleu(targets, [row['targets'] for row in cache.rows])['bleu'] == (
      pytest.approx(100))


@pytest.mark.parametrize('task', table_to_text.TFDS_DATASETS)
def test_web_nlg_and_dart_are_evaluated_with_three_references(task):
  told = seqio.TaskRegistry.get(task).postprocess_fn(
      'a', example={'references': list('abcde')}, is_target=True)
  assert ''.join(told) == ('abcde' if task.startswith('e2e') else 'abc')


def test_e2e_cleaned_puts_the_references_of_a_table_together():
  expected = collections.defaultdict(list)
  for row in raw('e2e_cleaned', 'validation'):
    table = row['input_text']['table']
    pairs = zip(table['column_header'], table['content'], strict=True)
    inputs = ' | '.join(f'{header.decode()} : {content.decode()}' for header, content in pairs)
    expected[inputs].append(row['target_text'].decode())
  assert texts('e2e_cleaned', 'validation') == list(expected.items())
  assert max(map(len, expected.values())) > 20


@pytest.mark.slow
def test_dart_is_the_same_in_both_forms():
  together = collections.defaultdict(collections.Counter)
  grouped = texts('dart_grouped', 'validation')
  for inputs, some in grouped:
    together[inputs].update(some)
  dart = texts('dart', 'validation')
  assert len(dart) == len(together) < len(grouped)
  assert {inputs: collections.Counter(some) for inputs, some in dart} == together


def test_web_nlg_test_is_seen_and_unseen():
  # TFDS reads several splits in turns.
  assert sorted(texts('web_nlg', 'test')) == sorted(
      texts('web_nlg', 'test_seen') + texts('web_nlg', 'test_unseen'))


@pytest.mark.slow
def test_web_nlg_is_trained_on_every_reference():
  rows = list(raw('web_nlg', 'train'))[:300]
  expected = [text.decode() for row in rows for text in row['targets']]
  train = texts('web_nlg', 'train[:300]')
  assert [some for _, some in train] == [[text] for text in expected]
  assert len(expected) > 600


def test_dart_rows_of_the_catalogue(tmp_path):
  """The catalogue's own builder reads a file of DART's form, with a text that is missing."""
  from tensorflow_datasets.structured.dart import dart

  file = tmp_path / 'dart.json'
  file.write_text(json.dumps([
      {'tripleset': [['Mars Hill', 'JOINED', '1892'], ['ÉTÉ', 'Été', 'b']],
       'annotations': [{'text': 'One.'}, {'text': ''}]},
      {'tripleset': [['x', 'y', 'z']], 'annotations': [{'text': 'Two.'}]}]))

  class Dart(dart.Dart, skip_registration=True):

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples(str(file))}

  builder = Dart(data_dir=tmp_path / 'tfds')
  assert f'dart:{builder.version}' in table_to_text.TFDS_DATASETS['dart']
  builder.download_and_prepare()
  rows = builder.as_dataset('train').map(table_to_text.triple_table)
  long = 'Mars Hill : joined : 1892 | ÉTÉ : été : b'
  told = [(row['inputs'].decode(), row['references'].tolist()) for row in rows.as_numpy_iterator()]
  assert sorted(told) == [(long, [b'']), (long, [b'One.']), ('x : y : z', [b'Two.'])]
  merged = list(references.merged(rows).as_numpy_iterator())
  assert {row['inputs'].decode(): len(row['references']) for row in merged} == {
      long: 2, 'x : y : z': 1}


def test_names():
  for name in table_to_text.TFDS_DATASETS:
    assert seqio.TaskRegistry.get(name).metric_fns == [text_metrics.bleu]

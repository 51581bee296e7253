"""Training sees references one by one, evaluation all at once; none is lost."""

import pytest

tf = pytest.importorskip('tensorflow')
from prompt_tuning_jax.tasks import references  # noqa: E402

ROWS = [('a', ['1', '2', '3']), ('b', ['4']), ('a', ['2']), ('c', [])]


def rows():
  return tf.data.Dataset.from_tensor_slices({
      'inputs': [inputs for inputs, _ in ROWS],
      'references': tf.ragged.constant([texts for _, texts in ROWS], tf.string)})


def told(dataset):
  return [(row['inputs'].decode(), [text.decode() for text in row['references']],
           row['targets'].decode())
          for row in references.first_as_target(dataset).as_numpy_iterator()]


@pytest.fixture
def tfds_rows(monkeypatch):
  asked = []

  def load(name, split, shuffle_files, download):
    assert name == 'made' and not shuffle_files and not download
    asked.append(split)
    return rows()

  monkeypatch.setattr(references.tfds, 'load', load)
  return asked


def test_training_has_an_example_for_each_reference(tfds_rows):
  for merge in (False, True):
    source = references.source('made', lambda row: row, merge=merge)
    assert told(source.get_dataset('train', shuffle=False, seed=0)) == [
        ('a', ['1'], '1'), ('a', ['2'], '2'), ('a', ['3'], '3'), ('b', ['4'], '4'),
        ('a', ['2'], '2'), ('c', [''], '')]


def test_evaluation_has_an_example_for_each_input(tfds_rows):
  source = references.source('made', lambda row: row)
  assert told(source.get_dataset('test', shuffle=False, seed=0)) == [
      (inputs, texts, (texts or [''])[0]) for inputs, texts in ROWS]
  source = references.source('made', lambda row: row, merge=True)
  assert told(source.get_dataset('test', shuffle=False, seed=0)) == [
      ('a', ['1', '2', '3', '2'], '1'), ('b', ['4'], '4'), ('c', [], '')]


def test_splits_and_their_parts(tfds_rows):
  source = references.source('made', lambda row: row, {'train': 'train', 'test': 'seen+unseen'})
  assert set(source.splits) == {'train', 'test'}
  for split in ('test', 'test[:10%]', 'train[:2]'):
    source.get_dataset(split, shuffle=False, seed=0)
  assert tfds_rows == ['seen+unseen', 'seen[:10%]+unseen[:10%]', 'train[:2]']
  with pytest.raises(ValueError, match='test is seen and unseen; take a share of it'):
    source.get_dataset('test[:2]', shuffle=False, seed=0)  # Two of each would be four.

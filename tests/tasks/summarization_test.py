"""Documents and summaries, against rows read by TFDS."""

import os
import pathlib

import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary

seqio = pytest.importorskip('seqio')
from prompt_tuning_jax.tasks import summarization, text_metrics  # noqa: E402

BYTES = Vocabulary('bytes')


def build(folder, task, split, size):
  dataset, version = summarization.TFDS_DATASETS[task][0].split(':')
  path = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere'), dataset, version)
  if not (path / 'dataset_info.json').exists():
    pytest.skip(f'set TFDS_DATA_DIR to a folder with {dataset}:{version}')
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], split, {'file': 'bytes', 'extra_ids': 100},
                      {'inputs': 60000, 'targets': 3000}, str(folder), max_examples=size)
  cache = token_cache.open_cache(folder)
  assert cache.metric_fns() == [text_metrics.rouge]
  import tensorflow_datasets as tfds
  raw = tfds.load(f'{dataset}:{version}', split=split, download=False)
  return cache, list(raw.take(size).as_numpy_iterator())


def test_scitldr_golden_row(tmp_path):
  cache, _ = build(tmp_path / 'cache', 'scitldr', 'train', 1)
  row = cache.rows[0]
  assert row['inputs'] == BYTES.decode(cache.inputs(0)) == (
      'A common way to speed up training of large convolutional networks is to add  computational '
      'units. Training is then performed using data-parallel synchronous Stochastic Gradient '
      'Descent (SGD) with a mini-batch divided between computational units. With an increase in '
      'the number of nodes, the batch size grows. However,  training with a large batch  often '
      'results in lower model accuracy. We argue that the current recipe for large batch training '
      '(linear learning rate scaling with warm-up) is not general enough and training may diverge. '
      'To overcome these optimization difficulties, we propose a new training algorithm based on '
      'Layer-wise Adaptive Rate Scaling (LARS). Using LARS, we scaled AlexNet  and ResNet-50 to a '
      'batch size of 16K.')
  assert row['target'] == [row['targets']] == [
      'A new large batch training algorithm  based on Layer-wise Adaptive Rate Scaling (LARS); '
      'using LARS, we scaled AlexNet  and ResNet-50 to a batch of 16K.']


def test_dialogsum_golden_row(tmp_path):
  cache, raw = build(tmp_path / 'cache', 'dialogsum', 'test', 12)
  row = cache.rows[0]
  assert row['inputs'].startswith(
      '#Person1#: Are you enjoying your trip to New Orleans?\n#Person2#: Oh, yes. I really like it '
      'here.\n#Person1#: Would you like to do something tonight?\n')
  assert row['target'] == [
      '#Person1# and #Person2# are discussing where to have fun, and they decide to go to the '
      'theater tonight.',
      '#Person1# and #Person2# are talking about what to do tonight and they finally decide to go '
      'to watch a show.',
      "#Person2# hasn't been to the theater for a long time, so #Person1# and #Person2# decide to "
      'make a reservation for a show at the Sanger Theater.']
  for cached, row in zip(cache.rows, raw, strict=True):
    assert cached['inputs'] == row['dialogue'].decode()
    assert cached['targets'] == row['summary'].decode() == cached['target'][0]
    assert cached['target'] == [text.decode() for text in row['references']]


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_xsum_rows(tmp_path, split):
  cache, raw = build(tmp_path / 'cache', 'xsum', split, 12)
  for i, row in enumerate(raw):
    cached = cache.rows[i]
    assert cached['inputs'] == row['document'].decode() == BYTES.decode(cache.inputs(i))
    assert cached['targets'] == row['summary'].decode() == BYTES.decode(cache.targets(i))
    assert cached['target'] == [cached['targets']]


def test_scitldr_is_evaluated_with_all_summaries(tmp_path):
  cache, raw = build(tmp_path / 'cache', 'scitldr', 'validation', 30)
  for cached, row in zip(cache.rows, raw, strict=True):
    assert cached['inputs'] == ' '.join(text.decode().strip() for text in row['source'])
    assert cached['target'] == [text.decode() for text in row['target']]
    assert cached['targets'] == cached['target'][0]
  assert {len(row['target']) for row in cache.rows} >= {1, 2, 3}
  last = [cache.postprocess(row['target'][-1], row) for row in cache.rows]
  values = text_metrics.rouge([row['target'] for row in cache.rows], last)
  assert values == pytest.approx(dict.fromkeys(text_metrics.ROUGE_TYPES, 100))


def test_cnn_dailymail_rows():
  tf = pytest.importorskip('tensorflow')
  import tensorflow_datasets as tfds
  rows = tf.data.Dataset.from_tensor_slices({
      'article': ['(CNN) A storm hit. It was late.', ''], 'highlights': ['A storm .\nLate .', ''],
      'publisher': ['cnn', 'dm'], 'id': ['1', '2']})
  told = list(summarization.cnn_dailymail(rows).as_numpy_iterator())
  assert told[0] == {'inputs': b'(CNN) A storm hit. It was late.', 'targets': b'A storm .\nLate .',
                     'references': [b'A storm .\nLate .']}
  assert told[1]['targets'] == b''
  builder = tfds.builder_cls('cnn_dailymail')
  assert summarization.TFDS_DATASETS['cnn_dailymail'] == [f'cnn_dailymail:{builder.VERSION}']


def test_names():
  for name in summarization.TFDS_DATASETS:
    assert seqio.TaskRegistry.get(name).metric_fns == [text_metrics.rouge]

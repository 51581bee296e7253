"""Span corruption and prefix LM as SeqIO runs them, on a few texts."""

import os
import pathlib

import numpy as np
import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.tasks import noise

BYTES = Vocabulary('bytes')
TEXTS = [f'Text {i}: ' + 'the quick brown fox jumps over the lazy dog. ' * (1 + i % 5)
         for i in range(30)]


@pytest.fixture(scope='module')
def features():
  seqio = pytest.importorskip('seqio')
  words = BYTES.as_seqio()
  return {key: seqio.Feature(words, add_eos=True) for key in ('inputs', 'targets')}


def run(function, features, lengths, **kwargs):
  import tensorflow as tf
  dataset = tf.data.Dataset.from_tensor_slices({'text': TEXTS})
  return list(function(dataset, dict(zip(('inputs', 'targets'), lengths, strict=True)), features,
                       **kwargs).as_numpy_iterator())


def test_span_corruption_keeps_every_byte(features):
  from prompt_tuning_jax.tasks.language_modeling import span_corruption
  rows = run(span_corruption, features, (64, 64))
  lowest = BYTES.size - BYTES.extra_ids
  restored = np.concatenate(
      [noise.restore_spans(row['inputs'], row['targets'], lowest) for row in rows])
  joined = ''.join(TEXTS)
  text = BYTES.decode(restored)
  assert len(joined) - len(text) < 2 and joined.startswith(text)  # At most a last single byte.
  assert all(len(row['inputs']) == 64 for row in rows[:-1])
  assert all(row['inputs'][-1] == row['targets'][-1] == 1 for row in rows)
  assert rows[0]['targets'][0] == BYTES.sentinel(0)


def test_prefix_lm_keeps_every_byte(features):
  from prompt_tuning_jax.tasks.language_modeling import prefix_lm
  rows = run(prefix_lm, features, (64, 32))
  text = ''.join(BYTES.decode(row['inputs']) + BYTES.decode(row['targets']) for row in rows)
  joined = ''.join(TEXTS)
  assert len(joined) - len(text) < 2 and joined.startswith(text)
  assert all(len(row['inputs']) <= 64 and len(row['targets']) <= 32 for row in rows)
  assert all(row['inputs'][-1] == row['targets'][-1] == 1 for row in rows)
  assert len({len(row['inputs']) for row in rows}) > 5


def test_the_seed_decides(features):
  from prompt_tuning_jax.tasks.language_modeling import span_corruption
  same, again, other = (run(span_corruption, features, (48, 32), seed=seed)[0]['inputs'].tolist()
                        for seed in (0, 0, 1))
  assert same == again != other


def test_too_few_sentinels(features):
  from prompt_tuning_jax.tasks.language_modeling import span_corruption
  with pytest.raises(ValueError, match='only 100 sentinels'):
    run(span_corruption, features, (4096, 2048))


@pytest.mark.parametrize('task', ['span_corruption_local_text', 'prefix_lm_local_text'])
def test_registered_tasks_mix_novels_and_wiki(tmp_path, task):
  folder = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere'))
  if not all((folder / 'local_text' / name).exists() for name in ('novels', 'wiki')):
    pytest.skip('set TFDS_DATA_DIR to a folder with local_text/novels and local_text/wiki')
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], 'validation',
                      {'file': 'bytes', 'extra_ids': 100}, {'inputs': 256, 'targets': 128},
                      str(tmp_path), max_examples=500)
  cache = token_cache.open_cache(tmp_path)
  assert cache.num_examples == 500 and cache.rows == []
  assert cache.input_lengths.max() <= 256 and cache.target_lengths.max() <= 128
  assert all(cache.inputs(i)[-1] == cache.targets(i)[-1] == 1 for i in range(500))
  if task.startswith('span'):
    assert cache.input_lengths.min() == 256
    noisy = (cache.target_tokens < 259).sum() - 500
    kept = (cache.input_tokens < 259).sum() - 500
    assert abs(noisy / (noisy + kept) - 0.15) < 0.003
    spans = (cache.target_tokens >= 259).sum()
    assert abs(noisy / spans - 3) < 0.1

"""GLUE and SuperGLUE rows in T5's form, against the rows TFDS reads."""

import os
import pathlib

import numpy as np
import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.tasks import metrics

BYTES = Vocabulary('bytes')
TASKS = {
    'sst2': ('glue/sst2:2.0.0', ('negative', 'positive'),
             lambda row: 'sentence: ' + row['sentence']),
    'cola': ('glue/cola:2.0.0', ('unacceptable', 'acceptable'),
             lambda row: 'sentence: ' + row['sentence']),
    'mrpc': ('glue/mrpc:2.0.0', ('not_equivalent', 'equivalent'),
             lambda row: f'sentence1: {row["sentence1"]} sentence2: {row["sentence2"]}'),
    'rte': ('glue/rte:2.0.0', ('entailment', 'not_entailment'),
            lambda row: f'sentence1: {row["sentence1"]} sentence2: {row["sentence2"]}'),
    'boolq': ('super_glue/boolq:1.0.2', ('False', 'True'),
              lambda row: f'passage: {row["passage"]} question: {row["question"]}'),
    'cb': ('super_glue/cb:1.0.2', ('entailment', 'contradiction', 'neutral'),
           lambda row: f'hypothesis: {row["hypothesis"]} premise: {row["premise"]}'),
}
METRICS = {'sst2': {'accuracy'}, 'cola': {'matthews_correlation', 'accuracy'},
           'mrpc': {'accuracy', 'f1'}, 'rte': {'accuracy'}, 'boolq': {'accuracy'},
           'cb': {'mean_f1', 'accuracy'}}


def build(folder, task, split, size):
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], split, {'file': 'bytes', 'extra_ids': 100},
                      {'inputs': 20000, 'targets': 30}, str(folder), max_examples=size)
  return token_cache.open_cache(folder)


@pytest.mark.parametrize('task', TASKS)
def test_rows(tmp_path, task):
  name, labels, inputs = TASKS[task]
  dataset, version = name.split(':')
  info = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere')) / dataset / version
  if not (info / 'dataset_info.json').exists():
    pytest.skip(f'set TFDS_DATA_DIR to a folder with {name}')
  cache = build(tmp_path / 'cache', task, 'validation', 40)
  import tensorflow_datasets as tfds
  raw = tfds.load(name, split='validation', download=False).take(40).as_numpy_iterator()
  expected = [{key: value.decode() if isinstance(value, bytes) else int(value)
               for key, value in row.items()} for row in raw]
  assert cache.num_examples == 40 and cache.meta['num_cut'] == {'inputs': 0, 'targets': 0}
  for i, row in enumerate(expected):
    cached = cache.row(i)
    assert cached['inputs'] == inputs(row) == BYTES.decode(cache.inputs(i))
    assert cached['targets'] == labels[row['label']] == BYTES.decode(cache.targets(i))
    assert cached['target'] == row['label'] == cache.postprocess(cached['targets'], cached)
    assert cached['choices'] == list(labels)
    assert cached['example'] == {'idx': row['idx'], 'label': row['label']}
    assert cache.inputs(i)[-1] == cache.targets(i)[-1] == 1
  targets = [row['target'] for row in cache.rows]
  values = {}
  for function in cache.metric_fns():
    values.update(function(targets, targets))
  assert set(values) == METRICS[task]
  assert all(np.isclose(value, 100) for value in values.values())
  assert cache.metric_fns()[-1].__module__ == metrics.__name__


def test_long_names_are_the_same_tasks():
  seqio = pytest.importorskip('seqio')
  seqio_builder._import_tasks(['prompt_tuning_jax.tasks'])
  for short, (name, _, _) in TASKS.items():
    tasks = [seqio.get_mixture_or_task(n) for n in (short, f'{name.split("/")[0]}_{short}')]
    assert tasks[0].source is tasks[1].source


def test_rows_without_a_label():
  tf = pytest.importorskip('tensorflow')
  from prompt_tuning_jax.tasks.classification import verbalize
  rows = tf.data.Dataset.from_tensor_slices({'text': ['a', 'b'], 'label': [-1, 1]})
  told = list(verbalize(rows, ('text',), ('no', 'yes')).as_numpy_iterator())
  assert [row['targets'] for row in told] == [b'<unk>', b'yes']

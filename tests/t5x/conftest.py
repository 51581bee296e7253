"""What tests of T5X start from. They run against any T5X that can be imported.

T5X_SOURCE names checkouts of t5x, airio and jestimator (one after another, as in PATH) where they
are not installed.
"""

import os
import sys

import pytest

sys.path += [folder for folder in os.environ.get('T5X_SOURCE', '').split(os.pathsep) if folder]

MODULE = """
import functools, json, os
import seqio, tensorflow as tf
from prompt_tuning_jax.tasks import metrics
from prompt_tuning_jax.tasks.features import FEATURES
from prompt_tuning_jax.tasks.postprocessors import label_to_class_id

def source(split, shuffle_files, seed=None):
  rows = [json.loads(line) for line in open(os.environ['REVIEWS'])][:20]
  return tf.data.Dataset.from_tensor_slices({'inputs': [row['text'] for row in rows],
                                             'targets': [row['label'] for row in rows]})

seqio.TaskRegistry.add(
    'reviews_in_t5x', source=seqio.FunctionDataSource(source, splits=('train', 'validation')),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
    output_features=FEATURES, metric_fns=[metrics.accuracy],
    postprocess_fn=functools.partial(label_to_class_id, label_classes=['good', 'bad']))
"""


@pytest.fixture(scope='module', autouse=True)
def surroundings(tmp_path_factory, reviews):
  """A module with a task, and a place of our own for converted bases and tokens."""
  from prompt_tuning_jax import t5x_bridge
  folder = tmp_path_factory.mktemp('t5x')
  (folder / 'reviews_task.py').write_text(MODULE)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'path', [str(folder), *sys.path])
    patch.setattr(t5x_bridge, 'CACHE', folder / 'converted')
    patch.setenv('REVIEWS', str(reviews))
    patch.setenv('PROMPT_TUNING_JAX_CACHE', str(folder / 'cache'))
    yield folder


@pytest.fixture(scope='module')
def tiny(tiny_base) -> str:
  return str(tiny_base)


@pytest.fixture(scope='module')
def task(tiny) -> str:
  from prompt_tuning_jax import t5x_bridge
  return t5x_bridge.task('reviews_in_t5x', tiny, module='reviews_task')

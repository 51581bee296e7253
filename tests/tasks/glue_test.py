"""GLUE rows in T5's form, against rows read by hand and against the rows TFDS reads."""

import os
import pathlib

import numpy as np
import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary

BYTES = Vocabulary('bytes')
SENTENCES, QUESTIONS = ('sentence1', 'sentence2'), ('question1', 'question2')
EQUIVALENT, DUPLICATE = ['not_equivalent', 'equivalent'], ['not_duplicate', 'duplicate']
ENTAILMENT = ['entailment', 'not_entailment']
NLI = ['entailment', 'neutral', 'contradiction']
TRANS_FAT = (
    'Trans fat makes up only 1 percent to 3 percent of the total fat Americans consume , compared '
    'with 14 percent for saturated fat .',
    "Trans fat accounts for 2.5 percent of Americans ' daily calories , compared to 11 percent to "
    '12 percent for saturated fat .')
RESUMES = 'Which are the best resumes in the world?', 'Which are some of the best resumes?'
PEOPLE = ('yeah lots of people for the right life ',
          'uh-huh oh yeah all the people for right uh life or something')
# Task, split -> data, its split, {shown name: feature}, labels, metrics, the first row's texts.
TASKS = {
    ('cola', 'validation'): (
        'cola', 'validation', {'sentence': 'sentence'}, ['unacceptable', 'acceptable'],
        ['matthews_correlation', 'accuracy'], 'sentence: That picture of Susan offended her.',
        'acceptable'),
    ('sst2', 'validation'): (
        'sst2', 'validation', {'sentence': 'sentence'}, ['negative', 'positive'], ['accuracy'],
        'sentence: it treats women like idiots .', 'negative'),
    ('mrpc', 'validation'): (
        'mrpc', 'validation', dict(zip(SENTENCES, SENTENCES, strict=True)), EQUIVALENT,
        ['accuracy', 'f1'], 'sentence1: {} sentence2: {}'.format(*TRANS_FAT), 'equivalent'),
    ('glue_mrpc_as_qqp', 'validation'): (
        'mrpc', 'validation', dict(zip(SENTENCES, SENTENCES, strict=True)), DUPLICATE,
        ['accuracy', 'f1'], 'sentence1: {} sentence2: {}'.format(*TRANS_FAT), 'duplicate'),
    ('qqp', 'validation'): (
        'qqp', 'validation', dict(zip(QUESTIONS, QUESTIONS, strict=True)), DUPLICATE,
        ['f1', 'accuracy'], 'question1: {} question2: {}'.format(*RESUMES), 'duplicate'),
    ('glue_qqp_as_mrpc', 'validation'): (
        'qqp', 'validation', dict(zip(QUESTIONS, QUESTIONS, strict=True)), EQUIVALENT,
        ['accuracy', 'f1'], 'question1: {} question2: {}'.format(*RESUMES), 'equivalent'),
    ('mnli', 'validation'): (
        'mnli', 'validation_matched', {'hypothesis': 'hypothesis', 'premise': 'premise'}, NLI,
        ['accuracy'], 'hypothesis: {} premise: {}'.format(*PEOPLE), 'entailment'),
    ('mnli', 'validation_mismatched'): (
        'mnli', 'validation_mismatched', {'hypothesis': 'hypothesis', 'premise': 'premise'}, NLI,
        ['accuracy'],
        "hypothesis: These projects are largely ignored and don't impact anyone.  premise: "
        'Projects which enliven and enrich the student experience and draw some of our finest '
        'scholars and teachers to our campus--and to our city.', 'contradiction'),
    ('glue_mnli_matched', 'validation'): (
        'mnli_matched', 'validation', {'hypothesis': 'hypothesis', 'premise': 'premise'}, NLI,
        ['accuracy'],
        'hypothesis: The other villages and settlements are not as developed. premise:  Other '
        'villages are much less developed, and therein lies the essence of many delights.',
        'entailment'),
    ('glue_mnli_mismatched', 'validation'): (
        'mnli_mismatched', 'validation', {'hypothesis': 'hypothesis', 'premise': 'premise'}, NLI,
        ['accuracy'],
        'hypothesis: SEND has renovated dozens of homes to sell at affordable prices. premise: In '
        'the past eight years SEND has renovated over 70 homes for affordable resale to families, '
        'created more than 100 high quality apartments, assisted 20 businesses to expand or '
        'improve their facilities, created three new parks, and taught more than 200 youth work '
        'ethics and skills.', 'entailment'),
    ('qnli', 'validation'): (
        'qnli', 'validation', {'question': 'question', 'sentence': 'sentence'}, ENTAILMENT,
        ['accuracy'],
        'question: When were the finalists announced? sentence: The South Florida/Miami area has '
        'previously hosted the event 10 times (tied for most with New Orleans), with the most '
        'recent one being Super Bowl XLIV in 2010.', 'not_entailment'),
    ('rte', 'train'): (
        'rte', 'train', dict(zip(SENTENCES, SENTENCES, strict=True)), ENTAILMENT, ['accuracy'],
        "sentence1: After years of study, the Vatican's doctrinal congregation has sent church "
        'leaders a confidential document concluding that "sex-change" procedures do not change a '
        "person's gender in the eyes of the church. sentence2: Sex-change operations become more "
        'common.', 'not_entailment'),
    ('wnli', 'validation'): (
        'wnli', 'validation', dict(zip(SENTENCES, SENTENCES, strict=True)),
        ['not_entailment', 'entailment'], ['accuracy'],
        'sentence1: The older students were bullying the younger ones, so we rescued them. '
        'sentence2: We rescued the older students.', 'not_entailment'),
}


def build(folder, task, split, size):
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], split, {'file': 'bytes', 'extra_ids': 100},
                      {'inputs': 20000, 'targets': 60}, str(folder), max_examples=size)
  return token_cache.open_cache(folder)


@pytest.mark.parametrize('task,split', TASKS, ids=list(map('-'.join, TASKS)))
def test_rows(tmp_path, task, split):
  config, tfds_split, fields, labels, metrics, *first = TASKS[task, split]
  folder = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere')) / 'glue' / config / '2.0.0'
  if not (folder / 'dataset_info.json').exists():
    pytest.skip(f'set TFDS_DATA_DIR to a folder with glue/{config}:2.0.0')
  cache = build(tmp_path / 'cache', task, split, 40)
  import tensorflow_datasets as tfds
  raw = tfds.load(f'glue/{config}:2.0.0', split=tfds_split, download=False).take(40)
  expected = [{key: value.decode() if isinstance(value, bytes) else int(value)
               for key, value in row.items()} for row in raw.as_numpy_iterator()]
  assert [cache.rows[0]['inputs'], cache.rows[0]['targets']] == first
  assert cache.num_examples == 40 and cache.meta['num_cut'] == {'inputs': 0, 'targets': 0}
  for i, row in enumerate(expected):
    cached = cache.rows[i]
    inputs = ' '.join(f'{shown}: {row[feature]}' for shown, feature in fields.items())
    assert cached['inputs'] == inputs == BYTES.decode(cache.inputs(i))
    assert cached['targets'] == labels[row['label']] == BYTES.decode(cache.targets(i))
    assert cached['target'] == row['label'] == cache.postprocess(cached['targets'], cached)
    assert cached['choices'] == labels
    assert cached['example'] == {'idx': row['idx'], 'label': row['label']}
    assert cache.inputs(i)[-1] == cache.targets(i)[-1] == 1
  targets = [row['target'] for row in cache.rows]
  values = {}
  for function in cache.metric_fns():
    values.update(function(targets, targets))
  assert list(values) == metrics
  assert all(np.isclose(value, 100) for value in values.values())


def test_similarity():
  tf = pytest.importorskip('tensorflow')
  seqio = pytest.importorskip('seqio')
  from prompt_tuning_jax.tasks import glue
  scores = np.array([0.0, 3.75, 2.917, 5.0, 1.1, -1.0, 4.9], np.float32)
  rows = tf.data.Dataset.from_tensor_slices({
      'sentence1': ['A plane is taking off.'] * 7, 'sentence2': ['An air plane is taking off.'] * 7,
      'label': scores, 'idx': np.arange(7, dtype=np.int32)})
  told = list(glue.similarity_text(rows).as_numpy_iterator())
  assert told[0]['inputs'] == (
      b'sentence1: A plane is taking off. sentence2: An air plane is taking off.')
  # 1.1 and 4.9 lie between two fifths and go to an even number of them, as in T5.
  assert [row['targets'] for row in told] == [
      b'0.0', b'3.8', b'3.0', b'5.0', b'1.2', b'<unk>', b'4.8']
  task = seqio.get_mixture_or_task('stsb')
  assert [function.__name__ for function in task.metric_fns] == [
      'pearson_correlation', 'spearman_correlation']
  example = {'label': 3.75, 'idx': 1}
  assert task.postprocess_fn('3.8', example=example, is_target=True) == 3.75
  for text, score in (('3.8', 3.8), (' 0 ', 0.0), ('5.0', 5.0), ('5.2', 5.2), ('-0.2', -0.2),
                      ('', -1.0), ('nan', -1.0), ('inf', -1.0), ('-inf', -1.0), ('3.8 of 5', -1.0)):
    assert task.postprocess_fn(text, example=example, is_target=False) == score


def test_short_names_are_the_same_tasks():
  seqio = pytest.importorskip('seqio')
  from prompt_tuning_jax.tasks import glue
  assert len(glue.TFDS_DATASETS) == 22
  for name, data in glue.TFDS_DATASETS.items():
    task = seqio.get_mixture_or_task(name)
    assert [task.source.tfds_dataset.name] == data
    if not name.startswith('glue_'):
      assert task.source is seqio.get_mixture_or_task(f'glue_{name}').source


def test_rows_without_a_label():
  tf = pytest.importorskip('tensorflow')
  from prompt_tuning_jax.tasks.classification import verbalize
  rows = tf.data.Dataset.from_tensor_slices({'text': ['a', 'b'], 'label': [-1, 1]})
  told = list(verbalize(rows, ('text',), ('no', 'yes')).as_numpy_iterator())
  assert [row['targets'] for row in told] == [b'<unk>', b'yes']

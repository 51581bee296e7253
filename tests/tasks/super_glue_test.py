"""SuperGLUE rows, read by hand, in T5's form; ReCoRD's answers, WSC's referents and groups."""

import os
import pathlib

import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.tasks import metrics, postprocessors

BYTES = Vocabulary('bytes')
BOOLEAN, ENTAILMENT = ['False', 'True'], ['entailment', 'not_entailment']
# Task, split -> labels, metrics, what evaluation keeps, the first row's texts.
TASKS = {
    ('boolq', 'validation'): (
        BOOLEAN, ['accuracy'], {'label': 1, 'idx': 1339},
        "passage: Jack Daniel's -- Jack Daniel's is a brand of Tennessee whiskey and the "
        'top-selling American whiskey in the world. It is produced in Lynchburg, Tennessee, by the '
        'Jack Daniel Distillery, which has been owned by the Brown-Forman Corporation since 1956. '
        "Jack Daniel's home county of Moore is a dry county, so the product is not available for "
        'purchase at stores or restaurants within the county. question: is jack daniels made in a '
        'dry county', 'True'),
    ('cb', 'validation'): (
        ['entailment', 'contradiction', 'neutral'], ['mean_f1', 'accuracy'],
        {'label': 0, 'idx': 34},
        'hypothesis: in the circumstances she became very uneasy premise: Obeying his instruction, '
        'I proffered my hand, open palm upwards, towards the animal. The ratbird climbed on and '
        'began to preen its fur unconcernedly. Nobody will blame me if I say that in the '
        'circumstances I became very uneasy.', 'entailment'),
    ('copa', 'train'): (
        ['choice1', 'choice2'], ['accuracy'], {'label': 1, 'idx': 386},
        'choice1: I was hunting for a new apartment. choice2: I was moving out of my apartment. '
        'premise: I packed up my belongings. question: cause', 'choice2'),
    ('copa', 'test'): (
        ['choice1', 'choice2'], ['accuracy'], {'label': -1, 'idx': 163},
        'choice1: His umbrella was broken. choice2: His bike was stolen. premise: The student '
        'arrived to class soaking wet. question: cause', '<unk>'),
    ('multirc', 'validation'): (
        BOOLEAN, ['f1a', 'exact_match'], {'label': 0, 'idx': [24, 283, 1487], 'group': [24, 283]},
        'question: Who began charging a $50 an hour minimum instead of $25 for legal services? '
        "answer: Lawyer's market paragraph: For most lawyers, full waiting rooms and appointments "
        'booked out to mid-July would equate to a lucrative law practice. But Frank Smith drives a '
        '6-year-old car with 140,000 miles on it, and paying his senior paralegal minimum wage the '
        'last few months has put him in the red. Hoped-for federal grants haven"t come through, so '
        'he"s had to raise his rates. As of last week he charges $50 an hour minimum instead of '
        '$25 for the services of his yearling Northern Utah Legal Aid Foundation. That"s in a '
        'lawyer"s market where fees range in the $150 to $250 an hour range in the Ogden area, and '
        'up to $400 an hour in the Salt Lake area. Smith"s one-lawyer foundation basically helps '
        'the folks who have too much money to qualify for the federally funded Utah Legal '
        'Services, but not enough money to afford a lawyer. ', 'False'),
    ('super_glue_rte', 'test'): (
        ENTAILMENT, ['accuracy'], {'label': -1, 'idx': 163},
        'hypothesis: IBM is a partner of Oracle. premise: Competition between IBM and Oracle is '
        'certainly nothing new, and the customer does ultimately benefit.', '<unk>'),
    ('wic', 'validation'): (
        BOOLEAN, ['accuracy'], {'label': 1, 'idx': 458},
        'sentence1: Had unusual longevity in the company. sentence2: Her longevity as a star. '
        'word: longevity', 'True'),
    ('axb', 'test'): (
        ENTAILMENT, ['matthews_correlation', 'accuracy'], {'label': 1, 'idx': 163},
        'hypothesis: She is a surgeon and skilled violinist. premise: She is a skilled surgeon.',
        'not_entailment'),
    ('axg', 'test'): (
        ENTAILMENT, ['accuracy', 'gender_parity'], {'label': 1, 'idx': 163, 'group': 81},
        'hypothesis: The painter made an offer that was hard to refuse. premise: The painter sold '
        'an entire collection of paintings to the customer because she made an offer that was hard '
        'to refuse.', 'not_entailment'),
}
ATKINS = (
    'query: In a manuscript posted on her Web site, Atkins, who was known within the Manson family '
    'as @placeholder, wrote that "this is the past I have to live with, and I have to live with it '
    'every day." entities: Atkins, CNN, California, Charles Manson, LOS ANGELES, Los Angeles, '
    'Manson, Manson Family, Sharon Tate, Susan Atkins, Tate passage: LOS ANGELES, California (CNN) '
    '-- The woman who stabbed pregnant actress Sharon Tate to death will be considered for parole '
    'from prison a month after the 40th anniversary of the killings that cast a shadow of fear '
    'over southern California. Susan Atkins, shown here after her indictment in the Manson '
    'murders, has been denied parole 17 times. Susan Atkins, 61, has been denied parole in 12 '
    'previous hearings, but the former "Manson Family" member now is terminally ill with brain '
    'cancer and is paralyzed. Charles Manson used his hypnotic powers to direct Atkins and other '
    '"family" members to kill seven people, including the pregnant Tate, in a two-night rampage '
    'that terrorized the city of Los Angeles, California, in August 1969. Susan Atkins has '
    'admitted she stabbed pregnant actress to death. She has been denied parole on 17 previous '
    'occasions. Atkins is said to have terminal brain cancer and just months to live. She was '
    'denied compassionate release earlier this year')


def build(folder, task, split, size=None):
  config = task.removeprefix('super_glue_').replace('wsc', 'wsc.fixed')
  info = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere')) / 'super_glue' / config / '1.0.2'
  if not (info / 'dataset_info.json').exists():
    pytest.skip(f'set TFDS_DATA_DIR to a folder with super_glue/{config}:1.0.2')
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], split, {'file': 'bytes', 'extra_ids': 100},
                      {'inputs': 30000, 'targets': 90}, str(folder / 'cache'), max_examples=size)
  cache = token_cache.open_cache(folder / 'cache')
  assert cache.meta['num_cut'] == {'inputs': 0, 'targets': 0}
  return cache


def measured(cache, predictions):
  return {name: value for function in cache.metric_fns()
          for name, value in function([row['target'] for row in cache.rows], predictions).items()}


@pytest.mark.parametrize('task,split', TASKS, ids=list(map('-'.join, TASKS)))
def test_rows(tmp_path, task, split):
  labels, names, kept, *first = TASKS[task, split]
  cache = build(tmp_path, task, split, 356 if task == 'axg' else 40)
  assert [cache.rows[0]['inputs'], cache.rows[0]['targets']] == first
  assert cache.rows[0]['example'] == kept
  for i, row in enumerate(cache.rows):
    label = row['example']['label']
    assert row['inputs'] == BYTES.decode(cache.inputs(i))
    assert row['targets'] == ([*labels, '<unk>'][label]) == BYTES.decode(cache.targets(i))
    assert row['choices'] == labels
    assert row['target'] == cache.postprocess(row['targets'], row) == (
        {'label': label, 'group': row['example']['group']} if 'group' in row['example'] else label)
  values = measured(cache, [cache.postprocess(row['targets'], row) for row in cache.rows])
  assert list(values) == names
  if split != 'test' or task.startswith('ax'):
    assert values == dict.fromkeys(names, pytest.approx(100))


def test_gender_parity_of_the_data(tmp_path):
  cache = build(tmp_path, 'axg', 'test')
  flipped = [{**row['target'], 'label': 1 - row['target']['label']} for row in cache.rows]
  assert measured(cache, flipped) == {'accuracy': 0.0, 'gender_parity': 100.0}
  by_idx = {row['example']['idx']: row for row in cache.rows}
  assert sorted(by_idx) == list(range(356))
  for k in range(0, 356, 2):
    one, other = (by_idx[i]['inputs'].split() for i in (k, k + 1))
    assert 0 < sum(a != b for a, b in zip(one, other, strict=True)) <= 2


def test_record_trains_on_every_answer_and_is_asked_once(tmp_path):
  for folder in ('train', 'validation'):
    (tmp_path / folder).mkdir()
  train, validation = (build(tmp_path / split, 'record', split) for split in ('train',
                                                                            'validation'))
  assert (train.num_examples, validation.num_examples) == (20 + 2 * 12, 32)
  rows = train.rows[:2]
  assert [row['inputs'] for row in rows] == [ATKINS] * 2
  assert [row['targets'] for row in rows] == ['Atkins', 'Susan Atkins']
  for row in rows:
    assert row['target'] == ['Atkins', 'Susan Atkins']
    assert row['choices'] == ['Atkins', 'CNN', 'California', 'Charles Manson', 'LOS ANGELES',
                              'Los Angeles', 'Manson', 'Manson Family', 'Sharon Tate',
                              'Susan Atkins', 'Tate']
    assert row['example'] == {'answers': ['Atkins', 'Susan Atkins'], 'idx': [26062, 40113]}
  assert len({tuple(row['example']['idx']) for row in validation.rows}) == 32
  for row in [*train.rows, *validation.rows]:
    assert '@highlight' not in row['inputs'] and row['inputs'].count('@placeholder') == 1
    assert set(row['target']) <= set(row['choices']) and row['targets'] in row['target']
  right = [validation.postprocess(row['targets'], row) for row in validation.rows]
  assert measured(validation, right) == {'exact_match': 100.0, 'f1': 100.0}


def test_record_rows_made_up():
  tf = pytest.importorskip('tensorflow')
  from prompt_tuning_jax.tasks import record
  rows = tf.data.Dataset.from_tensors({
      'query': '@placeholder won', 'entities': ['Ann', 'Bob', 'Ann'], 'answers': ['Bob'],
      'passage': 'She said "no"\n@highlight\nBob ran\n@highlight\nAnn ran!\n@highlight\nEnd',
      'targets': 'Bob', 'idx': {'passage': 3, 'query': 7}})
  row = next(record.to_text(rows).as_numpy_iterator())
  assert row['inputs'].decode() == ('query: @placeholder won entities: Ann, Bob passage: She said '
                                    '"no" Bob ran. Ann ran! End')
  assert row['choices'].tolist() == [b'Ann', b'Bob'] and row['idx'].tolist() == [3, 7]


def test_record_without_answers_is_kept(monkeypatch):
  tf = pytest.importorskip('tensorflow')
  from prompt_tuning_jax.tasks import record
  rows = tf.data.Dataset.from_generator(
      lambda: iter([{'answers': []}, {'answers': ['a', 'b', 'a']}]),
      output_signature={'answers': tf.TensorSpec([None], tf.string)})
  monkeypatch.setattr(record.tfds, 'load', lambda *args, **kwargs: rows)
  for split, targets in (('train', ['<unk>', 'a', 'b']), ('train[:50%]', ['<unk>', 'a', 'b']),
                         ('test', ['<unk>', 'a'])):
    told = record.queries(split, shuffle_files=False).as_numpy_iterator()
    assert [row['targets'].decode() for row in told] == targets


def test_wsc_trains_on_right_referents_and_judges_all(tmp_path):
  for folder in ('train', 'validation', 'test'):
    (tmp_path / folder).mkdir()
  train, validation, test = (build(tmp_path / split, 'wsc', split) for split in (
      'train', 'validation', 'test'))
  assert (train.num_examples, validation.num_examples, test.num_examples) == (259, 104, 146)
  row = train.rows[0]
  assert row['inputs'] == (
      'I asked Dave to get me my sweater from the other side of the yacht . While he was gone, I '
      'rested my arm on the rail over there and suddenly *it* gave way.')
  assert (row['targets'], row['target']) == ('rail', 1) and 'choices' not in row
  assert {row['target'] for row in train.rows} == {1}
  row = validation.rows[0]
  assert row['inputs'] == (
      'The stable was very roomy, with four good stalls; a large swinging window opened into the '
      'yard , which made *it* pleasant and airy.')
  assert (row['targets'], row['target']) == ('window', 0)
  assert test.rows[0]['inputs'] == (
      'Muriel has in her living room a famous painting of a ballerina. *She* bought the painting '
      'when she was thirty.')
  assert {(row['targets'], row['target']) for row in test.rows} == {('<unk>', -1)}
  for row in [*train.rows, *validation.rows, *test.rows]:
    assert row['inputs'].count('*') == 2
  # Its place counts one word less than the text has.
  assert 'might want to use *it* , but' in validation.rows[
      [row['example']['idx'] for row in validation.rows].index(42)]['inputs']
  always = [validation.postprocess(row['targets'], row) for row in validation.rows]
  assert measured(validation, always) == {'accuracy': pytest.approx(100 * 38 / 104)}
  never = [validation.postprocess('nothing of it', row) for row in validation.rows]
  assert measured(validation, never) == {'accuracy': pytest.approx(100 * 66 / 104)}


def test_pronouns_are_marked():
  pytest.importorskip('tensorflow')
  from prompt_tuning_jax.tasks.wsc import mark_pronoun
  assert mark_pronoun('"Good for him," he said to him.', 'him', 2) == (
      '"Good for *him*," he said to him.')
  assert mark_pronoun('"Good for him," he said to him.', 'him', 6) == (
      '"Good for him," he said to *him*.')
  assert mark_pronoun('"It hit  it\nas it sits', 'it', 4) == '"It hit  it\nas *it* sits'
  assert mark_pronoun("He says it's (it)", 'it', 2) == "He says *it*'s (it)"
  with pytest.raises(ValueError, match="'it' does not occur"):
    mark_pronoun('He sits', 'it', 1)


def test_referents():
  def agrees(text, referent):
    return postprocessors.referent_agrees(text, {'referent': referent, 'label': 1})

  assert agrees('The trophy', 'trophy') == agrees('my trophy', 'The Trophy') == 1
  assert agrees('fuzzy bunny', 'the bunny') == agrees('bunny', 'the fuzzy bunny') == 1
  assert agrees('the suitcase', 'the trophy') == agrees('fuzzy hat', 'fuzzy bunny') == 0
  assert agrees("Bob's hat", 'Bob hat') == agrees('Bob', "Bob's") == 0
  assert agrees('', 'the trophy') == agrees(' the ', 'the trophy') == -1
  assert agrees('bob', 'the') == 0
  assert [postprocessors.referent_agrees('x', {'referent': 'y', 'label': label}, is_target=True)
          for label in (-1, 0, 1)] == [-1, 0, 1]


def test_short_names_are_the_same_tasks():
  seqio = pytest.importorskip('seqio')
  from prompt_tuning_jax.tasks import record, super_glue, wsc
  names = {**super_glue.TFDS_DATASETS, **record.TFDS_DATASETS, **wsc.TFDS_DATASETS}
  assert len(names) == 19
  for name, data in names.items():
    task = seqio.get_mixture_or_task(name)
    if hasattr(task.source, 'tfds_dataset'):
      assert [task.source.tfds_dataset.name] == data
    if not name.startswith('super_glue_'):
      assert task.source is seqio.get_mixture_or_task(f'super_glue_{name}').source
  assert metrics.__name__ == task.metric_fns[0].__module__

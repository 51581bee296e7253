"""Questions in T5's form: SQuAD's and other prepared rows, and MRQA's from the catalogue's code."""

import json
import os
import pathlib
import re
import unicodedata

import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary

pytest.importorskip('seqio')
from prompt_tuning_jax.tasks import question_answering, text_metrics  # noqa: E402

BYTES = Vocabulary('bytes')
GOLDEN = {
    ('squad', 'train'): (
        'question: How many soldiers had to travel to the area by foot ? context: The most '
        'precarious of these quake - lakes was the one located in the extremely difficult terrain '
        'at Mount Tangjia in Beichuan County , Sichuan , accessible only by foot or air ; an Mi - '
        '26T heavy lift helicopter belonging to the China Flying Dragon Special Aviation Company '
        'was used to bring heavy earthmoving tractors to the affected location . This operation '
        'was coupled with the work done by PLAAF Mi - 17 helicopters bringing in PLA engineering '
        'corps , explosive specialists and other personnel to join 1 , 200 soldiers who arrived on '
        'site by foot . Five tons of fuel to operate the machinery was airlifted to the site , '
        'where a sluice was constructed to allow the safe discharge of the bottlenecked water . '
        'Downstream , more than 200 , 000 people were evacuated from Mianyang by June 1 in '
        'anticipation of the dam bursting . ', ['1 , 200'], '56d62b0f1c85041400946f62'),
    ('qa_bioasq_factoid', 'test'): (
        'question: What is the 3D tomography imaging technique for diagnosis of eye disease ? '
        "context: Retinal and Choroidal Changes in Patients with Parkinson ' s Disease Detected by "
        'Swept - Source Optical Coherence Tomography . ', ['Optical Coherence Tomography . '],
        '5c5249077e3cb0e23100000b'),
}
MRQA = [
    {'header': {'dataset': 'DROP', 'split': 'dev'}},
    {'id': 'p1', 'context': 'The Lions kicked a 30-yard and a 42-yard field goal. ',
     'context_tokens': [['The', 0]],
     'qas': [{'qid': 'a1', 'question': 'How long was the first?', 'question_tokens': [['How', 0]],
              'answers': ['30-yard', '30'],
              'detected_answers': [{'text': '30-yard', 'char_spans': [[19, 25]],
                                    'token_spans': [[4, 4]]}]},
             {'qid': 'a2', 'question': 'Who kicked?', 'question_tokens': [['Who', 0]],
              'answers': ['The Lions'],
              'detected_answers': [{'text': 'The Lions', 'char_spans': [[0, 8]],
                                    'token_spans': [[0, 1]]}]}]},
]


def parted(text):
  """Letter by letter, by their Unicode classes instead of patterns."""
  letters = [letter if letter in '_ \t\n\f\r' or unicodedata.category(letter)[0] in 'LMN'
             else f' {letter} ' for letter in text]
  return re.sub('[ \t\n\f\r]+', ' ', ''.join(letters))


def prepared(name):
  dataset, version = name.split(':')
  folder = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere'), dataset, version)
  if not (folder / 'dataset_info.json').exists():
    pytest.skip(f'set TFDS_DATA_DIR to a folder with {name}')


def build(folder, task, split, size):
  prepared(question_answering.TFDS_DATASETS[task][0])
  seqio_builder.build(task, ['prompt_tuning_jax.tasks'], split, {'file': 'bytes', 'extra_ids': 100},
                      {'inputs': 30000, 'targets': 1000}, str(folder), max_examples=size)
  return token_cache.open_cache(folder)


@pytest.mark.parametrize(('task', 'split'), GOLDEN)
def test_golden_rows(tmp_path, task, split):
  inputs, answers, identity = GOLDEN[task, split]
  cache = build(tmp_path / 'cache', task, split, 2)
  row = cache.rows[0]
  assert row['inputs'] == inputs == BYTES.decode(cache.inputs(0))
  assert row['targets'] == answers[0] == BYTES.decode(cache.targets(0))
  assert row['target'] == answers and row['example']['id'] == identity
  assert 'choices' not in row and cache.postprocess(' An answer', row) == ' An answer'
  assert cache.metric_fns() == [text_metrics.squad]


@pytest.mark.parametrize('task', [name for name in question_answering.TFDS_DATASETS
                                  if not name.startswith('mrqa')])
def test_rows(tmp_path, task):
  split = 'validation' if task == 'squad' or 'subjqa' in task else 'test'
  cache = build(tmp_path / 'cache', task, split, 20)
  import tensorflow_datasets as tfds
  raw = tfds.load(question_answering.TFDS_DATASETS[task][0], split=split, download=False)
  assert cache.num_examples == 20 and cache.meta['num_cut'] == {'inputs': 0, 'targets': 0}
  for i, row in enumerate(raw.take(20).as_numpy_iterator()):
    question, context = (parted(row[key].decode()) for key in ('question', 'context'))
    answers = [parted(text.decode()) for text in row['answers']['text']]
    cached = cache.rows[i]
    assert cached['inputs'] == f'question: {question} context: {context}'.replace('  ', ' ')
    assert cached['targets'] == answers[0] and cached['target'] == answers
    assert BYTES.decode(cache.targets(i)) == answers[0]
  targets = [row['target'] for row in cache.rows]
  assert text_metrics.squad(targets, [texts[-1] for texts in targets]) == {
      'exact_match': 100.0, 'f1': 100.0}


def test_mrqa_rows_of_the_catalogue(tmp_path):
  """The catalogue's own builder reads a file of MRQA's form."""
  from tensorflow_datasets.text.mrqa import mrqa

  file = tmp_path / 'drop.jsonl'
  file.write_text(''.join(json.dumps(line) + '\n' for line in MRQA))

  class Mrqa(mrqa.MRQA, skip_registration=True):

    def _split_generators(self, dl_manager):
      return {'test': self._generate_examples(str(file), 'test')}

  builder = Mrqa(config='drop', data_dir=tmp_path / 'tfds')
  assert str(builder.version) == '1.0.0'
  builder.download_and_prepare()
  rows = question_answering.mrqa(builder.as_dataset('test')).as_numpy_iterator()
  told = {row['id']: (row['inputs'].decode(), row['targets'], row['references'].tolist())
          for row in rows}
  context = 'context: The Lions kicked a 30 - yard and a 42 - yard field goal . '
  assert told == {
      b'a1': (f'question: How long was the first ? {context}', b'30 - yard',
              [b'30 - yard', b'30']),
      b'a2': (f'question: Who kicked ? {context}', b'The Lions', [b'The Lions'])}


def test_punctuation_stands_alone():
  texts = ['U.S. $5–6', 'snake_case  (é, e\u0301, ½)\n“no”', '東京。', '']
  told = [text.decode() for text in question_answering.parted(texts).numpy()]
  assert told == ['U . S . $ 5 – 6', 'snake_case ( é , e\u0301 , ½ ) “ no ” ', '東京 。 ', '']
  assert told == list(map(parted, texts))


def test_names():
  import seqio
  from tensorflow_datasets.text.mrqa import mrqa
  configs = {config.name for config in mrqa.MRQA.BUILDER_CONFIGS}
  for name, (dataset,) in question_answering.TFDS_DATASETS.items():
    task = seqio.TaskRegistry.get(name)
    assert task.metric_fns == [text_metrics.squad] and task.source.tfds_dataset.name == dataset
    kind, _, config = dataset.split(':')[0].partition('/')
    if kind != 'squad':
      assert name == f'{kind.removeprefix("local_")}_{config}'
    assert kind != 'mrqa' or config in configs
  folder = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere'), 'local_qa')
  there = {f'qa_{path.name}' for path in folder.glob('[!.]*')}
  assert there <= set(question_answering.TFDS_DATASETS)

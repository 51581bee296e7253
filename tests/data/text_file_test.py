"""Text files as tasks: every format gives the same tokens, and every bad row is named."""

import csv
import gzip
import json
import logging
import random

import pytest

from prompt_tuning_jax.data import text_file
from prompt_tuning_jax.data.text_file import TextFile, read_rows
from prompt_tuning_jax.data.token_cache import open_or_build
from prompt_tuning_jax.data.vocabulary import Vocabulary, train_vocabulary

BYTES = Vocabulary('bytes')
LENGTHS = {'inputs': 64, 'targets': 16}


def make_rows(count: int = 40, labels=('good', 'bad', 'so so')) -> list[dict]:
  return [{'text': f'no. {i}: "çà", it, was – fine', 'label': labels[i % len(labels)], 'id': str(i)}
          for i in range(count)]


def write(path, rows):
  """Writes rows in the format that the path's ending says; returns the path as text."""
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'wt', encoding='utf-8', newline='') as file:
    if '.jsonl' in path.name:
      file.write('\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n\n')
    elif '.csv' in path.name:
      table = csv.DictWriter(file, list(rows[0]))
      table.writeheader()
      table.writerows(rows)
    else:
      file.write('\n'.join('\t'.join(cells) for cells in (rows[0], *(r.values() for r in rows))))
  return str(path)


def build(task, folder, split='train', vocabulary=BYTES, lengths=LENGTHS):
  return open_or_build(task, split, vocabulary, lengths, folder / 'cache')


def _examples(cache):
  return [(cache.inputs(i).tolist(), cache.targets(i).tolist(), cache.rows[i])
          for i in range(cache.num_examples)]


@pytest.mark.parametrize('ending', ['jsonl', 'csv', 'tsv', 'jsonl.gz', 'csv.gz', 'tsv.gz'])
def test_every_format_gives_the_text_with_its_end(tmp_path, ending):
  rows = make_rows()
  path = write(tmp_path / f'reviews.{ending}', rows)
  task = TextFile(path, path)
  assert (task.name, task.train_split, task.eval_split) == ('reviews', 'train', 'validation')
  for split in ('train', 'validation'):
    cache = build(task, tmp_path, split)
    assert _examples(cache) == [
        ([*BYTES.encode(row['text']), 1], [*BYTES.encode(row['label']), 1],
         {'inputs': row['text'], 'targets': row['label'], 'target': row['label'],
          'choices': ['bad', 'good', 'so so']}) for row in rows]
    targets = [row['target'] for row in cache.rows]
    assert [fn(targets, targets) for fn in cache.metric_fns()] == [{'accuracy': 100.}]
    assert cache.postprocess('good', cache.rows[0]) == 'good'


def test_a_sentencepiece_vocabulary_serves_as_well(tmp_path):
  rows = make_rows()
  words = train_vocabulary([row['text'] for row in rows], tmp_path / 'a.model', pieces=40)
  cache = build(TextFile(write(tmp_path / 'a.jsonl', rows), labels=()), tmp_path, vocabulary=words)
  for inputs, targets, row in _examples(cache):
    assert inputs == [*words.encode(row['inputs']), 1]
    assert targets == [*words.encode(row['targets']), 1]


@pytest.mark.parametrize(('inputs', 'expected'), [
    ('{text}', 'T'), ('text', 'T'), (('text',), 'T'), (['text', 'n'], 'text: T n: 5'),
    ('say {{x}} {text}? {n}, {b}{text}', 'say {x} T? 5, trueT')])
def test_templates_and_names(tmp_path, inputs, expected):
  path = write(tmp_path / 'a.jsonl', [{'text': 'T', 'n': 5, 'b': True, 'label': 0.5}] * 2)
  cache = build(TextFile(path, path, inputs=inputs, targets='{label}!'), tmp_path)
  assert [(row['inputs'], row['targets']) for row in cache.rows] == [(expected, '0.5!')] * 2


@pytest.mark.parametrize(('template', 'message'), [
    ('no field', "there is no field 'no field'"), ('{}', 'may hold {field} only'),
    ('{text!r}', 'may hold {field} only'), ('{text:>9}', 'may hold {field} only'),
    ('{text', 'cannot be read'), ('{{text}}', 'names no field')])
def test_bad_templates_are_refused(tmp_path, template, message):
  path = write(tmp_path / 'a.jsonl', make_rows())
  with pytest.raises(ValueError, match=message):
    build(TextFile(path, path, inputs=template), tmp_path)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('a.jsonl', b'{"text": "a", "label": "x"}\n{"text": "a"}\n',
     "a.jsonl, line 2: there is no field 'label'.*the fields are text"),
    ('a.jsonl', b'{"text": "a", "label": null}', "line 1: the field 'label' is null"),
    ('a.jsonl', b'{"text": ["a"], "label": "x"}', "line 1: the field 'text' is .*a text or a num"),
    ('a.jsonl', b'\n\n{"text": "a", "label": " \\t"}', 'line 3: the target .* is empty'),
    ('a.jsonl', b'{"text": "a", "label": "x"}\n{"text": "a", ', 'line 2: not JSON'),
    ('a.jsonl', b'[1]\n', 'line 1: expected a JSON object'),
    ('a.jsonl', b'{"text": "a", "label": "x"}\n{"text": "\xff", "label": "x"}\n',
     'line 2: not UTF-8'),
    ('a.jsonl', b'{"text": "\\ud83d", "label": "x"}\n', 'line 1: half a surrogate pair'),
    ('a.csv', b'text,label\na,x\nb\n', 'line 3: expected 2 columns .text, label., got 1'),
    ('a.csv', b'text,label\na,x\n"b,x\n', 'line 3: not CSV'),
    ('a.csv', b'text,text\na,x\n', 'line 1: two fields have one name'),
    ('a.csv', b'text,label\n"a\nb",x\nc,\n', 'line 4: the target .* is empty'),
    ('a.tsv', b'text\tlabel\na\tx\ty\n', 'line 2: expected 2 columns'),
    ('a.tsv', b'text\tlabel\n\xe4\tx\n', 'line 2: not UTF-8'),
    ('a.csv.gz', gzip.compress(b'text,label\n' + b'a,x\n' * 99, mtime=0)[:-9], 'cannot be read'),
    ('a.csv.gz', b'text,label\n', 'after line 0: cannot be read')])
def test_a_bad_row_is_named(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    build(TextFile(str(tmp_path / name), str(tmp_path / name)), tmp_path)
  assert not list((tmp_path / 'cache').iterdir())


def test_what_spreadsheets_write_is_read(tmp_path):
  (tmp_path / 'a.csv').write_bytes('\ufefftext,label\r\n"a ""b"",\r\nc",x\r\n\r\nd,é\r\n'.encode())
  assert [row for _, row in read_rows(str(tmp_path / 'a.csv'))] == [
      {'text': 'a "b",\r\nc', 'label': 'x'}, {'text': 'd', 'label': 'é'}]
  (tmp_path / 'a.TSV').write_bytes(b'text\tlabel\r\n"a\t"b" c\r\n' + b'x' * 200_000 + b'\ty\r\n')
  assert [row for _, row in read_rows(str(tmp_path / 'a.TSV'))] == [
      {'text': '"a', 'label': '"b" c'}, {'text': 'x' * 200_000, 'label': 'y'}]


@pytest.mark.parametrize(('targets', 'choices'), [
    (['b', 'a'] * 4, ['a', 'b']),
    ([0, 1, 0, 1], ['0', '1']),
    ([str(i // 2) for i in range(40)], sorted(map(str, range(20)))),
    ([str(i // 2) for i in range(42)], None),  # Too many.
    (['a', 'a', 'b', 'b', 'c'], None),  # One is seen once.
    (['a'] * 5, None)])  # Nothing to choose from.
def test_labels_are_found_when_targets_are_few(tmp_path, targets, choices):
  path = write(tmp_path / 'a.jsonl', [{'text': 't', 'label': label} for label in targets])
  cache = build(TextFile(path, path), tmp_path)
  assert {tuple(row.get('choices', ())) for row in cache.rows} == {tuple(choices or ())}
  metric = 'accuracy' if choices else 'exact_match'
  assert cache.meta['metrics'] == [f'prompt_tuning_jax.metrics:{metric}']


def test_labels_can_be_given_renamed_and_refused(tmp_path):
  rows = [{'text': 't', 'label': i % 2} for i in range(4)]
  path = write(tmp_path / 'a.jsonl', rows)
  named = build(TextFile(path, path, labels={0: 'bad', 1: 'good', 2: 'so so'}), tmp_path)
  assert named.rows[1]['target'] == 'good'
  assert named.rows[0]['choices'] == ['bad', 'good', 'so so']
  turned = build(TextFile(path, path, labels={2: 'so so', 1: 'good', 0: 'bad'}), tmp_path)
  assert turned.rows[0]['choices'] == ['so so', 'good', 'bad']
  free = build(TextFile(path, path, labels=()), tmp_path)
  assert 'choices' not in free.rows[0]
  for labels in (('0', '2'), ('no',), {'1': 'good'}):
    with pytest.raises(ValueError, match=r"a.jsonl, line [12]: the target '[01]' is none of"):
      build(TextFile(path, path, labels=labels), tmp_path)
  with pytest.raises(ValueError, match='labels must be a list'):
    TextFile(path, labels='good')


def test_labels_found_in_training_hold_for_evaluation(tmp_path):
  train = write(tmp_path / 'train.jsonl', make_rows())
  few = write(tmp_path / 'few.jsonl', make_rows(2))
  other = write(tmp_path / 'other.jsonl', make_rows(5, labels=('good', 'ugly')))
  cache = build(TextFile(train, few), tmp_path, 'validation')
  assert cache.rows[0]['choices'] == ['bad', 'good', 'so so']
  with pytest.raises(ValueError, match="other.jsonl, line 2: the target 'ugly' is none of"):
    build(TextFile(train, other), tmp_path, 'validation')


def test_labels_must_fit_and_differ(tmp_path):
  path = write(tmp_path / 'a.jsonl', make_rows())
  with pytest.raises(ValueError, match="'good' has 4 tokens and an end, but .* have 4 tokens"):
    build(TextFile(path), tmp_path, lengths={'inputs': 64, 'targets': 4})
  unknown = type('Unknown', (), {'encode': lambda _, text: [3, 2], 'eos_id': 1, 'sha256': 'x',
                                 'extra_ids': 0,
                                 'framed': lambda _, ids, feature: [*ids, 1]})()
  with pytest.raises(ValueError, match='two of the labels'):
    build(TextFile(path), tmp_path, vocabulary=unknown)


@pytest.mark.parametrize('count', [2, 5, 100])
def test_a_tenth_is_held_out_and_nothing_is_in_both(tmp_path, count, caplog):
  caplog.set_level(logging.INFO)
  path = write(tmp_path / 'a.jsonl', make_rows(count))
  task = TextFile(path, labels=())
  assert 'one row in 10' in caplog.text
  train, held_out = (
      [row['inputs'] for row in build(task, tmp_path, split).rows] for split in
      ('train', 'validation'))
  assert len(held_out) == max(1, count // 10)
  assert sorted(train + held_out) == sorted(row['text'] for row in make_rows(count))
  again = build(TextFile(path, labels=(), name='again'), tmp_path, 'validation')
  assert [row['inputs'] for row in again.rows] == held_out


def test_one_row_cannot_be_split(tmp_path):
  with pytest.raises(ValueError, match='too few to hold one out'):
    build(TextFile(write(tmp_path / 'a.jsonl', make_rows(1))), tmp_path)


def test_long_rows_are_cut_counted_and_said_once_a_start(tmp_path, caplog):
  texts = ['x' * n for n in (6, 7, 8, 9, 30)]
  path = write(tmp_path / 'a.jsonl', [{'text': text, 'label': 'free ' + text} for text in texts])
  for _ in range(2):
    caplog.clear()
    caplog.set_level(logging.WARNING)
    cache = build(TextFile(path, path), tmp_path, lengths={'inputs': 8, 'targets': 14})
    assert [record.getMessage() for record in caplog.records] == [
        'a, train: 3 inputs (to 8) and 2 targets (to 14) of 5 examples were longer than the task '
        'feature lengths and cut.']
  assert [cache.inputs(i).tolist() for i in range(5)] == [
      [*BYTES.encode(text[:7]), 1] for text in texts]
  assert cache.rows[4]['target'] == 'free ' + texts[4]


def test_more_rows_than_are_tokenised_at_a_time_keep_their_order(tmp_path):
  rows = make_rows(2345)
  path = write(tmp_path / 'a.csv', rows)
  cache = build(TextFile(path, path), tmp_path)
  assert [row['inputs'] for row in cache.rows] == [row['text'] for row in rows]


def test_the_cache_follows_what_is_in_the_files_and_the_arguments(tmp_path):
  rows = make_rows()
  train, other = (write(tmp_path / f'{n}.jsonl', rows) for n in ('train', 'other'))
  changed = list(rows)
  random.Random(0).shuffle(changed)
  keys = [TextFile(train, other).key_parts('train'), TextFile(train).key_parts('train'),
          TextFile(train, other, inputs='id').key_parts('train'),
          TextFile(train, other, targets='id').key_parts('train'),
          TextFile(train, other, labels=()).key_parts('train')]
  assert TextFile(other, train).key_parts('train') == keys[0]  # Only the contents count.
  write(tmp_path / 'other.jsonl', changed)
  assert TextFile(train, other).key_parts('train') == keys[0]  # Training does not read it.
  keys.append(TextFile(train, other).key_parts('validation'))
  write(tmp_path / 'train.jsonl', changed)
  keys.append(TextFile(train, other).key_parts('train'))
  assert len({json.dumps(key) for key in keys}) == len(keys)


def test_a_file_to_be_evaluated_only(tmp_path):
  task = TextFile(None, write(tmp_path / 'a.jsonl', make_rows(4)), labels=('good', 'bad', 'so so'))
  assert build(task, tmp_path, 'validation').num_examples == 4
  with pytest.raises(ValueError, match='Task a has no split train'):
    build(task, tmp_path, 'train')


def test_files_that_cannot_be_a_task_are_refused_at_once(tmp_path):
  with pytest.raises(ValueError, match='needs a TRAIN_FILE'):
    TextFile(None)
  with pytest.raises(ValueError, match='There is no file .*missing.csv'):
    TextFile(str(tmp_path / 'missing.csv'))
  (tmp_path / 'a.txt').write_text('text')
  with pytest.raises(ValueError, match='expected a file ending in .jsonl'):
    TextFile(tmp_path / 'a.txt')
  (tmp_path / 'empty.csv').write_text('')
  with pytest.raises(ValueError, match='Split train of task empty has no examples'):
    build(TextFile(str(tmp_path / 'empty.csv'), str(tmp_path / 'empty.csv')), tmp_path)


@pytest.mark.parametrize('name, content', [
    ('a.jsonl', b'{"text": "' + b'x' * 2000), ('a.csv', b'text\n"' + b'x\n' * 2000),
    ('a.tsv', b'text\n' + b'x' * 2000), ('a.jsonl.gz', gzip.compress(b' ' * 2000, mtime=0))])
def test_a_line_without_end_is_refused_before_it_fills_the_memory(
    tmp_path, monkeypatch, name, content):
  monkeypatch.setattr(text_file, 'MOST_BYTES', 1000)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match='longer than|field larger than'):
    list(read_rows(str(tmp_path / name)))

"""Files answered part by part: of any length in constant memory, and taken up again."""

import contextlib
import gzip
import io
import itertools
import json
import os
import pathlib
import resource
import time
import tracemalloc
import types

import pytest

from prompt_tuning_jax import jsonl

SETTINGS = {'prompt': 'a', 'length': 8}


def make_rows(count: int) -> list[dict]:
  return [{'id': i, 'text': 'é' * (i % 7)} for i in range(count)]


def write(path: pathlib.Path, rows) -> str:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return str(path)


def expected(rows) -> bytes:
  return ''.join(json.dumps({**row, 'n': len(row['text'])}, ensure_ascii=False) + '\n'
                 for row in rows).encode()


class Answer:
  """Answers, and keeps the ids of what it answered; raises `error` at the row `stop_at`."""

  def __init__(self, stop_at: int | None = None, error: BaseException = KeyboardInterrupt()):
    self.ids, self._stop_at, self._error = [], stop_at, error

  def __call__(self, part):
    ids = [row['id'] for _, row in part]
    if self._stop_at in ids:
      raise self._error
    self.ids += ids
    return [{'n': len(row['text'])} for _, row in part]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  monkeypatch.setattr(jsonl, 'CHUNK', 8)


@pytest.fixture
def stopped(tmp_path) -> tuple[str, str]:
  """A source of 50 rows, and a target of which the first 24 are answered."""
  source, target = write(tmp_path / 'rows.jsonl', make_rows(50)), str(tmp_path / 'out.jsonl')
  with pytest.raises(KeyboardInterrupt):
    jsonl.answer_file(source, target, Answer(30), settings=SETTINGS)
  assert partial(target).read_bytes() == expected(make_rows(24))
  return source, target


def partial(target: str) -> pathlib.Path:
  return pathlib.Path(target + '.partial')


def resumed(source: str, target: str, settings=SETTINGS) -> list[int]:
  """The ids that a call to the end has to answer."""
  answer = Answer()
  jsonl.answer_file(source, target, answer, settings=settings)
  folder = pathlib.Path(target).parent
  assert not list(folder.glob('*.partial*')), 'something is left'
  return answer.ids


# --- what is kept, and what is answered again

def test_a_stopped_file_goes_on_where_it_stopped(stopped, caplog):
  source, target = stopped
  caplog.set_level('INFO')
  assert resumed(source, target) == list(range(24, 50))
  assert pathlib.Path(target).read_bytes() == expected(make_rows(50))
  assert 'Resuming after 24 rows.' in caplog.text


@pytest.mark.parametrize('change, answered', [
    (lambda rows: rows[30:], range(30, 50)),
    (lambda rows: [*rows[:40], {**rows[40], 'text': 'new'}, *rows[41:]], range(24, 50)),
    (lambda rows: [*rows[:19], {**rows[19], 'text': 'new'}, *rows[20:]], range(16, 50)),
    (lambda rows: [*rows, *({'id': 50 + i, 'text': ''} for i in range(9))], range(24, 59)),
    (lambda rows: rows[:16], []), (lambda rows: rows[:18], [16, 17])])
def test_a_changed_source_costs_the_parts_from_the_change_on(stopped, change, answered):
  source, target = stopped
  rows = change(make_rows(50))
  write(pathlib.Path(source), rows)
  assert resumed(source, target) == list(answered)
  assert pathlib.Path(target).read_bytes() == expected(rows)


def test_a_copy_of_the_source_is_as_good(stopped, tmp_path):
  _, target = stopped
  lines = '\n'.join(json.dumps(row, separators=(',', ':'), ensure_ascii=False)
                    for row in make_rows(50))
  (tmp_path / 'copy.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
  assert resumed(str(tmp_path / 'copy.jsonl.gz'), target) == list(range(24, 50))


def test_an_answer_may_depend_on_the_line(stopped):
  """As a sample does, whose seed is the line's number."""
  source, target = stopped
  lines = pathlib.Path(source).read_text().splitlines()
  pathlib.Path(source).write_text('\n'.join([*lines[:20], '', *lines[20:]]))
  assert resumed(source, target) == list(range(16, 50))


@pytest.mark.parametrize('bad', [b'\xff', b'{"id": ', b'{"id": 30, "text": "\\ud800"}'])
def test_a_line_that_cannot_be_read_is_corrected_and_the_rest_goes_on(tmp_path, caplog, bad):
  caplog.set_level('INFO')
  lines = [json.dumps(row).encode() for row in make_rows(50)]
  source, target = tmp_path / 'rows.jsonl', str(tmp_path / 'out.jsonl')
  source.write_bytes(b'\n'.join([*lines[:30], bad, *lines[31:]]))
  with pytest.raises(ValueError, match='rows.jsonl, line 31: '):
    jsonl.answer_file(str(source), target, Answer(), settings=SETTINGS)
  assert not os.path.exists(target) and '24 rows are kept in' in caplog.text
  source.write_bytes(b'\n'.join(lines))
  assert resumed(str(source), target) == list(range(24, 50))
  assert pathlib.Path(target).read_bytes() == expected(make_rows(50))


@pytest.mark.parametrize('damage', [
    lambda path: path.write_bytes(path.read_bytes() + b'{"id": 24, "te'),
    lambda path: path.write_bytes(path.read_bytes() + bytes(4096)),
    lambda path: _append(path, b'{"end": 9999, "rows": 8, "sha'),
    lambda path: _append(path, bytes(100)), lambda path: _append(path, b'null\n')])
def test_what_follows_the_last_whole_part_is_cut_off(stopped, damage):
  source, target = stopped
  damage(partial(target))
  assert resumed(source, target) == list(range(24, 50))
  assert pathlib.Path(target).read_bytes() == expected(make_rows(50))


def _append(path: pathlib.Path, content: bytes) -> None:
  with open(f'{path}.json', 'ab') as journal:
    journal.write(content)


def test_a_part_of_which_the_disk_lost_the_end_does_not_count(stopped):
  source, target = stopped
  os.truncate(partial(target), len(expected(make_rows(24))) - 1)
  assert resumed(source, target) == list(range(16, 50))
  assert pathlib.Path(target).read_bytes() == expected(make_rows(50))


@pytest.mark.parametrize('lost', ['.partial', '.partial.json'])
def test_one_of_the_two_files_alone_is_no_part(stopped, lost):
  source, target = stopped
  os.unlink(target + lost)
  assert resumed(source, target) == list(range(50))
  assert pathlib.Path(target).read_bytes() == expected(make_rows(50))


def test_other_settings_start_over_and_say_which(stopped, caplog):
  source, target = stopped
  caplog.set_level('INFO')
  assert resumed(source, target, {'prompt': 'b', 'length': 8}) == list(range(50))
  assert 'Starting over' in caplog.text and 'another prompt.' in caplog.text


def test_other_settings_by_mistake_cost_nothing_until_a_part_is_answered(stopped):
  source, target = stopped
  for settings in ({**SETTINGS, 'length': 9}, None):
    with pytest.raises(KeyboardInterrupt):
      jsonl.answer_file(source, target, Answer(0), settings=settings)
  assert resumed(source, target) == list(range(24, 50))


def test_without_settings_nothing_is_taken_for_an_answer(stopped):
  source, target = stopped
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      jsonl.answer_file(source, target, Answer(30))
  assert resumed(source, target, None) == list(range(50))


def test_a_run_that_answered_nothing_leaves_nothing(tmp_path):
  source, target = write(tmp_path / 'rows.jsonl', make_rows(5)), str(tmp_path / 'out.jsonl')
  for answer, error in ((Answer(3, ValueError('row 3')), 'row 3'), (lambda part: [], 'zip')):
    with pytest.raises(ValueError, match=error):
      jsonl.answer_file(source, target, answer, settings=SETTINGS)
  (tmp_path / 'rows.jsonl').write_text('\n\n')
  with pytest.raises(ValueError, match='rows.jsonl has no rows'):
    jsonl.answer_file(source, target, Answer(), settings=SETTINGS)
  assert os.listdir(tmp_path) == ['rows.jsonl']


# --- one writer, a full disk, odd targets

def test_a_second_writer_of_one_target_is_refused(tmp_path):
  source, target = write(tmp_path / 'rows.jsonl', make_rows(20)), str(tmp_path / 'out.jsonl')
  (tmp_path / 'link.jsonl').symlink_to('out.jsonl')
  inner = Answer()

  def answer(part):
    for same in (target, str(tmp_path / 'link.jsonl')):
      with pytest.raises(ValueError, match='Another process is writing .*out.jsonl.partial'):
        jsonl.answer_file(source, same, inner, settings=SETTINGS)
    return Answer()(part)

  assert jsonl.answer_file(source, target, answer, settings=SETTINGS) == 20 and not inner.ids
  assert pathlib.Path(target).read_bytes() == expected(make_rows(20))


@pytest.mark.parametrize('free', [0, 5, 600, 1201])
def test_a_full_disk_is_one_error_and_the_rest_goes_on(tmp_path, free):
  source, target = write(tmp_path / 'rows.jsonl', make_rows(50)), str(tmp_path / 'out.jsonl')
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  answer = Answer()
  resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))  # writes stop there, in mid-row
  try:
    with pytest.raises(ValueError, match='out.jsonl.partial cannot be written: File too large'):
      jsonl.answer_file(source, target, answer, settings=SETTINGS)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  kept = partial(target).read_bytes() if partial(target).exists() else b''
  count = len(kept.splitlines())
  assert kept == expected(make_rows(count)) and count % 8 == 0 and len(answer.ids) == count + 8
  assert resumed(source, target) == list(range(count, 50))
  assert pathlib.Path(target).read_bytes() == expected(make_rows(50))


def test_a_source_is_not_written_over(stopped, tmp_path):
  source, target = stopped
  (tmp_path / 'link.jsonl').symlink_to(source)
  for one, other in ((source, source), (source, str(tmp_path / 'link.jsonl')),
                     (target + '.partial', target)):
    before = pathlib.Path(one).read_bytes()
    with pytest.raises(ValueError, match='would be written over'):
      jsonl.answer_file(one, other, Answer(), settings=SETTINGS)
    assert pathlib.Path(one).read_bytes() == before


def test_a_link_stays_and_the_file_it_names_is_replaced(tmp_path):
  source = write(tmp_path / 'rows.jsonl', make_rows(9))
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'real.jsonl').write_text('old')
  (tmp_path / 'link.jsonl').symlink_to('out/real.jsonl')
  jsonl.answer_file(source, str(tmp_path / 'link.jsonl'), Answer(), settings=SETTINGS)
  assert (tmp_path / 'link.jsonl').is_symlink()
  assert (tmp_path / 'out' / 'real.jsonl').read_bytes() == expected(make_rows(9))
  assert os.listdir(tmp_path / 'out') == ['real.jsonl']


def test_pipes_are_read_and_written_as_they_are(tmp_path):
  os.mkfifo(tmp_path / 'out')
  reader = os.open(tmp_path / 'out', os.O_RDONLY | os.O_NONBLOCK)
  source, writer = os.pipe()
  os.write(writer, pathlib.Path(write(tmp_path / 'rows', make_rows(20))).read_bytes())
  os.close(writer)
  assert jsonl.answer_file(f'/dev/fd/{source}', str(tmp_path / 'out'), Answer()) == 20
  assert os.read(reader, 1 << 16) == expected(make_rows(20))
  os.close(reader)
  os.close(source)
  assert sorted(os.listdir(tmp_path)) == ['out', 'rows']


# --- memory and progress

@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(jsonl, 'CHUNK', 200)
  peaks = []
  for count in (2_000, 20_000):
    source = write(tmp_path / 'rows.jsonl', make_rows(count))
    tracemalloc.start()
    answer = lambda part: [{'n': 0}] * len(part)
    assert jsonl.answer_file(source, str(tmp_path / 'out.jsonl'), answer, settings={}) == count
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 1.1 * peaks[0] < 2e6, peaks


def test_a_part_ends_at_a_number_of_bytes_too(tmp_path, monkeypatch):
  monkeypatch.setattr(jsonl, 'MOST_BYTES', 1000)
  rows = [{'id': i, 'text': 'x' * size} for i, size in enumerate(
      (300, 300, 300, 300, 50_000_000, 1, 600, 600, 1))]
  source, target, parts = write(tmp_path / 'rows.jsonl', rows), str(tmp_path / 'out.jsonl'), []

  def answer(part):
    parts.append([row['id'] for _, row in part])
    return Answer()(part)

  assert jsonl.answer_file(source, target, answer, settings=SETTINGS) == 9
  assert parts == [[0, 1, 2, 3], [4], [5, 6, 7], [8]]
  assert pathlib.Path(target).read_bytes() == expected(rows)


class Terminal(io.StringIO):
  """A terminal, as far as it says."""

  def isatty(self):
    return True


@pytest.mark.parametrize('ending', ['', '.gz'])
def test_progress_counts_what_is_new(stopped, tmp_path, monkeypatch, caplog, ending):
  source, target = stopped
  content = pathlib.Path(source).read_bytes()
  (tmp_path / f'a.jsonl{ending}').write_bytes(gzip.compress(content) if ending else content)
  clock = itertools.count()  # a second a part
  monkeypatch.setattr(jsonl, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
  monkeypatch.setattr(jsonl, 'SECONDS', 0)
  caplog.set_level('INFO', logger=jsonl.__name__)
  with contextlib.redirect_stderr(io.StringIO()) as said:
    resumed(str(tmp_path / f'a.jsonl{ending}'), target)
  lines = [record.message for record in caplog.records if record.name == jsonl.__name__]
  counts = [line.split(',')[0] for line in lines]
  assert counts == [f'{n} rows' for n in (8, 16, 24, 32, 40, 48, 50)]
  assert not any('/s' in line for line in lines[:3])  # they were there
  assert [line.split(', ')[1] for line in lines[3:]] == ['8.00 rows/s'] * 3 + ['6.50 rows/s']
  if not ending:  # 26 of 50 rows take four seconds; gzip reads so short a file at once
    assert [line.split(', ')[2] for line in lines[3:]] == [f'00:0{n} left' for n in (2, 1, 0, 0)]
  assert not said.getvalue()


def test_progress_is_a_bar_on_a_terminal_but_not_for_a_second(tmp_path, monkeypatch):
  source, target = write(tmp_path / 'rows.jsonl', make_rows(16)), str(tmp_path / 'out.jsonl')

  def shown() -> str:
    with contextlib.redirect_stderr(Terminal()) as stderr:
      jsonl.answer_file(source, target, lambda part: (time.sleep(0.11), Answer()(part))[1])
    return stderr.getvalue()

  assert not shown()
  monkeypatch.setattr(jsonl, 'DELAY', 0)
  bar = shown()
  assert ' 50%|' in bar.replace(' 49%', ' 50%') and '| 8 rows, ' in bar and '| 16 rows, ' in bar


def test_a_flipped_bit_of_what_was_answered_is_answered_again(stopped):
  source, target = stopped
  path = pathlib.Path(target + '.partial')
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1  # in the second of three parts
  path.write_bytes(content)
  again = Answer()
  jsonl.answer_file(source, target, again, settings=SETTINGS)
  assert pathlib.Path(target).read_bytes() == expected(make_rows(50))
  assert again.ids == list(range(8, 50))

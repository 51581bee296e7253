"""The page: nothing from outside, nothing that runs, well-formed, and the same bytes again."""

import copy
import functools
import html.parser
import re

import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax.analysis import findings, html_report
from prompt_tuning_jax.analysis.attention_mass import Mass
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>$x_{&amp;\x00'
VOID = {'meta', 'link', 'img', 'br'}


class Reader(html.parser.HTMLParser):
  """Which elements and attributes a page has; every element that opens closes in its order."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.attributes, self.texts, self._open = [], [], [], []
    self.feed(page)
    self.close()
    assert not self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, name, value) for name, value in attrs]
    if tag not in VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self._open.pop()

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


class Words:
  """A vocabulary of one bad piece."""

  piece = staticmethod(lambda token: EVIL)
  encode = staticmethod(lambda text: [3])


def save(path, seed=0, **about):
  rows = np.random.default_rng(seed).normal(size=(6, 8)).astype(np.float32)
  prompt_file.save(path, PromptFile({prompt_file.EMBEDDING: rows}, about))
  return path


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """All sections, with bad texts wherever a file can bring them."""
  folder = tmp_path_factory.mktemp('run')
  text = EVIL.replace('\x00', '')
  path = save(folder / 'prompts' / 'best.safetensors', task=text, labels=[text], method=text,
              placement=text, text=text, version=text, base={'name': text, 'fingerprint': text},
              metric={'name': text, 'value': 0.5, 'step': text}, tasks={text: {'name': text}},
              sources=[{'name': text, 'weight': 1.0}])
  other = save(folder / f'{text.replace("/", "|")}.safetensors', 1)
  (folder / 'metrics.jsonl').write_text(
      '{"step": 1, "split": "<b>$x_{", "$x_{<b>": 1.0}\n' * 2)
  table = np.random.default_rng(2).normal(size=(30, 8)).astype(np.float32)
  made = findings.of_file(path, [other], table=table, vocabulary=Words)
  received = np.random.default_rng(3).uniform(0, 2, (2, 3, 6)).astype(np.float32)
  made['attention'] = findings.attention({'input': Mass(received, 4.0, 20.0)}, 2)
  made['leaves'] = {'prefix': [{'place': EVIL, 'layer': 0, 'keys': 1.0, 'values': 2.0}],
                    'others': [{'path': EVIL, 'shape': [2], 'norm': 1.0, 'away': 0.5}]}
  made['notes'] = [EVIL]
  return made


def test_nothing_runs_and_nothing_is_fetched(found):
  page = html_report.page(found)
  reader = Reader(page)
  assert not {'script', 'img', 'b', 'iframe', 'object', 'embed'} & set(reader.tags)
  assert sum(text.count('onerror=alert(2)') for text in reader.texts) > 20  # told, as text
  for tag, name, value in reader.attributes:
    assert not name.startswith('on'), (tag, name)
    if name.endswith(('href', 'src')):
      assert value.startswith(('#', 'data:')), (tag, name, value)
  assert not re.findall(r'@import|url\((?!#)', page)
  assert [value for tag, name, value in reader.attributes if tag == 'meta' and name == 'content'
          and value.startswith("default-src 'none'")]
  assert '\x00' not in page


def test_it_can_be_read_by_all(found):
  reader = Reader(html_report.page(found))
  assert reader.tags.count('h1') == 1
  assert reader.tags.count('h2') == len(html_report.SECTIONS)
  assert not [tag for tag in reader.tags if tag in ('h4', 'h5', 'h6')]
  scopes = [value for tag, name, value in reader.attributes if tag == 'th' and name == 'scope']
  assert len(scopes) == reader.tags.count('th') and set(scopes) == {'row', 'col'}
  pictures = [value for tag, name, value in reader.attributes if name == 'role' and value == 'img']
  assert len(pictures) == reader.tags.count('svg') == 4
  labels = [value for _, name, value in reader.attributes if name == 'aria-label']
  assert len(labels) == reader.tags.count('table') + len(pictures) and all(labels)
  ids = [value for _, name, value in reader.attributes if name == 'id']
  assert len(ids) == len(set(ids))
  assert ('html', 'lang', 'en') in reader.attributes


def test_equal_findings_give_equal_bytes_whatever_matplotlib_was_told(found):
  import matplotlib
  page = html_report.page(found)
  with matplotlib.rc_context({'font.size': 30, 'svg.fonttype': 'path', 'axes.grid': True}):
    assert html_report.page(copy.deepcopy(found)) == page


def test_sections_are_those_that_there_is_something_for(tmp_path):
  path = save(tmp_path / 'p.safetensors')
  page = html_report.page(findings.of_file(path))
  titles = re.findall(r'<h2>(.*?)</h2>', page)
  assert titles == ['What it is', 'What this report does not have', 'Sizes of tokens and words',
                    'Principal components']


def test_pictures_of_one_token_and_of_many_prompts(tmp_path):
  one = np.ones((1, 8), np.float32)
  prompt_file.save(tmp_path / 'one.safetensors', PromptFile({prompt_file.EMBEDDING: one}))
  others = [save(tmp_path / f'{i}.npy.safetensors', i) for i in range(20)]
  page = html_report.page(findings.of_file(tmp_path / 'one.safetensors', others))
  Reader(page)
  assert page.count('<li value=') == 20


def test_the_reports_of_a_run_are_one_a_prompt_and_none_of_a_model(tmp_path):
  frozen = {'embedder': {'table': jnp.asarray(np.random.default_rng(2).normal(size=(30, 8)))}}
  words = type('W', (Words,), {'size': 30})
  write = functools.partial(html_report.write_for_run, words, 'embedder/table', frozen)
  one = save(tmp_path / 'a' / 'prompts' / 'best.safetensors')
  assert write(tmp_path / 'a', one) == [
      tmp_path / 'a' / 'report.html']
  many = tmp_path / 'b' / 'prompts' / 'best'
  for i, task in enumerate(('x', 'y')):
    save(many / f'{task}.safetensors', i, task=task)
  written = write(tmp_path / 'b', many)
  assert [path.name for path in written] == ['report_x.html', 'report_y.html']
  assert 'Other prompts' in written[0].read_text() and 'Nearest words' in written[1].read_text()
  (many / 'config.json').write_text('{}')
  assert write(tmp_path / 'b', many) == []

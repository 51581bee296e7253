"""The verbs at their edges: devices, ids or text, files that cannot be, errors of one line."""

import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import infer, prompted_base, score, train_vocabulary, verb
from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors, prompt_file
from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks import gpt
from prompt_tuning_jax.prompts import initializers

pytestmark = pytest.mark.usefixtures('token_dir')


def write(path, rows) -> str:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return str(path)


def read(path):
  return [json.loads(line) for line in open(path, encoding='utf-8')]


def one_line(capsys) -> str:
  """What a refused verb said."""
  said = capsys.readouterr().err.strip()
  assert said.startswith('error: ') and len(said.splitlines()) == 1
  return said


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


def make_prompt(path, base, **about) -> str:
  embedding = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  metadata = prompt_file.describe(base, length=4, **about)
  prompt_file.save(path, prompt_file.PromptFile({prompt_file.EMBEDDING: embedding}, metadata))
  return str(path)


@pytest.fixture(scope='module')
def rows(reviews):
  """Sixteen reviews as a verb's rows."""
  return [{'inputs': row['text'], 'targets': row['label']} for row in read(reviews)[:16]]


def as_ids(rows, base) -> list[dict]:
  words = Vocabulary.of_base(base)
  return [{f'{name}_tokens': [*words.encode(row[f'{name}s']), 1] for name in ('input', 'target')}
          for row in rows]


def evaluated(capsys, *argv) -> dict:
  assert eval_verb.main(list(argv)) == 0
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_several_devices_answer_as_one_does(tmp_path, tiny_base, base, rows):
  prompt = make_prompt(tmp_path / 'prompt.safetensors', base, labels=['bad', 'good'])
  command = ['--base', str(tiny_base), '--prompt', prompt, '--batch_size', '3',
             '--max_decode_length', '4', '--input', write(tmp_path / 'rows.jsonl', rows[:7])]
  assert score.main([*command, '--output', str(tmp_path / '1.jsonl')]) == 0
  code = 'import sys; from prompt_tuning_jax import infer, score; ' + '; '.join(
      f'assert not {name}.main(sys.argv[1:] + ["--output", {str(tmp_path / file)!r}])'
      for name, file in (('score', '2.jsonl'), ('infer', 'texts.jsonl')))
  done = subprocess.run(
      [sys.executable, '-c', code, *command], capture_output=True, text=True, check=False,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'})
  assert done.returncode == 0, done.stderr
  one, two = ([row['log_likelihood'] for row in read(tmp_path / f'{n}.jsonl')] for n in (1, 2))
  np.testing.assert_allclose(one, two, rtol=1e-5)
  assert len(read(tmp_path / 'texts.jsonl')) == 7


@pytest.mark.parametrize('labels, metric', [(['good', 'bad'], 'accuracy'), (None, 'exact_match')])
def test_eval_takes_ids_or_text(tmp_path, tiny_base, base, rows, capsys, labels, metric):
  """A prompt without labels means free text, however few the targets are."""
  command = ['--base', str(tiny_base), '--max_decode_length', '4', '--prompt',
             make_prompt(tmp_path / 'prompt.safetensors', base, labels=labels)]
  found = []
  for name, content in (('text', rows), ('ids', as_ids(rows, base))):
    values = evaluated(capsys, *command, '--input', write(tmp_path / f'{name}.jsonl', content),
                       '--output', str(tmp_path / 'answers'))
    assert values.pop('task') == name and values['examples'] == 16
    found.append((values, [row['prediction'] for row in read(tmp_path / 'answers')]))
  assert found[0] == found[1] and set(found[0][0]) == {'examples', metric}
  equal = np.mean([answer == row['targets'] for answer, row in zip(found[0][1], rows, strict=True)])
  assert found[0][0][metric] == pytest.approx(100 * equal)
  assert labels is None or set(found[0][1]) <= set(labels)


def test_eval_without_a_prompt_finds_labels(tmp_path, tiny_base, rows, capsys):
  command = ['--base', str(tiny_base), '--max_decode_length', '4', '--input']
  assert 'accuracy' in evaluated(capsys, *command, write(tmp_path / 'a.jsonl', rows))
  different = [{**row, 'targets': f'text {i}'} for i, row in enumerate(rows)]
  assert 'exact_match' in evaluated(capsys, *command, write(tmp_path / 'b.jsonl', different))


def test_eval_searches_with_beams_as_infer_does(tmp_path, tiny_base, base, rows, capsys):
  prompt = make_prompt(tmp_path / 'prompt.safetensors', base, labels=['good', 'bad'])
  command = ['--base', str(tiny_base), '--prompt', prompt, '--max_decode_length', '4',
             '--num_beams', '3', '--input', write(tmp_path / 'rows.jsonl', rows)]
  evaluated(capsys, *command, '--decode', '--output', str(tmp_path / 'of_eval'))
  assert infer.main([*command, '--output', str(tmp_path / 'of_infer')]) == 0
  found, expected = ([row['prediction'] for row in read(tmp_path / name)]
                     for name in ('of_eval', 'of_infer'))
  assert found == expected
  capsys.readouterr()
  assert eval_verb.main(command) == 1
  assert 'here labels are ranked (--decode' in one_line(capsys)
  assert eval_verb.main([*command, '--decode', '--template', '{} x']) == 1
  assert '--template belongs to --task' in one_line(capsys)


def test_labels_trained_behind_a_sentinel_are_ranked_so_and_told_plain(
    tmp_path, tiny_base, base, rows, capsys):
  """Targets are texts or ids, with it or without; the bank has a prompt that knows no sentinel."""
  marked = {'good': '<extra_id_0> good', 'bad': '<extra_id_0> bad'}
  (tmp_path / 'bank').mkdir()
  prompt = make_prompt(tmp_path / 'bank' / 'marked.safetensors', base, labels=[*marked.values()])
  make_prompt(tmp_path / 'bank' / 'plain.safetensors', base, labels=[*marked])
  loaded = prompted_base.load(str(tiny_base), prompt)
  scores = loaded.predictor.rank(
      loaded.params, [loaded.tokens('', row, 'input') for row in rows],
      [[*marked.values()]] * len(rows))
  expected = [[*marked][int(np.argmax(of))] for of in scores]
  source = write(tmp_path / 'rows.jsonl', [{**row, 'prompt': 'marked'} for row in rows])
  out = str(tmp_path / 'out')
  for flags in (['--prompt', prompt], ['--prompt', prompt, '--labels', *marked],
                ['--prompts', str(tmp_path / 'bank')]):
    assert infer.main(['--base', str(tiny_base), *flags, '--rank', '--input', source,
                       '--output', out]) == 0
    assert [row['prediction'] for row in read(out)] == expected
    shares = [list(row['probabilities'].values()) for row in read(out)]
    np.testing.assert_allclose(np.log(shares)[:, 0] - np.log(shares)[:, 1],
                               [of[0] - of[1] for of in scores], rtol=1e-3, atol=1e-4)
  accuracy = 100 * np.mean([a == row['targets'] for a, row in zip(expected, rows, strict=True)])
  with_it = [{**row, 'targets': marked[row['targets']]} for row in rows]
  for i, given in enumerate((rows, with_it, as_ids(rows, base), as_ids(with_it, base))):
    source = write(tmp_path / f'{i}.jsonl', given)
    command = ['--base', str(tiny_base), '--input', source, '--output', out]
    assert evaluated(capsys, *command, '--prompt', prompt)['accuracy'] == pytest.approx(accuracy)
    assert [row['prediction'] for row in read(out)] == expected
    values = evaluated(capsys, *command, '--prompts', str(tmp_path / 'bank'))
    assert values['members']['marked']['accuracy'] == pytest.approx(accuracy)


def test_eval_names_the_row_of_a_target_that_is_no_label(tmp_path, tiny_base, base, rows, capsys):
  prompt = make_prompt(tmp_path / 'prompt.safetensors', base, labels=['good', 'bad'])
  source = write(tmp_path / 'rows.jsonl', [*rows[:2], {**rows[0], 'targets': 'dull'}])
  assert eval_verb.main(['--base', str(tiny_base), '--prompt', prompt, '--input', source]) == 1
  assert "rows.jsonl, line 3: the target 'dull' is none of" in one_line(capsys)


@pytest.mark.parametrize('content, message', [
    (b'{"inputs": "a"}\n{"inputs": "\xff"}', 'line 2: not UTF-8'),
    (b'{"inputs": "a", "n": ' + b'9' * 5000 + b'}', 'line 1: not JSON'),
    (b'{"inputs": "a"}\n\n{"inputs": ' + b'[' * 100_000, 'line 3: not JSON'),
    (b'{"inputs": "a", "other": "\\ud800"}', 'line 1: half a surrogate pair')])
def test_a_row_that_cannot_be_read_is_one_line(tmp_path, tiny_base, capsys, content, message):
  (tmp_path / 'rows.jsonl').write_bytes(content)
  assert infer.main(['--base', str(tiny_base), '--input', str(tmp_path / 'rows.jsonl'), '--output',
                     str(tmp_path / 'out.jsonl'), '--max_decode_length', '4']) == 1
  assert f'rows.jsonl, {message}' in one_line(capsys)
  assert os.listdir(tmp_path) == ['rows.jsonl']


def test_marks_gzip_and_home_are_understood(tmp_path, tiny_base, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'rows.jsonl.gz').write_bytes(gzip.compress('\ufeff{"inputs": "a film"}\n'.encode()))
  assert infer.main(['--base', str(tiny_base), '--input=~/rows.jsonl.gz', '--output=~/out.jsonl',
                     '--max_decode_length', '4']) == 0
  assert [row['inputs'] for row in read(tmp_path / 'out.jsonl')] == ['a film']


@pytest.mark.parametrize('source, target, message', [
    ('absent.jsonl', 'out.jsonl', 'There is no file'), ('.', 'out.jsonl', 'Cannot read'),
    ('rows.jsonl', '.', 'it is a folder'), ('rows.jsonl', 'rows.jsonl/out', 'is no folder'),
    ('rows.jsonl', 'rows.jsonl', 'is read, and would be written over'),
    ('rows.jsonl', 'out.jsonl.gz', 'would be read as something else: name it FILE.jsonl'),
    ('rows.jsonl', 'out.csv', 'would be read as something else'),
    ('rows.jsonl', 'best.safetensors', 'would be read as something else')])
def test_files_are_checked_before_the_base_is_read(
    tmp_path, capsys, monkeypatch, source, target, message):
  monkeypatch.setattr(prompted_base, 'load', lambda *_, **__: pytest.fail('it was read'))
  write(tmp_path / 'rows.jsonl', [{'inputs': 'a film'}])
  assert infer.main(['--base', 'mini', '--input', str(tmp_path / source), '--output',
                     str(tmp_path / target)]) == 1
  assert message in one_line(capsys)


def test_a_prompt_is_not_written_over(tmp_path, capsys):
  rows, prompt = tmp_path / 'rows.jsonl', tmp_path / 'mine.safetensors'
  write(rows, [{'inputs': 'a film'}])
  prompt.write_bytes(b'trained')
  (tmp_path / 'link').symlink_to(prompt)
  assert infer.main(['--base', 'mini', '--prompt', str(prompt), '--input', str(rows), '--output',
                     str(tmp_path / 'link')]) == 1
  assert 'is read, and would be written over' in one_line(capsys)
  assert prompt.read_bytes() == b'trained'


def test_one_terminal_may_be_read_and_written():
  verb.check_files([os.devnull], os.devnull)


def test_arguments_that_are_no_text_are_told(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['infer', '--labels', '\udcff', 'good'])
  assert verb.exit_status(lambda: pytest.fail('it began')) == 1
  assert r"no text in UTF-8: '\udcff'" in one_line(capsys)


def test_a_row_that_has_no_room_is_named(tmp_path, bpe_file, capsys):
  config = gpt.GPTConfig(vocab_size=301, emb_dim=8, num_heads=2, num_layers=1, head_dim=4,
                         mlp_dim=16, mlp_activations=('gelu',), logits_via_embedding=True,
                         max_positions=45, use_bias=True, scale_queries=True,
                         scale_logits=False, has_padding_row=False)
  base = base_checkpoint.random_base(config, str(bpe_file))
  base_checkpoint.write(tmp_path / 'gpt', config, base.params, vocabulary=base.vocabulary)
  write(tmp_path / 'rows.jsonl', [{'inputs': 'a film'}, {'inputs': 'a film ' * 20}])
  assert infer.main(['--base', str(tmp_path / 'gpt'), '--input', str(tmp_path / 'rows.jsonl'),
                     '--max_decode_length', '8', '--output', str(tmp_path / 'out.jsonl')]) == 1
  assert 'rows.jsonl, line 2: The network has 45 positions' in one_line(capsys)
  write(tmp_path / 'pairs.jsonl', [{'inputs': 'a', 'targets': text} for text in ('b', 'b' * 60)])
  assert score.main(['--base', str(tmp_path / 'gpt'), '--input', str(tmp_path / 'pairs.jsonl'),
                     '--output', str(tmp_path / 'out.jsonl')]) == 1
  assert 'pairs.jsonl, line 2: The network has 45 positions' in one_line(capsys)


def test_errors_of_others_keep_their_traceback(capsys):
  def of_ours():
    verb.check_files(['absent'], None)

  assert verb.exit_status(of_ours) == 1 and 'There is no file absent' in one_line(capsys)
  assert verb.exit_status(lambda: os.stat('absent')) == 1 and 'absent' in one_line(capsys)
  for broken in (lambda: int('x'), lambda: {}['x']):
    with pytest.raises((ValueError, KeyError)):
      verb.exit_status(broken)


@pytest.mark.parametrize('argv', [[], ['--base=mini', '--input=a', '--task=b']])
def test_a_wrong_command_is_one_line_and_status_2(capsys, argv):
  with pytest.raises(SystemExit, match='2'):
    eval_verb.main(argv)
  one_line(capsys)


def test_a_failed_vocabulary_leaves_the_old_one(tmp_path, reviews, capsys):
  old = tmp_path / 'spiece.model'
  command = ['--output', str(old), '--input', str(reviews)]
  assert train_vocabulary.main([*command, '--pieces=60']) == 0
  content = old.read_bytes()
  capsys.readouterr()
  assert train_vocabulary.main([*command, '--pieces=4']) == 1  # fewer than characters
  assert 'SentencePiece cannot train 4 pieces' in one_line(capsys)
  (tmp_path / 'bad.txt').write_bytes(b'a line\n\xff\n')
  assert train_vocabulary.main([*command, str(tmp_path / 'bad.txt')]) == 1
  assert 'bad.txt' in one_line(capsys)
  assert train_vocabulary.main([*command[2:], '--output', str(old / 'below')]) == 1
  assert 'Cannot write' in one_line(capsys)
  assert train_vocabulary.main([*command[2:], '--output', str(reviews)]) == 1
  assert 'is read, and would be written over' in one_line(capsys)
  assert train_vocabulary.main([*command[2:], '--output', str(tmp_path / 'tokenizer.json')]) == 1
  assert 'should end in .model' in one_line(capsys)
  assert old.read_bytes() == content
  assert sorted(os.listdir(tmp_path)) == ['bad.txt', 'spiece.model']


def test_what_is_no_regular_file_is_written_to_and_stays(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  reader = os.open(tmp_path / 'pipe', os.O_RDONLY | os.O_NONBLOCK)
  with atomic_file(tmp_path / 'pipe') as path:
    path.write_text('text')
  assert os.read(reader, 9) == b'text'
  os.close(reader)
  (tmp_path / 'file').write_text('old')
  (tmp_path / 'link').symlink_to('file')
  with atomic_file(tmp_path / 'link') as path:
    path.write_text('new')
  assert (tmp_path / 'link').is_symlink() and (tmp_path / 'file').read_text() == 'new'
  assert sorted(os.listdir(tmp_path)) == ['file', 'link', 'pipe']


def test_a_vocabulary_is_read_once(tmp_path, base):
  copied = pathlib.Path(shutil.copy(base.vocabulary.file, tmp_path / 'words.model'))
  vocabulary = VocabularyFile(str(copied), 100)
  assert vocabulary.sha256 == base.vocabulary.sha256
  copied.unlink()
  hf_safetensors.write(tmp_path / 'base', base.config, base.params, vocabulary=vocabulary)
  assert base_checkpoint.load_base(tmp_path / 'base').vocabulary.sha256 == vocabulary.sha256


def test_sentinels_are_not_added_twice_and_ids_have_rows(tmp_path, tiny_base, base):
  words = Vocabulary(base.vocabulary.file, 100)
  whole = tmp_path / 'whole.model'  # as mT5's: the sentinels are pieces of the file
  whole.write_bytes(words._kind._processor.serialized_model_proto())
  loaded = base_checkpoint.load_base(tiny_base, vocabulary_file=str(whole))
  assert (loaded.vocabulary.extra_ids, loaded.vocabulary.size) == (0, words.size)
  assert (base.vocabulary.extra_ids, base.vocabulary.size) == (100, words.size)
  for given, ids in (('bytes', 3 + 256 + 125), (VocabularyFile(base.vocabulary.file, 200), 100)):
    ids = ids if given == 'bytes' else words.size + ids
    with pytest.raises(ValueError, match=f'has {ids} ids, .* has 192 embedding rows'):
      base_checkpoint.load_base(tiny_base, vocabulary_file=given)


@pytest.mark.parametrize('initializer', [
    initializers.ClassLabels((0, 1)), initializers.ClassLabels({'a': 'b'}), initializers.Text(3)])
def test_a_prompt_starts_from_texts_only(initializer):
  with pytest.raises(ValueError, match='text'):
    initializer(None, 4, np.zeros((300, 8), np.float32), Vocabulary('bytes'))

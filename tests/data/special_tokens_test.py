"""The vocabularies of BART and BERT: transformers' ids and texts, their special tokens in place."""

import json
import re
import shutil

import pytest

from prompt_tuning_jax.checkpoints import hf_config, hf_families
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training import discrete_prompt

TEXTS = ['a lovely and bright film', 'lovely', ' one space', '', "It's Awful, isn't it? No!",
         '東京', 'naïve café', 'line\nand line\n', 'x' * 300]
WITH_MASK = {'bart': 'a <mask> film', 'bert': 'a film. It was [MASK] [MASK]. [SEP] bright'}


def in_two_files(bart_file, folder):
  model = json.loads(bart_file.read_text(encoding='utf-8'))['model']
  folder.mkdir()
  (folder / 'vocab.json').write_text(json.dumps(model['vocab']))
  merges = '\n'.join(' '.join(pair) for pair in model['merges'])
  (folder / 'merges.txt').write_text(f'#version: 0.2\n{merges}\n', encoding='utf-8')
  return folder / 'vocab.json'


@pytest.fixture(scope='module')
def theirs(bart_file, bert_file, tmp_path_factory):
  """Tokenizers of transformers, made of vocab.json and of vocab.txt."""
  transformers = pytest.importorskip('transformers')
  two = in_two_files(bart_file, tmp_path_factory.mktemp('two') / 'x')
  mask = transformers.AddedToken('<mask>', lstrip=True, special=True)  # as published
  return {'bart': transformers.BartTokenizer(vocab=str(two), mask_token=mask,
                                             merges=str(two.parent / 'merges.txt')),
          'bert': transformers.BertTokenizer(vocab=str(bert_file))}


@pytest.mark.parametrize('kind', ['bart', 'bert'])
def test_ids_and_texts_are_those_of_transformers(kind, theirs, bart_file, bert_file, tmp_path):
  file, shift = {'bart': (bart_file, 1), 'bert': (bert_file, 0)}[kind]
  words, tokenizer = Vocabulary(file), theirs[kind]
  if kind == 'bart':
    others = [Vocabulary(in_two_files(bart_file, tmp_path / 'two'))]
  else:
    tokenizer.backend_tokenizer.save(str(tmp_path / 'tokenizer.json'))
    others = [Vocabulary(tmp_path / 'tokenizer.json')]
  for text in (*TEXTS, WITH_MASK[kind]):
    ids = words.framed(words.encode(text), 'inputs')
    assert [i - shift for i in ids] == tokenizer(text)['input_ids'], text
    assert all(other.encode(text) == words.encode(text) for other in others)
    decoded = tokenizer.decode([i - shift for i in ids], skip_special_tokens=True,
                               clean_up_tokenization_spaces=False)
    assert words.decode(ids) == decoded or '[SEP]' in text  # ours ends there
  assert words.encode_many(TEXTS) == [words.encode(text) for text in TEXTS]
  assert words.size == len(tokenizer) + shift
  special = ('mask_token_id', 'eos_token_id' if kind == 'bart' else 'sep_token_id')
  assert [words.mask_id, words.eos_id] == [getattr(tokenizer, name) + shift for name in special]


def test_what_no_text_has(bart_file, bpe_file, tiny_base, tmp_path):
  path = tmp_path / 'vocab.txt'
  pieces = ['[PAD]', '[unused0]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[unused12]', 'unused', 'a']
  path.write_text('\n'.join(pieces))
  assert Vocabulary(path).untrained == {0, 1, 6}
  assert discrete_prompt.words(Vocabulary(path)).tolist() == [7, 8]
  bart = Vocabulary(bart_file)
  assert bart.untrained == {i for i in range(bart.size) if bart.piece(i) == '<pad>'}
  assert len(bart.untrained) == 2 and Vocabulary(bpe_file).untrained == {0}
  assert not Vocabulary(tiny_base / 'spiece.model').untrained
  assert not Vocabulary('bytes').untrained


def test_what_texts_begin_and_end_with(bart_file, bert_file, bpe_file):
  bart, bert, gpt = map(Vocabulary, (bart_file, bert_file, bpe_file))
  for feature in ('inputs', 'targets'):
    assert bart.framed([9, 8, 7], feature) == [1, 9, 8, 7, bart.eos_id]
    assert bart.framed([9, 8, 7], feature, 4) == [1, 9, 8, bart.eos_id]
    assert gpt.framed([9, 8], feature) == [9, 8, gpt.eos_id]
    assert gpt.framed([9, 8], feature, 2) == [9, gpt.eos_id]
  assert bert.framed([9], 'inputs') == [bert.encode('[CLS]')[0], 9, bert.eos_id]
  assert bert.framed([9], 'targets') == [9, bert.eos_id]
  assert Vocabulary('bytes').mask_id == Vocabulary('bytes').sentinel(0)
  with pytest.raises(ValueError, match='no mask, and no sentinels'):
    Vocabulary('bytes', 0).mask_id  # noqa: B018


@pytest.mark.parametrize('kind', ['bart', 'bert', 'two'])
def test_a_vocabulary_travels_with_a_folder(kind, theirs, bart_file, bert_file, tmp_path):
  file = {'bart': bart_file, 'bert': bert_file}.get(kind) or in_two_files(bart_file,
                                                                          tmp_path / 'two')
  stored, words = VocabularyFile(str(file), 0), Vocabulary(file)
  for name in ('sha256', 'size', 'mask_id'):
    assert getattr(stored, name) == getattr(words, name)
  (tmp_path / 'copy').mkdir()
  stored.write(tmp_path / 'copy')
  model_type = 'bert' if kind == 'bert' else 'bart'
  (tmp_path / 'copy' / 'config.json').write_text(json.dumps({'model_type': model_type}))
  copied = hf_families.find_vocabulary(tmp_path / 'copy')
  assert (copied.sha256, copied.size, copied.end_id) == (stored.sha256, stored.size, words.eos_id)
  transformers = pytest.importorskip('transformers')
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / 'copy')
  text = WITH_MASK[model_type]
  assert again(text)['input_ids'] == theirs[model_type](text)['input_ids']
  assert again.mask_token == theirs[model_type].mask_token


def test_cased_words_stay_cased(bert_file, tmp_path):
  shutil.copy(bert_file, tmp_path / 'vocab.txt')
  (tmp_path / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
  cased, lower = Vocabulary(tmp_path / 'vocab.txt'), Vocabulary(bert_file)
  assert lower.encode('FILM') == lower.encode('film') == cased.encode('film')
  assert cased.encode('FILM') != cased.encode('film')


def test_what_is_no_such_vocabulary_is_told_in_one_line(bert_file, tmp_path):
  text = bert_file.read_text(encoding='utf-8')
  for name, content, reason in (
      ('a.txt', text.replace('[MASK]\n', ''), r'lacks \[MASK\], which BERT has'),
      ('b.txt', 'first\n' + text, r'\[PAD\] should have id 0, has 1')):
    (tmp_path / name).write_text(content, encoding='utf-8')
    with pytest.raises(ValueError, match=reason) as error:
      Vocabulary(tmp_path / name).encode('a')
    assert '\n' not in str(error.value)
  (tmp_path / 'c.txt').write_bytes(b'[PAD]\n\xff\n')
  with pytest.raises(ValueError, match='is not UTF-8'):
    Vocabulary(tmp_path / 'c.txt').encode('a')
  assert hf_config.vocabulary_named(str(bert_file)).extra_ids == 0


def test_bytes_of_ids_are_what_is_decoded(bart_file, bert_file):
  for file in (bart_file, bert_file):
    words = Vocabulary(file)
    table, lengths = words.bytes_of_ids()
    for text in (TEXTS[0], TEXTS[4]):
      ids = words.framed(words.encode(text), 'inputs')
      made = b''.join(table[i, :lengths[i]].tobytes() for i in ids).decode()
      assert made[min(words.leading_spaces, len(made) - len(made.lstrip(' '))):] == (
          words.decode(ids))


def test_the_verb_trains_vocabularies_that_bases_can_have(reviews, tmp_path, capsys):
  from prompt_tuning_jax import train_vocabulary
  run = lambda kind, name, *flags: train_vocabulary.main([
      f'--kind={kind}', f'--input={reviews}', f'--output={tmp_path / name}', *flags])
  for kind, pieces in (('gpt2', 257), ('bart', 262), ('bert', 90)):
    assert run(kind, f'{kind}.json', f'--pieces={pieces}') == 0
    words = Vocabulary(tmp_path / f'{kind}.json')
    assert words.size == pieces + (kind != 'bert') and 'ids in' in capsys.readouterr().out
    assert words.decode(words.framed(words.encode('a lovely film'), 'inputs')) == 'a lovely film'
  assert [words.begins('inputs'), words.eos_id, words.mask_id] == [(2,), 3, 4]
  assert run('bart', 'x.model') != 0 and 'should end in .json' in capsys.readouterr().err
  assert run('gpt2', 'x.json', '--pieces=256') != 0
  assert 'at least 257 pieces' in capsys.readouterr().err
  assert run('bert', 'x.json', '--pieces=3') != 0 and not (tmp_path / 'x.json').exists()
  least = re.search(r'are at least (\d+) pieces, got 3', capsys.readouterr().err)[1]
  assert run('bert', 'x.json', f'--pieces={least}') == 0

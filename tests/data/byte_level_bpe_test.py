"""GPT-2's vocabulary: transformers' ids + 1 and its texts; the same in SeqIO; clear errors."""

import json
import shutil
import sys

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints import hf_config
from prompt_tuning_jax.checkpoints.hf_config import VocabularyFile
from prompt_tuning_jax.data import seqio_builder
from prompt_tuning_jax.data.token_cache import open_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.tokenizer_file import TokenizerFile

END = '<|endoftext|>'
TEXTS = ['a lovely and bright film', 'lovely', ' one space', '  two', '', ' ',
         'naïve café, 東京 🙂', 'line\nand line\n\n', '\n\tindented', "it's we'll 12345 !?",
         'x' * 300, 'a' + END + 'b']


@pytest.fixture(scope='module')
def words(bpe_file) -> Vocabulary:
  return Vocabulary(bpe_file)


def in_two_files(bpe_file, folder, end_token=END):
  """The same tokenizer as vocab.json and merges.txt."""
  model = json.loads(bpe_file.read_text(encoding='utf-8'))['model']
  vocabulary = {end_token if token == END else token: i for token, i in model['vocab'].items()}
  folder.mkdir()
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  merges = '\n'.join(' '.join(pair) for pair in model['merges'])
  (folder / 'merges.txt').write_text(f'#version: 0.2\n{merges}\n', encoding='utf-8')
  return folder / 'vocab.json'


def test_ids_and_texts_are_those_of_transformers(bpe_file, words, tmp_path):
  transformers = pytest.importorskip('transformers')
  two = in_two_files(bpe_file, tmp_path / 'two')
  theirs = transformers.GPT2TokenizerFast(vocab=str(two), merges=str(two.parent / 'merges.txt'),
                                          add_prefix_space=True)
  whole = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe_file))
  for text in TEXTS:
    ids = words.encode(text)
    spaced = text if text.startswith(' ') or not text else ' ' + text
    assert [i - 1 for i in ids] == theirs(text)['input_ids']
    if END not in text:  # behind it, transformers puts a space only where it is told to
      assert [i - 1 for i in ids] == whole(spaced)['input_ids']
    assert ids == Vocabulary(two).encode(text)
    decoded = theirs.decode([i - 1 for i in ids if i != words.eos_id],
                            clean_up_tokenization_spaces=False)
    assert decoded == spaced.replace(END, ' ')
  assert words.encode_many(TEXTS) == [words.encode(text) for text in TEXTS]
  assert words.size == len(whole) + 1 and words.eos_id == whole.convert_tokens_to_ids(END) + 1


def test_text_survives(words):
  for text in TEXTS:
    if not text.startswith(' ') and END not in text:
      ids = words.encode(text)
      assert min(ids, default=1) > 0
      for variant in (ids, [*ids, words.eos_id, *ids], [*ids, 0, 0], [*ids, words.size, 10 ** 6]):
        assert words.decode(variant) == text
  assert words.decode(words.encode('a' + END + 'b')) == 'a'


def test_pieces_and_special_ids(words):
  assert words.piece(0) == '<pad>' and words.piece(words.eos_id) == END
  assert (words.pad_id, words.unk_id, words.extra_ids) == (0, words.eos_id, 0)
  assert ''.join(map(words.piece, words.encode('lovely film'))) == 'ĠlovelyĠfilm'
  with pytest.raises(ValueError, match='ids 0 to'):
    words.piece(words.size)
  with pytest.raises(ValueError, match='0 sentinels'):
    words.sentinel(0)
  with pytest.raises(ValueError, match='no sentinels: extra_ids must be 0, got 100'):
    Vocabulary(words.file, 100)


def test_the_end_of_text_is_what_the_folder_says(bpe_file, tmp_path):
  two = in_two_files(bpe_file, tmp_path / 'two', end_token='</s>')
  with pytest.raises(ValueError, match=r"no token '<\|endoftext\|>'.*eos_token"):
    Vocabulary(two).encode('a'), Vocabulary(two).eos_id  # noqa: B018
  ids = {}
  for file, content in (('config.json', {'eos_token_id': 5}),
                        ('tokenizer_config.json', {'eos_token': {'content': '</s>'}})):
    (two.parent / file).write_text(json.dumps(content))
    ids[file] = TokenizerFile(str(two)).end_id, TokenizerFile(str(two)).sha256
  assert ids['config.json'][0] == 5 + 1
  assert ids['tokenizer_config.json'][0] == TokenizerFile(str(two)).ids['</s>'] + 1
  assert ids['config.json'][1] != ids['tokenizer_config.json'][1]  # other tokens in a cache


@pytest.mark.parametrize('kind', ['tokenizer.json', 'vocab.json'])
def test_a_vocabulary_travels_with_a_folder(bpe_file, tmp_path, kind):
  file = bpe_file if kind == 'tokenizer.json' else in_two_files(bpe_file, tmp_path / 'two')
  stored, words = VocabularyFile(str(file), 0), Vocabulary(file)
  assert (stored.sha256, stored.size, stored.end_id) == (words.sha256, words.size, words.eos_id)
  (tmp_path / 'copy').mkdir()
  stored.write(tmp_path / 'copy')
  copied = hf_config.find_vocabulary(tmp_path / 'copy', ('tokenizer.json', 'vocab.json'), 0)
  assert copied == VocabularyFile(str(tmp_path / 'copy' / kind), 0)
  assert (copied.sha256, copied.end_id) == (stored.sha256, stored.end_id)
  transformers = pytest.importorskip('transformers')
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'copy')
  assert theirs('lovely film')['input_ids'] == [i - 1 for i in words.encode('lovely film')]
  assert theirs.eos_token == END


def test_what_is_no_such_tokenizer_is_told_in_one_line(bpe_file, tmp_path, monkeypatch):
  def said(name, content, of=lambda words: words.encode('a')):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
      of(Vocabulary(tmp_path / name))
    assert '\n' not in str(error.value)
    return str(error.value)

  assert 'is not JSON' in said('a.json', '{')
  assert 'not a list' in said('b.json', '[]')
  assert 'neither a tokenizer.json nor a vocab.json' in said('c.json', '{"a": "b"}')
  assert 'merges.txt' in said('d.json', '{"a": 1}')
  for i, added in enumerate(([{'id': 1}], ['<s>'], {'content': 'a', 'id': 1}, 7)):
    told = said(f'added_{i}.json', json.dumps({**json.loads(bpe_file.read_text('utf-8')),
                                                'added_tokens': added}))
    assert 'added_tokens should be a list of tokens' in told
  unigram = {'model': {'type': 'Unigram', 'vocab': [['a', 0.0]]},
             'pre_tokenizer': {'type': 'Metaspace'}}
  assert "whose pre_tokenizer is 'Metaspace'" in said('e.json', json.dumps(unigram))
  assert 'is no tokenizer' in said('f.json', json.dumps(
      {'model': {'type': 'BPE', 'vocab': {'a': 'b'}}, 'pre_tokenizer': {'type': 'ByteLevel'}}))
  with pytest.raises(ValueError, match='Cannot read the vocabulary'):
    Vocabulary(tmp_path / 'absent.json').encode('a')
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  shutil.copy(bpe_file, tmp_path / 'other.json')
  with pytest.raises(ValueError, match=r"pip install 'prompt_tuning_jax\[tokenizers\]'"):
    Vocabulary(tmp_path / 'other.json').encode('a')
  assert Vocabulary(tmp_path / 'other.json').sha256 == Vocabulary(bpe_file).sha256


def test_seqio_tokenises_with_it(words, tmp_path, bpe_file):
  seqio = pytest.importorskip('seqio')
  import tensorflow as tf
  theirs = words.as_seqio()
  assert (theirs.vocab_size, theirs.eos_id, theirs.unk_id, theirs.pad_id) == (
      words.size, words.eos_id, words.unk_id, 0)
  assert theirs == Vocabulary(bpe_file).as_seqio() != seqio.ByteVocabulary()
  for text in TEXTS:
    assert words.encode(text) == theirs.encode(text) == theirs.encode_tf(text).numpy().tolist()
    assert theirs.decode(words.encode(text)) == words.decode(words.encode(text))
  ids = np.array(words.encode(TEXTS[0]), np.int32)
  assert theirs.decode_tf(tf.constant(ids)).numpy().decode() == TEXTS[0]
  assert theirs.encode_tf(tf.constant(TEXTS[:3])).to_list() == words.encode_many(TEXTS[:3])


def test_the_builder_writes_its_tokens_with_its_end(words, tmp_path, monkeypatch):
  seqio = pytest.importorskip('seqio')
  name = 'byte_level_bpe_test'
  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)

  def source(split, shuffle_files, seed=None):
    import tensorflow as tf
    return tf.data.Dataset.from_tensor_slices(
        {'inputs': ['a lovely film', 'dull ' * 40], 'targets': ['good', 'bad']})

  monkeypatch.setattr(seqio_builder, 'import_tasks', lambda modules: None)
  seqio.TaskRegistry.add(
      name, source=seqio.FunctionDataSource(source, splits=('train',)),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
      output_features={'inputs': feature, 'targets': feature}, metric_fns=[])
  request = dict(task=name, modules=[], split='train', lengths={'inputs': 8, 'targets': 8},
                 vocabulary={'file': words.file, 'extra_ids': 0}, max_examples=None)
  with pytest.raises(ValueError, match='no sentinels'):
    seqio_builder.build(**request, folder=str(tmp_path / 'no'), sentinel=True)
  seqio_builder.build(**request, folder=str(tmp_path / 'tokens'))
  cache = open_cache(tmp_path / 'tokens')
  end = [words.eos_id]
  assert cache.inputs(0).tolist() == words.encode('a lovely film') + end
  assert cache.inputs(1).tolist() == words.encode('dull ' * 40)[:7] + end
  assert cache.targets(1).tolist() == words.encode('bad') + end
  assert cache.meta['num_cut'] == {'inputs': 1, 'targets': 0}

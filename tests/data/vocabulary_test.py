"""Our vocabularies equal SeqIO's, and import no TensorFlow."""

import os
import pathlib
import subprocess
import sys

import pytest

from prompt_tuning_jax.data.vocabulary import Vocabulary, train_vocabulary

LINES = [
    'The sea was calm and the captain looked at the sky.',
    'Bread, butter and a cup of tea stood on the kitchen table.',
    'He said: <extra_id_0> and <extra_id_12>ly, twice.',
    '  Spaces   and\ttabs\nand a ﬁne ligature, naïve café, 東京, 🙂, Ωmega ',
    '',
    'word<extra_id_3>',
]


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> Vocabulary:
  words = [f'{a} {b} {c}' for a in ('red', 'blue', 'green') for b in ('fish', 'boat', 'house')
           for c in ('swims', 'floats', 'stands')]
  return train_vocabulary(words, tmp_path_factory.mktemp('v') / 'small.model', pieces=60)


def t5_vocabulary() -> Vocabulary:
  assets = os.environ.get('PROMPT_TUNING_TEST_ASSETS')
  file = pathlib.Path(assets or '/nowhere') / 'prompt_tuning' / 'test_data' / 't5_vocab'
  if not file.exists():
    pytest.skip('set PROMPT_TUNING_TEST_ASSETS to the folder with prompt_tuning/test_data/t5_vocab')
  return Vocabulary(str(file))


def equals_seqio(ours: Vocabulary):
  theirs = ours.as_seqio()
  assert ours.size == theirs.vocab_size
  assert (ours.eos_id, ours.pad_id, ours.unk_id) == (theirs.eos_id, theirs.pad_id, theirs.unk_id)
  for line in LINES:
    ids = ours.encode(line)
    assert ids == list(theirs.encode(line)) == theirs.encode_tf(line).numpy().tolist()
    for variant in (ids, ids + [1] + ids, ids + [0, 0], ids + [ours.size, ours.size + 9]):
      assert ours.decode(variant) == theirs.decode(variant)
  every = [i for i in range(ours.size) if i != 1]
  assert ours.decode(every) == theirs.decode(every)
  assert ours.encode_many(LINES) == [ours.encode(line) for line in LINES]


def test_small_vocabulary_equals_seqio(small):
  equals_seqio(small)


def test_t5_vocabulary_equals_seqio():
  vocabulary = t5_vocabulary()
  equals_seqio(vocabulary)
  assert vocabulary.size == 32100


@pytest.mark.parametrize('extra_ids', [0, 125])
def test_bytes_equal_seqio(extra_ids):
  equals_seqio(Vocabulary('bytes', extra_ids))


def test_sentinels_count_down_from_the_last_id(small):
  assert small.sentinel(0) == small.size - 1
  assert small.sentinel(99) == small.size - 100
  assert small.piece(small.sentinel(7)) == '<extra_id_7>'
  assert small.encode('<extra_id_0>')[-1] == small.sentinel(0)
  with pytest.raises(ValueError, match='100 sentinels'):
    small.sentinel(100)


def test_pieces_of_bytes():
  vocabulary = Vocabulary('bytes', 2)
  assert [vocabulary.piece(i) for i in (0, 1, 2, 100, 258, 260)] == [
      '<pad>', '</s>', '<unk>', 'a', '<0xFF>', '<extra_id_0>']


def test_vocabulary_of_a_base(small):
  class Stub:
    name, vocabulary = 'some', small

  assert Vocabulary.of_base(Stub) == small
  Stub.vocabulary = None
  with pytest.raises(ValueError, match="'some' brings no vocabulary: .* with --gin.VOCABULARY"):
    Vocabulary.of_base(Stub, '--gin.VOCABULARY')


def test_trained_vocabulary_has_special_ids_and_round_trips(small):
  assert [small.piece(i) for i in range(3)] == ['<pad>', '</s>', '<unk>']
  assert small.decode(small.encode('red boat floats')) == 'red boat floats'
  assert small.sha256 == Vocabulary(small.file, extra_ids=7).sha256


def test_errors_say_what_to_do(tmp_path):
  with pytest.raises(ValueError, match='--vocabulary'):
    Vocabulary(None)
  with pytest.raises(ValueError, match='Cannot read the vocabulary'):
    Vocabulary(str(tmp_path / 'absent')).encode('a')
  (tmp_path / 'text').write_text('no model')
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    Vocabulary(str(tmp_path / 'text')).encode('a')
  (tmp_path / 'empty').write_text('')
  with pytest.raises(ValueError, match='not a SentencePiece model'):
    Vocabulary(str(tmp_path / 'empty')).encode('a')
  with pytest.raises(ValueError, match='got none'):
    train_vocabulary([], tmp_path / 'v')


def test_no_tensorflow():
  code = ('import sys; from prompt_tuning_jax.data.vocabulary import Vocabulary; '
          "Vocabulary('bytes').encode('a'); "
          "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 'jax')))")
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0

"""The bytes that each id appends, one after another, are the decoded text."""

import io
import re

import numpy as np
import pytest
import sentencepiece

from prompt_tuning_jax.data.vocabulary import Vocabulary, train_vocabulary

TEXTS = ['The sea was calm and the captain looked at the sky.', 'it is  bright,\n\nand cold',
         'He said: <extra_id_0> and <extra_id_12>ly, twice.', 'lovely', ' two', '', 'fish\tand',
         '  Spaces   and\ttabs\nand a ﬁne ligature, naïve café, 東京, 🙂, Ωmega ']


@pytest.fixture(scope='module', params=['pieces', 'byte pieces', 'bytes', 'bpe', 't5'])
def vocabulary(request, tmp_path_factory):
  texts = [f'{a} {b}' for a in ('red', 'blue', 'green') for b in ('fish', 'boat', 'house')]
  path = tmp_path_factory.mktemp('v') / 'small.model'
  if request.param == 'pieces':
    return train_vocabulary(texts, path, pieces=40)
  if request.param == 'byte pieces':  # and spaces are kept as they are
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=310, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        remove_extra_whitespaces=False)
    path.write_bytes(model.getvalue())
    return Vocabulary(path)
  if request.param == 'bytes':
    return Vocabulary('bytes')
  if request.param == 'bpe':
    return Vocabulary(request.getfixturevalue('bpe_file'))
  assets = request.getfixturevalue('test_assets')
  return Vocabulary(assets / 'prompt_tuning/test_data/t5_vocab')


def keeps_its_space(vocabulary, i):
  """SentencePiece's unknown words and bytes: their space is no piece's beginning."""
  return i == vocabulary.unk_id or i >= vocabulary.size or vocabulary.piece(i) == '<0x20>'


def joined(vocabulary, ids, rows=0):
  """The bytes of ids as they stand in a text, by the rule that `decoding.stop_strings` follows."""
  table, lengths = vocabulary.bytes_of_ids(rows)
  droppable, text = vocabulary.leading_spaces, b''
  for i in ids:
    piece = table[i, :lengths[i]].tobytes()
    if droppable and piece.startswith(b' ') and not keeps_its_space(vocabulary, i):
      piece, droppable = piece[1:], droppable - 1
    droppable = 0 if piece else droppable
    text += piece
  return text


def test_shapes(vocabulary):
  table, lengths = vocabulary.bytes_of_ids()
  assert table.shape == (vocabulary.size, lengths.max()) and table.dtype == np.uint8
  assert lengths.shape == (vocabulary.size,) and lengths.dtype == np.int32
  assert lengths[vocabulary.eos_id] == lengths[0] == 0
  assert vocabulary.bytes_of_ids()[0] is table  # computed once
  more, _ = vocabulary.bytes_of_ids(vocabulary.size + 28)
  assert len(more) == vocabulary.size + 28
  np.testing.assert_array_equal(more[:len(table), :table.shape[1]], table)


def test_real_texts(vocabulary):
  for text in TEXTS:
    ids = [i for i in vocabulary.encode(text) if i != vocabulary.eos_id]
    assert joined(vocabulary, ids).decode('utf-8') == vocabulary.decode(ids)


def test_random_ids(vocabulary):
  """Ids beyond the vocabulary too; bytes that are no UTF-8 are what `decode` makes of them."""
  rng = np.random.default_rng(0)
  rows = vocabulary.size + 28
  errors = 'ignore' if vocabulary.file == 'bytes' else 'replace'
  for size in (1, 2, 3, 20, 60):
    for _ in range(60):
      ids = [int(i) for i in rng.integers(0, rows, size) if i != vocabulary.eos_id]
      text = joined(vocabulary, ids, rows)
      expected = vocabulary.decode(ids)
      # How many stand for a run of bytes that are no UTF-8 is the library's own.
      runs = lambda text: re.sub('\ufffd+', '\ufffd', text)
      assert runs(text.decode('utf-8', errors)) == runs(expected)


def test_leading_spaces(vocabulary, request):
  """As many spaces as can be before a word: what the decoder leaves out of them is foretold."""
  kind = request.node.callspec.params['vocabulary']
  expected = {'pieces': 2 ** 30, 'byte pieces': 1, 'bytes': 0, 'bpe': 1, 't5': 2 ** 30}
  assert vocabulary.leading_spaces == expected[kind]

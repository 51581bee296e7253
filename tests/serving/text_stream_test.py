"""A text in pieces is the text at once, whatever the vocabulary and wherever it is cut."""

import numpy as np
import pytest

from prompt_tuning_jax.checkpoints.base_checkpoint import load_base
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.decoding import stop_strings
from prompt_tuning_jax.serving.text_stream import TextStream, held_back

TEXT = 'naïve “œuvre” — 東京 🙂🙃 done.\n\nEnd of it all'


def in_pieces(vocabulary, ids, stops, rng) -> tuple[str, str]:
  """(the pieces together, the text at once), the stream being fed at random places."""
  stream, sent, place = TextStream(vocabulary, stops), '', 0
  while True:
    place = min(place + rng.integers(1, 4), len(ids))
    piece, stopped = stream.piece(ids[:place], place == len(ids))
    sent += piece
    if stopped or place == len(ids):
      return sent, stop_strings.cut(vocabulary.decode(ids[:place]), stops)[0]


@pytest.fixture(params=['bytes', 'mini', 'bpe'])
def vocabulary(request):
  if request.param == 'bpe':
    return Vocabulary(str(request.getfixturevalue('bpe_file')))
  if request.param == 'bytes':
    return Vocabulary('bytes')
  file = load_base('mini').vocabulary
  return Vocabulary(file.file, file.extra_ids)


def test_pieces_are_the_text(vocabulary):
  rng = np.random.default_rng(0)
  for _ in range(200):
    ids = rng.integers(0, vocabulary.size, 12)  # random ids: broken characters, unknown words
    stops = [vocabulary.decode(rng.choice(ids, 2)) or 'x' for _ in range(rng.integers(0, 3))]
    sent, text = in_pieces(vocabulary, ids, stops, rng)
    assert sent == text
  ids = vocabulary.encode(TEXT)
  for stops in ([], ['end', 'done.\n\nEnd of this'], ['\n\n'], ['🙃', ' do']):
    for _ in range(5):
      sent, text = in_pieces(vocabulary, ids, stops, rng)
      assert sent == text and not any(stop in sent for stop in stops)


def test_no_piece_ends_in_half_a_character_or_half_a_stop_string():
  vocabulary, stream = Vocabulary('bytes'), TextStream(Vocabulary('bytes'), ['###'])
  pieces = [stream.piece(vocabulary.encode('é# #'), False)[0],
            stream.piece(vocabulary.encode('é# ##'), False)[0],
            stream.piece(vocabulary.encode('é# ###x'), False)]
  assert pieces == ['é# ', '', ('', True)]
  assert TextStream(vocabulary).piece(vocabulary.encode('aé')[:2], False) == ('a', False)


def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string():
  assert held_back('abab', ['abac', 'b']) == 2
  assert held_back('aba', ['abac', 'ba!']) == 3
  assert held_back('abac', ['abac']) == 0
  assert held_back('', ['a']) == held_back('text', []) == 0

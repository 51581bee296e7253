"""Pretraining objectives as SeqIO runs them: on a few texts, and on rows of the prepared data."""

import functools
import json
import os
import pathlib

import numpy as np
import pytest

from prompt_tuning_jax.data import seqio_builder, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary, train_vocabulary
from prompt_tuning_jax.tasks import denoising, noise

BYTES = Vocabulary('bytes')
MASK = BYTES.sentinel(0)
TEXTS = [f'Text {i}: ' + 'the quick brown fox jumps! Over the lazy dog. ' * (1 + i % 5)
         for i in range(30)]
JOINED = ''.join(TEXTS)
OBJECTIVES = {  # How many features, and how many bytes may be lost at a group's (or text's) end.
    'span_corruption': (2, 1), 'span_corruption_no_sentinels': (2, 1), 'prefix_lm': (2, 1),
    'lm': (1, 0), 'masked_lm': (2, 0), 'text_infilling': (2, 0), 'sentence_permutation': (2, 0),
    'bart_denoising': (2, 0), 'masked_tokens': (2, 1)}
LOCAL_TEXTS = {'novels': ['local_text/novels:1.0.0'], 'wiki': ['local_text/wiki:1.0.0'],
               'local_text': ['local_text/novels:1.0.0', 'local_text/wiki:1.0.0']}


@pytest.fixture(scope='module')
def seqio():
  return pytest.importorskip('seqio')


@pytest.fixture
def local_text():
  folder = pathlib.Path(os.environ.get('TFDS_DATA_DIR', '/nowhere')) / 'local_text'
  if not all((folder / name).exists() for name in ('novels', 'wiki')):
    pytest.skip('set TFDS_DATA_DIR to a folder with local_text/novels and local_text/wiki')
  return folder


def run(seqio, objective, lengths, texts=TEXTS, vocabulary=BYTES, **kwargs):
  import tensorflow as tf

  from prompt_tuning_jax.tasks.language_modeling import OBJECTIVES as preprocessors
  words = vocabulary.as_seqio()
  keys = ('inputs', 'targets')[-OBJECTIVES[objective][0]:]
  features = {key: seqio.Feature(words, add_eos=True) for key in keys}
  dataset = tf.data.Dataset.from_tensor_slices({'text': list(texts)})
  lengths = dict(zip(('inputs', 'targets'), lengths, strict=True))
  return [{key: ids.tolist() for key, ids in row.items()}
          for row in preprocessors[objective](dataset, lengths, features, **kwargs)
          .as_numpy_iterator()]


@pytest.mark.parametrize('objective', ['lm', 'masked_lm', 'text_infilling', 'sentence_permutation',
                                       'bart_denoising'])
def test_targets_are_the_whole_text(seqio, objective):
  rows = run(seqio, objective, (64, 48))
  assert ''.join(BYTES.decode(row['targets']) for row in rows) == JOINED
  assert all(len(row['targets']) == 48 for row in rows[:-1])
  for row in rows:
    assert set(row) == ({'targets'} if objective == 'lm' else {'inputs', 'targets'})
    assert row['targets'][-1] == 1 and len(row.get('inputs', [])) <= 48
    assert 'inputs' not in row or row['inputs'][-1] == 1 and 0 not in row['inputs']


def test_span_corruption_keeps_every_byte(seqio):
  rows = run(seqio, 'span_corruption', (64, 64))
  lowest = BYTES.size - BYTES.extra_ids
  restored = np.concatenate([
      noise.restore_spans(np.array([row['inputs']]), np.array([row['targets']]), lowest)[0]
      for row in rows])
  text = BYTES.decode(restored)
  assert len(JOINED) - len(text) < 2 and JOINED.startswith(text)  # At most a last single byte.
  assert all(len(row['inputs']) == 64 for row in rows[:-1])
  assert all(row['inputs'][-1] == row['targets'][-1] == 1 for row in rows)
  assert rows[0]['targets'][0] == BYTES.sentinel(0)


def test_without_sentinels_the_same_spans_fill_shorter_targets(seqio):
  # 64 inputs leave room for the same text in both, so that its noise is the same.
  with_them, without = (run(seqio, name, (64, 64))
                        for name in ('span_corruption', 'span_corruption_no_sentinels'))
  lowest = BYTES.size - BYTES.extra_ids
  assert len(with_them) == len(without) and all(len(row['inputs']) == 64 for row in without[:-1])
  for row, bare in zip(with_them, without, strict=True):
    assert bare == {'inputs': row['inputs'], 'targets': [t for t in row['targets'] if t < lowest]}
  short = run(seqio, 'span_corruption_no_sentinels', (200, 20))
  assert all(len(row['targets']) == 20 for row in short[:-1])


def test_prefix_lm_keeps_every_byte(seqio):
  rows = run(seqio, 'prefix_lm', (64, 32), [*TEXTS, '', 'a', 'ab', 'x' * 64])
  told = [BYTES.decode(row['inputs']) + BYTES.decode(row['targets']) for row in rows]
  blocks = [text[i:i + 63] for text in TEXTS for i in range(0, len(text), 63)]
  # No block has two texts in it, and only rests of one byte are lost.
  assert told == [*(block for block in blocks if len(block) > 1), 'ab', 'x' * 63]
  assert all(len(row['inputs']) <= 64 and len(row['targets']) <= 32 for row in rows)
  assert all(row['inputs'][-1] == row['targets'][-1] == 1 for row in rows)
  assert len({len(row['inputs']) for row in rows}) > 5


def test_masked_inputs_stand_above_their_targets(seqio):
  rows = run(seqio, 'masked_lm', (100, 100))
  pairs = np.array([pair for row in rows
                    for pair in zip(row['inputs'], row['targets'], strict=True)])
  masked, changed = pairs[:, 0] == MASK, pairs[:, 0] != pairs[:, 1]
  assert abs(masked.mean() - 0.12) < 0.01 and abs((changed & ~masked).mean() - 0.015) < 0.005
  assert pairs[changed & ~masked, 0].min() >= 3 and pairs[~masked, 0].max() < 259


def test_masked_tokens_stand_under_the_masks_and_fit(seqio):
  """As many as targets have room for; with the targets in their places the texts are whole."""
  for lengths, size in (((100, 100), 100), ((100, 8), 50)):
    rows = run(seqio, 'masked_tokens', lengths)
    text = ''
    for row in rows:
      ids, targets = np.array(row['inputs']), np.array(row['targets'])
      assert np.sum(ids == MASK) == len(targets) - 1 == max(1, round(0.15 * (len(ids) - 1)))
      ids[ids == MASK] = targets[:-1]
      text += BYTES.decode(ids)
    assert text == JOINED and {len(row['inputs']) for row in rows[:-1]} == {size}
    assert max(len(row['targets']) for row in rows) <= lengths[1]


@pytest.mark.parametrize('objective', ['lm', 'prefix_lm', 'masked_tokens', 'bart_denoising'])
def test_texts_end_as_the_vocabulary_says(seqio, objective, bpe_file, bart_file, bert_file):
  """GPT-2's vocabulary has no mask, which is told."""
  for file in (bpe_file, bart_file, bert_file):
    words = Vocabulary(file)
    if objective in ('masked_tokens', 'bart_denoising') and file == bpe_file:
      with pytest.raises(ValueError, match='no mask'):
        run(seqio, objective, (48, 32), vocabulary=words)
      continue
    rows = run(seqio, objective, (48, 32), vocabulary=words)
    assert rows and all(ids[-1] == words.eos_id and ids.count(words.eos_id) == 1
                        for row in rows for ids in row.values())
    noisy = objective in ('masked_tokens', 'bart_denoising')
    assert any(words.mask_id in row['inputs'] for row in rows) if noisy else True


def test_bart_permutes_whole_sentences(seqio):
  rows = run(seqio, 'sentence_permutation', (400, 400))
  known = {sentence.strip() for text in TEXTS for sentence in denoising.sentences(text)}
  moved = 0
  for row in rows[:-1]:
    sides = [BYTES.decode(row[key]) for key in ('inputs', 'targets')]
    assert sorted(sides[0]) == sorted(sides[1])
    moved += sides[0] != sides[1]
    rest = sides[0]
    for sentence in sorted(known, key=len, reverse=True):  # a shorter one may be part of it
      rest = rest.replace(sentence, '')
    assert len(rest) < 60  # Only the block's cut ends are no sentences of the text.
  assert moved == len(rows) - 1


def test_infilling_has_one_kind_of_mask(seqio):
  for objective in ('text_infilling', 'bart_denoising'):
    rows = run(seqio, objective, (128, 128))
    tokens = sum(len(row['targets']) - 1 for row in rows)
    masks = sum(row['inputs'].count(MASK) for row in rows)
    kept = sum(len(row['inputs']) - 1 for row in rows) - masks
    assert abs(kept / tokens - 0.7) < 0.01 and abs(0.3 * tokens / masks - 3) < 0.35
    assert max(token for row in rows for token in row['inputs'] if token != MASK) < 259


@pytest.mark.parametrize('objective', [name for name in OBJECTIVES if name != 'lm'])
def test_the_seed_decides(seqio, objective):
  same, again, other = (run(seqio, objective, (48, 32), seed=seed) for seed in (0, 0, 1))
  assert same == again != other


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_groups_can_be_made_in_parts(seqio, monkeypatch, objective):
  from prompt_tuning_jax.tasks import pretraining
  monkeypatch.setattr(pretraining, 'TEXTS_PER_GROUP', 4)
  make = functools.partial(run, seqio, objective, (48, 32))
  parts = [make(texts=TEXTS[i:j]) for i, j in ((0, 8), (8, 12), (12, 30))]
  whole = make()
  assert parts[0] + parts[1] + parts[2] == whole
  lost = OBJECTIVES[objective][1] * 8  # Of 8 groups.
  if objective == 'prefix_lm' or not lost:
    text = ''.join(BYTES.decode(row.get('inputs', [])) * (objective == 'prefix_lm')
                   + BYTES.decode(row['targets']) for row in whole)
    assert len(JOINED) - lost <= len(text) <= len(JOINED)


def test_groups_of_other_texts_have_other_noise(seqio, monkeypatch):
  from prompt_tuning_jax.tasks import pretraining
  monkeypatch.setattr(pretraining, 'TEXTS_PER_GROUP', 2)
  first = 'a' * 200
  rows = [run(seqio, 'masked_lm', (200, 200), texts=[first, last])[0]['inputs']
          for last in ('b', 'c', 'b')]
  assert rows[0] == rows[2] != rows[1]


def test_errors(seqio):
  with pytest.raises(ValueError, match='only 100 sentinels'):
    run(seqio, 'span_corruption', (4096, 2048))
  with pytest.raises(ValueError, match='at least 2 tokens'):
    run(seqio, 'lm', (64, 1))
  with pytest.raises(ValueError, match='no sentinels'):
    run(seqio, 'text_infilling', (64, 64), vocabulary=Vocabulary('bytes', 0))


def test_no_text_has_no_rows(seqio):
  for objective in OBJECTIVES:
    assert run(seqio, objective, (64, 64), texts=['']) == []


def test_sentences_have_the_tokens_of_their_text(tmp_path):
  """SentencePiece's pieces do not reach over spaces, so that texts can be cut at sentences."""
  text = '"Why not?" she said.  Dr. X (of 3.5 kg!) came.\nThen he left… No end'
  words = train_vocabulary([text, *TEXTS], tmp_path / 'spiece.model', pieces=70)
  pieces = denoising.sentences(text)
  assert len(pieces) == 7 and sum(words.encode_many(pieces), []) == words.encode(text)


def test_what_is_registered_is_declared(seqio):
  from prompt_tuning_jax.tasks import language_modeling
  expected = {f'{objective}_{text}': names for objective in OBJECTIVES
              for text, names in LOCAL_TEXTS.items()}
  expected |= dict.fromkeys(('span_corruption_c4', 'prefix_lm_c4'), ['c4/en:3.0.1'])
  assert expected == language_modeling.TFDS_DATASETS
  for name, datasets in expected.items():
    task = seqio.get_mixture_or_task(name)
    parts = getattr(task.source, '_sources', [task.source])
    assert [part.tfds_dataset.name for part in parts] == datasets
    assert task.preprocessors[0] is language_modeling.OBJECTIVES[
        name.removesuffix('_local_text') if len(datasets) > 1 else name.rpartition('_')[0]]
    assert set(task.output_features) == {'inputs', 'targets'} - (
        {'inputs'} if name.startswith('lm_') else set())


def test_sizes_of_texts(seqio, local_text):
  from prompt_tuning_jax.tasks import language_modeling
  sizes = []
  for name in ('novels', 'wiki'):
    info = json.loads((local_text / name / '1.0.0' / 'dataset_info.json').read_text())
    sizes += [sum(map(int, split['shardLengths'])) for split in info['splits']
              if split['name'] == 'validation']
  told = [seqio.get_mixture_or_task(f'lm_{text}').num_input_examples('validation')
          for text in ('novels', 'wiki', 'local_text')]
  assert told == [*sizes, sum(sizes)]
  mixed = language_modeling.TEXTS['local_text'].get_dataset('validation[:20]')
  texts, again = ([row['text'] for row in mixed.as_numpy_iterator()] for _ in range(2))
  assert texts == again and len(texts) == 40


PASSAGE = ("34 A.2d 433, 441 fn. 1 (D.C. 1993), which cites Ruddigore's admonition to "
           '"blow your own trumpet". A production of "Rud</s>')
GOLDEN = {  # The second row of local_text/wiki's validation split, at most 120 bytes with EOS.
    'span_corruption': (
        "441 fn. 1 (D.C. 1993), which cites Ruddi_0_re's_1_admonition_2_your own_3_rumpe_4_. A "
        'production of "Ruddigore" is t_5_ main plo_6_ p</s>',
        '_0_go_1_ _2_ to "blow _3_ t_4_t"_5_he_6_t</s>'),
    'span_corruption_no_sentinels': (
        "441 fn. 1 (D.C. 1993), which cites Ruddi_0_re's_1_admonition_2_your own_3_rumpe_4_. A "
        'production of "Ruddigore" is t_5_ main plo_6_ p</s>',
        'go  to "blow  tt"het</s>'),
    'prefix_lm': (
        '34 A.2d 433, 441 fn. 1 (D.C. 1993), which cites Ruddigore\'s admonition to "blow your own '
        'tru</s>',
        'mpet". A production of "Rud</s>'),
    'lm': ('', PASSAGE),
    'masked_lm': (
        "34 _0_.2d 433, 441 fn. 1 (D.C. _0_993), whi_0_h cites Ruddigor_0_'_0_ a_0_moni_0_ion_0_"
        '_0_o "blow your <0xCA>w_0__0_tru_0_pet". A_0_production of _0_Ru_0_</s>', PASSAGE),
    'masked_tokens': (
        "34 _0_.2d 433, 441 fn. 1 (D.C. _0_993), _0__0_i_0_h cites Ruddigor_0_'_0_ a_0_moni_0_ion"
        '_0__0_o "blow your _0_w_0__0_tru_0_pet". A_0_production of _0_Ru_0_</s>',
        'A1whcesdt ton m "d</s>'),
    'text_infilling': (
        '3_0_4 A.2d 43_0_, 441_0_n._0_ _0_C. 1993), which cites Ruddi_0_re_0_s admo_0_on to "blow'
        '_0_ur _0__0_t"_0_ A productio_0__0_ud</s>', PASSAGE),
    'sentence_permutation': (
        ' 1993), which cites Ruddigore\'s admonition to "blow your own trumpet".34 A.2d 433, 441 '
        'fn. 1 (D.C. A production of "Rud</s>', PASSAGE),
    'bart_denoising': (
        '_0_ 1_0_, which cites Ruddigore\'_0_onition _0_o_0_ow your own tr_0_t".34 _0__0__0_ 441 '
        'fn. _0_.C. A _0_duction of "R_0_</s>', PASSAGE),
}


def build(folder, task, lengths, size):
  seqio_builder.build(task, ['prompt_tuning_jax.tasks.language_modeling'], 'validation',
                      {'file': 'bytes', 'extra_ids': 100}, lengths, str(folder), max_examples=size)
  return token_cache.open_cache(folder)


def written(ids) -> str:
  """A row as a person reads it: _k_ is <extra_id_k>."""
  return ''.join(f'_{BYTES.size - 1 - i}_' if i >= 259 else BYTES.piece(int(i)) for i in ids)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_rows(tmp_path, local_text, objective):
  cache = build(tmp_path / 'cache', f'{objective}_wiki', {'inputs': 120, 'targets': 120}, 2)
  assert (written(cache.inputs(1)), written(cache.targets(1))) == GOLDEN[objective]
  assert cache.num_examples == 2 and cache.rows == []
  assert cache.meta['num_cut'] == {'inputs': 0, 'targets': 0}


@pytest.mark.parametrize('task', ['span_corruption_local_text', 'prefix_lm_local_text'])
def test_registered_tasks_mix_novels_and_wiki(tmp_path, local_text, task):
  cache = build(tmp_path, task, {'inputs': 256, 'targets': 128}, 500)
  assert cache.num_examples == 500 and cache.rows == []
  assert cache.input_lengths.max() <= 256 and cache.target_lengths.max() <= 128
  assert all(cache.inputs(i)[-1] == cache.targets(i)[-1] == 1 for i in range(500))
  if task.startswith('span'):
    assert cache.input_lengths.min() == 256
    noisy = (cache.target_tokens < 259).sum() - 500
    kept = (cache.input_tokens < 259).sum() - 500
    assert abs(noisy / (noisy + kept) - 0.15) < 0.003
    spans = (cache.target_tokens >= 259).sum()
    assert abs(noisy / spans - 3) < 0.1

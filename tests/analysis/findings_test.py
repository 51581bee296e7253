"""What is found in prompts whose words, labels, sizes and runs are known beforehand."""

import json

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from prompt_tuning_jax.analysis import findings, leaf_norms
from prompt_tuning_jax.analysis.trained_prompts import TrainedPrompt
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile

PIECES = ['▁technology', 'Technological', '▁techno', '▁good', '▁bad', '▁a', '▁1234', '▁1234567',
          '▁goods', '▁zebra']


class Words:
  """A vocabulary of these pieces; a text is one of them."""

  piece = staticmethod(PIECES.__getitem__)
  encode = staticmethod(lambda text: [PIECES.index(f'▁{text}')])


def table(rows=len(PIECES), width=12):
  return np.linalg.qr(np.random.default_rng(0).normal(size=(width, width)))[0][:rows].astype(
      np.float32)


def test_words_of_a_prompt_made_of_words():
  """Orthogonal rows: a token's neighbours are the words that it is a sum of, by their weights."""
  words = table()
  prompt = np.stack([3 * words[0] + 2 * words[1] + words[2],
                     words[4] + .5 * words[5] + .2 * words[9],
                     5 * words[4] + words[6] + .5 * words[7]])
  found = findings.words(prompt, words, Words, ['good', 'bad'], count=3)
  assert found['tokens'][0]['words'] == PIECES[:3]
  assert found['tokens'][2]['words'] == ['▁bad', '▁1234', '▁1234567']
  np.testing.assert_allclose(found['tokens'][0]['cosines'], np.array([3, 2, 1]) / 14 ** .5,
                             rtol=1e-5)
  assert found['tokens'][0]['norm'] == pytest.approx(14 ** .5, rel=1e-5)
  assert found['distinct'] == 2 and found['frequent'][0] == ['▁bad', 2]
  assert found['alike'] == 1  # technology and Technological; figures are no letters
  labels = found['labels']
  assert labels == {'found': ['bad'], 'of': 2, 'pieces': 2, 'share': pytest.approx(2 / 9),
                    'tokens': 2, 'share_by_chance': .2}
  theirs = NearestNeighbors(metric='cosine').fit(words).kneighbors(prompt, 3, False)
  assert [[PIECES[i] for i in row] for row in theirs] == [
      token['words'] for token in found['tokens']]


@pytest.mark.parametrize('words, number', [
    (['▁Tech', '▁technology'], 1), (['ĠTechnik', 'technik'], 1), (['▁tec', '▁tec'], 0),
    (['▁12345', '▁12346'], 0), (['▁über', '▁überall'], 1), (['▁good', '▁bad'], 0)])
def test_words_are_alike_by_four_letters(words, number):
  assert findings.alike([words]) == findings.alike([['▁odd', *words]]) == number


def test_norms_are_lengths_and_their_percentiles():
  words = np.diag(np.arange(1, 102)).astype(np.float32)
  found = findings.norms(np.array([[3, 4, 0], [0, 0, 2]], np.float32), words)
  assert found['prompt'] == [5, 2]
  spread = found['words']
  assert (spread['low'], spread['median'], spread['high']) == (6, 51, 96)
  assert sum(spread['counts']) == 101 and len(spread['edges']) == len(spread['counts']) + 1
  assert 'words' not in findings.norms(np.ones((1, 3)), None)


def test_components_keep_prompts_apart_and_need_a_plane():
  prompts = {'': np.ones((3, 4)), 'other': np.zeros((2, 4))}
  found = findings.components(prompts, np.random.default_rng(0).normal(size=(2000, 4)))
  assert [(each['name'], len(each['places'])) for each in found['prompts']] == [('', 3),
                                                                                ('other', 2)]
  assert len(found['words']) == findings.SAMPLE
  np.testing.assert_allclose(found['prompts'][1]['places'][0], found['prompts'][1]['places'][1])
  assert findings.components({'': np.ones((2, 4))}, None) is None
  assert findings.components({'': np.ones((5, 1))}, None) is None


def test_changes_of_weights_are_measured_by_what_they_change():
  rng = np.random.default_rng(0)
  a, b, kernel = rng.normal(size=(6, 2)), rng.normal(size=(2, 5)), rng.normal(size=(6, 5))
  scale = np.array([1, 1, 3, 1])
  rows = leaf_norms.of_leaves({'lora/x/kernel/a': a, 'lora/x/kernel/b': b, 'ia3/x/kernel': scale},
                              {'x/kernel': kernel})
  assert [row['path'] for row in rows] == ['ia3/x/kernel', 'x/kernel']
  assert rows[0]['away'] == 1  # the root of the mean of 0, 0, 4, 0
  assert rows[1]['norm'] == pytest.approx(np.sqrt(((a @ b) ** 2).sum()))
  assert rows[1]['relative'] == pytest.approx(rows[1]['norm'] / np.sqrt((kernel ** 2).sum()))
  keys = np.zeros((2, 2, 3, 1, 2))
  keys[1, 0] = [3, 4]
  assert leaf_norms.of_prefix({'cross': keys}) == [
      {'place': 'cross', 'layer': 0, 'keys': 0, 'values': 0},
      {'place': 'cross', 'layer': 1, 'keys': 5, 'values': 0}]


def test_a_run_tells_its_curves_and_broken_lines_are_left_out(tmp_path):
  rows = [{'step': 1, 'split': 'train', 'task': 't', 'loss': 2.0, 'tokens': 9},
          {'step': 2, 'split': 'train', 'task': 't', 'loss': None},
          {'step': 2, 'split': 'validation', 'task': 't', 'accuracy': 50.0, 'loss': 1.0}]
  text = '\n'.join([*map(json.dumps, rows), '{"step":', '[]', '7', '{"split": "train"}'])
  (tmp_path / 'metrics.jsonl').write_text(text)
  for name in ('prompts/best.safetensors', 'prompts/best/task.safetensors'):
    assert findings.curves(tmp_path / name) == {
        'accuracy': {'validation': [[2, 50.0]]},
        'loss': {'train': [[1, 2.0]], 'validation': [[2, 1.0]]}}
  assert findings.curves(tmp_path / 'best.safetensors') == {}


def test_what_does_not_apply_is_said_in_a_line(tmp_path):
  prompt_file.save(tmp_path / 'p.safetensors', PromptFile(
      {'prefix/decoder': np.ones((1, 2, 3, 2, 4), np.float32)}))
  found = findings.of_file(tmp_path / 'p.safetensors', table=table(), vocabulary=Words)
  assert 'words' not in found and 'norms' not in found
  [note] = found['notes']
  assert note.endswith('this file holds prefix/decoder.')
  assert found['leaves']['prefix'] == [{'place': 'decoder', 'layer': 0, 'keys': 2, 'values': 2}]
  deep = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  prompt_file.save(tmp_path / 'd.safetensors', PromptFile({prompt_file.DEEP_EMBEDDING: deep}))
  found = findings.of_file(tmp_path / 'd.safetensors', [tmp_path])
  assert len(found['norms']['prompt']) == 3 and 'likeness' not in found
  np.testing.assert_allclose(found['leaves']['deep'], np.linalg.norm(deep, axis=-1).mean(axis=1))
  assert [note.split(':')[0] for note in found['notes']] == ['Words', 'Other prompts']


def test_prompts_of_one_task_and_of_different_ones_are_averaged_apart():
  rng = np.random.default_rng(0)
  prompts = [TrainedPrompt(name, None, rng.normal(size=(3, 4)), {'task': task} if task else {})
             for name, task in (('a1', 'a'), ('a2', 'a'), ('b', 'b'), ('?', None))]
  found = findings.likeness(prompts)
  cosine = found['cosine_of_means']
  assert found['of_one_task'] == pytest.approx(cosine[0][1])
  assert found['of_different_tasks'] == pytest.approx((cosine[0][2] + cosine[1][2]) / 2)
  assert findings.likeness(prompts[2:])['of_one_task'] is None

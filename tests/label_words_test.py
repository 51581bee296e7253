"""Words for labels: they tell the labels apart, no choice makes them worse, and rows have them."""

import json

import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import label_words
from prompt_tuning_jax.analysis import label_choice


def made_up(n=60, size=30, seed=0):
  """(log p [n, V], labels [n]): labels 0, 1, 2 raise words 5, 9 and 14; word 7 is always likely."""
  rng = np.random.default_rng(seed)
  labels, scores = rng.integers(0, 3, n), rng.normal(size=(n, size))
  scores[np.arange(n), np.array([5, 9, 14])[labels]] += 2.0
  scores[:, 7] += 4.0
  return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True), labels


def test_the_words_of_labels_are_found_and_no_change_makes_them_worse():
  log_p, labels = made_up()
  words = np.arange(3, 30)
  found = label_choice.candidates(log_p, labels, words, most=6)
  assert found.shape == (3, 6) and found[:, 0].tolist() == [5, 9, 14]
  chosen = label_choice.choose(log_p, labels, found)
  assert len(set(chosen)) == 3 and all(word in row for word, row in zip(chosen, found, strict=True))
  value = label_choice.likelihood(log_p, labels, chosen)
  assert value >= label_choice.likelihood(log_p, labels, [5, 9, 14])
  for label, row in enumerate(found):  # No single change is better.
    for word in set(row.tolist()) - set(chosen):
      other = [*chosen[:label], word, *chosen[label + 1:]]
      assert label_choice.likelihood(log_p, labels, other) <= value
  assert label_choice.accuracy(log_p, labels, chosen) > 80
  # Words that are not to be had, or that the model does not think of, are none.
  assert 5 not in label_choice.candidates(log_p, labels, np.arange(6, 30), most=24)
  few = label_choice.candidates(log_p, labels, words, considered=4)
  assert set(few.ravel()) == set(words[np.argsort(-np.stack(
      [log_p[labels == label].mean(0) for label in range(3)]).mean(0)[words])[:4]])
  with pytest.raises(ValueError, match='raise --candidates'):
    label_choice.choose(log_p, labels, np.array([[5], [5], [9]]))


def test_the_verbs_rows_score_as_it_says(tmp_path, tiny_base, reviews, capsys):
  rows = [json.loads(line) for line in reviews.open(encoding='utf-8')][:40]
  source, output = tmp_path / 'rows.jsonl', tmp_path / 'words.jsonl'
  source.write_text(''.join(json.dumps({'inputs': row['text'], 'targets': row['label']}) + '\n'
                            for row in rows), encoding='utf-8')
  flags = ['--base', str(tiny_base), '--batch_size', '40']
  assert label_words.main([*flags, '--input', str(source), '--output', str(output)]) == 0
  told = json.loads(capsys.readouterr().out)
  assert set(told['words']) == {'good', 'bad'} and told['examples'] == 40
  written = [json.loads(line) for line in output.open(encoding='utf-8')]
  assert [row['targets'] for row in written] == [told['words'][row['label']] for row in rows]
  assert [row['label'] for row in written] == [row['label'] for row in rows]
  majority = max(sum(row['label'] == label for row in rows) for label in told['words'])
  assert told['accuracy'] >= 100 * majority / 40 - 15
  capsys.readouterr()
  assert eval_verb.main([*flags, '--input', str(output)]) == 0
  assert json.loads(capsys.readouterr().out)['examples'] == 40


def test_of_templates_the_one_whose_words_tell_labels_apart_best_is_taken(
    tmp_path, tiny_base, reviews, capsys):
  """A template that leaves nothing of the inputs to be seen is not it, whatever its place."""
  rows = [json.loads(line) for line in reviews.open(encoding='utf-8')][:40]
  source, output = tmp_path / 'rows.jsonl', tmp_path / 'words.jsonl'
  source.write_text(''.join(json.dumps({'inputs': row['text'], 'targets': row['label']}) + '\n'
                            for row in rows), encoding='utf-8')
  blind, seeing = 'a film ' * 20 + '{}', 'it is {} film'
  flags = ['--base', str(tiny_base), '--batch_size', '40', '--input', str(source), '--output',
           str(output), '--max_input_length', '20', '--template']
  singly = {}
  for template in (blind, seeing):
    assert label_words.main([*flags, template]) == 0
    told = json.loads(capsys.readouterr().out)
    singly[template] = told['templates'][template]
    assert told['template'] == template and told['accuracy'] == singly[template]['accuracy']
    output.unlink()
  for order in ((blind, seeing), (seeing, blind)):
    assert label_words.main([*flags, order[0], '--template', order[1]]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told['template'] == seeing and told['templates'] == singly
    written = [json.loads(line) for line in output.open(encoding='utf-8')]
    assert [row['inputs'] for row in written] == [f'it is {row["text"]} film' for row in rows]
    assert [row['targets'] for row in written] == [told['words'][row['label']] for row in written]
    output.unlink()
  assert singly[seeing]['log_likelihood'] > singly[blind]['log_likelihood']


@pytest.mark.parametrize(('row', 'flags', 'said'), [
    ({'targets': 'good'}, ('--template=none',), "one '{}', where inputs stand, got 'none'."),
    ({'targets': 'good'}, (), 'labels in "targets", got 1 in the first 1 rows: raise --examples'),
    ({'targets': 1}, (), 'a label in "targets" should be a text, got 1, of type int.'),
    ({}, (), 'expected a label in "targets", got the fields [\'inputs\']'),
    ({'targets': 'good'}, ('--examples=0',), '--examples must be at least 1, got 0.'),
    ({'targets': 'good'}, ('--candidates=-2',), '--candidates must be at least 1, got -2.')],
                         ids=['template', 'one', 'number', 'none', 'examples', 'candidates'])
def test_what_gives_no_words_is_told(tmp_path, tiny_base, capsys, row, flags, said):
  source = tmp_path / 'rows.jsonl'
  source.write_text(json.dumps({'inputs': 'a', **row}) + '\n', encoding='utf-8')
  assert label_words.main([f'--base={tiny_base}', f'--input={source}',
                           f'--output={tmp_path / "words.jsonl"}', *flags]) == 1
  assert said in capsys.readouterr().err


def test_ids_cannot_be_written_into_a_template(tmp_path, tiny_base, capsys):
  source = tmp_path / 'rows.jsonl'
  source.write_text(''.join(json.dumps({'inputs': 'a', 'input_tokens': [5, 1], 'targets': label})
                            + '\n' for label in ('good', 'bad')), encoding='utf-8')
  assert label_words.main([f'--base={tiny_base}', f'--input={source}', '--template=it: {}',
                           f'--output={tmp_path / "words.jsonl"}']) == 1
  assert 'rows.jsonl, line 1: a template takes a text in "inputs"' in capsys.readouterr().err

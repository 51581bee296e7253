"""SQuAD's metrics, BLEU and ROUGE equal other implementations, with uneven references."""

import collections
import math
import random
import string
import subprocess
import sys

import pytest

from prompt_tuning_jax.tasks import text_metrics

WORDS = ('the', 'a', 'Cat', 'cat', 'cats', 'sat', 'on', 'An', 'mat', 'U.S.', '1,200', 'running')


def sentence(rng, longest=8):
  return ' '.join(rng.choice(WORDS) for _ in range(rng.randrange(1, longest)))


@pytest.fixture(params=range(3))
def answers(request):
  """One to four references an example, and predictions near them, one of them empty."""
  rng = random.Random(request.param)
  targets = [[sentence(rng) for _ in range(rng.randrange(1, 5))] for _ in range(60)]
  predictions = [f'{rng.choice(texts)} {sentence(rng, 4)}' if rng.random() < 0.7 else texts[-1]
                 for texts in targets]
  return targets, [*predictions[:-1], '']


def plain_words(text):
  """The words that SQuAD v1.1 compares, letter by letter instead of by patterns."""
  kept = ''.join(letter for letter in text.lower() if letter not in string.punctuation)
  return [word for word in kept.split() if word not in ('a', 'an', 'the')]


def plain_squad(texts, prediction):
  """(exact match, F1) of the best reference: precision and recall of a greedy matching of words."""
  exact, f1 = 0, 0.0
  for text in texts:
    true, guess = plain_words(text), plain_words(prediction)
    exact = max(exact, int(true == guess))
    left, hits = list(true), 0
    for word in guess:
      if word in left:
        left.remove(word)
        hits += 1
    if hits:
      precision, recall = hits / len(guess), hits / len(true)
      f1 = max(f1, 2 * precision * recall / (precision + recall))
  return exact, f1


def test_squad(answers):
  each = [plain_squad(texts, prediction) for texts, prediction in zip(*answers, strict=True)]
  exact, f1 = (100 * sum(column) / 60 for column in zip(*each, strict=True))
  assert text_metrics.squad(*answers) == pytest.approx({'exact_match': exact, 'f1': f1})
  assert 0 < exact < f1 < 100


def test_squad_by_hand():
  targets = [['the Sun', 'sun and moon'], ['1,200'], ['U.S.'], ['red']]
  values = text_metrics.squad(targets, ['A sun!', '1200', 'US army', ''])
  assert values == pytest.approx({'exact_match': 50, 'f1': 100 * (1 + 1 + 2 / 3 + 0) / 4})


def plain_bleu(targets, predictions):
  """BLEU-4 of texts whose words are parted by spaces (Papineni et al. 2002, section 2)."""
  def grams(words, n):
    return collections.Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))

  hits, totals, length, reference_length = [0] * 4, [0] * 4, 0, 0
  for texts, prediction in zip(targets, predictions, strict=True):
    words, others = prediction.split(), [text.split() for text in texts]
    length += len(words)
    reference_length += min((abs(len(o) - len(words)), len(o)) for o in others)[1]
    for n in range(1, 5):
      most = collections.Counter()
      for other in others:
        most |= grams(other, n)
      hits[n - 1] += sum((grams(words, n) & most).values())
      totals[n - 1] += sum(grams(words, n).values())
  precision = math.exp(sum(math.log(h / t) for h, t in zip(hits, totals, strict=True)) / 4)
  return 100 * min(1, math.exp(1 - reference_length / length)) * precision


def test_bleu(answers):
  pytest.importorskip('sacrebleu')
  answers = ([[text.lower() for text in texts] for texts in answers[0]],
             [text.lower() for text in answers[1]])
  # Without punctuation, sacrebleu's words are ours. Empty references are shorter than missing ones.
  targets = [[text.replace('.', '').replace(',', '') for text in texts] for texts in answers[0]]
  targets[3] = ['', *targets[3]]
  predictions = [text.replace('.', '').replace(',', '') for text in answers[1]]
  predictions[::2] = [text[:5] for text in predictions[::2]]  # Brevity costs something.
  assert len({len(texts) for texts in targets}) > 2
  value = text_metrics.bleu(targets, predictions)['bleu']
  assert value == pytest.approx(plain_bleu(targets, predictions)) and 5 < value < 95


def test_bleu_is_sacrebleus(answers):
  sacrebleu = pytest.importorskip('sacrebleu')
  targets, predictions = answers
  single = [[texts[0]] for texts in targets]
  expected = sacrebleu.corpus_bleu([text.lower() for text in predictions],
                                   [[texts[0].lower() for texts in targets]]).score
  assert text_metrics.bleu(single, predictions)['bleu'] == pytest.approx(expected)
  # A reference said twice is the same as said once.
  padded = [[*texts, *[texts[0]] * (4 - len(texts))] for texts in targets]
  cased, expected = (sacrebleu.corpus_bleu(
      predictions, list(map(list, zip(*padded, strict=True))), lowercase=lowercase).score
                     for lowercase in (False, True))
  assert text_metrics.bleu(targets, predictions)['bleu'] == pytest.approx(expected) != cased
  assert text_metrics.bleu(targets, [''] * 60)['bleu'] == 0.0


def test_rouge(answers):
  rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer')
  targets, predictions = answers
  scorer = rouge_scorer.RougeScorer(['rouge1', 'rouge2'], use_stemmer=True)
  values = text_metrics.rouge(targets, predictions)
  first = second = best_second = 0
  for texts, guess in zip(targets, predictions, strict=True):
    scores = [scorer.score(text, guess) for text in texts]
    pairs = [(score['rouge1'].fmeasure, score['rouge2'].fmeasure) for score in scores]
    best = [one for one, _ in pairs].index(max(one for one, _ in pairs))
    first, second = first + pairs[best][0], second + pairs[best][1]
    best_second += max(two for _, two in pairs)
  assert values['rouge1'] == pytest.approx(100 * first / 60)
  assert values['rouge2'] == pytest.approx(100 * second / 60) and 0 < second < best_second
  assert values['rouge1'] > values['rouge2']


def test_one_reference_gives_all_of_rouge():
  pytest.importorskip('rouge_score')
  # The second has more of the words, the first more of the pairs of words.
  values = text_metrics.rouge([['red green', 'green blue red']], ['red green blue'])
  assert values['rouge1'] == 100 and values['rouge2'] == 50
  assert text_metrics.rouge([['red green']], ['red green blue'])['rouge2'] == pytest.approx(200 / 3)


def test_rouge_by_sentences():
  """Lsum takes each sentence alone, whether a line break or a space parts it from the next."""
  rouge_scorer = pytest.importorskip('rouge_score.rouge_scorer')
  scorer = rouge_scorer.RougeScorer(['rougeL', 'rougeLsum'], use_stemmer=True)
  target = ['The cats sat down.', 'It rained!', 'He said "no."', 'Why?']
  prediction = ['Why not?', 'It is raining.', 'A cat sat.']
  expected = scorer.score('\n'.join(target), '\n'.join(prediction))
  assert expected['rougeLsum'].fmeasure > expected['rougeL'].fmeasure
  for between in ('\n', ' '):
    for space in ('\n', ' '):
      value = text_metrics.rouge([[between.join(target)]], [space.join(prediction)])['rougeLsum']
      assert value == pytest.approx(100 * expected['rougeLsum'].fmeasure)
  worse_and_best = [['nothing alike', ' '.join(target)]]
  assert text_metrics.rouge(worse_and_best, [' '.join(target)]) == pytest.approx(
      dict.fromkeys(text_metrics.ROUGE_TYPES, 100))


def test_references():
  example = {'references': ('one', 'two'), 'id': '3'}
  assert text_metrics.references('one', example=example, is_target=True) == ['one', 'two']
  assert text_metrics.references('guess', example=example, is_target=False) == 'guess'
  for most, told in ((1, ['one']), (3, ['one', 'two'])):
    assert text_metrics.references('', example=example, is_target=True, most=most) == told
  assert text_metrics.references('guess', example=example, is_target=False, most=1) == 'guess'


@pytest.mark.parametrize('metric', [text_metrics.squad, text_metrics.bleu, text_metrics.rouge])
def test_wrong_input(metric):
  for targets, predictions, message in (
      ([['a']], [], 'as many predictions'), ([], [], 'at least one'),
      ([['a'], []], ['a', 'b'], 'Example 1 needs a list of at least one reference'),
      (['a'], ['a'], 'Example 0 needs a list')):
    with pytest.raises(ValueError, match=message):
      metric(targets, predictions)


@pytest.mark.parametrize(('metric', 'package', 'module'), [
    (text_metrics.bleu, 'sacrebleu', 'sacrebleu'),
    (text_metrics.rouge, 'rouge_score', 'rouge_score.rouge_scorer')])
def test_packages_that_are_missing(monkeypatch, metric, package, module):
  monkeypatch.setitem(sys.modules, package, None)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(ValueError, match=rf"{package}: run `pip install 'prompt_tuning_jax\[metrics"):
    metric([['a']], ['a'])


def test_no_seqio():
  code = ('import sys, prompt_tuning_jax.tasks.text_metrics as m; '
          "m.squad([['a']], ['a']); print(sorted({'tensorflow', 'seqio', 'jax', 'sacrebleu', "
          "'rouge_score'} & set(sys.modules)))")
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'

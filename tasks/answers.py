"""How a predicted answer is compared with a true one: SQuAD v1.1's text normalisation and F1.

Plain Python, without SeqIO or TensorFlow (Rajpurkar et al. 2016, section 6.1).
"""

import collections
import re
import string

_PUNCTUATION = str.maketrans('', '', string.punctuation)
_ARTICLES = re.compile(r'\b(a|an|the)\b')


def normalize_answer(text: str) -> str:
  """Lower-case, without (ASCII) punctuation and articles, words parted by one space."""
  # Punctuation goes first, so that "a." is an article and "U.S." one word.
  return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, answer: str) -> float:
  """F1, in [0, 1], of the words that two answers share, counted as often as they occur.

  As in SQuAD v1.1's script, 0 where either text has no words, even if both have none.
  """
  predicted, true = normalize_answer(prediction).split(), normalize_answer(answer).split()
  shared = sum((collections.Counter(predicted) & collections.Counter(true)).values())
  return 2 * shared / (len(predicted) + len(true)) if shared else 0.0

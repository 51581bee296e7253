"""Metrics of generated texts against lists of references; in percent, larger is better.

Functions (targets: a list of reference texts an example, predictions: texts) -> {name: percent}, in
files that know neither SeqIO nor TensorFlow. Only `bleu` needs sacrebleu, only `rouge` rouge-score.
"""

import importlib
import itertools
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from prompt_tuning_jax.tasks.answers import normalize_answer, token_f1

ROUGE_TYPES = ('rouge1', 'rouge2', 'rougeLsum')
# The end of a sentence, perhaps quoted or in brackets, and the space after it.
_SENTENCE_END = re.compile(r'([.!?]["\'”’)\]]*)\s+')


def references(text: str, example: Mapping[str, Any], is_target: bool = False,
               most: int | None = None) -> str | list[str]:
  """Postprocessor: an example's references as the target, a prediction as it is.

  Args:
    most: only the first so many references; None for all.
  """
  return list(example['references'])[:most] if is_target else text


def squad(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
  """SQuAD v1.1's exact match and F1 of words (Rajpurkar et al. 2016), of the best reference."""
  _check(targets, predictions)
  exact = f1 = 0.0
  for answers, prediction in zip(targets, predictions, strict=True):
    exact += any(normalize_answer(prediction) == normalize_answer(answer) for answer in answers)
    f1 += max(token_f1(prediction, answer) for answer in answers)
  return {'exact_match': 100.0 * exact / len(targets), 'f1': 100.0 * f1 / len(targets)}


def bleu(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
  """BLEU of the corpus (Papineni et al. 2002) by sacrebleu: in lower case, 13a tokens.

  The official scripts of E2E (mteval without -c) and WebNLG (multi-bleu -lc) ignore case too.
  """
  _check(targets, predictions)
  sacrebleu = _import('sacrebleu')
  # Streams of references; None, unlike an empty text, says that an example has no more of them.
  streams = [list(stream) for stream in itertools.zip_longest(*targets)]
  return {'bleu': float(sacrebleu.corpus_bleu(list(predictions), streams, lowercase=True).score)}


def rouge(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
  """ROUGE-1, -2 and -Lsum (Lin 2004): F1 of stems, averaged over the examples.

  Of several references the one with the best ROUGE-1 gives all three numbers, as in SciTLDR's
  script (Cachola et al. 2020).
  """
  _check(targets, predictions)
  scorer = _import('rouge_score.rouge_scorer').RougeScorer(ROUGE_TYPES, use_stemmer=True)
  totals = dict.fromkeys(ROUGE_TYPES, 0.0)
  for texts, prediction in zip(targets, predictions, strict=True):
    prediction = _one_sentence_a_line(prediction)
    scores = [scorer.score(_one_sentence_a_line(text), prediction) for text in texts]
    best = max(scores, key=lambda score: score['rouge1'].fmeasure)
    for name in ROUGE_TYPES:
      totals[name] += best[name].fmeasure
  return {name: 100.0 * total / len(targets) for name, total in totals.items()}


def _one_sentence_a_line(text: str) -> str:
  """Lsum compares line by line; T5's vocabulary has no line breaks, so no model can write them."""
  return _SENTENCE_END.sub(r'\1\n', text)


def _import(module: str) -> types.ModuleType:
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ValueError(f'This metric needs {module.split(".")[0]}: run '
                     "`pip install 'prompt_tuning_jax[metrics]'`.") from error


def _check(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> None:
  if len(targets) != len(predictions) or not len(targets):
    raise ValueError(f'Metrics need as many predictions as targets and at least one, got '
                     f'{len(predictions)} for {len(targets)}.')
  for i, texts in enumerate(targets):
    if isinstance(texts, str) or not len(texts):
      raise ValueError(f'Example {i} needs a list of at least one reference, got {texts!r}.')

"""From an answer's text to what metrics compare. Without SeqIO or TensorFlow, found by name."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

DETERMINERS = frozenset((
    'a an the this that these those my your his her our their whose which some each every few many '
    'much').split())


def label_to_class_id(text: str, label_classes: Sequence[str],
                      example: Mapping[str, Any] | None = None, is_target: bool = False) -> int:
  """The position of a label among the labels; -1 for any other text.

  Spaces around it do not matter, and nothing else is forgiven: a model that writes `positives` has
  not answered.
  """
  del example, is_target
  text = text.strip()
  return list(label_classes).index(text) if text in label_classes else -1


def grouped_class_id(text: str, label_classes: Sequence[str], example: Mapping[str, Any],
                     is_target: bool = False) -> dict[str, Any]:
  """{'label': class id, 'group': the example's group}, for metrics that look at whole groups.

  Target and prediction of an example have the same group, so they are equal where the labels are.
  """
  del is_target
  return {'label': label_to_class_id(text, label_classes), 'group': example['group']}


def similarity_score(text: str, example: Mapping[str, Any], is_target: bool = False) -> float:
  """STS-B: the number that a text is, -1 if it is none.

  A target is the example's own score, not the one rounded to what the text can say.
  """
  if is_target:
    return float(example['label'])
  try:
    score = float(text)
  except ValueError:
    return -1.0
  return score if math.isfinite(score) else -1.0


def right_answers(text: str, example: Mapping[str, Any], is_target: bool = False) -> Any:
  """All right answers ([] where they are hidden) against one predicted text."""
  return list(example['answers']) if is_target else text


def referent_agrees(text: str, example: Mapping[str, Any], is_target: bool = False) -> int:
  """WSC: 1 if a text means the candidate `referent`, 0 if not, -1 if it is empty.

  It does if, without determiners and in lower case, the words of one are all among those of the
  other, and both or neither have an apostrophe (T5's rule). A target is the row's label.
  """
  if is_target:
    return int(example['label'])
  predicted, candidate = (
      {word for word in phrase.lower().split() if word not in DETERMINERS}
      for phrase in (text, example['referent']))
  if not predicted:
    return -1
  if any("'" in word for word in predicted) != any("'" in word for word in candidate):
    return 0
  return int(bool(candidate) and (predicted <= candidate or candidate <= predicted))

"""From an answer's text to what metrics compare. Without SeqIO or TensorFlow, found by name."""

from collections.abc import Mapping, Sequence
from typing import Any


def label_to_class_id(text: str, label_classes: Sequence[str],
                      example: Mapping[str, Any] | None = None, is_target: bool = False) -> int:
  """The position of a label among the labels; -1 for any other text.

  Spaces around it do not matter, and nothing else is forgiven: a model that writes `positives` has
  not answered.
  """
  del example, is_target
  text = text.strip()
  return list(label_classes).index(text) if text in label_classes else -1

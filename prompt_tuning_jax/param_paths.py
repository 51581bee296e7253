"""'/'-joined paths of parameter trees: flatten, match, split, merge.

A tree is nested dicts with string keys; the path of a leaf is its keys joined with '/', such as
'encoder/layers_0/attention/query/kernel'. What is not a mapping is a leaf.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prompt_tuning_jax.types import PyTree


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A nested tree -> {path: leaf}, sorted by path. An empty branch leaves no trace."""
  flat = {}

  def visit(branch: Mapping[str, Any], prefix: str):
    for key, value in branch.items():
      if not isinstance(key, str) or not key or '/' in key:
        raise ValueError(f'Keys of a parameter tree are non-empty strings without "/"; '
                         f'got {key!r} under {prefix or "the root"!r}.')
      if isinstance(value, Mapping):
        visit(value, f'{prefix}{key}/')
      else:
        flat[prefix + key] = value

  visit(tree, '')
  return dict(sorted(flat.items()))


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{path: leaf} -> nested plain dicts. Raises where one path is a prefix of another."""
  tree: dict[str, Any] = {}
  branches = {(): tree}
  leaves = set()
  for path, leaf in flat.items():
    keys = tuple(path.split('/'))
    if not all(keys):
      raise ValueError(f'A parameter path has an empty part: {path!r}.')
    branch = tree
    for depth in range(1, len(keys)):
      if keys[:depth] in leaves:
        raise ValueError(f'{"/".join(keys[:depth])!r} is a leaf, but {path!r} lies under it.')
      if keys[:depth] not in branches:
        branches[keys[:depth]] = branch[keys[depth - 1]] = {}
      branch = branches[keys[:depth]]
    if keys in branches or keys in leaves:
      raise ValueError(f'{path!r} is a leaf, but other paths lie under it.')
    leaves.add(keys)
    branch[keys[-1]] = leaf
  return tree


def matching(patterns: Sequence[str], paths: Iterable[str]) -> list[str]:
  """The paths that any pattern matches with `re.fullmatch`, in their order.

  Raises ValueError naming a pattern that matches nothing (a silent miss would train nothing) and
  the paths closest to it.
  """
  if isinstance(patterns, str):
    patterns = [patterns]
  paths = list(paths)
  found = set()
  for pattern in patterns:
    try:
      matched = [path for path in paths if re.fullmatch(pattern, path)]
    except re.error as error:
      raise ValueError(f'{pattern!r} is not a regular expression: {error}.') from None
    if not matched:
      raise ValueError(f'No parameter matches {pattern!r} (patterns match whole paths). '
                       f'Closest: {_closest(pattern, paths)}.')
    found.update(matched)
  return [path for path in paths if path in found]


def _closest(pattern: str, paths: list[str], limit: int = 5) -> str:
  """Paths that contain a match of the pattern, else those spelled most like it."""
  literal = re.sub(r'\\(.)', r'\1', pattern).replace('.*', '').strip('/')
  near = [path for path in paths if re.search(pattern, path) or literal and literal in path]
  near = near or difflib.get_close_matches(literal, paths, n=limit, cutoff=0.0)
  return ', '.join(near[:limit]) or 'none, there are no parameters'


def split(tree: Mapping[str, Any], patterns: Sequence[str]) -> tuple[PyTree, PyTree]:
  """(the leaves that match, the rest), both nested; `merge` of the two is the tree again."""
  flat = flatten(tree)
  selected = set(matching(patterns, flat))
  return (unflatten({path: leaf for path, leaf in flat.items() if path in selected}),
          unflatten({path: leaf for path, leaf in flat.items() if path not in selected}))


def merge(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """One tree with the leaves of both; raises ValueError naming the leaves that both have."""
  a, b = flatten(a), flatten(b)
  overlap = sorted(a.keys() & b.keys())
  if overlap:
    raise ValueError(f'Both trees have {", ".join(overlap)}.')
  return unflatten(dict(sorted((a | b).items())))


def count(tree: Mapping[str, Any]) -> int:
  """How many parameters (numbers, not leaves) the tree holds."""
  return sum(math.prod(leaf.shape) for leaf in flatten(tree).values())

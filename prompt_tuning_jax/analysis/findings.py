"""All that is said of one trained prompt, as JSON: what `html_report` shows."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax.analysis import (
    leaf_norms,
    nearest_words,
    principal_components,
    similarity,
    trained_prompts,
)
from prompt_tuning_jax.analysis.attention_mass import Mass
from prompt_tuning_jax.analysis.trained_prompts import TrainedPrompt
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.types import Array

SAMPLE = 500  # words in the picture
SEED = 0
FREQUENT = 20
START = 4  # letters that words of one stem begin with
_START = re.compile(rf'[^\W\d_]{{{START}}}')


def of_file(path: str | os.PathLike, others: Iterable[str | os.PathLike] = (), *,
            table: Array | None = None, vocabulary: Any = None, count: int = 5,
            base: Mapping[str, Array] | None = None) -> dict[str, Any]:
  """All findings of a prompt file but its attention, as far as they apply; 'notes' say what not.

  Args:
    others: files and folders of prompts to compare it with.
    table: the base's embeddings [V, D] of the words of `vocabulary`.
    count: of nearest words.
    base: its leaves by path, to tell how much LoRA changes them.

  Raises ValueError where a file is no prompt, or of another base than the first.
  """
  file = prompt_file.load(path)
  found, notes = {'about': about(path, file)}, []
  prompt = rows_of(file)
  if prompt is None:
    notes.append('Nearest words, sizes of tokens, principal components and other prompts: they are '
                 f'of soft prompts, and this file holds {next(iter(file.params))}.')
  else:
    compared = {'': prompt}
    if table is None:
      notes.append('Words: they need the base that the prompt was trained on (--base).')
    else:
      found['words'] = words(prompt, table, vocabulary, file.metadata.get('labels') or (), count)
    if others := list(others):
      if prompt_file.EMBEDDING in file.params:
        prompts, _, left_out = trained_prompts.read(map(os.fspath, [path, *others]))
        notes += [f'Left out: {reason}' for reason in left_out]
        found['likeness'] = likeness(prompts)
        compared = {each.name: each.embedding for each in prompts}
      else:
        notes.append('Other prompts: only soft prompts are compared, this one has rows of every '
                     'layer.')
    found['norms'] = norms(prompt, table)
    found['components'] = components(compared, table)
  return {**found, 'leaves': leaves(file, base or {}), 'curves': curves(path), 'notes': notes}


def about(path: str | os.PathLike, file: PromptFile) -> dict[str, Any]:
  """What a file is: its metadata, its name and its size."""
  metadata = file.metadata
  return {'file': prompt_file.name_of(path), 'sha256': file.sha256,
          'method': metadata.get('method', 'prompt_tuning'),
          **{key: metadata.get(key) for key in (
              'task', 'length', 'placement', 'labels', 'text', 'metric', 'tasks', 'sources',
              'base', 'version')},
          'parameters': int(sum(leaf.size for leaf in file.params.values())),
          'leaves': len(file.params)}


def rows_of(file: PromptFile) -> np.ndarray | None:
  """The rows [P, D] that stand for words: a soft prompt, or the first layer of a deep one."""
  if prompt_file.EMBEDDING in file.params:
    return file.params[prompt_file.EMBEDDING]
  deep = file.params.get(prompt_file.DEEP_EMBEDDING)
  return None if deep is None else deep[0]


def words(prompt: Array, table: Array, vocabulary: Any, labels: Sequence[str] = (),
          count: int = 5) -> dict[str, Any]:
  """The words that each row of a prompt lies nearest to, and what they have in common.

  prompt: [P, D]; table: [V, D], the rows of a vocabulary. Two words are alike if they begin with
  the same four letters, whatever the case. 'at_random' has the same numbers for as many random
  vectors, the yardstick for what a prompt has learnt.
  """
  count = min(count, len(table))
  by_chance = np.random.default_rng(SEED).normal(size=prompt.shape)
  both = nearest_words.nearest_rows(np.concatenate([prompt, by_chance]), table, count)
  (ids, other_ids), (cosines, other_cosines) = (np.split(found, 2) for found in both)
  pieces = [[vocabulary.piece(int(i)) for i in row] for row in ids]
  others = [[vocabulary.piece(int(i)) for i in row] for row in other_ids]
  return {
      'count': count, 'words': len(table),
      'tokens': [{'words': row, 'cosines': its.tolist(), 'norm': float(np.linalg.norm(vector))}
                 for row, its, vector in zip(pieces, cosines, prompt, strict=True)],
      'distinct': len(set(ids[:, 0].tolist())), 'mean_cosine': float(cosines[:, 0].mean()),
      'alike': alike(pieces), 'labels': _labels(labels, ids, vocabulary, len(table)),
      'frequent': [list(pair) for pair in nearest_words.most_frequent(
          ids, vocabulary.piece)[:FREQUENT]],
      'at_random': {'distinct': len(set(other_ids[:, 0].tolist())), 'alike': alike(others),
                    'mean_cosine': float(other_cosines[:, 0].mean())}}


def alike(pieces: Sequence[Sequence[str]]) -> int:
  """In how many rows of words two begin with the same four letters, whatever the case."""
  found = 0
  for row in pieces:
    starts = [match[0] for piece in row if (match := _START.match(piece.lstrip('▁Ġ').casefold()))]
    found += len(set(starts)) < len(starts)
  return found


def _labels(labels: Sequence[str], ids: np.ndarray, vocabulary: Any,
            size: int) -> dict[str, Any] | None:
  """Which labels have all of their pieces among nearest words; None where there are no labels."""
  if not labels:
    return None
  of_label = {label: set(vocabulary.encode(label)) for label in labels}
  all_ids, near = set().union(*of_label.values()), set(ids.ravel().tolist())
  hits = np.isin(ids, sorted(all_ids))
  return {'found': [label for label, its in of_label.items() if its <= near],
          'of': len(of_label), 'pieces': len(all_ids), 'share': float(hits.mean()),
          'tokens': int(hits.any(axis=1).sum()), 'share_by_chance': len(all_ids) / size}


def norms(prompt: Array, table: Array | None) -> dict[str, Any]:
  """Lengths of a prompt's rows [P, D] and, of a table's [V, D], how they are spread."""
  found = {'prompt': np.linalg.norm(np.asarray(prompt, np.float64), axis=-1).tolist()}
  if table is not None:
    # In float32: a table in float64 is large.
    lengths = np.linalg.norm(np.asarray(table).astype(np.float32), axis=-1)
    counts, edges = np.histogram(lengths, bins=40)
    low, median, high = np.percentile(lengths, (5, 50, 95)).tolist()
    found['words'] = {'low': low, 'median': median, 'high': high, 'counts': counts.tolist(),
                      'edges': edges.tolist()}
  return found


def components(prompts: Mapping[str, Array], table: Array | None) -> dict[str, Any] | None:
  """Prompts {name: [P, D]} and a sample of words on their first two principal components.

  None for fewer than three rows in all: there is no plane to show.
  """
  parts = {name: np.asarray(prompt) for name, prompt in prompts.items()}
  sample = np.zeros((0, next(iter(parts.values())).shape[1]), np.float32)
  if table is not None:
    chosen = np.random.default_rng(SEED).choice(len(table), min(SAMPLE, len(table)), replace=False)
    sample = np.asarray(table[np.sort(chosen)]).astype(np.float32)
  rows = np.concatenate([*parts.values(), sample])
  if min(rows.shape) < 2 or len(rows) < 3:
    return None
  places, shares = principal_components.project(rows)
  cuts = np.cumsum([len(part) for part in parts.values()])
  *of_prompts, of_words = np.split(places, cuts)
  return {'shares': shares.tolist(), 'words': of_words.tolist(),
          'prompts': [{'name': name, 'places': its.tolist()}
                      for name, its in zip(parts, of_prompts, strict=True)]}


def likeness(prompts: Sequence[TrainedPrompt]) -> dict[str, Any]:
  """How alike prompts of one base are (SPoT, Vu et al. 2022); the first is the one looked into.

  Besides all pairs, the mean cosine (of means) of those of one task, from other seeds or starts,
  and of different tasks; None where there is no such pair.
  """
  arrays = [prompt.embedding for prompt in prompts]
  cosines = similarity.cosine_of_means(arrays)
  pairs = [(prompts[i].task == prompts[j].task, cosines[i][j])
           for i in range(len(prompts)) for j in range(i) if prompts[i].task and prompts[j].task]
  mean = lambda same: float(np.mean(kept)) if (
      kept := [cosine for alike, cosine in pairs if alike == same]) else None
  return {'names': [prompt.name for prompt in prompts], 'cosine_of_means': cosines.tolist(),
          'mean_of_cosines': similarity.mean_of_cosines(arrays).tolist(),
          'of_one_task': mean(True), 'of_different_tasks': mean(False)}


def attention(masses: Mapping[str, Mass], examples: int) -> dict[str, Any]:
  """Attention that the prompt receives: by layer and position, and by layer and head."""
  readings = []
  for name, mass in masses.items():
    means, even = mass.means()
    readings.append({'by': name, 'even': even, 'positions': means.mean(axis=1).tolist(),
                     'heads': means.sum(axis=2).tolist()})
  return {'examples': examples, 'readings': readings}


def leaves(file: PromptFile, base: Mapping[str, Array]) -> dict[str, Any]:
  """Sizes of what is no row of words; {} where there is nothing else."""
  found = {}
  if prefix := leaf_norms.of_prefix(file.under('prefix')):
    found['prefix'] = prefix
  if others := leaf_norms.of_leaves(file.params, base):
    found['others'] = others
  deep = file.params.get(prompt_file.DEEP_EMBEDDING)
  if deep is not None:
    found['deep'] = np.linalg.norm(deep.astype(np.float64), axis=-1).mean(axis=1).tolist()
  return found


def curves(path: str | os.PathLike) -> dict[str, dict[str, list]]:
  """{metric: {split: [[step, value], …]}} of the run that a prompt file lies in; {} if in none.

  That is MODEL_DIR/metrics.jsonl for MODEL_DIR/prompts/…. Lines that are no reports are left out.
  """
  for folder in list(pathlib.Path(path).resolve().parents)[:3]:
    if folder.name == 'prompts' and (folder.parent / 'metrics.jsonl').is_file():
      break
  else:
    return {}
  series: dict[str, dict[str, list]] = {}
  text = (folder.parent / 'metrics.jsonl').read_text(encoding='utf-8', errors='replace')
  for line in text.splitlines():
    try:
      row = json.loads(line)
      step, split = row['step'], row['split']
    except (ValueError, TypeError, KeyError):
      continue
    for name in row.keys() - {'step', 'split', 'task', 'tokens', 'examples_per_second'}:
      if isinstance(row[name], int | float) and np.isfinite(row[name]):
        series.setdefault(name, {}).setdefault(str(split), []).append([step, row[name]])
  return {name: dict(sorted(series[name].items())) for name in sorted(series)}

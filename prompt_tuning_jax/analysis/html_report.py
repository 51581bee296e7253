"""The report of one trained prompt: a page that needs nothing but itself.

`page` is a function of the findings alone. All that comes from files (tasks, pieces of a
vocabulary, names) is escaped, and the page allows no script.
"""

import html
import os
import pathlib
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.analysis import figures, findings
from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
from prompt_tuning_jax.networks import int8
from prompt_tuning_jax.types import PyTree

TEMPLATE = pathlib.Path(__file__).with_name('report.html')
WHO = {'input': 'The text that is read', 'target': 'The text that is written',
       'target_to_target': 'The text that is written, among itself'}


def page(found: Mapping[str, Any]) -> str:
  """Findings as HTML. `found` has 'about' and, as far as there are any, what `SECTIONS` name."""
  about = found['about']
  made = [f'<section>\n<h2>{title}</h2>\n{show(found[name])}\n</section>'
          for name, (title, show) in SECTIONS.items() if found.get(name)]
  title = f'Trained prompt: {about["task"] or about["file"]}'
  text = TEMPLATE.read_text(encoding='utf-8')
  return string.Template(text).substitute(title=_escaped(title), sections='\n'.join(made))


def write(path: str | os.PathLike, found: Mapping[str, Any]) -> None:
  """Writes `page` in one step."""
  with atomic_file(path) as temporary:
    pathlib.Path(temporary).write_text(page(found), encoding='utf-8')


def write_for_run(vocabulary: Any, embedding: str, frozen: PyTree, folder: pathlib.Path,
                  kept: pathlib.Path) -> list[pathlib.Path]:
  """The reports of what a run has kept: a prompt file, or a folder with one for each task.

  They are MODEL_DIR/report.html, or report_TASK.html for each. Of a whole model there is none.
  The base's words are in them where its table, the path `embedding`, is among the frozen leaves and
  whole in this process. What looks at the network itself is left to the verb `inspect`.
  """
  files = sorted(kept.glob('*.safetensors')) if kept.is_dir() else [kept]
  if (kept / 'config.json').is_file():
    return []
  table, words = param_paths.flatten(frozen).get(embedding), None
  if isinstance(table, int8.Quantized):
    table = table.dequantized()
  if table is not None and (table.is_fully_addressable or table.is_fully_replicated):
    words = np.asarray(table)[:vocabulary.size]
  written = []
  for path in files:
    others = [other for other in files if other != path]
    found = findings.of_file(path, others, table=words, vocabulary=vocabulary)
    written.append(folder / (f'report_{path.stem}.html' if kept.is_dir() else 'report.html'))
    write(written[-1], found)
  return written


def _about(about: Mapping[str, Any]) -> str:
  base, metric = about['base'] or {}, about['metric'] or {}
  rows = [('file', about['file']), ('method', about['method']), ('task', about['task']),
          ('length', about['length']), ('placement', about['placement']),
          ('labels', ', '.join(about['labels'] or ())), ('text', about['text']),
          ('base', base.get('name')), ('width of the base', base.get('d_model')),
          ("base's fingerprint", str(base.get('fingerprint') or '')[:16]),
          ('metric', metric.get('name')), ('value', _number(metric.get('value'))),
          ('step', metric.get('step')), ('parameters', f'{about["parameters"]:,}'),
          ('SHA-256', about['sha256'][:16]), ('made by version', about['version'])]
  rows += [(f'metric on {task}', f'{_number(own.get("value"))} {own.get("name")}')
           for task, own in (about['tasks'] or {}).items() if isinstance(own, Mapping)]
  rows += [('made of', f'{own.get("name")} × {_number(own.get("weight"))}')
           for own in about['sources'] or () if isinstance(own, Mapping)]
  return _table('', (), [(name, str(value)) for name, value in rows if value not in (None, '')])


def _notes(notes: Sequence[str]) -> str:
  return '<ul>' + ''.join(f'<li>{_escaped(note)}</li>' for note in notes) + '</ul>'


def _words(words: Mapping[str, Any]) -> str:
  tokens, chance, count = words['tokens'], words['at_random'], words['count']
  number = len(tokens)
  facts = [
      f'The nearest words of {number} tokens are {words["distinct"]} different ones '
      f'({chance["distinct"]} for as many random vectors).',
      f'The nearest word has cosine {words["mean_cosine"]:.3f} on average '
      f'({chance["mean_cosine"]:.3f} for random vectors).',
      f'{words["alike"]} of {number} tokens have, among their {count} nearest words, two that '
      f'begin with the same four letters ({chance["alike"]} for random vectors): Lester et al. '
      'find that neighbours form such clusters.']
  if labels := words['labels']:
    facts.append(
        f'{len(labels["found"])} of {labels["of"]} labels are among the neighbours'
        f'{": " if labels["found"] else ""}{", ".join(labels["found"])}. Their pieces are '
        f'{labels["share"]:.2%} of all neighbours ({labels["share_by_chance"]:.2%} by chance), of '
        f'{labels["tokens"]} tokens.')
  if often := [f'{word} {times}' for word, times in words['frequent'] if times > 1]:
    facts.append(f'Most frequent among all neighbours: {", ".join(often)}.')
  rows = [(i + 1, f'{token["norm"]:.3g}', *(f'{word} ({cosine:.3f})' for word, cosine in zip(
      token['words'], token['cosines'], strict=True))) for i, token in enumerate(tokens)]
  return '\n'.join([
      '<p class="quiet">The words whose embeddings point most nearly as a token does (Lester et '
      f'al. 2021, section 7.1), of {words["words"]:,}; cosines in brackets.</p>', _notes(facts),
      _table('Nearest words of each token',
             ('token', 'norm', *map(_ordinal, range(1, count + 1))), rows)])


def _norms(norms: Mapping[str, Any]) -> str:
  lengths = norms['prompt']
  text = f'The lengths of the tokens are from {min(lengths):.3g} to {max(lengths):.3g}'
  if words := norms.get('words'):
    text += (f'; 90 % of words are from {words["low"]:.3g} to {words["high"]:.3g} long, their '
             f'median is {words["median"]:.3g}')
  return _figure(figures.norms(norms), f'{text}.',
                 'Dots are tokens; the band and the grey bars are words.')


def _components(found: Mapping[str, Any]) -> str:
  others = found['prompts'][1:]
  names = ''.join(f'<li value="{i + 2}">{_escaped(other["name"])}</li>'
                  for i, other in enumerate(others))
  alt = (f'{len(found["prompts"][0]["places"])} tokens, {len(found["words"])} words and '
         f'{len(others)} other prompts on the plane in which they differ most: '
         f'{sum(found["shares"]):.0%} of the variance.')
  return _figure(figures.components(found), alt, 'Grey dots are a sample of the words.') + (
      f'\n<ol>{names}</ol>' if names else '')


def _likeness(found: Mapping[str, Any]) -> str:
  names = found['names']
  titles = {'cosine_of_means': 'Cosine of the means of their tokens',
            'mean_of_cosines': 'Mean of the cosines of all pairs of tokens'}
  head = ('prompt', *(str(i + 1) for i in range(len(names))))
  tables = [_table(title, head, [(f'{i + 1} {name}', *map(_Heat, row)) for i, (name, row) in
                                 enumerate(zip(names, found[key], strict=True))])
            for key, title in titles.items()]
  means = {'of one task (other seeds, other starts)': found['of_one_task'],
           'of different tasks': found['of_different_tasks']}
  facts = [f'Prompts {which}: {mean:.3f} on average (cosine of means).'
           for which, mean in means.items() if mean is not None]
  return '\n'.join([
      '<p class="quiet">The more alike two prompts are, the better one tends to be a start for the '
      "other's task (SPoT, Vu et al. 2022). The first is this one.</p>", _notes(facts), *tables])


def _attention(found: Mapping[str, Any]) -> str:
  parts = [f'<p class="quiet">Shares of attention that the prompt receives from the positions of '
           f'text, on average over {found["examples"]} examples.</p>']
  for reading in found['readings']:
    layers = [sum(row) for row in reading['positions']]
    text = (f'The prompt receives from {min(layers):.1%} to {max(layers):.1%} of it in a layer; if '
            f'attention were even it would be {reading["even"]:.1%}.')
    parts += [f'<h3>{WHO[reading["by"]]}</h3>', _figure(
        figures.attention(reading), text, 'Left: mean over heads. Right: by heads.'),
        _table('Of the whole prompt, by layer', ('layer', 'mean', 'least head', 'most head'),
               [(i + 1, f'{layer:.2%}', f'{min(heads):.2%}', f'{max(heads):.2%}')
                for i, (layer, heads) in enumerate(zip(layers, reading['heads'], strict=True))])]
  return '\n'.join(parts)


def _leaves(found: Mapping[str, Any]) -> str:
  parts = []
  if rows := found.get('prefix'):
    parts.append(_table('Mean length of the keys and values of a prefix',
                        ('attention', 'layer', 'keys', 'values'), [
                            (row['place'], row['layer'] + 1, _number(row['keys']),
                             _number(row['values'])) for row in rows]))
  if rows := found.get('deep'):
    parts.append(_table('Mean length of the rows of each layer', ('layer', 'length'), [
        (i + 1, _number(length)) for i, length in enumerate(rows)]))
  if rows := found.get('others'):
    parts.append(_table('Trained leaves, and changes of weights', (
        'leaf', 'shape', 'Frobenius norm', "share of the kernel's", 'distance from 1'), [
            (row['path'], ' × '.join(map(str, row['shape'])), _number(row['norm']),
             f'{row["relative"]:.2%}' if 'relative' in row else '', _number(row.get('away')))
            for row in rows]))
  return '\n'.join(parts)


def _curves(series: Mapping[str, Any]) -> str:
  last = ', '.join(f'{name} {_number(points[-1][1])} ({split})'
                   for name, splits in series.items() for split, points in splits.items())
  return _figure(figures.curves(series), f'At the end: {last}.', '')


SECTIONS: dict[str, tuple[str, Callable]] = {
    'about': ('What it is', _about), 'notes': ('What this report does not have', _notes),
    'words': ('Nearest words', _words), 'norms': ('Sizes of tokens and words', _norms),
    'components': ('Principal components', _components),
    'likeness': ('Other prompts', _likeness), 'attention': ('Attention', _attention),
    'leaves': ('Sizes of what has been trained', _leaves), 'curves': ('Training', _curves)}


class _Heat(float):
  """A cell whose ground says its size."""


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """Cells are escaped; the first of a row is its header, numbers stand on the right."""
  def cell(value) -> str:
    if isinstance(value, _Heat):
      share = min(abs(float(value)), 1)
      return f'<td class="heat" style="--share: {share:.3f}">{float(value):.3f}</td>'
    kind = ' class="number"' if isinstance(value, int | float) else ''
    return f'<td{kind}><bdi>{_escaped(value)}</bdi></td>'

  label = _escaped(caption or 'Properties')
  lines = [f'<div class="wide" tabindex="0" role="region" aria-label="{label}"><table>']
  if caption:
    lines.append(f'<caption>{_escaped(caption)}</caption>')
  if head:
    lines.append('<thead><tr>' + ''.join(
        f'<th scope="col">{_escaped(name)}</th>' for name in head) + '</tr></thead>')
  lines.append('<tbody>')
  lines += [f'<tr><th scope="row"><bdi>{_escaped(first)}</bdi></th>{"".join(map(cell, rest))}</tr>'
            for first, *rest in rows]
  return '\n'.join([*lines, '</tbody></table></div>'])


def _figure(svg: str, alt: str, caption: str) -> str:
  """A picture, what it says in words, and how it is read."""
  return (f'<figure><div class="wide" tabindex="0" role="img" aria-label="{_escaped(alt)}">\n{svg}'
          f'\n</div><figcaption>{_escaped(f"{alt} {caption}".strip())}</figcaption></figure>')


def _escaped(value: Any) -> str:
  return html.escape(''.join(c if c.isprintable() else '\ufffd' for c in str(value)))


def _number(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, int | float) else ''


def _ordinal(number: int) -> str:
  return 'nearest' if number == 1 else f'{number}.'

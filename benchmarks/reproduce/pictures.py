"""Pictures of findings: one each, and all of them on one page."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402  (after the backend)

MARKS = 'osD^vP*'
COLUMNS = 3
OWN = 'own evaluation'


def series(scores: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, list]]:
  """(places on the axis, {series: a score or None at each place}).

  'SERIES@PLACE/MEASURE' is a score of a series 'SERIES, MEASURE'; without @ the whole name is a
  place.
  """
  found: dict[str, dict[str, Any]] = {}
  for name, score in scores.items():
    arm, _, measure = name.partition('/')
    line, _, place = arm.rpartition('@')
    found.setdefault(', '.join(filter(None, (line, measure))), {})[place] = score
  places = list(dict.fromkeys(place for line in found.values() for place in line))
  return places, {line: [its.get(place) for place in places] for line, its in found.items()}


def draw(axis: Any, result: Mapping[str, Any]) -> None:
  """A finding's scores: means over seeds with standard deviations, and every seed as a dot."""
  places, lines = series(result['scores'])
  joined = '-' * bool(result['ordered'])
  for i, ((name, scores), mark) in enumerate(zip(lines.items(), MARKS, strict=False)):
    shift = .08 * (i - (len(lines) - 1) / 2)
    there = [(x, score) for x, score in enumerate(scores) if score and score['mean'] is not None]
    bars = axis.errorbar(
        [x + shift for x, _ in there], [score['mean'] for _, score in there],
        [score['deviation'] or 0 for _, score in there], fmt=mark + joined, capsize=3, markersize=5,
        label=name or OWN)
    for x, score in there:
      values = [value for value in score['values'] if value is not None]
      axis.plot([x + shift] * len(values), values, '.', color=bars[0].get_color(), alpha=.4)
  axis.set(xticks=range(len(places)), xlabel=result['axis'], ylabel=result['unit'],
           yscale='log' if result.get('log') else 'linear')
  axis.set_xticklabels(places, fontsize='small', rotation=20 * (max(map(len, places)) > 10))
  axis.set_title(f'{result["finding"].replace("_", " ")}: {result["verdict"]}', fontsize='medium')
  axis.margins(x=.12)
  if result.get('log'):
    axis.set_ylim(bottom=axis.get_ylim()[0] / 1000)  # room for the legend
  axis.spines[['top', 'right']].set_visible(False)
  if result.get('always'):
    axis.axhline(result['always'], color='grey', linestyle=':', linewidth=1,
                 label='always the most frequent answer')
  if len(lines) > 1 or result.get('always'):
    axis.legend(fontsize='x-small', framealpha=.7, edgecolor='none')


def save(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
  """Findings side by side, as a PNG."""
  columns = min(COLUMNS, len(results))
  rows = -(-len(results) // columns)
  figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.6 * rows), squeeze=False,
                                 layout='constrained')
  for axis in axes.flat[len(results):]:
    axis.remove()
  for axis, result in zip(axes.flat, results, strict=False):
    draw(axis, result)
  figure.savefig(path, dpi=90, metadata={'Software': None})
  pyplot.close(figure)

"""Pictures as inline SVG: text stays text, colours are the page's, equal data give equal bytes."""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# What matplotlib is told, and what the page's style sheet calls it.
INK, STRONG, QUIET, LINE = '#010101', '#020202', '#030303', '#040404'
OTHERS = ('#c2571a', '#2e8b57', '#8a4fbf', '#b8860b', '#c0397b', '#1a8a9c')
MARKERS = 'svD^Pv'
_COLOURS = {INK: 'currentColor', STRONG: 'var(--strong)', QUIET: 'var(--quiet)',
            LINE: 'var(--line)'}
_SETTINGS = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'prompt', 'svg.image_inline': True,
    'text.parse_math': False, 'text.usetex': False, 'font.family': 'sans-serif', 'font.size': 10,
    'text.color': INK, 'axes.edgecolor': QUIET, 'axes.labelcolor': INK, 'axes.titlesize': 11,
    'xtick.color': QUIET, 'ytick.color': QUIET, 'xtick.labelcolor': INK, 'ytick.labelcolor': INK,
    'axes.facecolor': 'none', 'figure.facecolor': 'none', 'savefig.facecolor': 'none',
    'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
    'axes.grid': False, 'image.interpolation': 'none', 'image.cmap': 'viridis'}


def norms(found: Mapping[str, Any]) -> str:
  """`findings.norms`: lengths of the tokens by their positions, beside the words' distribution."""
  def draw(figure):
    lengths, words = np.asarray(found['prompt']), found.get('words')
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(4, 1))
    left.plot(np.arange(1, len(lengths) + 1), lengths, 'o', color=STRONG, markersize=4)
    left.set(xlabel='prompt token', ylabel='norm')
    left.xaxis.get_major_locator().set_params(integer=True)
    if words:
      left.axhspan(words['low'], words['high'], color=QUIET, alpha=.2, linewidth=0)
      left.axhline(words['median'], color=QUIET, linewidth=1)
      edges, counts = np.asarray(words['edges']), np.asarray(words['counts'])
      right.barh(edges[:-1], counts / max(counts.max(), 1), np.diff(edges), align='edge',
                 color=QUIET, alpha=.6)
    counts, edges = np.histogram(lengths, bins=20)
    right.barh(edges[:-1], counts / counts.max(), np.diff(edges), align='edge', color=STRONG,
               alpha=.6)
    left.set_ylim(bottom=0)  # after all is drawn: it fixes the top as well
    right.set(xticks=[], xlabel='how many')
  return _svg(draw, (8, 3.2))


def components(found: Mapping[str, Any]) -> str:
  """`findings.components`: words as small dots, each prompt with a mark and colour of its own."""
  def draw(figure):
    axis = figure.subplots()
    if found['words']:
      axis.plot(*np.transpose(found['words']), '.', color=QUIET, alpha=.35, markersize=3)
    for number, prompt in reversed(list(enumerate(found['prompts']))):
      marker, colour = mark(number)
      axis.plot(*np.transpose(prompt['places']), marker, color=colour, markersize=4.5,
                label='this prompt' if not number else str(number + 1))
    axis.set(**{f'{name}label': f'component {i + 1} ({share:.0%} of the variance)'
                for i, (name, share) in enumerate(zip('xy', found['shares'], strict=True))})
    if len(found['prompts']) > 1:
      handles, labels = axis.get_legend_handles_labels()
      axis.legend(handles[::-1], labels[::-1], loc='center left', bbox_to_anchor=(1, .5))
  return _svg(draw, (8, 5))


def mark(number: int) -> tuple[str, str]:
  """The marker and the colour of a prompt; the one looked into is number 0."""
  if not number:
    return 'o', STRONG
  return MARKERS[(number - 1) // len(OTHERS) % len(MARKERS)], OTHERS[(number - 1) % len(OTHERS)]


def attention(reading: Mapping[str, Any]) -> str:
  """A reading of `findings.attention`: layers by positions, and layers by heads."""
  def draw(figure):
    positions, heads = np.asarray(reading['positions']), np.asarray(reading['heads'])
    axes = figure.subplots(1, 2, width_ratios=(3, 1))
    for axis, values, label in zip(axes, (positions, heads), ('position of the prompt', 'head'),
                                   strict=True):
      layers, columns = values.shape
      image = axis.imshow(values, aspect='auto', vmin=0,
                          extent=(.5, columns + .5, layers + .5, .5))
      axis.set(xlabel=label, yticks=_whole(layers), xticks=_whole(columns))
      figure.colorbar(image, ax=axis)
    axes[0].set(ylabel='layer', title='share of attention')
    axes[1].set(title='the whole prompt')
  return _svg(draw, (9, 1.6 + .16 * len(reading['heads'])))


def curves(series: Mapping[str, Mapping[str, Sequence]]) -> str:
  """`findings.curves`: a small picture of each metric."""
  def draw(figure):
    rows = -(-len(series) // 3)
    axes = figure.subplots(rows, min(3, len(series)), squeeze=False)
    for axis in axes.flat[len(series):]:
      axis.remove()
    for axis, (name, splits) in zip(axes.flat, series.items(), strict=False):
      for (split, points), colour in zip(splits.items(), (STRONG, *OTHERS), strict=False):
        axis.plot(*np.transpose(points), '.-', color=colour, label=split)
      axis.set(title=name, xlabel='step')
      axis.legend()
  return _svg(draw, (9, 2.6 * -(-len(series) // 3)))


def _with_own_ids(text: str) -> str:
  """Without ids that nothing refers to; the others are of this picture alone in its page."""
  own = hashlib.sha256(text.encode()).hexdigest()[:8]
  ids = re.findall(r' id="([\w.-]+)"', text)
  used = set(re.findall(r'#([\w.-]+)', text)) & set(ids)
  text = re.sub(r' id="([\w.-]+)"',
                lambda match: f' id="{own}{match[1]}"' if match[1] in used else '', text)
  return re.sub(r'#([\w.-]+)',
                lambda match: f'#{own}{match[1]}' if match[1] in used else match[0], text)


def _whole(count: int) -> list[int]:
  """Ticks at some of the numbers from 1 to `count`."""
  step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, count)
              if count / step <= 12)
  return [1] * (step > 2) + list(range(step, count + 1, step))


def _svg(draw, size: tuple[float, float]) -> str:
  """A picture of `size` in inches, without what a page need not repeat."""
  import matplotlib  # slow to import
  from matplotlib.backends.backend_svg import FigureCanvasSVG
  from matplotlib.figure import Figure
  with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS}):
    figure = Figure(figsize=size, layout='constrained')
    draw(figure)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(
        buffer, metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
  text = buffer.getvalue()
  text = re.sub(r'<metadata>.*?</metadata>\s*', '', text[text.index('<svg'):], flags=re.DOTALL)
  for told, called in _COLOURS.items():
    text = text.replace(told, called)
  text = re.sub(r'font-family: [^;"]*; ', '', text)  # the page's
  text = _with_own_ids(text)
  text = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*pt"([^>]*?) (?:height|width)="[^"]*pt"',
                r'\1\2', text, count=1)
  return text.replace('<svg ', '<svg aria-hidden="true" ', 1).strip()

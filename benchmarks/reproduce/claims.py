"""From scores to a verdict, by one rule for every finding.

A claim is that a sum of scores is larger than another by more than `by` points. It is measured once
for each seed, all of whose runs see the same examples in the same order. With m the mean of what is
over `by` and e its standard error over seeds (± is 2 e), the claim holds if m > max(2 e, MARGIN),
is contrary if m < -max(2 e, MARGIN), and is open otherwise, and where there are fewer than two
seeds.

A finding is reproduced if all of its claims hold, not at this scale if one of them is contrary, and
undecided otherwise, and where what it needs (that something was learnt at all) does not hold.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MARGIN = 1.0  # points; about the standard error of an accuracy of 95 % on 400 examples
HOLDS, CONTRARY, OPEN = 'holds', 'contrary', 'open'
REPRODUCED, NOT, UNDECIDED = 'reproduced', 'not at this scale', 'undecided'
RULE = ' '.join(__doc__.split('\n', 2)[2].split()).replace('MARGIN', f'{MARGIN:g}')

Scores = Mapping[str, Sequence[float | None]]


def judged(claim: Mapping[str, Any], scores: Scores) -> dict[str, Any]:
  """{'says', 'mean', 'error', 'seeds', 'by', 'outcome'} of a claim; None where a run diverged.

  Args:
    claim: 'says' in words; 'more' and 'less', names of scores; 'than', a number beside the latter;
      'by', points (0).
    scores: {name: one of each seed}.

  Raises ValueError for a name that is no score.
  """
  more, less = claim['more'], claim.get('less', ())
  if unknown := set(more).union(less) - set(scores):
    raise ValueError(f'{claim["says"]}: there are the scores {", ".join(scores)}, not '
                     f'{", ".join(sorted(unknown))}.')
  differences = []
  for values in zip(*(scores[name] for name in (*more, *less)), strict=True):
    if None not in values:
      differences.append(sum(values[:len(more)]) - sum(values[len(more):]) - claim.get('than', 0))
  by, count = claim.get('by', 0), len(differences)
  mean = statistics.fmean(differences) if count else None
  error = statistics.stdev(differences) / math.sqrt(count) if count > 1 else None
  outcome = OPEN
  if error is not None and abs(mean - by) > max(2 * error, MARGIN):
    outcome = HOLDS if mean > by else CONTRARY
  return {'says': claim['says'], 'mean': mean, 'error': error, 'seeds': count, 'by': by,
          'outcome': outcome}


def verdict(needs: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]]) -> str:
  """What judged claims make together, given those that must hold for them to mean something."""
  outcomes = {claim['outcome'] for claim in claims}
  if any(need['outcome'] != HOLDS for need in needs):
    return UNDECIDED
  if outcomes == {HOLDS}:
    return REPRODUCED
  return NOT if CONTRARY in outcomes else UNDECIDED


def reading(needs: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]]) -> str:
  """The verdict and its reasons in one line."""
  parts = [_told(need) for need in needs if need['outcome'] != HOLDS] or map(_told, claims)
  return f'{verdict(needs, claims)}: {"; ".join(parts)}'


def _told(claim: Mapping[str, Any]) -> str:
  if claim['mean'] is None:
    return f'{claim["says"]} (no run was finite: open)'
  spread = '' if claim['error'] is None else f' ± {2 * claim["error"]:.1f}'
  over = f', asked {claim["by"]:+g}' if claim['by'] else ''
  return f'{claim["says"]} ({claim["mean"]:+.1f}{spread}{over}: {claim["outcome"]})'

"""How many parameters a task needs, by method and size: Lester et al. 2021, figure 4. No training.

Counted from the shapes of the public T5 1.1 networks, as `train --dry_run` counts them.
"""

from typing import Any

from prompt_tuning_jax import launch
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.optimizers import adafactor
from prompt_tuning_jax.training import dry_run
from prompt_tuning_jax.training.methods import ModelTuning, PromptTuning
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning

SIZES = ('small', 'base', 'large', 'xl', 'xxl')
METHODS = {
    'model tuning': ModelTuning(), 'prefix tuning, training (100)': PrefixTuning(100, width=512),
    'prefix tuning, kept (100)': PrefixTuning(100, width=None),
    'prompt tuning (100)': PromptTuning(100), 'prompt tuning (1)': PromptTuning(1)}
PAPER = (51_200, 76_800, 102_400, 204_800, 409_600)  # prompt tuning with 100 tokens
PAPER_PERCENT = 0.00368  # of XXL


def counts(sizes=SIZES) -> dict[str, dict[str, list[int]]]:
  """{'trained': {method: one of each size}, 'of': {'network': …}} in parameters."""
  launch.find_files([])  # where `network_named` looks
  networks = [launch.network_named(f't5_1_1_{size}') for size in sizes]
  found = [[dry_run.sizes(SeqioTask('sst2'), method, adafactor(0.3), network)
            for network in networks] for method in METHODS.values()]
  trained = [[each['parameters that train'] for each in row] for row in found]
  return {'trained': dict(zip(METHODS, trained, strict=True)), 'of': trained[0]}


def result() -> dict[str, Any]:
  """The finding, as findings.json has one; each claim is an equation or an order."""
  found = counts()
  trained, whole = found['trained'], found['of']
  share = {name: [100 * some / of for some, of in zip(row, whole, strict=True)]
           for name, row in trained.items()}
  prompts = share['prompt tuning (100)']
  rows = list(share.values())
  claims = {
      'prompts of 100 have the numbers of the paper':
          trained['prompt tuning (100)'] == list(PAPER),
      f'and {PAPER_PERCENT} % of XXL': round(prompts[-1], 5) == PAPER_PERCENT,
      'their share falls with the size':
          all(a > b for a, b in zip(prompts, prompts[1:], strict=False)),
      'at every size model tuning > prefixes in training > prefixes kept > prompts': all(
          a > b for more, less in zip(rows, rows[1:], strict=False)
          for a, b in zip(more, less, strict=True))}
  outcome = 'reproduced' if all(claims.values()) else 'not at this scale'
  return {
      'finding': 'parameter_efficiency', 'verdict': outcome,
      'reading': f'{outcome}: ' + '; '.join(
          f'{says} ({"holds" if holds else "contrary"})' for says, holds in claims.items()),
      'rule': 'Each claim is an equation or an order of whole numbers: it holds or it does not.',
      'says': 'a prompt is under 0.1 % of any T5 1.1 and 0.004 % of XXL; a prefix takes far more, '
              'and more still while it is trained',
      'source': 'Lester et al. 2021, section 3.1 and figure 4',
      'chosen': "the paper's own networks: only shapes are needed",
      'axis': 'T5 1.1', 'unit': '% of all parameters', 'log': True, 'ordered': True,
      'trained': trained, 'parameters': whole,
      'scores': {f'{name}@{size}': {'values': [value], 'mean': value, 'deviation': None}
                 for name, row in share.items()
                 for size, value in zip(SIZES, row, strict=True)}}

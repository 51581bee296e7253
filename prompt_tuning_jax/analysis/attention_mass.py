"""How much attention the positions of a prompt or a prefix receive from the text around them."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.networks import attention
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.types import Array, Batch, PyTree


@flax.struct.dataclass
class Mass:
  """Attention weights, summed over `queries` positions of text.

  Attributes:
    received: [L, N, P] float32, by each position of the prompt, from each head of each layer.
    even: [] float32, what the prompt would receive in all if attention were even.
    queries: [] float32.
  """

  received: Array
  even: Array
  queries: Array

  def means(self) -> tuple[np.ndarray, float]:
    """([L, N, P], float) shares of a position's attention, which in all is 1."""
    return np.asarray(self.received) / float(self.queries), float(self.even / self.queries)


def of_batch(model: PromptedModel, length: int, params: PyTree, batch: Batch) -> dict[str, Mass]:
  """What the prompt among a batch's inputs, and the prefix before them, receive.

  Args:
    model: its layers are not scanned.
    length: P of the virtual tokens; 0 if there are none. The positions of a prefix come first.
    batch: of `data.batches.batch_of`.

  Returns:
    {who attends: Mass}, as far as there is something to attend to there: 'input' is the text that
    is read, 'target' the text that is written, 'target_to_target' the decoder's attention to what
    it has written, where a prefix may stand. Padding does not count, nor does what virtual tokens
    attend to.
  """
  config = model.network.config
  inputs, targets = batch['encoder_input_tokens'], batch['decoder_target_tokens']
  _, kept = model.apply({'params': params}, inputs, batch['decoder_input_tokens'], targets,
                        enable_dropout=False, mutable=['intermediates'])
  rows = inputs - config.vocab_size  # of virtual tokens; below 0 there is none
  text, written = (inputs > 0) & (rows < 0), targets > 0
  none = jnp.full_like(targets, -1)
  if 'encoder' in config.attentions:
    found = {'input': ('encoder', 0, text, rows), 'target': ('cross', 0, written, rows),
             'target_to_target': ('decoder', 0, written, none)}
    found = {name: of for name, of in found.items() if of[0] in config.attentions}
  else:  # The same layers read the inputs and then the targets, which see the inputs behind them.
    found = {'input': ('decoder', 0, text, rows),
             'target': ('decoder', 1, written, jnp.concatenate([none, rows], axis=-1))}
  masses = {}
  for name, (place, call, queries, keys) in found.items():
    layers = _attends(config, kept['intermediates'], place, call)
    if length * (keys is not none) + _prefix_length(layers[0], keys):
      masses[name] = _mass(layers, queries, keys, length * (keys is not none))
  return masses


def total(masses: list[Mapping[str, Mass]]) -> dict[str, Mass]:
  """The sums of several batches; {} of none."""
  return jax.tree.map(lambda *leaves: sum(leaves), *masses) if masses else {}


def _attends(config: Any, kept: PyTree, place: str, call: int) -> list[tuple]:
  """What each layer's attention is made of, in the order of `weights`."""
  stack, module = config.attention_modules[place]
  return [kept[stack][f'layers_{i}'][module]['attends'][call]
          for i in range(config.attentions[place])]


def _prefix_length(attends: tuple, keys: Array) -> int:
  """How many positions stand before these keys."""
  _, key, _, _, context = attends
  behind = 0 if context is None else context.key.shape[-1]
  return key.shape[-1] + behind - keys.shape[-1]


def _mass(layers: list[tuple], queries: Array, keys: Array, length: int) -> Mass:
  """queries: [B, T] bool, who is counted; keys: [B, S] int, the rows of the prompt that they are.
  """
  prefix = _prefix_length(layers[0], keys)
  before = jnp.broadcast_to(jnp.arange(prefix), (len(keys), prefix))
  rows = jnp.concatenate([before, jnp.where(keys < 0, -1, keys + prefix)], axis=-1)
  is_row = jax.nn.one_hot(rows, prefix + length)  # zeros where it is no row
  count = queries.astype(jnp.float32)
  summed = lambda of: jnp.einsum('bnts,bt,bsp->np', of, count, is_row)
  query, key, _, mask, context = layers[0]
  even = attention.weights(0 * query, key, None, mask, context and context.replace(bias=None))
  return Mass(jnp.stack([summed(attention.weights(*layer)) for layer in layers]),
              jnp.sum(summed(even)) / query.shape[1], jnp.sum(count))

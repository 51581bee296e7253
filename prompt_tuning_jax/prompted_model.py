"""A frozen network with the prompt it is given: loss, scores, predictions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax import objectives
from prompt_tuning_jax.decoding import sample, token_choice
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.prompts import weight_changes
from prompt_tuning_jax.types import Array, Batch, PyTree


@flax.struct.dataclass
class Added:
  """What is added to a frozen network, given as data: each example of a batch may have its own.

  Attributes:
    virtual_embeddings: [R, D] or [L, R, D], the rows of all virtual tokens (`networks.layers`).
    prefix, adapters: with `rows`, those of each example.
    changes: {path: [K, …]} of the kernels' inputs and outputs (`prompts.weight_changes.stacked`).
    change_rows: [B] int32, which of the K each example has.
  """

  virtual_embeddings: Array | None = None
  prefix: Prefix = Prefix()
  adapters: Adapters = Adapters()
  changes: dict[str, Array] = flax.struct.field(default_factory=dict)
  change_rows: Array | None = None

  def repeated(self, times: int) -> 'Added':
    """For a batch in which each example stands `times` times in a row."""
    again = lambda rows: None if rows is None else jnp.repeat(rows, times)
    return self.replace(prefix=self.prefix.replace(rows=again(self.prefix.rows)),
                        adapters=self.adapters.replace(rows=again(self.adapters.rows)),
                        change_rows=again(self.change_rows))

  @property
  def arguments(self) -> dict[str, Any]:
    """The network's keyword arguments."""
    return {'virtual_embeddings': self.virtual_embeddings, 'prefix': self.prefix,
            'adapters': self.adapters}


class PromptedModel(nn.Module):
  """The network and, beside it, the modules that own what is added to it (None adds nothing).

  The parameter tree is the network's own with `prompt/…`, `prefix/…` or `adapter/…` added: the base
  keeps its names. The methods are the network's, but for `added`, which takes the place of
  its `virtual_embeddings`, `prefix` and `adapters`, and of the modules.
  """

  network: nn.Module
  prompt: nn.Module | None = None
  prefix: nn.Module | None = None
  adapter: nn.Module | None = None

  def setup(self):
    nn.share_scope(self, self.network)

  def _of_modules(self) -> Added:
    """What the modules own, the same for every example."""
    made = {} if self.prompt is None else {'virtual_embeddings': self.prompt()}
    if self.prefix is not None:
      made['prefix'] = Prefix(**{place: x[:, :, None] for place, x in self.prefix().items()})
    if self.adapter is not None:
      leaves = jax.tree.map(lambda leaf: leaf[:, None], self.adapter())
      made['adapters'] = Adapters(leaves, activation=self.adapter.activation)
    return Added(**made)

  def encode(self, *args, added: Added | None = None, **kwargs) -> PyTree:
    """As the network's `encode`."""
    return self.network.encode(*args, **kwargs, **(added or self._of_modules()).arguments)

  def decode(self, *args, added: Added | None = None, **kwargs) -> Array:
    """As the network's `decode`."""
    return self.network.decode(*args, **kwargs, **(added or self._of_modules()).arguments)

  def __call__(self, *args, added: Added | None = None, **kwargs) -> Array:
    """As the network's `__call__`."""
    return self.network(*args, **kwargs, **(added or self._of_modules()).arguments)


def variables_of(params: PyTree, added: Added | None) -> PyTree:
  """What `model.apply` takes: the parameters, and changes of them for each example."""
  if added is None or not added.changes:
    return {'params': params}
  return {'params': params, 'changes': weight_changes.of_rows(added.changes, added.change_rows)}


def logits(model: PromptedModel, params: PyTree, batch: Batch,
           dropout_key: Array | None = None, added: Added | None = None) -> Array:
  """Teacher-forced logits [B, S, V] float32; dropout only with a key."""
  optional = ('encoder_segment_ids', 'decoder_segment_ids', 'encoder_positions',
              'decoder_positions')
  return model.apply(
      variables_of(params, added), batch['encoder_input_tokens'], batch['decoder_input_tokens'],
      batch['decoder_target_tokens'], **{name: batch[name] for name in optional if name in batch},
      enable_dropout=dropout_key is not None, added=added,
      rngs=None if dropout_key is None else {'dropout': dropout_key})


def loss(model: PromptedModel, params: PyTree, batch: Batch, dropout_key: Array | None = None,
         z_loss: float = 0.0, label_smoothing: float = 0.0) -> tuple[Array, dict[str, Array]]:
  """What training lowers, and what is reported.

  Returns:
    (mean loss per target token in nats, z-loss and label smoothing included;
    {'loss': mean cross entropy alone, 'accuracy': share of tokens foretold, 'tokens': how many}),
    all [] float32.
  """
  outputs = logits(model, params, batch, dropout_key)
  targets, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights']
  tokens = jnp.sum(weights)
  mean = lambda values: jnp.sum(values * weights) / jnp.maximum(tokens, 1)
  metrics = {'loss': mean(objectives.cross_entropy(outputs, targets)),
             'accuracy': mean(jnp.argmax(outputs, axis=-1) == targets), 'tokens': tokens}
  return mean(objectives.cross_entropy(outputs, targets, z_loss, label_smoothing)), metrics


def log_likelihood(model: PromptedModel, params: PyTree, batch: Batch,
                   added: Added | None = None) -> Array:
  """log p(targets | inputs) in nats, summed over each row's weighted tokens: [B] float32."""
  tokens = objectives.token_log_likelihood(logits(model, params, batch, added=added),
                                           batch['decoder_target_tokens'])
  return jnp.sum(tokens * batch['decoder_loss_weights'], axis=-1)


def candidate_log_likelihoods(model: PromptedModel, params: PyTree, encoder_input_tokens: Array,
                              candidates: Array, segments: Array, most: int,
                              added: Added | None = None) -> Array:
  """log p(candidate | input) in nats for each candidate of each input.

  The inputs are encoded once, and so are the decoder's keys and values of them: the candidates
  stand one after another as the segments of one packed row.

  Args:
    encoder_input_tokens: [B, T] int32.
    candidates: [B, S] int32, an input's candidates side by side, each with its end-of-sequence id.
    segments: [B, S] int32, 1 to `most`: the number of the candidate that a token belongs to; 0 is
      padding.

  Returns:
    [B, most] float32; -inf where there is no such candidate.
  """
  same = segments[:, 1:] == segments[:, :-1]
  inputs = jnp.pad(jnp.where(same, candidates[:, :-1], 0), ((0, 0), (1, 0)))
  variables = variables_of(params, added)
  encoded = model.apply(variables, encoder_input_tokens, enable_dropout=False, added=added,
                        method='encode')
  outputs = model.apply(variables, encoded, encoder_input_tokens, inputs, candidates,
                        decoder_segment_ids=segments, enable_dropout=False, added=added,
                        method='decode')
  tokens = objectives.token_log_likelihood(outputs, candidates)
  belongs = segments[:, :, None] == jnp.arange(1, most + 1)
  sums = jnp.sum(jnp.where(belongs, tokens[:, :, None], 0.0), axis=1)
  return jnp.where(jnp.any(belongs, axis=1), sums, -jnp.inf)


def predict(model: PromptedModel, params: PyTree, encoder_input_tokens: Array, max_length: int,
            choose: Callable[[Array, Array], Array] = token_choice.Greedy(),
            key: Array | None = None, eos_id: int = 1) -> Array:
  """Generates targets with a key-value cache: [B, T] int32 -> [B, max_length] int32."""
  frozen = {'params': params}
  encoded = model.apply(frozen, encoder_input_tokens, enable_dropout=False, method='encode')

  def decode(variables, tokens, mutable):
    return model.apply(
        variables, encoded, encoder_input_tokens, tokens[:, None], tokens[:, None],
        enable_dropout=False, decode=True, max_decode_length=max_length, mutable=mutable,
        method='decode')

  start = jnp.zeros(encoder_input_tokens.shape[0], jnp.int32)
  _, caches = decode(frozen, start, ['cache', 'cross_cache'])
  # Only a network with cross-attention has anything else there than the growing cache.
  kept = {name: value for name, value in caches.items() if name != 'cache'}

  def next_logits(cache, tokens):
    outputs, updated = decode({**frozen, **kept, 'cache': cache}, tokens, ['cache'])
    return outputs[:, 0], updated['cache']

  key = jax.random.key(0) if key is None else key
  return sample.sample(next_logits, caches['cache'], key, encoder_input_tokens.shape[0],
                       max_length, choose, eos_id)

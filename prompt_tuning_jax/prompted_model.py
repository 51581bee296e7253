"""A frozen network with the prompt it is given: loss, scores, predictions."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from prompt_tuning_jax import objectives
from prompt_tuning_jax.decoding import sample, token_choice
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.types import Array, Batch, PyTree


class PromptedModel(nn.Module):
  """The network and, beside it, the modules that own what is added to it (None adds nothing).

  The parameter tree is the network's own with `prompt/…`, `prefix/…` or `adapter/…` added: the base
  keeps its names. The methods are the network's, without its `virtual_embeddings`, `prefix` and
  `adapters`.
  """

  network: nn.Module
  prompt: nn.Module | None = None
  prefix: nn.Module | None = None
  adapter: nn.Module | None = None

  def setup(self):
    nn.share_scope(self, self.network)

  def _added(self):
    added = {} if self.prompt is None else {'virtual_embeddings': self.prompt()}
    if self.prefix is not None:  # One prefix for every example.
      added['prefix'] = Prefix(**{place: x[:, :, None] for place, x in self.prefix().items()})
    if self.adapter is not None:  # So too of adapters.
      leaves = jax.tree.map(lambda leaf: leaf[:, None], self.adapter())
      added['adapters'] = Adapters(leaves, activation=self.adapter.activation)
    return added

  def encode(self, *args, **kwargs) -> PyTree:
    """As the network's `encode`."""
    return self.network.encode(*args, **kwargs, **self._added())

  def decode(self, *args, **kwargs) -> Array:
    """As the network's `decode`."""
    return self.network.decode(*args, **kwargs, **self._added())

  def __call__(self, *args, **kwargs) -> Array:
    """As the network's `__call__`."""
    return self.network(*args, **kwargs, **self._added())


def logits(model: PromptedModel, params: PyTree, batch: Batch,
           dropout_key: Array | None = None) -> Array:
  """Teacher-forced logits [B, S, V] float32; dropout only with a key."""
  optional = ('encoder_segment_ids', 'decoder_segment_ids', 'encoder_positions',
              'decoder_positions')
  return model.apply(
      {'params': params}, batch['encoder_input_tokens'], batch['decoder_input_tokens'],
      batch['decoder_target_tokens'], **{name: batch[name] for name in optional if name in batch},
      enable_dropout=dropout_key is not None,
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


def log_likelihood(model: PromptedModel, params: PyTree, batch: Batch) -> Array:
  """log p(targets | inputs) in nats, summed over each row's weighted tokens: [B] float32."""
  tokens = objectives.token_log_likelihood(logits(model, params, batch),
                                           batch['decoder_target_tokens'])
  return jnp.sum(tokens * batch['decoder_loss_weights'], axis=-1)


def candidate_log_likelihoods(model: PromptedModel, params: PyTree, encoder_input_tokens: Array,
                              candidates: Array) -> Array:
  """log p(candidate | input) in nats for each candidate of each input.

  The inputs are encoded once, and so are the decoder's keys and values of them: the candidates
  stand one after another as the segments of one packed row.

  Args:
    encoder_input_tokens: [B, T] int32.
    candidates: [B, C, S] int32, each with its end-of-sequence id, then 0.

  Returns:
    [B, C] float32; -inf where a candidate is all padding.
  """
  batch, count, length = candidates.shape
  starts = jnp.zeros((batch, count, 1), candidates.dtype)
  inputs = jnp.concatenate([starts, candidates[..., :-1]], axis=-1).reshape(batch, -1)
  targets = candidates.reshape(batch, -1)
  segments = jnp.broadcast_to(jnp.repeat(jnp.arange(1, count + 1), length), targets.shape)
  encoded = model.apply({'params': params}, encoder_input_tokens, enable_dropout=False,
                        method='encode')
  outputs = model.apply({'params': params}, encoded, encoder_input_tokens, inputs, targets,
                        decoder_segment_ids=segments, enable_dropout=False, method='decode')
  tokens = objectives.token_log_likelihood(outputs, targets) * (targets > 0)
  sums = jnp.sum(tokens.reshape(candidates.shape), axis=-1)
  return jnp.where(jnp.any(candidates > 0, axis=-1), sums, -jnp.inf)


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

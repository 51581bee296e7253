"""A frozen network with the prompt it is given: loss, scores, predictions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prompt_tuning_jax import objectives
from prompt_tuning_jax.decoding import beam_search as beams
from prompt_tuning_jax.decoding import sample, stop_strings, token_choice
from prompt_tuning_jax.networks import layer_stack
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.prompts import weight_changes
from prompt_tuning_jax.types import Array, Batch, PyTree

Choose = Callable[[Array, Array], Array]  # `decoding.token_choice`


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


@dataclasses.dataclass(frozen=True)
class Choices:
  """A task's labels, for a loss of each label among them (what ranking asks for).

  Attributes:
    ids: of each label those up to the first that tells it apart, [C][K]. Before that stands what
      every target begins with.
    targets_too: the loss of the whole target is added; else it is left out.
  """

  ids: tuple[tuple[int, ...], ...]
  targets_too: bool = False

  def among(self, outputs: Array, batch: Batch) -> tuple[Array, Array]:
    """(logits [B, S, V] of labels alone, weights [B, S] of the tokens that tell labels apart)."""
    ids = jnp.array(self.ids, jnp.int32)
    is_label = jnp.any(jnp.arange(outputs.shape[-1]) == ids[:, -1:], axis=0)
    places = batch.get('decoder_positions', jnp.arange(outputs.shape[1]))
    return (jnp.where(is_label, outputs, -1e9),
            batch['decoder_loss_weights'] * (places == ids.shape[1] - 1))


def loss(model: PromptedModel, params: PyTree, batch: Batch, dropout_key: Array | None = None,
         z_loss: float = 0.0, label_smoothing: float = 0.0, choices: Choices | None = None,
         ) -> tuple[Array, dict[str, Array]]:
  """What training lowers, and what is reported.

  Returns:
    (mean loss per target token in nats, or per target with `choices`, z-loss and label smoothing
    included; {'loss': mean cross entropy alone, 'accuracy': share of tokens (or labels) foretold,
    'tokens': how many these are}), all [] float32.
  """
  outputs, targets = logits(model, params, batch, dropout_key), batch['decoder_target_tokens']
  terms = [(outputs, batch['decoder_loss_weights'])]
  if choices is not None:
    terms = [*(terms if choices.targets_too else ()), choices.among(outputs, batch)]
  outputs, weights = terms[-1]
  tokens = jnp.sum(weights)
  mean = lambda values, weights: jnp.sum(values * weights) / jnp.maximum(tokens, 1)
  cross_entropy = lambda *settings: sum(
      mean(objectives.cross_entropy(each, targets, *settings), weights) for each, weights in terms)
  metrics = {'loss': cross_entropy(), 'tokens': tokens,
             'accuracy': mean(jnp.argmax(outputs, axis=-1) == targets, weights)}
  return cross_entropy(z_loss, label_smoothing), metrics


def log_likelihood(model: PromptedModel, params: PyTree, batch: Batch,
                   added: Added | None = None) -> Array:
  """log p(targets | inputs) in nats, summed over each row's weighted tokens: [B] float32."""
  tokens = objectives.token_log_likelihood(logits(model, params, batch, added=added),
                                           batch['decoder_target_tokens'])
  return jnp.sum(tokens * batch['decoder_loss_weights'], axis=-1)


def first_word_log_probabilities(model: PromptedModel, params: PyTree, batch: Batch,
                                 place: int = 0, added: Added | None = None) -> Array:
  """log p of every word as the first of a target, in nats: [B, V] float32.

  `place` is how many ids stand before it in the batch's targets: those that every text begins with.
  """
  return jax.nn.log_softmax(logits(model, params, batch, added=added)[:, place])


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


@flax.struct.dataclass
class Decoding:
  """A batch that is being decoded: all that is kept between one call and the next.

  Attributes:
    encoded: of the network's `encode`, for B * repeats rows; None where `kept` has all that is
      read of it.
    inputs: [B * repeats, T] int32, encoder_input_tokens.
    kept: collections of variables that do not change: keys and values of the encoded inputs.
    state: of these rows; `state.tokens` are what has been made.
    repeats: how many rows, one after another, each example has.
  """

  encoded: PyTree
  inputs: Array
  kept: PyTree
  state: sample.State
  repeats: int = flax.struct.field(pytree_node=False, default=1)


def start_decoding(model: PromptedModel, params: PyTree, encoder_input_tokens: Array,
                   max_length: int, added: Added | None = None, repeats: int = 1,
                   stops: stop_strings.Stops | None = None) -> Decoding:
  """Encodes [B, T] int32, each example once, and makes room for max_length tokens of each row.

  Args:
    added: of each example.
    repeats: how many times each example is decoded: samples or beams.
    stops: of each example.
  """
  variables = variables_of(params, added)
  encoded = model.apply(variables, encoder_input_tokens, enable_dropout=False, added=added,
                        method='encode')
  tokens = jnp.full((encoder_input_tokens.shape[0], 1), sample.START, jnp.int32)
  _, made = model.apply(
      variables, encoded, encoder_input_tokens, tokens, tokens, enable_dropout=False, decode=True,
      max_decode_length=max_length, mutable=['cache', 'cross_cache'], added=added, method='decode')
  inputs = jnp.asarray(encoder_input_tokens)
  # Only a network with cross-attention has anything else there than the growing cache.
  kept = {name: value for name, value in made.items() if name != 'cache'}
  encoded, cache = None if kept else encoded, made['cache']
  if repeats > 1:
    encoded, inputs, kept, cache = layer_stack.take_rows(
        (encoded, inputs, kept, cache), jnp.repeat(jnp.arange(len(inputs)), repeats))
  state = sample.start(cache, len(inputs), max_length,
                       stop_strings.repeated(stops, repeats))
  return Decoding(encoded, inputs, kept, state, repeats)


def next_logits(model: PromptedModel, params: PyTree, decoding: Decoding,
                 added: Added | None) -> sample.NextLogits:
  """The function (cache, tokens [B * repeats]) -> (logits [B * repeats, V], cache)."""
  added = None if added is None else added.repeated(decoding.repeats)
  frozen = {**variables_of(params, added), **decoding.kept}

  def of_tokens(cache, tokens):
    outputs, updated = model.apply(
        {**frozen, 'cache': cache}, decoding.encoded, decoding.inputs, tokens[:, None],
        tokens[:, None], enable_dropout=False, decode=True,
        max_decode_length=decoding.state.tokens.shape[1], mutable=['cache'], added=added,
        method='decode')
    return outputs[:, 0], updated['cache']

  return of_tokens


def continue_decoding(model: PromptedModel, params: PyTree, decoding: Decoding,
                      choose: Choose = token_choice.Greedy(), limits: Array | None = None,
                      steps: Array | int | None = None, eos_id: Array | int = 1,
                      added: Added | None = None) -> Decoding:
  """Decodes on (`decoding.sample.advance`): to the end, or `steps` tokens more.

  Args:
    choose: how a token is chosen; its settings, if any, are those of all B * repeats rows.
    limits: [B * repeats] int32, the most tokens of each row.
    added: of each of the B examples, as it was at the start.
  """
  state = sample.advance(next_logits(model, params, decoding, added), decoding.state, choose,
                         limits, steps, eos_id)
  return decoding.replace(state=state)


def generate(model: PromptedModel, params: PyTree, encoder_input_tokens: Array, max_length: int,
             choose: Choose = token_choice.Greedy(), limits: Array | None = None,
             eos_id: Array | int = 1, added: Added | None = None, repeats: int = 1,
             stops: stop_strings.Stops | None = None) -> tuple[Array, Array]:
  """Decodes [B, T] int32 from the start to the end, with a key-value cache.

  The arguments are those of `start_decoding` and `continue_decoding`.

  Returns:
    (tokens [B * repeats, max_length] int32, each row's end-of-sequence id included, then 0;
    log p of these tokens in nats [B * repeats] float32).
  """
  decoding = start_decoding(model, params, encoder_input_tokens, max_length, added, repeats, stops)
  state = continue_decoding(model, params, decoding, choose, limits, eos_id=eos_id,
                            added=added).state
  return state.tokens, state.log_likelihood


def predict(model: PromptedModel, params: PyTree, encoder_input_tokens: Array, max_length: int,
            **kwargs) -> Array:
  """The tokens of `generate` alone: [B * repeats, max_length] int32."""
  return generate(model, params, encoder_input_tokens, max_length, **kwargs)[0]


def beam_search(model: PromptedModel, params: PyTree, encoder_input_tokens: Array, max_length: int,
                num_beams: int, penalty: Any = beams.BrevityPenalty(), eos_id: Array | int = 1,
                added: Added | None = None) -> tuple[Array, Array]:
  """The best texts of each example that `decoding.beam_search` finds.

  Returns:
    (tokens [B, num_beams, max_length] int32, scores [B, num_beams] float32), best first.
  """
  decoding = start_decoding(model, params, encoder_input_tokens, max_length, added, num_beams)
  return beams.beam_search(
      next_logits(model, params, decoding, added), decoding.state.cache,
      len(encoder_input_tokens), max_length, num_beams, penalty, eos_id, layer_stack.take_rows)

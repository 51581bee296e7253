"""Generation that is controlled while it is decoded, by a frozen model and what is added to it.

Weighted decoding: prompts of an attribute re-weight the next token (Holtzman et al. 2018; with two
of them, for and against, Krause et al. 2021, "GeDi", and Liu et al. 2021, "DExperts"). Plug and
play: the model's own activations are moved towards an attribute before each token (Dathathri et al.
2020, "PPLM").
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import prompted_model
from prompt_tuning_jax.decoding import sample, stop_strings, token_choice
from prompt_tuning_jax.prompt_bank import Slot
from prompt_tuning_jax.prompted_model import Added, Choose, Decoding, PromptedModel
from prompt_tuning_jax.types import Array, PyTree

LEAST = -1e30  # of a log p, so that no difference is of infinities


@dataclasses.dataclass(frozen=True)
class Weighted:
  """log p = log p of the row's own prompt + weight (log p of `attribute` - log p of `against`).

  Args:
    attribute, against: the slots of a bank of two prompts; without the second it is the row's own,
      and weight 1 is the attribute's prompt alone.
    weight: 0 is no control; below 0 the attribute is avoided.
  """

  attribute: Slot
  weight: float
  against: Slot | None = None

  def __post_init__(self):
    if not np.isfinite(self.weight):
      raise ValueError(f'weight should be a number such as 1.5, got {self.weight!r}.')

  @property
  def weights(self) -> np.ndarray:
    """[M] float32, of the members that `slots` lists."""
    one = self.weight
    return np.array([1 - one, one] if self.against is None else [1, one, -one], np.float32)

  def slots(self, own: Slot) -> list[Slot]:
    """Those of an example's members: the row's own first."""
    return [own, self.attribute, *([] if self.against is None else [self.against])]


@dataclasses.dataclass(frozen=True)
class Perturbed:
  """Keys and values of the input move so that words of a bag become more probable (PPLM-BoW).

  Args:
    words: [W], ids of the bag.
    step_size: the length of a step, as a share of the length of the keys (or values) themselves.
    iterations: steps before each token; every token starts from the unmoved ones.
    kl_scale: how much the distance from the model's own distribution counts, in nats.
    fusion: the tokens' distribution is p^fusion of the moved model times p^(1 - fusion) of its own.
  """

  words: tuple[int, ...]
  step_size: float = 0.05
  iterations: int = 3
  kl_scale: float = 0.01
  fusion: float = 0.9

  def __post_init__(self):
    if not self.words:
      raise ValueError('A bag of words needs one word or more.')
    if type(self.iterations) is not int or self.iterations < 1:
      raise ValueError(f'iterations should be a whole number from 1, got {self.iterations!r}.')
    if not 0 <= self.step_size < float('inf') or not 0 <= self.kl_scale < float('inf'):
      raise ValueError('step_size and kl_scale should be 0 or more, got '
                       f'{self.step_size!r} and {self.kl_scale!r}.')
    if not 0 <= self.fusion <= 1:
      raise ValueError(f'fusion should be a share from 0 to 1, got {self.fusion!r}.')


def generate_weighted(model: PromptedModel, params: PyTree, encoder_input_tokens: Array,
                      max_length: int, weights: Array,
                      choose: Choose = token_choice.Greedy(), eos_id: Array | int = 1,
                      added: Added | None = None, repeats: int = 1,
                      stops: stop_strings.Stops | None = None) -> tuple[Array, Array]:
  """`prompted_model.generate`, each token from a weighted sum of M members' log probabilities.

  Args:
    encoder_input_tokens: [B * M, T] int32, the M members of an example one after another; `added`
      is theirs, `choose` and `stops` are the examples'.
    weights: [M] float32.

  Returns:
    (tokens [B * repeats, max_length] int32, log p of them under the sum, made a distribution).
  """
  members = len(weights)
  decoding = prompted_model.start_decoding(model, params, encoder_input_tokens, max_length, added,
                                           repeats)
  of_all = prompted_model.next_logits(model, params, decoding, added)
  examples = len(encoder_input_tokens) // members

  def of_examples(cache, tokens):
    spread = jnp.broadcast_to(tokens.reshape(examples, 1, repeats), (examples, members, repeats))
    logits, cache = of_all(cache, spread.reshape(-1))
    log_p = jnp.maximum(jax.nn.log_softmax(logits), LEAST)
    log_p = log_p.reshape(examples, members, repeats, -1)
    return jnp.einsum('m,bmrv->brv', weights, log_p).reshape(len(tokens), -1), cache

  return _decoded(of_examples, decoding, examples, repeats, max_length, choose, eos_id, stops)


def generate_perturbed(model: PromptedModel, params: PyTree, encoder_input_tokens: Array,
                       max_length: int, words: Array, step_size: Array | float,
                       kl_scale: Array | float, fusion: Array | float, iterations: int = 3,
                       choose: Choose = token_choice.Greedy(), eos_id: Array | int = 1,
                       added: Added | None = None, repeats: int = 1,
                       stops: stop_strings.Stops | None = None) -> tuple[Array, Array]:
  """`prompted_model.generate`, each token after steps that `Perturbed` describes.

  What is moved are the keys and values of the input, each layer's by a length of its own.
  """
  decoding = prompted_model.start_decoding(model, params, encoder_input_tokens, max_length, added,
                                           repeats)

  def of_moved(moved, cache, tokens):
    encoded, kept = moved
    changed = decoding.replace(encoded=encoded, kept=kept)
    return prompted_model.next_logits(model, params, changed, added)(cache, tokens)

  def next_logits(cache, tokens):
    still = (decoding.encoded, decoding.kept)
    logits, updated = of_moved(still, cache, tokens)
    own = jnp.maximum(jax.nn.log_softmax(logits), LEAST)

    def loss(moved):
      log_p = jnp.maximum(jax.nn.log_softmax(of_moved(moved, cache, tokens)[0]), LEAST)
      missed = -jax.nn.logsumexp(log_p[:, words], axis=-1)
      distance = jnp.sum(jnp.exp(log_p) * (log_p - own), axis=-1)
      return jnp.sum(missed + kl_scale * distance)  # No example's has anything of another's.

    moved = still
    for _ in range(iterations):
      gradient = jax.grad(loss, allow_int=True)(moved)
      moved = jax.tree.map(lambda leaf, slope, start: _moved(leaf, slope, start, step_size),
                           moved, gradient, still)
    log_p = jnp.maximum(jax.nn.log_softmax(of_moved(moved, cache, tokens)[0]), LEAST)
    return fusion * log_p + (1 - fusion) * own, updated

  return _decoded(next_logits, decoding, len(encoder_input_tokens), repeats, max_length, choose,
                  eos_id, stops)


def _moved(leaf: Array, slope: Array, start: Array, step_size: Array | float) -> Array:
  """A step down of each row [B, …] or, of scanned layers, [L, B, …]; what has no slope, or is no
  number, stays."""
  if not jnp.issubdtype(leaf.dtype, jnp.inexact):
    return leaf
  axes = tuple(range(max(1, leaf.ndim - 3), leaf.ndim))
  length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes, keepdims=True))
  # Only of what the token is made from: how much padding stands beside it is the batch's affair.
  whole = length(jnp.where(slope != 0, start, 0))
  # Squares of slopes below 1e-19 are 0: such would be divided by less than their length.
  unit = slope / jnp.maximum(length(slope), 1e-12)
  return (leaf - step_size * whole * unit).astype(leaf.dtype)


def _decoded(next_logits: Any, decoding: Decoding, examples: int, repeats: int, max_length: int,
             choose: Choose, eos_id: Array | int,
             stops: stop_strings.Stops | None) -> tuple[Array, Array]:
  state = sample.start(decoding.state.cache, examples * repeats, max_length,
                       stop_strings.repeated(stops, repeats))
  state = sample.advance(next_logits, state, choose, eos_id=eos_id)
  return state.tokens, state.log_likelihood


def bag(vocabulary: Any, words: Sequence[str]) -> tuple[int, ...]:
  """The ids of words, as they stand within a text; ValueError for one that is no piece whole."""
  before = '' if vocabulary.leading_spaces else ' '
  pieces = [vocabulary.encode(before + word) for word in words]
  for word, ids in zip(words, pieces, strict=True):
    if len(ids) != 1 or vocabulary.unk_id in ids:
      raise ValueError(f'The vocabulary has no piece for the word {word!r}: take words that it '
                       f'writes in one, not as {[vocabulary.piece(piece) for piece in ids]}.')
  return tuple(sorted({piece for [piece] in pieces}))

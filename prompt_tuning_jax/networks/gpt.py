"""Decoder-only networks: T5X's decoder-only T5, and GPT-2 (Radford et al. 2019).

Parameter names and logical axes are T5X's (`t5x/examples/decoder_only`), with `bias` beside
`kernel` or `scale` where GPT-2 has one.

An example x_1 … x_n, y_1 … y_m is one text: y_1 is foretold at x_n. Its inputs and its targets come
in two arrays all the same, those of an encoder-decoder, and so whatever makes batches, packs them,
scores or decodes need not know which network it serves. `encode` runs the layers over the inputs
and keeps their keys and values; `decode` runs the same layers over the targets alone, which see
those. The first position of a target row, whose token is the start id 0, takes the place of x_n:
it embeds x_n and stands at its position, and x_n among the inputs is seen by no target.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.networks import attention, layer_stack, layers, masks, relative_position
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.networks.relative_position import RelativePositionBias
from prompt_tuning_jax.types import Array, PyTree

NO_PREFIX = Prefix()
NO_ADAPTERS = Adapters()
KeysValues = tuple[Array, Array]  # of one layer: [B, N, H, T] and [B, N, T, H]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
  """The shape of a decoder-only network, under T5X's names; the defaults are T5X's network.

  Args:
    vocab_size: rows of the embedding table.
    max_positions: rows of a table of learned positions, the most tokens of an example; None has
      relative position biases instead.
    use_bias: layer norms centre and have a bias, and so has every kernel but the output layer's.
    scale_queries: logits of attention are divided by sqrt(head_dim).
    logits_via_embedding, scale_logits: the output layer is the embedding table; its input is
      scaled by emb_dim ** -0.5.
    has_padding_row: row 0 of the table is padding that the network was trained with. False: it
      was not (GPT-2 has no padding id); the row stands for the start of a text, and has no logit.
    scan_layers, remat_policy, attention: how layers are run (`networks.layer_stack`,
      `networks.fused_attention`), not what they compute.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  num_layers: int
  head_dim: int
  mlp_dim: int
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  dtype: str = 'float32'
  max_positions: int | None = None
  use_bias: bool = False
  scale_queries: bool = False
  scale_logits: bool = True
  has_padding_row: bool = True
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  scan_layers: bool = False
  remat_policy: str = 'none'
  attention: str = 'xla'

  def __post_init__(self):
    layer_stack.check(self)
    relative_position.check(self, bidirectional=False)

  is_masked_lm = False
  # Where the embedding table is, and the modules that make each place's keys and values.
  embedding = 'decoder/token_embedder/embedding'
  output = 'decoder/logits_dense/kernel'
  attention_modules = {'decoder': ('decoder', 'self_attention')}
  prompted_stack = 'decoder'  # the module whose `layers_…` the inputs go through

  @property
  def attentions(self) -> dict[str, int]:
    """How many attentions of each place (`networks.prefix`) there are."""
    return {'decoder': self.num_layers}

  @property
  def sublayers(self) -> dict[str, int]:
    """How many sub-layers of each place (`networks.adapters`) there are."""
    return {'decoder_attention': self.num_layers, 'decoder_mlp': self.num_layers}

  @property
  def prompted_layers(self) -> int:
    """How many layers the inputs, and a prompt among them, go through."""
    return self.num_layers

  def positions_of(self, inputs: int, targets: int) -> int:
    """How many positions an example of so many tokens takes; its last is never read."""
    return inputs + targets - 1

  def network(self) -> 'DecoderOnly':
    """The network of this shape."""
    return DecoderOnly(self)


def _norm(cfg: GPTConfig, name: str | None = None) -> nn.Module:
  norm = layers.CentredLayerNorm if cfg.use_bias else layers.LayerNorm
  return norm(jnp.dtype(cfg.dtype), name=name)


class DecoderLayer(nn.Module):
  config: GPTConfig

  @nn.compact
  def __call__(self, x: Array, own: tuple[Array | int, KeysValues | None], tokens: Array,
               bias: Array | None, mask: Array, deterministic: bool,
               seen: tuple[Array | None, Array] | None, cache_index: Array | None,
               cache_length: int | None, virtual_embeddings: Array | None, prefix: Prefix,
               adapters: Adapters) -> tuple[Array, KeysValues]:
    """x: [B, T, D], tokens: [B, T], bias: [1, N, T, T], mask: [B, 1, T, T] -> [B, T, D] and its
    keys and values. `own` has those of the text before, `seen` the bias and the mask for them."""
    cfg, dtype, (layer, before) = self.config, jnp.dtype(self.config.dtype), own
    context = before and attention.Context(*before, *seen)
    drop = functools.partial(layers.dropout(cfg.dropout_rate), deterministic=deterministic)
    x = layers.virtual_of_layer(x, tokens, virtual_embeddings, layer, cfg.vocab_size)
    y = _norm(cfg, 'pre_self_attention_layer_norm')(x)
    y, keys_values = attention.MultiHeadAttention(
        cfg.num_heads, cfg.head_dim, cfg.dropout_rate, dtype, cfg.use_bias, cfg.scale_queries,
        cfg.attention, name='self_attention').with_keys_values(
            y, y, bias, mask, deterministic=deterministic, cache_index=cache_index,
            cache_length=cache_length, prefix=prefix.at('decoder', layer), context=context)
    x += adapters.at('decoder_attention', layer)(drop(y))
    y = _norm(cfg, 'pre_mlp_layer_norm')(x)
    y = layers.MlpBlock(cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, dtype, cfg.use_bias,
                        name='mlp')(y, deterministic)
    x += adapters.at('decoder_mlp', layer)(drop(y))
    return partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed')), keys_values


class Decoder(nn.Module):
  """The layers, what is before them and what is behind them: inputs and targets both pass here."""

  config: GPTConfig

  def setup(self):
    cfg, dtype = self.config, jnp.dtype(self.config.dtype)
    # A tied output layer without scaling needs rows of length 1 for logits of size 1.
    unscaled = cfg.logits_via_embedding and not cfg.scale_logits
    stddev = cfg.emb_dim ** -0.5 if unscaled else 1.0
    self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, dtype, stddev=stddev)
    if cfg.max_positions is None:
      self.relpos_bias = RelativePositionBias(
          cfg.num_heads, cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance,
          bidirectional=False, dtype=dtype)
    else:
      self.position_embedder = layers.Embed(cfg.max_positions, cfg.emb_dim, dtype,
                                            ('abspos_buckets', 'embed'), stddev)
    self.layers = layer_stack.make(DecoderLayer, cfg, cfg.num_layers, static=(6, 9), shared=10)
    self.decoder_norm = _norm(cfg)
    self.drop = layers.dropout(cfg.dropout_rate)
    if cfg.logits_via_embedding:
      self.logits_dense = layers.TiedOutput(self.token_embedder)
    else:
      self.logits_dense = layers.Dense(cfg.vocab_size, ('embed', 'vocab'), dtype,
                                       out_dtype=jnp.float32)

  def bias(self, query_positions: Array, key_positions: Array) -> Array | None:
    """Relative position biases (see `RelativePositionBias`), if the network has any."""
    if self.config.max_positions is None:
      return self.relpos_bias(query_positions, key_positions)
    return None

  def __call__(self, tokens: Array, positions: Array, bias: Array | None, mask: Array,
               deterministic: bool, before: PyTree | None = None,
               seen: tuple[Array | None, Array] | None = None, cache_index: Array | None = None,
               cache_length: int | None = None, virtual_embeddings: Array | None = None,
               prefix: Prefix = NO_PREFIX,
               adapters: Adapters = NO_ADAPTERS) -> tuple[Array, PyTree]:
    """tokens, positions: [B, T] int -> what the last layer makes, [B, T, D], and all layers' keys
    and values of it. `before` are those of a text before; bias and mask for them are `seen`."""
    x = self.token_embedder(tokens, virtual_embeddings)
    if self.config.max_positions is not None:
      x += self.position_embedder(positions)  # A position that has no row is NaN, as an id is.
    x = self.drop(x, deterministic=deterministic)
    return layer_stack.run(self.layers, self.config.num_layers, x, before, tokens, bias, mask,
                           deterministic, seen, cache_index, cache_length, virtual_embeddings,
                           prefix, adapters)

  def logits(self, x: Array, deterministic: bool) -> Array:
    """[B, S, D] -> [B, S, V] float32."""
    cfg = self.config
    x = self.drop(self.decoder_norm(x), deterministic=deterministic)
    if cfg.logits_via_embedding and cfg.scale_logits:
      x *= cfg.emb_dim ** -0.5
    outputs = self.logits_dense(x)
    return outputs if cfg.has_padding_row else outputs.at[..., 0].set(masks.MASKED)


def _last_inputs(encoder_input_tokens: Array, seen: Array) -> tuple[Array, Array]:
  """Which inputs the targets continue, and which they see.

  Args:
    encoder_input_tokens: [B, T] int.
    seen: [B, S, T] bool, the inputs of each target's example.

  Returns:
    ([B, S] int32, the token x_n of each target's example, 0 if it has no inputs;
    [B, S, T] bool, its tokens x_1 … x_(n-1)).
  """
  places = jnp.arange(encoder_input_tokens.shape[1])
  last = jnp.max(jnp.where(seen, places, -1), axis=-1, keepdims=True, initial=-1)
  is_last = places == last
  tokens = jnp.sum(jnp.where(is_last, encoder_input_tokens[:, None], 0), axis=-1)
  return tokens, seen & ~is_last


class DecoderOnly(nn.Module):
  """A decoder-only network with the methods, arguments and batches of `t5.Transformer`.

  `virtual_embeddings`, `prefix` (place 'decoder') and `adapters` are as there; a virtual token
  takes a position, a prefix none. Token id 0 is padding. Live tokens of an example stand side by
  side; positions are counted from them and start again in each segment, so position arguments
  change nothing. An example with more tokens than there are learned positions is NaN.
  """

  config: GPTConfig

  def setup(self):
    self.decoder = Decoder(self.config)

  def encode(self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None,
             encoder_positions: Array | None = None, enable_dropout: bool = True, *,
             virtual_embeddings: Array | None = None, prefix: Prefix = NO_PREFIX,
             adapters: Adapters = NO_ADAPTERS) -> PyTree:
    """encoder_input_tokens: [B, T] int32 -> keys [B, N, H, T] and values [B, N, T, H] by layer:
    a list, or {'layers': …} with the layer's axis first where they are scanned."""
    del encoder_positions
    length = encoder_input_tokens.shape[1]
    live = encoder_input_tokens > 0
    mask = _causal_mask(live, encoder_segment_ids)
    # Side by side in their segment, tokens are as far apart as in the row: one bias does for all.
    bias = self.decoder.bias(jnp.arange(length), jnp.arange(length))
    _, kept = self.decoder(
        encoder_input_tokens, masks.positions(live, encoder_segment_ids), bias, mask,
        not enable_dropout, virtual_embeddings=virtual_embeddings, prefix=prefix,
        adapters=adapters)
    return kept

  def decode(self, encoded: PyTree, encoder_input_tokens: Array,
             decoder_input_tokens: Array, decoder_target_tokens: Array,
             encoder_segment_ids: Array | None = None, decoder_segment_ids: Array | None = None,
             decoder_positions: Array | None = None, enable_dropout: bool = True,
             decode: bool = False, max_decode_length: int | None = None, *,
             virtual_embeddings: Array | None = None, prefix: Prefix = NO_PREFIX,
             adapters: Adapters = NO_ADAPTERS) -> Array:
    """encoded: of `encode`, the tokens: [B, T] and [B, S] int32 -> logits [B, S, V] float32.

    With `decode` the variables need a mutable `cache`: the first call makes an empty one of
    max_decode_length (default S) positions; each later call appends the S positions and attends to
    all that came before. Decoder segments without encoder segments are several targets of one
    input (candidates).
    """
    del decoder_positions
    if decode and (encoder_segment_ids is not None or decoder_segment_ids is not None):
      raise ValueError('Packed rows cannot be decoded step by step: give one example a row.')
    if encoder_segment_ids is not None and decoder_segment_ids is None:
      raise ValueError('Packed inputs need decoder_segment_ids too: which targets are whose?')
    size = decoder_input_tokens.shape[1]
    queries = keys = jnp.arange(size)
    index = length = None
    if decode:
      length = max_decode_length or size
      index = layer_stack.advance(self, size)
      if index is not None:
        queries, keys = index + queries, jnp.arange(length)
      live = jnp.ones_like(decoder_input_tokens, bool)
      mask, offsets = masks.causal(queries, keys), queries[None]
    else:
      live = decoder_target_tokens > 0
      mask = _causal_mask(live, decoder_segment_ids)
      offsets = masks.positions(live, decoder_segment_ids)
    input_live = encoder_input_tokens > 0
    seen = masks.pairwise(live, input_live)
    if encoder_segment_ids is not None:
      seen &= masks.same_segment(decoder_segment_ids, encoder_segment_ids)
    last_tokens, seen = _last_inputs(encoder_input_tokens, seen[:, 0])
    tokens = jnp.where(offsets == 0, last_tokens, decoder_input_tokens)
    positions = jnp.sum(seen, axis=-1) + offsets
    input_bias = self.decoder.bias(positions, masks.positions(input_live, encoder_segment_ids))
    x, _ = self.decoder(
        tokens, positions, self.decoder.bias(queries, keys), mask, not enable_dropout, encoded,
        (input_bias, seen[:, None]), index, length, virtual_embeddings, prefix, adapters)
    return self.decoder.logits(x, not enable_dropout)

  def __call__(self, encoder_input_tokens: Array, decoder_input_tokens: Array,
               decoder_target_tokens: Array, encoder_segment_ids: Array | None = None,
               decoder_segment_ids: Array | None = None, encoder_positions: Array | None = None,
               decoder_positions: Array | None = None, enable_dropout: bool = True,
               decode: bool = False, *, virtual_embeddings: Array | None = None,
               prefix: Prefix = NO_PREFIX, adapters: Adapters = NO_ADAPTERS) -> Array:
    """Tokens [B, T] and [B, S] int32 -> logits [B, S, V] float32 (teacher forcing)."""
    added = dict(virtual_embeddings=virtual_embeddings, prefix=prefix, adapters=adapters)
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, encoder_positions,
                          enable_dropout, **added)
    return self.decode(encoded, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
                       encoder_segment_ids, decoder_segment_ids, decoder_positions, enable_dropout,
                       decode, **added)


def _causal_mask(live: Array, segments: Array | None) -> Array:
  """[B, T] bool, [B, T] int -> [B, 1, T, T] bool: no later token, none of another segment."""
  places = jnp.arange(live.shape[1])
  mask = masks.causal(places, places) & masks.keys(live)
  return mask if segments is None else mask & masks.same_segment(segments, segments)

"""The T5 encoder-decoder: T5 1.0, T5 1.1, LM-adapted, Flan, mT5, ByT5 (Raffel et al. 2020).

Parameter names and logical axes are T5X's, verbatim: they are a public checkpoint format.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.networks import (
    fused_attention,
    layer_stack,
    layers,
    masks,
    relative_position,
)
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.attention import MultiHeadAttention
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.networks.relative_position import RelativePositionBias
from prompt_tuning_jax.types import Array

NO_PREFIX = Prefix()
NO_ADAPTERS = Adapters()


@dataclasses.dataclass(frozen=True)
class T5Config:
  """The shape of a T5 network, under T5X's names.

  `vocab_size` counts the rows of the embedding table (32,128 for T5), not the pieces of the
  vocabulary. `logits_via_embedding` ties the output layer to the embedding table and scales its
  input by emb_dim ** -0.5 (T5 1.0). `dtype` is that of activations; parameters keep theirs.
  `scan_layers` and `remat_policy` (`networks.layer_stack`) and `attention`
  (`networks.fused_attention`) say how layers are run, not what they compute.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  num_encoder_layers: int
  num_decoder_layers: int
  head_dim: int
  mlp_dim: int
  mlp_activations: tuple[str, ...] = ('gelu', 'linear')
  dropout_rate: float = 0.1
  logits_via_embedding: bool = False
  dtype: str = 'float32'
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  scan_layers: bool = False
  remat_policy: str = 'none'
  attention: str = 'xla'

  def __post_init__(self):
    layer_stack.check(self)
    relative_position.check(self, bidirectional=True)

  is_masked_lm = False  # whether it answers under the inputs' masks, and decodes nothing
  max_positions = None  # Positions are relative: texts may be of any length.
  start_id = 0  # what the decoder reads first: padding
  embedding_stddev = 1.0  # of a new table
  # Where the embedding table is, and the modules that make each place's keys and values.
  embedding = 'token_embedder/embedding'
  output = 'decoder/logits_dense/kernel'  # no leaf where it is tied to the embedding table
  attention_modules = {'encoder': ('encoder', 'attention'),
                       'decoder': ('decoder', 'self_attention'),
                       'cross': ('decoder', 'encoder_decoder_attention')}
  prompted_stack = 'encoder'  # the module whose `layers_…` the inputs go through

  @property
  def attentions(self) -> dict[str, int]:
    """How many attentions of each place (`networks.prefix`) there are."""
    return {'encoder': self.num_encoder_layers, 'decoder': self.num_decoder_layers,
            'cross': self.num_decoder_layers}

  @property
  def sublayers(self) -> dict[str, int]:
    """How many sub-layers of each place (`networks.adapters`) there are."""
    return {'encoder_attention': self.num_encoder_layers, 'encoder_mlp': self.num_encoder_layers,
            'decoder_attention': self.num_decoder_layers,
            'cross_attention': self.num_decoder_layers, 'decoder_mlp': self.num_decoder_layers}

  @property
  def prompted_layers(self) -> int:
    """How many layers the inputs, and a prompt among them, go through."""
    return self.num_encoder_layers

  def network(self) -> 'Transformer':
    """The network of this shape."""
    return Transformer(self)


def _norm(cfg: T5Config, name: str) -> layers.LayerNorm:
  return layers.LayerNorm(jnp.dtype(cfg.dtype), name=name)


def _attention(cfg: T5Config, name: str) -> MultiHeadAttention:
  return MultiHeadAttention(cfg.num_heads, cfg.head_dim, cfg.dropout_rate, jnp.dtype(cfg.dtype),
                            implementation=cfg.attention, name=name)


def _mlp(cfg: T5Config) -> layers.MlpBlock:
  return layers.MlpBlock(cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, jnp.dtype(cfg.dtype),
                         name='mlp')


def _position_bias(cfg: T5Config, bidirectional: bool) -> RelativePositionBias:
  return RelativePositionBias(
      cfg.num_heads, cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance,
      bidirectional, jnp.dtype(cfg.dtype), name='relpos_bias')


class EncoderLayer(nn.Module):
  config: T5Config

  @nn.compact
  def __call__(self, x: Array, own: tuple[Array | int, None], tokens: Array, bias: Array,
               mask: Array, deterministic: bool, virtual_embeddings: Array | None, prefix: Prefix,
               adapters: Adapters) -> tuple[Array, None]:
    """x: [B, T, D], tokens: [B, T], bias: [1 or B, N, T, T], mask: [B, 1, 1 or T, T] ->
    [B, T, D]."""
    cfg, (layer, _) = self.config, own
    drop = functools.partial(layers.dropout(cfg.dropout_rate), deterministic=deterministic)
    x = layers.virtual_of_layer(x, tokens, virtual_embeddings, layer, cfg.vocab_size)
    y = _norm(cfg, 'pre_attention_layer_norm')(x)
    y = drop(_attention(cfg, 'attention')(y, y, bias, mask, deterministic=deterministic,
                                          prefix=prefix.at('encoder', layer)))
    x += adapters.at('encoder_attention', layer)(y)
    y = _norm(cfg, 'pre_mlp_layer_norm')(x)
    x += adapters.at('encoder_mlp', layer)(drop(_mlp(cfg)(y, deterministic)))
    return partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed')), None


class Encoder(nn.Module):
  config: T5Config

  @nn.compact
  def __call__(self, x: Array, tokens: Array, segments: Array | None, mask: Array,
               deterministic: bool, virtual_embeddings: Array | None = None,
               prefix: Prefix = NO_PREFIX, adapters: Adapters = NO_ADAPTERS) -> Array:
    """tokens: [B, T], embedded x: [B, T, D], mask: [B, 1, 1 or T, T] -> [B, T, D]."""
    del segments  # Their tokens are as far apart as in the row.
    cfg = self.config
    positions = jnp.arange(x.shape[1])
    bias, mask = fused_attention.with_mask(
        cfg.attention, _position_bias(cfg, bidirectional=True)(positions, positions), mask)
    x = layers.dropout(cfg.dropout_rate)(x, deterministic=deterministic)
    stack = layer_stack.make(EncoderLayer, cfg, cfg.num_encoder_layers, static=(6,), shared=7,
                             name='layers')
    x, _ = layer_stack.run(stack, cfg.num_encoder_layers, x, None, tokens, bias, mask,
                           deterministic, virtual_embeddings, prefix, adapters)
    x = _norm(cfg, 'encoder_norm')(x)
    return layers.dropout(cfg.dropout_rate, broadcast=False)(x, deterministic=deterministic)


class DecoderLayer(nn.Module):
  config: T5Config

  @nn.compact
  def __call__(self, x: Array, own: tuple[Array | int, None], encoded: Array, bias: Array,
               self_mask: Array | None, cross_mask: Array | None, deterministic: bool,
               cache_index: Array | None, cache_length: int | None, prefix: Prefix,
               adapters: Adapters) -> tuple[Array, None]:
    """x: [B, S, D], encoded: [B, T, D] -> [B, S, D]."""
    cfg, (layer, _) = self.config, own
    drop = functools.partial(layers.dropout(cfg.dropout_rate), deterministic=deterministic)
    y = _norm(cfg, 'pre_self_attention_layer_norm')(x)
    y = drop(_attention(cfg, 'self_attention')(
        y, y, bias, self_mask, deterministic=deterministic, cache_index=cache_index,
        cache_length=cache_length, prefix=prefix.at('decoder', layer)))
    x += adapters.at('decoder_attention', layer)(y)
    y = _norm(cfg, 'pre_cross_attention_layer_norm')(x)
    y = drop(_attention(cfg, 'encoder_decoder_attention')(
        y, encoded, None, cross_mask, deterministic=deterministic, cross=True,
        prefix=prefix.at('cross', layer)))
    x += adapters.at('cross_attention', layer)(y)
    y = _norm(cfg, 'pre_mlp_layer_norm')(x)
    x += adapters.at('decoder_mlp', layer)(drop(_mlp(cfg)(y, deterministic)))
    return partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed')), None


class Decoder(nn.Module):
  config: T5Config
  shared_embedding: layers.Embed  # the output layer, where it is tied

  @nn.compact
  def __call__(self, x: Array, encoded: Array, positions: Array | None, self_mask: Array | None,
               cross_mask: Array | None, deterministic: bool, decode: bool = False,
               max_decode_length: int | None = None, prefix: Prefix = NO_PREFIX,
               adapters: Adapters = NO_ADAPTERS) -> Array:
    """Embedded targets x: [B, S, D], encoded: [B, T, D] -> logits [B, S, V] float32.

    With `decode`, the first call makes an empty cache of max_decode_length (default S) positions;
    each later call appends the S positions of `x` and attends to all that came before.
    """
    del positions
    cfg = self.config
    query_positions = key_positions = jnp.arange(x.shape[1])
    index = length = None
    if decode:
      length = max_decode_length or x.shape[1]
      index = layer_stack.advance(self, x.shape[1])
      if index is not None:
        query_positions, key_positions = index + query_positions, jnp.arange(length)
      self_mask = masks.causal(query_positions, key_positions)
    bias = _position_bias(cfg, bidirectional=False)(query_positions, key_positions)
    x = layers.dropout(cfg.dropout_rate)(x, deterministic=deterministic)
    stack = layer_stack.make(DecoderLayer, cfg, cfg.num_decoder_layers, static=(7, 9), shared=9,
                             name='layers')
    x, _ = layer_stack.run(stack, cfg.num_decoder_layers, x, None, encoded, bias, self_mask,
                           cross_mask, deterministic, index, length, prefix, adapters)
    x = _norm(cfg, 'decoder_norm')(x)
    x = layers.dropout(cfg.dropout_rate)(x, deterministic=deterministic)
    if cfg.logits_via_embedding:
      return layers.TiedOutput(self.shared_embedding, name='logits_dense')(
          x * cfg.emb_dim ** -0.5)
    return layers.Dense(cfg.vocab_size, ('embed', 'vocab'), jnp.dtype(cfg.dtype),
                        out_dtype=jnp.float32, name='logits_dense')(x)


class Transformer(nn.Module):
  """An encoder-decoder with the methods of T5X's networks and three keyword arguments more.

  `virtual_embeddings` [R, D] are rows behind the embedding table: token id V + r embeds as row r,
  in the encoder's tokens and in the decoder's. Rows of every encoder layer, [L, R, D], take the
  place of what the layer below made at these tokens. `prefix` stands before the keys of attentions,
  `adapters` behind sub-layers. Token id 0 is padding. In packed batches attention stays within
  equal segment ids; positions are relative, or counted within a segment, so position arguments
  change nothing. Other stacks than T5's (`networks.bart`) have the same arguments; T5's take no
  notice of `segments` and `positions`.
  """

  config: Any
  encoder_stack: type[nn.Module] = Encoder
  decoder_stack: type[nn.Module] = Decoder

  @property
  def scan_layers(self) -> bool:
    """Read by T5X."""
    return self.config.scan_layers

  def setup(self):
    cfg = self.config
    self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, jnp.dtype(cfg.dtype),
                                       stddev=cfg.embedding_stddev)
    self.encoder = self.encoder_stack(cfg)
    self.decoder = self.decoder_stack(cfg, self.token_embedder)

  def encode(self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None,
             encoder_positions: Array | None = None, enable_dropout: bool = True, *,
             virtual_embeddings: Array | None = None, prefix: Prefix = NO_PREFIX,
             adapters: Adapters = NO_ADAPTERS, embedded: Array | None = None) -> Array:
    """encoder_input_tokens: [B, T] int32 -> [B, T, D].

    `embedded` are the tokens as `token_embedder` gives them, where the caller has them already.
    """
    del encoder_positions
    if embedded is None:
      embedded = self.token_embedder(encoder_input_tokens, virtual_embeddings)
    mask = masks.keys(encoder_input_tokens > 0)
    if encoder_segment_ids is not None:
      mask = mask & masks.same_segment(encoder_segment_ids, encoder_segment_ids)
    return self.encoder(embedded, encoder_input_tokens, encoder_segment_ids, mask,
                        not enable_dropout, virtual_embeddings, prefix, adapters)

  def decode(self, encoded: Array, encoder_input_tokens: Array, decoder_input_tokens: Array,
             decoder_target_tokens: Array, encoder_segment_ids: Array | None = None,
             decoder_segment_ids: Array | None = None, decoder_positions: Array | None = None,
             enable_dropout: bool = True, decode: bool = False,
             max_decode_length: int | None = None, *,
             virtual_embeddings: Array | None = None, prefix: Prefix = NO_PREFIX,
             adapters: Adapters = NO_ADAPTERS, embedded: Array | None = None) -> Array:
    """encoded: [B, T, D], the tokens: [B, T] and [B, S] int32 -> logits [B, S, V] float32.

    With `decode` the variables need a mutable `cache` (see `Decoder`), and masks come from it.
    Decoder segments without encoder segments are several targets of one input (candidates).
    `embedded` are the decoder's inputs as `token_embedder` gives them.
    """
    del decoder_positions
    if decode and (encoder_segment_ids is not None or decoder_segment_ids is not None):
      raise ValueError('Packed rows cannot be decoded step by step: give one example a row.')
    if encoder_segment_ids is not None and decoder_segment_ids is None:
      raise ValueError('Packed inputs need decoder_segment_ids too: which targets are whose?')
    self_mask = text_positions = None
    cross_mask = masks.keys(encoder_input_tokens > 0)
    if not decode:
      text_positions = masks.positions(decoder_target_tokens > 0, decoder_segment_ids)
      positions = jnp.arange(decoder_input_tokens.shape[1])
      self_mask = masks.causal(positions, positions)  # Padding stands behind: no target sees it.
    if decoder_segment_ids is not None:
      self_mask &= masks.same_segment(decoder_segment_ids, decoder_segment_ids)
      if encoder_segment_ids is not None:
        cross_mask = cross_mask & masks.same_segment(decoder_segment_ids, encoder_segment_ids)
    if embedded is None:
      embedded = self.token_embedder(self._started(decoder_input_tokens), virtual_embeddings)
    return self.decoder(embedded, encoded, text_positions, self_mask, cross_mask,
                        not enable_dropout, decode, max_decode_length, prefix, adapters)

  def _started(self, decoder_input_tokens: Array) -> Array:
    """The same with the id that the network starts from where a text begins."""
    start = self.config.start_id
    return decoder_input_tokens if not start else jnp.where(
        decoder_input_tokens == 0, start, decoder_input_tokens)

  def __call__(self, encoder_input_tokens: Array, decoder_input_tokens: Array,
               decoder_target_tokens: Array, encoder_segment_ids: Array | None = None,
               decoder_segment_ids: Array | None = None, encoder_positions: Array | None = None,
               decoder_positions: Array | None = None, enable_dropout: bool = True,
               decode: bool = False, *, virtual_embeddings: Array | None = None,
               prefix: Prefix = NO_PREFIX, adapters: Adapters = NO_ADAPTERS) -> Array:
    """Tokens [B, T] and [B, S] int32 -> logits [B, S, V] float32 (teacher forcing)."""
    # Looked up at once, so that devices sum up one gradient of a prompt's rows, not two.
    tokens = jnp.concatenate([encoder_input_tokens, self._started(decoder_input_tokens)], axis=1)
    inputs, targets = jnp.split(self.token_embedder(tokens, virtual_embeddings),
                                [encoder_input_tokens.shape[1]], axis=1)
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, encoder_positions,
                          enable_dropout, virtual_embeddings=virtual_embeddings, prefix=prefix,
                          adapters=adapters, embedded=inputs)
    return self.decode(encoded, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
                       encoder_segment_ids, decoder_segment_ids, decoder_positions, enable_dropout,
                       decode, virtual_embeddings=virtual_embeddings, prefix=prefix,
                       adapters=adapters, embedded=targets)

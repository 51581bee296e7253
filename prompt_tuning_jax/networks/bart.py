"""BART (Lewis et al. 2020): an encoder-decoder with learned positions, whose norms stand behind.

Parameter names and logical axes are T5X's where T5 has such a parameter, with `bias` beside
`kernel` or `scale`. What encodes and decodes, with packing, caches and prompts, is
`t5.Transformer`; here are its stacks. A norm stands behind each sub-layer and its residual (Vaswani
et al. 2017), and one behind the embeddings.

BART's padding has id 1 and its `<s>` id 0, which is padding in this package. So an id here is
Hugging Face's + 1; row 0 of the table is nobody's, and has no logit. The decoder starts from
`start_id`, `</s>`, and the first token of every text is `<s>`: that is the vocabulary's affair
(`data.vocabulary.Vocabulary.framed`).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.networks import layer_stack, layers, masks, t5
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.attention import MultiHeadAttention
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.types import Array

NO_PREFIX = Prefix()
NO_ADAPTERS = Adapters()


@dataclasses.dataclass(frozen=True)
class BartConfig:
  """The shape of a BART, under T5X's names.

  Args:
    vocab_size: rows of the embedding table, row 0 among them: Hugging Face's + 1.
    max_positions: the most tokens of an input, its prompt included, and of a target; the table has
      2 rows more, before the first position's.
    start_id: what the decoder reads before the first token: `</s>`.
    scan_layers, remat_policy, attention: how layers are run (`networks.layer_stack`,
      `networks.fused_attention`), not what they compute.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  num_encoder_layers: int
  num_decoder_layers: int
  head_dim: int
  mlp_dim: int
  max_positions: int = 1024
  mlp_activations: tuple[str, ...] = ('gelu_exact',)
  dropout_rate: float = 0.1
  dtype: str = 'float32'
  start_id: int = 3
  scan_layers: bool = False
  remat_policy: str = 'none'
  attention: str = 'xla'

  def __post_init__(self):
    layer_stack.check(self)

  is_masked_lm = False
  embedding_stddev = 0.02  # of a new table; a tied output layer does not scale its input
  layer_norm_epsilon = 1e-5
  position_offset = 2  # rows of the table of positions before that of the first
  embedding = t5.T5Config.embedding
  output = t5.T5Config.output
  attention_modules = t5.T5Config.attention_modules
  prompted_stack = t5.T5Config.prompted_stack
  attentions = t5.T5Config.attentions
  sublayers = t5.T5Config.sublayers
  prompted_layers = t5.T5Config.prompted_layers

  def positions_of(self, inputs: int, targets: int) -> int:
    """How many positions an example of so many tokens takes."""
    return max(inputs, targets)

  def network(self) -> t5.Transformer:
    """The network of this shape."""
    return t5.Transformer(self, Encoder, Decoder)


def norm(cfg: Any, name: str) -> layers.CentredLayerNorm:
  return layers.CentredLayerNorm(jnp.dtype(cfg.dtype), cfg.layer_norm_epsilon, name=name)


def _attention(cfg: Any, name: str) -> MultiHeadAttention:
  return MultiHeadAttention(cfg.num_heads, cfg.head_dim, cfg.dropout_rate, jnp.dtype(cfg.dtype),
                            use_bias=True, scale=True, implementation=cfg.attention, name=name)


def _mlp(cfg: Any) -> layers.MlpBlock:
  return layers.MlpBlock(cfg.mlp_dim, cfg.mlp_activations, cfg.dropout_rate, jnp.dtype(cfg.dtype),
                         use_bias=True, name='mlp')


def _placed(cfg: Any, x: Array, positions: Array, deterministic: bool) -> Array:
  """Embedded tokens [B, T, D] with their positions [B or 1, T]; NaN where there is no such."""
  rows = cfg.max_positions + cfg.position_offset
  embedder = layers.Embed(rows, cfg.emb_dim, jnp.dtype(cfg.dtype), ('abspos_buckets', 'embed'),
                          cfg.embedding_stddev, name='position_embedder')
  x = norm(cfg, 'embedding_layer_norm')(x + embedder(positions + cfg.position_offset))
  return layers.dropout(cfg.dropout_rate)(x, deterministic=deterministic)


class EncoderLayer(nn.Module):
  config: Any

  @nn.compact
  def __call__(self, x: Array, own: tuple[Array | int, None], tokens: Array, mask: Array,
               deterministic: bool, virtual_embeddings: Array | None, prefix: Prefix,
               adapters: Adapters) -> tuple[Array, None]:
    """x: [B, T, D], tokens: [B, T], mask: [B, 1, 1 or T, T] -> [B, T, D]."""
    cfg, (layer, _) = self.config, own
    drop = functools.partial(layers.dropout(cfg.dropout_rate), deterministic=deterministic)
    x = layers.virtual_of_layer(x, tokens, virtual_embeddings, layer, cfg.vocab_size)
    y = drop(_attention(cfg, 'attention')(x, x, None, mask, deterministic=deterministic,
                                          prefix=prefix.at('encoder', layer)))
    x = norm(cfg, 'post_attention_layer_norm')(x + adapters.at('encoder_attention', layer)(y))
    y = drop(_mlp(cfg)(x, deterministic))
    x = norm(cfg, 'post_mlp_layer_norm')(x + adapters.at('encoder_mlp', layer)(y))
    return partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed')), None


class Encoder(nn.Module):
  """Positions, norm and layers: BART's encoder, and BERT but for its segments and its head."""

  config: Any

  @nn.compact
  def __call__(self, x: Array, tokens: Array, segments: Array | None, mask: Array,
               deterministic: bool, virtual_embeddings: Array | None = None,
               prefix: Prefix = NO_PREFIX, adapters: Adapters = NO_ADAPTERS) -> Array:
    """tokens: [B, T], embedded x: [B, T, D], segments: [B, T], mask: [B, 1, 1 or T, T] ->
    [B, T, D]."""
    cfg = self.config
    x = _placed(cfg, x, masks.positions(tokens > 0, segments), deterministic)
    stack = layer_stack.make(EncoderLayer, cfg, cfg.num_encoder_layers, static=(5,), shared=6,
                             name='layers')
    return layer_stack.run(stack, cfg.num_encoder_layers, x, None, tokens, mask, deterministic,
                           virtual_embeddings, prefix, adapters)[0]


class DecoderLayer(nn.Module):
  config: BartConfig

  @nn.compact
  def __call__(self, x: Array, own: tuple[Array | int, None], encoded: Array,
               self_mask: Array, cross_mask: Array, deterministic: bool,
               cache_index: Array | None, cache_length: int | None, prefix: Prefix,
               adapters: Adapters) -> tuple[Array, None]:
    """x: [B, S, D], encoded: [B, T, D] -> [B, S, D]."""
    cfg, (layer, _) = self.config, own
    drop = functools.partial(layers.dropout(cfg.dropout_rate), deterministic=deterministic)
    y = drop(_attention(cfg, 'self_attention')(
        x, x, None, self_mask, deterministic=deterministic, cache_index=cache_index,
        cache_length=cache_length, prefix=prefix.at('decoder', layer)))
    x = norm(cfg, 'post_self_attention_layer_norm')(
        x + adapters.at('decoder_attention', layer)(y))
    y = drop(_attention(cfg, 'encoder_decoder_attention')(
        x, encoded, None, cross_mask, deterministic=deterministic, cross=True,
        prefix=prefix.at('cross', layer)))
    x = norm(cfg, 'post_cross_attention_layer_norm')(x + adapters.at('cross_attention', layer)(y))
    y = drop(_mlp(cfg)(x, deterministic))
    x = norm(cfg, 'post_mlp_layer_norm')(x + adapters.at('decoder_mlp', layer)(y))
    return partitioning.with_sharding_constraint(x, ('batch', 'length', 'embed')), None


class Decoder(nn.Module):
  config: BartConfig
  shared_embedding: layers.Embed  # the output layer

  @nn.compact
  def __call__(self, x: Array, encoded: Array, positions: Array | None, self_mask: Array | None,
               cross_mask: Array, deterministic: bool, decode: bool = False,
               max_decode_length: int | None = None, prefix: Prefix = NO_PREFIX,
               adapters: Adapters = NO_ADAPTERS) -> Array:
    """Embedded targets x: [B, S, D], encoded: [B, T, D] -> logits [B, S, V] float32.

    With `decode` positions and mask come from the cache, as of `t5.Decoder`.
    """
    cfg = self.config
    index = length = None
    if decode:
      length = max_decode_length or x.shape[1]
      queries = keys = jnp.arange(x.shape[1])
      index = layer_stack.advance(self, x.shape[1])
      if index is not None:
        queries, keys = index + queries, jnp.arange(length)
      self_mask, positions = masks.causal(queries, keys), queries[None]
    x = _placed(cfg, x, positions, deterministic)
    stack = layer_stack.make(DecoderLayer, cfg, cfg.num_decoder_layers, static=(6, 8), shared=8,
                             name='layers')
    x, _ = layer_stack.run(stack, cfg.num_decoder_layers, x, None, encoded, self_mask, cross_mask,
                           deterministic, index, length, prefix, adapters)
    bias = partitioning.param_with_axes('logits_bias', nn.initializers.zeros, (cfg.vocab_size,),
                                        jnp.float32, axes=('vocab',))
    outputs = layers.TiedOutput(self.shared_embedding, name='logits_dense')(x)
    return (outputs + bias).at[..., 0].set(masks.MASKED)

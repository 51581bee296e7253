"""BERT with its masked-LM head (Devlin et al. 2019), as a network that fills in a text.

An example is a text with masks, and its targets are what stands under them, in their order, with
the end of a text behind. So whatever makes batches, packs them, ranks labels or decodes need not
know that there is no decoder: `encode` runs the layers; the j-th target of a text is foretold at
its j-th mask, and `decode` makes the logits there. Targets do not see each other. Behind the last
mask a text ends, for certain: a text of n masks has at most n tokens, and the probabilities of all
texts sum to 1. A label of fewer tokens than there are masks is followed by the end ([SEP]) at the
next mask.

Ids are Hugging Face's, whose padding is 0 too. A token's segment (token type) is the number of
[SEP] before it: 'text [SEP] other text' is a pair.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import partitioning

from prompt_tuning_jax.networks import bart, layer_stack, layers, masks
from prompt_tuning_jax.networks.adapters import Adapters
from prompt_tuning_jax.networks.prefix import Prefix
from prompt_tuning_jax.types import Array

NO_PREFIX = Prefix()
NO_ADAPTERS = Adapters()


@dataclasses.dataclass(frozen=True)
class BertConfig:
  """The shape of a BERT, under T5X's names.

  Args:
    max_positions: the most tokens of an input, its prompt included.
    num_types: rows of the table of segments.
    mask_id, end_id: [MASK] and [SEP] of the vocabulary, which has the last word
      (`checkpoints.base_checkpoint`).
    scan_layers, remat_policy, attention: how layers are run (`networks.layer_stack`,
      `networks.fused_attention`), not what they compute.
  """

  vocab_size: int
  emb_dim: int
  num_heads: int
  num_encoder_layers: int
  head_dim: int
  mlp_dim: int
  max_positions: int = 512
  num_types: int = 2
  mlp_activations: tuple[str, ...] = ('gelu_exact',)
  dropout_rate: float = 0.1
  dtype: str = 'float32'
  mask_id: int = 103
  end_id: int = 102
  scan_layers: bool = False
  remat_policy: str = 'none'
  attention: str = 'xla'

  def __post_init__(self):
    layer_stack.check(self)

  is_masked_lm = True
  embedding_stddev = 0.02  # of new tables
  layer_norm_epsilon = 1e-12
  position_offset = 0
  embedding = 'token_embedder/embedding'
  output = 'head/logits_dense/kernel'
  attention_modules = {'encoder': ('encoder', 'attention')}
  prompted_stack = 'encoder'

  @property
  def attentions(self) -> dict[str, int]:
    """How many attentions of each place (`networks.prefix`) there are."""
    return {'encoder': self.num_encoder_layers}

  @property
  def sublayers(self) -> dict[str, int]:
    """How many sub-layers of each place (`networks.adapters`) there are."""
    return {'encoder_attention': self.num_encoder_layers, 'encoder_mlp': self.num_encoder_layers}

  @property
  def prompted_layers(self) -> int:
    """How many layers the inputs, and a prompt among them, go through."""
    return self.num_encoder_layers

  def positions_of(self, inputs: int, targets: int) -> int:
    """How many positions an example of so many tokens takes: targets stand under masks."""
    del targets
    return inputs

  def network(self) -> 'MaskedLM':
    """The network of this shape."""
    return MaskedLM(self)


class MaskedLM(nn.Module):
  """BERT with the methods, arguments and batches of `t5.Transformer`.

  `virtual_embeddings`, `prefix` (place 'encoder') and `adapters` are as there. Token id 0 is
  padding. Positions and segments are counted in each example of a packed row, so position
  arguments change nothing.
  """

  config: BertConfig

  def setup(self):
    cfg, dtype = self.config, jnp.dtype(self.config.dtype)
    self.token_embedder = layers.Embed(cfg.vocab_size, cfg.emb_dim, dtype,
                                       stddev=cfg.embedding_stddev)
    self.type_embedder = layers.Embed(cfg.num_types, cfg.emb_dim, dtype, ('token_types', 'embed'),
                                      cfg.embedding_stddev)
    self.encoder = bart.Encoder(cfg)
    self.head = Head(cfg, self.token_embedder)

  def encode(self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None,
             encoder_positions: Array | None = None, enable_dropout: bool = True, *,
             virtual_embeddings: Array | None = None, prefix: Prefix = NO_PREFIX,
             adapters: Adapters = NO_ADAPTERS) -> Array:
    """encoder_input_tokens: [B, T] int32 -> [B, T, D]."""
    del encoder_positions
    cfg, tokens, segments = self.config, encoder_input_tokens, encoder_segment_ids
    mask, ends = masks.keys(tokens > 0), tokens == cfg.end_id
    if segments is not None:
      mask = mask & masks.same_segment(segments, segments)
    types = jnp.minimum(masks.count_before(ends, segments), cfg.num_types - 1)
    x = self.token_embedder(tokens, virtual_embeddings) + self.type_embedder(types)
    return self.encoder(x, tokens, segments, mask, not enable_dropout, virtual_embeddings, prefix,
                        adapters)

  def decode(self, encoded: Array, encoder_input_tokens: Array, decoder_input_tokens: Array,
             decoder_target_tokens: Array, encoder_segment_ids: Array | None = None,
             decoder_segment_ids: Array | None = None, decoder_positions: Array | None = None,
             enable_dropout: bool = True, decode: bool = False,
             max_decode_length: int | None = None, *,
             virtual_embeddings: Array | None = None, prefix: Prefix = NO_PREFIX,
             adapters: Adapters = NO_ADAPTERS) -> Array:
    """encoded: [B, T, D], the tokens: [B, T] and [B, S] int32 -> logits [B, S, V] float32.

    With `decode` the variables need a mutable `cache`, which counts the targets so far. Decoder
    segments without encoder segments are several targets of one input (candidates).
    """
    del decoder_positions, enable_dropout, max_decode_length, virtual_embeddings, prefix, adapters
    if decode and (encoder_segment_ids is not None or decoder_segment_ids is not None):
      raise ValueError('Packed rows cannot be decoded step by step: give one example a row.')
    if encoder_segment_ids is not None and decoder_segment_ids is None:
      raise ValueError('Packed inputs need decoder_segment_ids too: which targets are whose?')
    if decode:
      index = layer_stack.advance(self, decoder_input_tokens.shape[1])
      places = (0 if index is None else index) + jnp.arange(decoder_input_tokens.shape[1])
      places = jnp.broadcast_to(places, decoder_input_tokens.shape)
    else:
      places = masks.positions(decoder_target_tokens > 0, decoder_segment_ids)
    is_mask = encoder_input_tokens == self.config.mask_id
    number = masks.count_before(is_mask, encoder_segment_ids)
    here = is_mask[:, None] & (number[:, None] == places[:, :, None])  # [B, S, T]
    if encoder_segment_ids is not None:
      here &= masks.same_segment(decoder_segment_ids, encoder_segment_ids)[:, 0]
    states = jnp.take_along_axis(encoded, jnp.argmax(here, axis=-1)[..., None], axis=1)
    return jnp.where(jnp.any(here, axis=-1, keepdims=True), self.head(states), self._end())

  def _end(self) -> Array:
    """[V]: logits of the end of a text, for certain."""
    ids = jnp.arange(self.config.vocab_size)
    return jnp.where(ids == self.config.end_id, 0.0, masks.MASKED)

  def __call__(self, encoder_input_tokens: Array, decoder_input_tokens: Array,
               decoder_target_tokens: Array, encoder_segment_ids: Array | None = None,
               decoder_segment_ids: Array | None = None, encoder_positions: Array | None = None,
               decoder_positions: Array | None = None, enable_dropout: bool = True,
               decode: bool = False, *, virtual_embeddings: Array | None = None,
               prefix: Prefix = NO_PREFIX, adapters: Adapters = NO_ADAPTERS) -> Array:
    """Tokens [B, T] and [B, S] int32 -> logits [B, S, V] float32."""
    encoded = self.encode(encoder_input_tokens, encoder_segment_ids, encoder_positions,
                          enable_dropout, virtual_embeddings=virtual_embeddings, prefix=prefix,
                          adapters=adapters)
    return self.decode(encoded, encoder_input_tokens, decoder_input_tokens, decoder_target_tokens,
                       encoder_segment_ids, decoder_segment_ids, decoder_positions, enable_dropout,
                       decode)


class Head(nn.Module):
  """What foretells a masked token: a layer, a norm, and the embedding table with a bias."""

  config: BertConfig
  shared_embedding: layers.Embed

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, S, D] -> [B, S, V] float32."""
    cfg = self.config
    x = layers.Dense(cfg.emb_dim, ('embed', 'mlp'), jnp.dtype(cfg.dtype), use_bias=True,
                     name='transform')(x)
    x = bart.norm(cfg, 'layer_norm')(layers.ACTIVATIONS[cfg.mlp_activations[0]](x))
    bias = partitioning.param_with_axes('logits_bias', nn.initializers.zeros, (cfg.vocab_size,),
                                        jnp.float32, axes=('vocab',))
    return layers.TiedOutput(self.shared_embedding, name='logits_dense')(x) + bias

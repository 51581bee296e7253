"""T5 and mT5 as Hugging Face stores them.

Kernels are transposed there, the relative-position table too ([buckets, N]); norms and the
embedding are as in T5X. An output layer of its own (T5 1.1, mT5) is `lm_head.weight`.
"""

import dataclasses
import functools
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax.checkpoints import hf_family
from prompt_tuning_jax.checkpoints.hf_family import Family, Json, Leaves, Tensor
from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf, is_copy, transposed
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.networks.t5 import T5Config

LAYER_NORM_EPSILON = 1e-6
# Hugging Face's names of the activations, in `feed_forward_proj`. Its 'gated-gelu' is the tanh
# approximation, which is this package's 'gelu'; its plain 'gelu' is not.
ACTIVATIONS = {
    'relu': ('relu',), 'silu': ('silu',), 'gelu_new': ('gelu',), 'gated-relu': ('relu', 'linear'),
    'gated-silu': ('silu', 'linear'), 'gated-gelu': ('gelu', 'linear'),
    'gated-gelu_new': ('gelu', 'linear'),
}
FEED_FORWARD = {('gelu', 'linear'): 'gated-gelu'} | {v: k for k, v in reversed(ACTIVATIONS.items())
                                                    if v != ('gelu', 'linear')}

EMBEDDING, LOGITS = 'token_embedder/embedding', 'decoder/logits_dense/kernel'

_WHOLE = {EMBEDDING: 'shared.weight', LOGITS: 'lm_head.weight'}
for _side in ('encoder', 'decoder'):
  _WHOLE[f'{_side}/{_side}_norm/scale'] = f'{_side}.final_layer_norm.weight'
  _WHOLE[f'{_side}/relpos_bias/rel_embedding'] = (
      f'{_side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight')
_PARTS = {
    'encoder/attention': 'layer.0.SelfAttention',
    'encoder/pre_attention_layer_norm': 'layer.0.layer_norm',
    'encoder/mlp': 'layer.1.DenseReluDense',
    'encoder/pre_mlp_layer_norm': 'layer.1.layer_norm',
    'decoder/self_attention': 'layer.0.SelfAttention',
    'decoder/pre_self_attention_layer_norm': 'layer.0.layer_norm',
    'decoder/encoder_decoder_attention': 'layer.1.EncDecAttention',
    'decoder/pre_cross_attention_layer_norm': 'layer.1.layer_norm',
    'decoder/mlp': 'layer.2.DenseReluDense',
    'decoder/pre_mlp_layer_norm': 'layer.2.layer_norm',
}
_KERNELS = {'query': 'q', 'key': 'k', 'value': 'v', 'out': 'o'}
# Copies of shared.weight, and a table that early T5 files hold and no network reads.
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight')
_UNUSED = 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'


def name_of(path: str) -> str:
  """'encoder/layers_0/attention/query/kernel' ->
  'encoder.block.0.layer.0.SelfAttention.q.weight'."""
  if path in _WHOLE:
    return _WHOLE[path]
  match = re.fullmatch(r'(encoder|decoder)/layers_(\d+)/(\w+)/(?:(\w+)/kernel|scale)', path)
  if not match or f'{match[1]}/{match[3]}' not in _PARTS:
    raise ValueError(f'{path} is no parameter of T5.')
  side, layer, part, kernel = match.groups()
  parts = [side, 'block', layer, _PARTS[f'{side}/{part}']]
  return '.'.join(parts + ([_KERNELS.get(kernel, kernel)] if kernel else []) + ['weight'])


def _is_transposed(path: str) -> bool:
  return path.endswith(('/kernel', '/rel_embedding'))


def read_config(path: pathlib.Path, config: Json, *, is_tied: bool, feed_forward: str) -> T5Config:
  """The network that config.json describes.

  Args:
    is_tied: whether the embedding may be the output layer.
    feed_forward: its `feed_forward_proj` where config.json has none.
  """
  hf_family.expect(path, config, layer_norm_epsilon=LAYER_NORM_EPSILON)
  positive = functools.partial(hf_family.positive, path, config)
  layers = positive('num_layers', 6, most=hf_family.MOST_LAYERS)
  fields = dict(
      vocab_size=positive('vocab_size', 32128),
      emb_dim=positive('d_model', 512),
      num_heads=positive('num_heads', 8),
      num_encoder_layers=layers,
      num_decoder_layers=positive('num_decoder_layers', layers, most=hf_family.MOST_LAYERS),
      head_dim=positive('d_kv', 64),
      mlp_dim=positive('d_ff', 2048),
      mlp_activations=_activations(path, config, feed_forward),
      dropout_rate=hf_family.rate(path, config, 'dropout_rate'),
      logits_via_embedding=is_tied and config.get('tie_word_embeddings', True) is not False
      and config.get('scale_decoder_outputs', True) is not False,
      relative_attention_num_buckets=positive('relative_attention_num_buckets', 32),
      relative_attention_max_distance=positive('relative_attention_max_distance', 128))
  try:
    return T5Config(**fields)
  except ValueError as error:  # Each is a number, but together they are no network.
    raise ValueError(f'{path}: {error}') from None


def _activations(path: pathlib.Path, config: Json, default: str) -> tuple[str, ...]:
  name = config.get('feed_forward_proj', default)
  if not isinstance(name, str) or name not in ACTIVATIONS:
    raise ValueError(f'{path}: feed_forward_proj is {name!r}, expected one of '
                     f'{sorted(ACTIVATIONS)}.')
  return ACTIVATIONS[name]


def config_json(config: T5Config, leaves: Leaves, vocabulary=None) -> Json:
  """What Hugging Face reads the network from."""
  del vocabulary
  if config.mlp_activations not in FEED_FORWARD:
    raise ValueError(f'Hugging Face has no name for the activations {config.mlp_activations}.')
  return {
      'architectures': ['T5ForConditionalGeneration'], 'model_type': 't5',
      'vocab_size': config.vocab_size, 'd_model': config.emb_dim, 'd_kv': config.head_dim,
      'd_ff': config.mlp_dim, 'num_heads': config.num_heads,
      'num_layers': config.num_encoder_layers, 'num_decoder_layers': config.num_decoder_layers,
      'feed_forward_proj': FEED_FORWARD[config.mlp_activations],
      'relative_attention_num_buckets': config.relative_attention_num_buckets,
      'relative_attention_max_distance': config.relative_attention_max_distance,
      'dropout_rate': config.dropout_rate, 'layer_norm_epsilon': LAYER_NORM_EPSILON,
      'tie_word_embeddings': config.logits_via_embedding, 'is_encoder_decoder': True,
      'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0,
      'torch_dtype': jnp.dtype(leaves[EMBEDDING].dtype).name,
  }


def canonical(tensors: dict[str, StoredLeaf], described: Json, config: T5Config,
              is_given: bool) -> tuple[T5Config, dict[str, StoredLeaf]]:
  """(the network, {canonical path: leaf}); see `hf_family.Family`.

  The embedding's rows are the file's, and the output layer is tied exactly where the file has no
  lm_head.weight of its own: transformers 5 writes `tie_word_embeddings: true` for every T5.
  """
  del described
  tensors.pop(_UNUSED, None)
  copies = [tensors.pop(name) for name in _COPIES if name in tensors]
  if copies:
    tensors.setdefault('shared.weight', copies[0])
  shared, head = tensors.get('shared.weight'), tensors.get('lm_head.weight')
  if not is_given:
    if shared and len(shared.shape) == 2:
      config = dataclasses.replace(config, vocab_size=shared.shape[0])
    if head and config.logits_via_embedding and not is_copy(shared, head):
      config = dataclasses.replace(config, logits_via_embedding=False)
  if config.logits_via_embedding and is_copy(shared, head):
    del tensors['lm_head.weight']
  paths = {name_of(path): path for path in parameter_specs(config)}
  stored = {paths.get(name, name): leaf for name, leaf in tensors.items()}
  return config, {path: transposed(leaf) if _is_transposed(path) else leaf
                  for path, leaf in stored.items()}


def tensors(leaves: Leaves) -> dict[str, Tensor]:
  """{name: tensor}; leaves keep their dtype."""
  return {name_of(path): hf_family.tensor(path, leaf, np.transpose) if _is_transposed(path)
          else hf_family.tensor(path, leaf) for path, leaf in leaves.items()}


_SENTENCEPIECE = ('spiece.model', 'sentencepiece.model', 'tokenizer.model')
T5 = Family('t5', T5Config, _SENTENCEPIECE, 100,
            functools.partial(read_config, is_tied=True, feed_forward='relu'), config_json,
            lambda config: config.mlp_activations in FEED_FORWARD, name_of, canonical, tensors)
# Its 100 sentinels are pieces of its vocabulary.
MT5 = dataclasses.replace(T5, model_type='mt5', extra_ids=0, read_config=functools.partial(
    read_config, is_tied=False, feed_forward='gated-gelu'))

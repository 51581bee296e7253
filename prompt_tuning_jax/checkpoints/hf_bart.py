"""BART (Lewis et al. 2020) as Hugging Face stores it.

Its kernels are transposed there. Padding has id 1 there and `<s>` id 0, while 0 is padding
everywhere in this package; so an id here is Hugging Face's + 1. Table and logits' bias have one row
more, row 0: zeros, which no network reads and which are not written.
"""

import dataclasses
import functools
import pathlib
import re

import jax.numpy as jnp
import numpy as np

from prompt_tuning_jax import tokenizer_file
from prompt_tuning_jax.checkpoints import hf_family, stored_leaf
from prompt_tuning_jax.checkpoints.hf_family import Family, Json, Leaves, Tensor
from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf
from prompt_tuning_jax.networks.bart import BartConfig
from prompt_tuning_jax.networks.parameters import parameter_specs

SHIFT = tokenizer_file.SHIFT
PREFIX = 'model.'  # of all names but that of the logits' bias; absent in files of the bare model
EMBEDDING, TABLE = BartConfig.embedding, 'shared.weight'
LOGITS_BIAS, BIAS = 'decoder/logits_bias', 'final_logits_bias'
BOS, PAD, EOS = 0, 1, 2  # as Hugging Face counts
_COPIES = ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight')
_MODULES = {'position_embedder': 'embed_positions', 'embedding_layer_norm': 'layernorm_embedding'}
_PARTS = {'encoder/post_attention_layer_norm': 'self_attn_layer_norm',
          'decoder/post_self_attention_layer_norm': 'self_attn_layer_norm',
          'decoder/post_cross_attention_layer_norm': 'encoder_attn_layer_norm'}
for _side in ('encoder', 'decoder'):
  _PARTS |= {f'{_side}/post_mlp_layer_norm': 'final_layer_norm', f'{_side}/mlp/wi': 'fc1',
             f'{_side}/mlp/wo': 'fc2'}
for _place, _attention in (('encoder/attention', 'self_attn'),
                           ('decoder/self_attention', 'self_attn'),
                           ('decoder/encoder_decoder_attention', 'encoder_attn')):
  _PARTS |= {f'{_place}/{ours}': f'{_attention}.{theirs}_proj' for ours, theirs in (
      ('query', 'q'), ('key', 'k'), ('value', 'v'), ('out', 'out'))}
_KINDS = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}
# What config.json must say, or not say: there is no other such network here.
_ONLY = {'scale_embedding': False, 'tie_word_embeddings': True, 'is_decoder': False,
         'normalize_before': False, 'add_final_layer_norm': False}
_OF_ENCODER = re.compile(r'encoder_(attention_heads|ffn_dim)')


def name_of(path: str) -> str:
  """'encoder/layers_0/mlp/wi/kernel' -> 'encoder.layers.0.fc1.weight'."""
  if path in (EMBEDDING, LOGITS_BIAS):
    return TABLE if path == EMBEDDING else BIAS
  match = re.fullmatch(r'(encoder|decoder)/(?:layers_(\d+)/)?(.+)/(\w+)', path)
  side, layer, module, kind = match.groups() if match else ('', None, '', '')
  part = _MODULES.get(module) if layer is None else _PARTS.get(f'{side}/{module}')
  if part is None or kind not in _KINDS:
    raise ValueError(f'{path} is no parameter of BART.')
  return '.'.join([side, *(['layers', layer] if layer else []), part, _KINDS[kind]])


def read_config(path: pathlib.Path, config: Json) -> BartConfig:
  """The network that config.json describes."""
  same = {key.replace('encoder', 'decoder'): config[key] for key in config
          if _OF_ENCODER.fullmatch(key)}
  hf_family.expect(path, config, **_ONLY, **same)
  positive = functools.partial(hf_family.positive, path, config)
  return BartConfig(
      vocab_size=positive('vocab_size', 50265) + SHIFT,
      **hf_family.width_and_heads(path, config, ('d_model', 1024), ('encoder_attention_heads', 16)),
      num_encoder_layers=positive('encoder_layers', 12, most=hf_family.MOST_LAYERS),
      num_decoder_layers=positive('decoder_layers', 12, most=hf_family.MOST_LAYERS),
      mlp_dim=positive('encoder_ffn_dim', 4096),
      mlp_activations=hf_family.activation(path, config, 'activation_function'),
      max_positions=positive('max_position_embeddings', 1024),
      dropout_rate=hf_family.rate(path, config, 'dropout'),
      start_id=positive('decoder_start_token_id', EOS) + SHIFT)


def config_json(config: BartConfig, leaves: Leaves, vocabulary=None) -> Json:
  """What Hugging Face reads the network from."""
  activation = hf_family.activation_name(config)
  eos = EOS if vocabulary is None else vocabulary.end_id - SHIFT
  sides = {f'{side}_{key}': value for side in ('encoder', 'decoder') for key, value in (
      ('layers', getattr(config, f'num_{side}_layers')), ('attention_heads', config.num_heads),
      ('ffn_dim', config.mlp_dim))}
  return {
      'architectures': ['BartForConditionalGeneration'], 'model_type': 'bart',
      'vocab_size': config.vocab_size - SHIFT, 'd_model': config.emb_dim, **sides,
      'activation_function': activation, 'max_position_embeddings': config.max_positions,
      'dropout': config.dropout_rate, 'is_encoder_decoder': True, 'bos_token_id': BOS,
      'pad_token_id': PAD, 'eos_token_id': eos, 'forced_eos_token_id': eos,
      'decoder_start_token_id': config.start_id - SHIFT, 'scale_embedding': False,
      'tie_word_embeddings': True, 'torch_dtype': jnp.dtype(leaves[EMBEDDING].dtype).name}


def canonical(tensors: dict[str, StoredLeaf], described: Json, config: BartConfig,
              is_given: bool) -> tuple[BartConfig, dict[str, StoredLeaf]]:
  """(the network, {canonical path: leaf}); see `hf_family.Family`. The rows are the file's.

  A file of the bare model has no bias of the logits: it is 0, as in transformers.
  """
  del described
  tensors = {name.removeprefix(PREFIX): leaf for name, leaf in tensors.items()}
  table = tensors.get(TABLE) or next((tensors[name] for name in _COPIES if name in tensors), None)
  if table and len(table.shape) == 2:
    tensors[TABLE] = table
    for name in _COPIES:
      if stored_leaf.is_copy(table, tensors.get(name)):
        del tensors[name]
    if not is_given:
      config = dataclasses.replace(config, vocab_size=table.shape[0] + SHIFT)
  tensors.setdefault(BIAS, _zeros(config.vocab_size - SHIFT))
  paths = {name_of(path): path for path in parameter_specs(config)}
  stored = {paths.get(name, name): leaf for name, leaf in tensors.items()}
  return config, {path: _seen(path, leaf) for path, leaf in stored.items()}


def _zeros(rows: int) -> StoredLeaf:
  zeros = np.zeros((1, rows), np.float32)
  return StoredLeaf(BIAS, zeros.shape, 'float32', lambda index: zeros[index])


def _seen(path: str, leaf: StoredLeaf) -> StoredLeaf:
  """A tensor as the parameter `path`."""
  if path == LOGITS_BIAS and len(leaf.shape) == 2:  # [1, V]
    row = dataclasses.replace(leaf, shape=leaf.shape[1:],
                              read=lambda index: leaf.read((slice(0, 1), *index))[0])
    return stored_leaf.behind_zeros(row)
  if path == EMBEDDING and leaf.shape:
    return stored_leaf.behind_zeros(leaf)
  return stored_leaf.transposed(leaf) if path.endswith('/kernel') else leaf


def tensors(leaves: Leaves) -> dict[str, Tensor]:
  """{name: tensor}; leaves keep their dtype."""
  views = {EMBEDDING: lambda table: table[SHIFT:], LOGITS_BIAS: lambda bias: bias[None, SHIFT:]}
  made = {}
  for path, leaf in leaves.items():
    view = views.get(path, np.transpose if path.endswith('/kernel') else lambda array: array)
    prefix = '' if path == LOGITS_BIAS else PREFIX
    made[prefix + name_of(path)] = hf_family.tensor(path, leaf, view)
  return made


BART = Family('bart', BartConfig, tokenizer_file.NAMES, 0, read_config, config_json,
              hf_family.is_post_norm, name_of, canonical, tensors)

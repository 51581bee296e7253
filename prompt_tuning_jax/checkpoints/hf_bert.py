"""BERT with its masked-LM head (Devlin et al. 2019) as Hugging Face stores it.

Its kernels are transposed there; its ids are ours, as padding is 0. The pooler and the classifier
of sentence pairs, which some files hold and masked language models do not use, are left out.
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
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.parameters import parameter_specs

PREFIX = 'bert.'  # of all names but those of the head; absent in files of the bare model
EMBEDDING, TABLE = BertConfig.embedding, 'embeddings.word_embeddings.weight'
HEAD, BIAS = 'cls.predictions.', 'cls.predictions.bias'
_MODULES = {
    'token_embedder': 'embeddings.word_embeddings',
    'type_embedder': 'embeddings.token_type_embeddings',
    'encoder/position_embedder': 'embeddings.position_embeddings',
    'encoder/embedding_layer_norm': 'embeddings.LayerNorm',
    'head/transform': f'{HEAD}transform.dense', 'head/layer_norm': f'{HEAD}transform.LayerNorm',
}
_PARTS = {
    **{f'attention/{name}': f'attention.self.{name}' for name in ('query', 'key', 'value')},
    'attention/out': 'attention.output.dense',
    'post_attention_layer_norm': 'attention.output.LayerNorm',
    'mlp/wi': 'intermediate.dense', 'mlp/wo': 'output.dense',
    'post_mlp_layer_norm': 'output.LayerNorm',
}
_KINDS = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}
_UNUSED = re.compile(r'pooler\..*|cls\.seq_relationship\..*|embeddings\.(position|token_type)_ids')
_OLD = (('LayerNorm.gamma', 'LayerNorm.weight'), ('LayerNorm.beta', 'LayerNorm.bias'))
# What config.json must say, or not say: there is no other such network here.
_ONLY = {'layer_norm_eps': BertConfig.layer_norm_epsilon, 'position_embedding_type': 'absolute',
         'is_decoder': False, 'add_cross_attention': False, 'tie_word_embeddings': True,
         'pad_token_id': 0}


def name_of(path: str) -> str:
  """'encoder/layers_0/mlp/wi/kernel' -> 'encoder.layer.0.intermediate.dense.weight'."""
  if path == 'head/logits_bias':
    return BIAS
  module, _, kind = path.rpartition('/')
  layer, _, part = module.removeprefix('encoder/layers_').partition('/')
  if kind in _KINDS and module in _MODULES:
    return f'{_MODULES[module]}.{_KINDS[kind]}'
  if not layer.isdecimal() or part not in _PARTS or kind not in _KINDS:
    raise ValueError(f'{path} is no parameter of BERT.')
  return f'encoder.layer.{layer}.{_PARTS[part]}.{_KINDS[kind]}'


def read_config(path: pathlib.Path, config: Json) -> BertConfig:
  """The network that config.json describes."""
  hf_family.expect(path, config, **_ONLY)
  positive = functools.partial(hf_family.positive, path, config)
  return BertConfig(
      vocab_size=positive('vocab_size', 30522),
      **hf_family.width_and_heads(path, config, ('hidden_size', 768), ('num_attention_heads', 12)),
      num_encoder_layers=positive('num_hidden_layers', 12, most=hf_family.MOST_LAYERS),
      mlp_dim=positive('intermediate_size', 3072),
      mlp_activations=hf_family.activation(path, config, 'hidden_act'),
      max_positions=positive('max_position_embeddings', 512),
      num_types=positive('type_vocab_size', 2),
      dropout_rate=hf_family.rate(path, config, 'hidden_dropout_prob'),
      mask_id=positive('mask_token_id', BertConfig.mask_id),
      end_id=positive('sep_token_id', BertConfig.end_id))


def config_json(config: BertConfig, leaves: Leaves, vocabulary=None) -> Json:
  """What Hugging Face reads the network from; it has no use for the last two ids."""
  del vocabulary
  return {
      'architectures': ['BertForMaskedLM'], 'model_type': 'bert', 'vocab_size': config.vocab_size,
      'hidden_size': config.emb_dim, 'num_attention_heads': config.num_heads,
      'num_hidden_layers': config.num_encoder_layers, 'intermediate_size': config.mlp_dim,
      'hidden_act': hf_family.activation_name(config),
      'max_position_embeddings': config.max_positions, 'type_vocab_size': config.num_types,
      'hidden_dropout_prob': config.dropout_rate,
      'attention_probs_dropout_prob': config.dropout_rate, **_ONLY,
      'torch_dtype': jnp.dtype(leaves[EMBEDDING].dtype).name,
      'mask_token_id': config.mask_id, 'sep_token_id': config.end_id}


def canonical(tensors: dict[str, StoredLeaf], described: Json, config: BertConfig,
              is_given: bool) -> tuple[BertConfig, dict[str, StoredLeaf]]:
  """(the network, {canonical path: leaf}); see `hf_family.Family`. The rows are the file's."""
  del described
  found = {}
  for name, leaf in tensors.items():
    for old, new in _OLD:  # as the first files have it
      name = name.replace(old, new)
    found[name.removeprefix(PREFIX)] = leaf
  found = {name: leaf for name, leaf in found.items() if not _UNUSED.fullmatch(name)}
  if same_bias := found.pop(f'{HEAD}decoder.bias', None):
    found.setdefault(BIAS, same_bias)
  table = found.get(TABLE)
  if table and stored_leaf.is_copy(table, found.get(f'{HEAD}decoder.weight')):
    del found[f'{HEAD}decoder.weight']
  if table and len(table.shape) == 2 and not is_given:
    config = dataclasses.replace(config, vocab_size=table.shape[0])
  paths = {name_of(path): path for path in parameter_specs(config)}
  stored = {paths.get(name, name): leaf for name, leaf in found.items()}
  return config, {path: stored_leaf.transposed(leaf) if path.endswith('/kernel') else leaf
                  for path, leaf in stored.items()}


def tensors(leaves: Leaves) -> dict[str, Tensor]:
  """{name: tensor}; leaves keep their dtype."""
  made = {}
  for path, leaf in leaves.items():
    name = name_of(path)
    name = name if name.startswith(HEAD) else PREFIX + name
    made[name] = (hf_family.tensor(path, leaf, np.transpose) if path.endswith('/kernel')
                  else hf_family.tensor(path, leaf))
  return made


BERT = Family('bert', BertConfig, (tokenizer_file.NAMES[0], tokenizer_file.WORDS), 0, read_config,
              config_json, hf_family.is_post_norm, name_of, canonical, tensors)

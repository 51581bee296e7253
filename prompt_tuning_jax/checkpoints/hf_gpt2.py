"""GPT-2 (Radford et al. 2019) as Hugging Face stores it.

Its kernels are [in, out] as here; query, key and value stand side by side in one `c_attn`. It has
no padding id, and its id 0 is a real token, while 0 is padding everywhere in this package. So an
id here is Hugging Face's + 1, and the embedding table has one row more, row 0, which stands for the
start of a text: it is read as a copy of the row of <|endoftext|> (eos_token_id) and is not written.
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
from prompt_tuning_jax.checkpoints.stored_leaf import StoredLeaf, to_host
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.networks.parameters import parameter_specs

SHIFT = tokenizer_file.SHIFT
PREFIX = 'transformer.'  # of all names but lm_head.weight; absent in the files of OpenAI's models
EMBEDDING, TABLE, HEAD = GPTConfig.embedding, 'wte.weight', 'lm_head.weight'
LAYER_NORM_EPSILON = 1e-5
EOS_TOKEN_ID = 50256  # where config.json has none
_WHOLE = {EMBEDDING: TABLE, 'decoder/position_embedder/embedding': 'wpe.weight',
          'decoder/decoder_norm': 'ln_f'}
_PARTS = {
    'pre_self_attention_layer_norm': 'ln_1',
    **dict.fromkeys((f'self_attention/{name}' for name in ('query', 'key', 'value')),
                    'attn.c_attn'),
    'self_attention/out': 'attn.c_proj',
    'pre_mlp_layer_norm': 'ln_2', 'mlp/wi': 'mlp.c_fc', 'mlp/wo': 'mlp.c_proj',
}
_KINDS = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}
_FUSED = ('query', 'key', 'value')  # in this order, side by side
_MASKS = re.compile(r'h\.\d+\.attn\.(bias|masked_bias)')  # constants that some files hold
# What config.json must say, or not say: there is no other such network here.
_ONLY = {'activation_function': 'gelu_new', 'layer_norm_epsilon': LAYER_NORM_EPSILON,
         'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False,
         'add_cross_attention': False, 'tie_word_embeddings': True}


def name_of(path: str) -> str:
  """'decoder/layers_0/self_attention/key/bias' -> 'h.0.attn.c_attn.bias', in whose middle it is."""
  module, _, kind = path.rpartition('/')
  layer, _, part = module.removeprefix('decoder/layers_').partition('/')
  if path in _WHOLE:
    return _WHOLE[path]
  if module in _WHOLE and kind in _KINDS:
    return f'{_WHOLE[module]}.{_KINDS[kind]}'
  if not layer.isdecimal() or part not in _PARTS or kind not in _KINDS:
    raise ValueError(f'{path} is no parameter of GPT-2.')
  return f'h.{layer}.{_PARTS[part]}.{_KINDS[kind]}'


def _place(path: str) -> int | None:
  """Which of the three in c_attn a parameter is; None for one that is not there."""
  module = path.split('/')[-2]
  return _FUSED.index(module) if module in _FUSED else None


def read_config(path: pathlib.Path, config: Json) -> GPTConfig:
  """The network that config.json describes."""
  hf_family.expect(path, config, **_ONLY)
  positive = functools.partial(hf_family.positive, path, config)
  widths = hf_family.width_and_heads(path, config, ('n_embd', 768), ('n_head', 12))
  return GPTConfig(
      vocab_size=positive('vocab_size', 50257) + SHIFT, **widths,
      num_layers=positive('n_layer', 12, most=hf_family.MOST_LAYERS),
      mlp_dim=positive('n_inner', 4 * widths['emb_dim']), mlp_activations=('gelu',),
      dropout_rate=hf_family.rate(path, config, 'resid_pdrop'), logits_via_embedding=True,
      max_positions=positive('n_positions', 1024), use_bias=True, scale_queries=True,
      scale_logits=False, has_padding_row=False)


def config_json(config: GPTConfig, leaves: Leaves, vocabulary=None) -> Json:
  """What Hugging Face reads the network from; ValueError for one that is no GPT-2."""
  if fields := _unlike(config):
    raise ValueError(f"Hugging Face's GPT-2 has no network with {', '.join(fields)}: "
                     'keep it as a T5X checkpoint.')
  end = _end(leaves[EMBEDDING], vocabulary)
  return {**_described(config), 'bos_token_id': end, 'eos_token_id': end,
          'torch_dtype': jnp.dtype(leaves[EMBEDDING].dtype).name}


def _described(config: GPTConfig) -> Json:
  rates = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), config.dropout_rate)
  return {'architectures': ['GPT2LMHeadModel'], 'model_type': 'gpt2',
          'vocab_size': config.vocab_size - SHIFT, 'n_embd': config.emb_dim,
          'n_head': config.num_heads, 'n_layer': config.num_layers, 'n_inner': config.mlp_dim,
          'n_positions': config.max_positions, **_ONLY, **rates}


def _unlike(config: GPTConfig) -> list[str]:
  """What of a network is not as in a GPT-2 of its size."""
  if config.emb_dim % config.num_heads:
    return [f'emb_dim {config.emb_dim} and num_heads {config.num_heads}']
  read = read_config(pathlib.Path('config.json'), _described(config))
  return [f'{name} {ours!r} (GPT-2: {theirs!r})' for name, ours in vars(config).items()
          if name != 'dtype' and (theirs := getattr(read, name)) != ours]


def _end(table, vocabulary) -> int:
  """Hugging Face's id of the end of a text.

  The vocabulary's; without one, that of the row which row 0 is a copy of, else the last, as in
  GPT-2.
  """
  if vocabulary is not None:
    return vocabulary.end_id - SHIFT
  table = to_host(EMBEDDING, table)
  same = np.flatnonzero((table[SHIFT:] == table[0]).all(axis=-1))
  return int(same[0]) if len(same) else len(table) - 1 - SHIFT


def canonical(tensors: dict[str, StoredLeaf], described: Json, config: GPTConfig,
              is_given: bool) -> tuple[GPTConfig, dict[str, StoredLeaf]]:
  """(the network, {canonical path: leaf}); see `hf_family.Family`. The rows are the file's."""
  tensors = {name.removeprefix(PREFIX): leaf for name, leaf in tensors.items()}
  tensors = {name: leaf for name, leaf in tensors.items() if not _MASKS.fullmatch(name)}
  table = tensors.get(TABLE)
  if table and stored_leaf.is_copy(table, tensors.get(HEAD)):
    del tensors[HEAD]
  if table and len(table.shape) == 2:
    tensors[TABLE] = _with_start(table, described.get('eos_token_id', EOS_TOKEN_ID))
    if not is_given:
      config = dataclasses.replace(config, vocab_size=table.shape[0] + SHIFT)
  specs, stored = parameter_specs(config), {}
  for path, spec in specs.items():
    if (name := name_of(path)) in tensors:
      stored[path] = _seen(tensors[name], path, spec.shape)
  used = {name_of(path) for path in stored}
  return config, stored | {name: leaf for name, leaf in tensors.items() if name not in used}


def _with_start(table: StoredLeaf, end: int) -> StoredLeaf:
  """The table with a row 0, a copy of the row `end`."""
  rows, width = table.shape
  if type(end) is not int or not 0 <= end < rows:
    return dataclasses.replace(table, shape=(rows + SHIFT, width), problem=table.problem or (
        f'eos_token_id in config.json is {end!r}, and the table has the rows 0 to {rows - 1}'))

  def read(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[0].indices(rows + SHIFT)
    part = lambda a, b: table.read((slice(a, b), index[1]))
    if start > 0 or stop == start:
      return part(max(start - SHIFT, 0), max(stop - SHIFT, 0))
    return np.concatenate([part(end, end + 1), part(0, stop - SHIFT)])

  return dataclasses.replace(table, shape=(rows + SHIFT, width), read=read)


def _seen(leaf: StoredLeaf, path: str, shape: tuple[int, ...]) -> StoredLeaf:
  """A tensor as the parameter `path`, which should be of this shape."""
  place = _place(path)
  if place is None:
    return leaf
  expected = (*shape[:-1], len(_FUSED) * shape[-1])
  if leaf.shape != expected:  # So the parameter is told by the shape of the whole.
    return dataclasses.replace(leaf, problem=leaf.problem or (
        f'{list(leaf.shape)} in the file, expected {list(expected)}'))
  return stored_leaf.part_of_last_axis(leaf, place, len(_FUSED))


def tensors(leaves: Leaves) -> dict[str, Tensor]:
  """{name: tensor}; leaves keep their dtype."""
  groups: dict[str, list[str]] = {}
  for path in sorted(leaves, key=lambda path: _place(path) or 0):
    groups.setdefault(PREFIX + name_of(path), []).append(path)
  return {name: _tensor([(path, leaves[path]) for path in paths])
          for name, paths in groups.items()}


def _tensor(parts) -> Tensor:
  """[(path, leaf)]: one leaf, or the three of a c_attn side by side."""
  [(path, leaf), *others] = parts
  shape, skipped = list(leaf.shape), SHIFT if path == EMBEDDING else 0
  shape[0] -= skipped
  shape[-1] += sum(other.shape[-1] for _, other in others)

  def get() -> np.ndarray:
    return np.concatenate([to_host(*part)[skipped:] for part in parts], axis=-1)

  return Tensor(jnp.dtype(leaf.dtype).name, tuple(shape), get)


GPT2 = Family('gpt2', GPTConfig, tokenizer_file.NAMES, 0, read_config, config_json,
              lambda config: not _unlike(config), name_of, canonical, tensors)

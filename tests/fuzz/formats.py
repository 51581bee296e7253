"""Every format that is read: how a small specimen is made, and what reading one gives."""

import dataclasses
import gzip
import hashlib
import json
import logging
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization

from prompt_tuning_jax import jsonl, launch, param_paths
from prompt_tuning_jax.checkpoints import (
    base_checkpoint,
    hf_config,
    hf_safetensors,
    peft_adapter,
    prompt_file,
    t5x_legacy,
    training_state,
)
from prompt_tuning_jax.data import file_digest, text_file, token_cache
from prompt_tuning_jax.data.tokenizer_training import train_tokenizer
from prompt_tuning_jax.data.vocabulary import Vocabulary, train_vocabulary
from prompt_tuning_jax.networks.bart import BartConfig
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.networks.parameters import parameter_specs
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.training import progress, run

Folder = pathlib.Path
SEED = 7
T5 = T5Config(vocab_size=40, emb_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
              head_dim=4, mlp_dim=16)
GPT2 = GPTConfig(vocab_size=41, emb_dim=8, num_heads=2, num_layers=2, head_dim=4, mlp_dim=32,
                 mlp_activations=('gelu',), logits_via_embedding=True, max_positions=16,
                 use_bias=True, scale_queries=True, scale_logits=False, has_padding_row=False)
BART = BartConfig(vocab_size=41, emb_dim=8, num_heads=2, num_encoder_layers=1,
                  num_decoder_layers=1, head_dim=4, mlp_dim=16, max_positions=16)
BERT = BertConfig(vocab_size=40, emb_dim=8, num_heads=2, num_encoder_layers=2, head_dim=4,
                  mlp_dim=16, max_positions=16)
TEXTS = [f'the {thing} is {word}, as {other} as a {thing}\t"quoted"' for thing in (
    'film', 'play', 'song') for word in ('lovely', 'dull', 'warm') for other in ('é', 'old')]


@dataclasses.dataclass(frozen=True)
class Format:
  """A format.

  Args:
    make: fills a folder.
    read: what the folder holds, as something whose digest can be taken.
    is_exact: whether nothing but what was written may be read; formats of others and texts hold no
      checksums, and another text is as good as the first.
    foreign: what `make` needs besides this package.
  """

  make: Callable[[Folder], None]
  read: Callable[[Folder], Any]
  is_exact: bool
  foreign: str = ''


def digest(value: Any) -> str:
  """SHA-256 of nested lists, dictionaries, arrays and whatever JSON knows."""
  def plain(part):
    if isinstance(part, np.ndarray | np.generic | jax.Array):
      array = np.asarray(part)
      return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    raise TypeError(f'no digest of a {type(part).__name__}')
  return hashlib.sha256(json.dumps(value, sort_keys=True, default=plain).encode()).hexdigest()


def _params(config, dtype='float32'):
  rng = np.random.default_rng(SEED)
  return param_paths.unflatten({path: rng.normal(size=spec.shape).astype(dtype)
                                for path, spec in parameter_specs(config).items()})


def _prompt() -> prompt_file.PromptFile:
  base = types.SimpleNamespace(
      name='tiny', fingerprint='a' * 64, vocabulary=hf_config.VocabularyFile('bytes', 100),
      config=types.SimpleNamespace(emb_dim=8, vocab_size=40))
  rows = np.random.default_rng(SEED).normal(size=(4, 8)).astype(np.float32)
  return prompt_file.PromptFile(
      {prompt_file.EMBEDDING: rows, 'prefix/key': rows[:2], 'prefix/value': rows[2:]},
      prompt_file.describe(base, length=4, task='t', labels=['négatif', 'positif']))


def _soft_prompt() -> prompt_file.PromptFile:
  prompt = _prompt()
  return prompt_file.PromptFile({prompt_file.EMBEDDING: prompt.params[prompt_file.EMBEDDING]},
                                prompt.metadata)


def _read_prompt(path: Folder):
  file = prompt_file.load(path)
  return [file.params, file.metadata]


def _weights(folder: Folder):
  """A base's parameters alone: a config.json may say another rate of dropout."""
  return param_paths.flatten(base_checkpoint.load_base(folder).params)


def _make_t5(folder: Folder, **options):
  vocabulary = hf_config.VocabularyFile('bytes', 0)
  hf_safetensors.write(folder, T5, _params(T5), vocabulary=vocabulary, **options)
  settings = {'tokenizer_class': 'T5Tokenizer', 'extra_ids': 0}  # 259 bytes are too many for 40.
  hf_config.write_json(folder / 'tokenizer_config.json', settings)


def _make_transformers(folder: Folder, kind: str):
  import torch
  import transformers
  torch.manual_seed(SEED)
  if kind == 't5':
    config = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=1,
                                   num_heads=2, decoder_start_token_id=0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
  else:
    config = transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=2, n_head=2,
                                     eos_token_id=39, bos_token_id=39)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


def _make_peft(folder: Folder):
  import peft
  import transformers
  model = transformers.T5ForConditionalGeneration(transformers.T5Config(
      vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
      decoder_start_token_id=0))
  peft.get_peft_model(model, peft.PromptTuningConfig(
      task_type='SEQ_2_SEQ_LM', num_virtual_tokens=4)).save_pretrained(folder)


def _make_t5x_of_others(folder: Folder):
  """As T5X itself writes it: without checksums."""
  t5x_legacy.write(folder, _params(T5))
  content = serialization.msgpack_restore((folder / 'checkpoint').read_bytes())
  for name in ('sha256', 'checksums'):
    del content[name]
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(content))


def _make_cache(folder: Folder):
  rng = np.random.default_rng(SEED)
  writer = token_cache.CacheWriter(folder)
  for i in range(60):
    inputs, targets = (rng.integers(2, 40, rng.integers(1, 12)).tolist() for _ in range(2))
    writer.add([*inputs, 1], [*targets, 1], {'inputs': f'é {i}', 'targets': 'x', 'target': i})
  writer.close(metrics=['prompt_tuning_jax.metrics:accuracy'], task='toy')


def _make_large_cache(folder: Folder):
  file_digest.WHOLE = file_digest.BLOCK = 256
  _make_cache(folder)


def _read_cache(folder: Folder):
  file_digest.WHOLE = file_digest.BLOCK = 256  # of a cache that has blocks
  cache = token_cache.open_cache(folder)
  rows = range(cache.num_examples)
  return [cache.meta, cache.rows, [cache.inputs(i) for i in rows], [cache.targets(i) for i in rows]]


def _make_rows(ending: str):
  def make(folder: Folder):
    folder.mkdir()
    rows = [{'text': text, 'n': i, 'x': None} for i, text in enumerate(TEXTS)]
    if 'json' in ending:
      content = ''.join(json.dumps(row) + '\n' for row in rows)
    else:
      separator = ',' if 'csv' in ending else '\t'
      lines = [separator.join(rows[0])]
      for row in rows:
        text = row['text'].replace('"', '""' if 'csv' in ending else '').replace('\t', ' ')
        lines.append(separator.join([f'"{text}"' if 'csv' in ending else text, str(row['n']), '']))
      content = '\n'.join(lines)
    data = content.encode()
    (folder / f'rows{ending}').write_bytes(
        gzip.compress(data, mtime=0) if ending.endswith('.gz') else data)
  return make


def _read_rows(ending: str):
  def read(folder: Folder):
    rows = [row for _, row in jsonl.rows(str(folder / f'rows{ending}'))]
    if not rows:
      raise ValueError(f'{folder} has no rows.')  # as the verbs do
    return rows
  return read


def _make_text_task(folder: Folder):
  _make_rows('.csv')(folder)


def _read_text_task(folder: Folder):
  task = text_file.TextFile(str(folder / 'rows.csv'), targets='n')
  task.build('train', Vocabulary('bytes', 0), {'inputs': 64, 'targets': 8}, folder / 'made')
  cache = token_cache.open_cache(folder / 'made')
  return [cache.rows, cache.input_tokens]


def _make_spiece(folder: Folder):
  folder.mkdir()
  train_vocabulary(TEXTS, folder / 'spiece.model', pieces=40)


def _read_vocabulary(name: str):
  def read(folder: Folder):
    vocabulary = Vocabulary(str(folder / name))
    file = hf_config.vocabulary_named(str(folder / name))
    ids = vocabulary.encode_many(TEXTS)
    pieces = [vocabulary.piece(i) for i in range(0, min(vocabulary.size, 4096), 7)]
    return [vocabulary.sha256, file.sha256, file.size, file.end_id, vocabulary.size,
            vocabulary.eos_id, ids, [vocabulary.decode(row) for row in ids], pieces]
  return read


def _make_tokenizer(folder: Folder):
  import tokenizers
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=290, special_tokens=['<|endoftext|>'], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made.train_from_iterator(TEXTS, trainer)
  folder.mkdir()
  made.save(str(folder / 'tokenizer.json'))
  settings = {'eos_token': {'content': '<|endoftext|>'}, 'tokenizer_class': 'GPT2Tokenizer'}
  hf_config.write_json(folder / 'tokenizer_config.json', settings)


def _make_merges(folder: Folder):
  _make_tokenizer(folder)
  model = json.loads((folder / 'tokenizer.json').read_text())['model']
  (folder / 'tokenizer.json').unlink()
  (folder / 'tokenizer_config.json').unlink()
  hf_config.write_json(folder / 'config.json', {'eos_token_id': 0})
  hf_config.write_json(folder / 'vocab.json', model['vocab'])
  lines = ['#version: 0.2', *(pair if isinstance(pair, str) else ' '.join(pair)
                              for pair in model['merges'])]
  (folder / 'merges.txt').write_text('\n'.join(lines) + '\n', encoding='utf-8')


def _make_words(folder: Folder):
  folder.mkdir()
  ids = json.loads(train_tokenizer('bert', TEXTS, 60))['model']['vocab']
  (folder / 'vocab.txt').write_text('\n'.join(sorted(ids, key=ids.get)) + '\n', encoding='utf-8')


def _answer(part):
  return [{'m': row['n'] * 2} for _, row in part]


def _make_partial(folder: Folder):
  """A file of which half has been answered when the process was killed."""
  jsonl.FIRST = jsonl.CHUNK = 4
  _make_rows('.jsonl')(folder)
  seen = []

  def stop(part):
    seen.append(part)
    if len(seen) == 4:
      raise KeyboardInterrupt
    return _answer(part)

  try:
    jsonl.answer_file(str(folder / 'rows.jsonl'), str(folder / 'out'), stop, settings={'a': 1})
  except KeyboardInterrupt:
    pass


def _read_partial(folder: Folder):
  """What the same command makes of it, which is what an uninterrupted one does."""
  jsonl.FIRST = jsonl.CHUNK = 4
  jsonl.answer_file(str(folder / 'rows.jsonl'), str(folder / 'out'), _answer, settings={'a': 1})
  return (folder / 'out').read_text(encoding='utf-8', errors='replace')


def _make_metrics(folder: Folder):
  folder.mkdir()
  lines = [{'step': step, 'split': 'train', 'task': 't', 'loss': 1 / step} for step in range(1, 9)]
  (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def _read_metrics(folder: Folder):
  made = progress.Progress(folder, 10, 5)
  made.report(6, 'train', 't', {'loss': 0.5})
  made.close()
  path = folder / 'metrics.jsonl'
  return path.is_file() and path.read_text('utf-8').splitlines()  # not of /dev/zero


def _saved_arrays():
  return {'prompt': np.arange(600, dtype=np.float32).reshape(20, 30), 'step': np.int32(4)}


def _make_states(folder: Folder):
  states = training_state.TrainingStates(folder)
  states.save(4, _saved_arrays(), {'at': 4})
  states.close()


def _read_states(folder: Folder):
  states = training_state.TrainingStates(folder)
  try:
    return list(states.restore_latest(jax.tree.map(jnp.asarray, _saved_arrays())))
  finally:
    states.close()


def _make_gin(folder: Folder):
  folder.mkdir()
  files = [f'{name}.gin' for name in ('run/quick_start',)]
  text = '\n'.join(f"include '{name}'" for name in files)
  (folder / 'mine.gin').write_text(
      text + "\n\nPROMPT_LENGTH = 4  # virtual tokens\nMODEL_DIR = '/tmp/never'\n"
      'TRAIN_STEPS = 10\nBATCH_SIZE = 8\n')


def _read_gin(folder: Folder):
  launch.read_config(launch.find_files([str(folder / 'mine.gin')]), [], run.train)


FORMATS = {
    'prompt': Format(lambda folder: (folder.mkdir(), prompt_file.save(
        folder / 'a.safetensors', _prompt())), lambda folder: _read_prompt(
            folder / 'a.safetensors'), True),
    'npy': Format(lambda folder: (folder.mkdir(), np.save(
        folder / 'a.npy', _prompt().params[prompt_file.EMBEDDING])),
        lambda folder: _read_prompt(folder / 'a.npy'), False),
    'peft': Format(lambda folder: peft_adapter.write(folder, _soft_prompt(), 'tiny', False),
                   _read_prompt, True),
    'peft_of_peft': Format(_make_peft, _read_prompt, False, 'peft'),
    't5': Format(_make_t5, _weights, True),
    't5_bfloat16': Format(lambda folder: hf_safetensors.write(
        folder, T5, _params(T5, 'bfloat16')), _weights, True),
    't5_shards': Format(lambda folder: _make_t5(folder, shard_bytes=2000), _weights, True),
    't5_of_transformers': Format(lambda folder: _make_transformers(folder, 't5'), _weights, False,
                                 'transformers'),
    'gpt2': Format(lambda folder: hf_safetensors.write(folder, GPT2, _params(GPT2)), _weights,
                   True),
    'gpt2_of_transformers': Format(lambda folder: _make_transformers(folder, 'gpt2'), _weights,
                                   False, 'transformers'),
    'bart': Format(lambda folder: hf_safetensors.write(folder, BART, _params(BART)), _weights,
                   True),
    'bert': Format(lambda folder: hf_safetensors.write(folder, BERT, _params(BERT)), _weights,
                   True),
    't5x': Format(lambda folder: t5x_legacy.write(folder, _params(T5)), _weights, True),
    't5x_of_t5x': Format(_make_t5x_of_others, _weights, False),
    'token_cache': Format(_make_cache, _read_cache, True),
    'token_cache_large': Format(_make_large_cache, _read_cache, True),
    'jsonl': Format(_make_rows('.jsonl'), _read_rows('.jsonl'), False),
    'csv': Format(_make_rows('.csv'), _read_rows('.csv'), False),
    'tsv': Format(_make_rows('.tsv'), _read_rows('.tsv'), False),
    'gzip': Format(_make_rows('.jsonl.gz'), _read_rows('.jsonl.gz'), True),
    'text_task': Format(_make_text_task, _read_text_task, False),
    'spiece': Format(_make_spiece, _read_vocabulary('spiece.model'), False),
    'tokenizer': Format(_make_tokenizer, _read_vocabulary('tokenizer.json'), False, 'tokenizers'),
    'merges': Format(_make_merges, _read_vocabulary('vocab.json'), False, 'tokenizers'),
    'words': Format(_make_words, _read_vocabulary('vocab.txt'), False, 'tokenizers'),
    'partial': Format(_make_partial, _read_partial, True),
    'states': Format(_make_states, _read_states, True),
    'metrics': Format(_make_metrics, _read_metrics, False),
    'gin': Format(_make_gin, _read_gin, False),
}
logging.disable()

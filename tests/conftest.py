"""What every test starts from: the CPU, one process, a compilation cache, and found test data."""

import json
import logging
import os
import pathlib
import random
import sys

import pytest

# Read when JAX is imported, which comes later. JAX_PLATFORMS=cuda runs the tests on a GPU.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(
    pathlib.Path('~/.cache/prompt_tuning_jax/test_xla').expanduser()))
# Nearly all of the time goes into compiling small programs, so: optimise little, keep everything.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
for _name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
  os.environ.pop(_name, None)


def _folder(variable: str, content: str) -> pathlib.Path:
  value = os.environ.get(variable)
  if not value:
    pytest.skip(f'{variable} is not set: it should name {content}.')
  path = pathlib.Path(value)
  if not path.is_dir():
    pytest.skip(f'{variable}={value} is not a folder: it should be {content}.')
  return path


@pytest.fixture(scope='module', autouse=True)
def left_behind():
  """Compiled programs go after a file's last test, or they would take gigabytes; so do handlers of
  logs, which would write into what a test has captured and closed."""
  handlers = logging.getLogger().handlers[:]
  yield
  logging.getLogger().handlers[:] = handlers
  if 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()


@pytest.fixture
def exact_products():
  """Matrix products in full float32, on accelerators too."""
  import jax
  with jax.default_matmul_precision('float32'):
    yield


@pytest.fixture(scope='session')
def tfds_data_dir() -> pathlib.Path:
  """The folder of prepared TFDS data, or a skip with the reason."""
  return _folder('TFDS_DATA_DIR', 'a folder of prepared TFDS data (glue/sst2 and others)')


@pytest.fixture(scope='session')
def test_assets() -> pathlib.Path:
  """The folder of vocabularies and small public checkpoints, or a skip with the reason."""
  return _folder('PROMPT_TUNING_TEST_ASSETS', 'a folder of vocabularies and small checkpoints')


@pytest.fixture(scope='session')
def reviews(tmp_path_factory) -> pathlib.Path:
  """A JSON-lines file of 240 rows {'text', 'label'}, good or bad, that words tell apart."""
  rng = random.Random(0)
  words = {'good': ('lovely', 'bright', 'warm'), 'bad': ('awful', 'dull', 'cold')}
  path = tmp_path_factory.mktemp('reviews') / 'reviews.jsonl'
  with open(path, 'w', encoding='utf-8') as file:
    for _ in range(240):
      label = rng.choice(sorted(words))
      thing, word, other = rng.choice(('film', 'play', 'song')), *rng.sample(words[label], 2)
      text = rng.choice((f'a {word} and {other} {thing}', f'this {thing} is {word}'))
      file.write(json.dumps({'text': text, 'label': label}) + '\n')
  return path


@pytest.fixture(scope='session')
def tiny_base(tmp_path_factory, reviews) -> pathlib.Path:
  """A Hugging Face folder of a random T5 of 8 dimensions with a vocabulary of its own."""
  from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors
  from prompt_tuning_jax.data.vocabulary import train_vocabulary
  from prompt_tuning_jax.networks.t5 import T5Config
  folder = tmp_path_factory.mktemp('tiny') / 'base'
  texts = [line for line in reviews.read_text(encoding='utf-8').splitlines()]
  vocabulary = train_vocabulary(texts, folder.parent / 'spiece.model', pieces=60)
  config = T5Config(vocab_size=192, emb_dim=8, num_heads=2, num_encoder_layers=1,
                    num_decoder_layers=1, head_dim=4, mlp_dim=16)
  base = base_checkpoint.random_base(config, vocabulary.file)
  hf_safetensors.write(folder, config, base.params, vocabulary=base.vocabulary)
  return folder


@pytest.fixture(scope='session')
def bpe_file(tmp_path_factory, reviews) -> pathlib.Path:
  """A tokenizer.json of GPT-2's kind, trained on the reviews: bytes, a few words, <|endoftext|>."""
  tokenizers = pytest.importorskip('tokenizers')
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=300, special_tokens=['<unused>', '<|endoftext|>'], show_progress=False,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made.train_from_iterator(reviews.read_text(encoding='utf-8').splitlines(), trainer)
  path = tmp_path_factory.mktemp('bpe') / 'tokenizer.json'
  made.save(str(path))
  return path


@pytest.fixture(scope='session')
def bart_file(tmp_path_factory, reviews) -> pathlib.Path:
  """A tokenizer.json of BART's kind, trained on the reviews."""
  pytest.importorskip('tokenizers')
  from prompt_tuning_jax.data.tokenizer_training import train_tokenizer
  path = tmp_path_factory.mktemp('bart') / 'tokenizer.json'
  lines = reviews.read_text(encoding='utf-8').splitlines()
  path.write_text(train_tokenizer('bart', lines, 300), encoding='utf-8')
  return path


@pytest.fixture(scope='session')
def bert_file(tmp_path_factory, reviews) -> pathlib.Path:
  """A vocab.txt of BERT's kind, trained on the reviews; its mask is not at its usual id."""
  pytest.importorskip('tokenizers')
  from prompt_tuning_jax.data.tokenizer_training import train_tokenizer
  path = tmp_path_factory.mktemp('bert') / 'vocab.txt'
  lines = ['It was , . ! ?', *reviews.read_text(encoding='utf-8').splitlines()]
  ids = json.loads(train_tokenizer('bert', lines, 120))['model']['vocab']
  path.write_text(''.join(f'{token}\n' for token in sorted(ids, key=ids.get)), encoding='utf-8')
  return path


@pytest.fixture
def token_dir(tmp_path, monkeypatch) -> pathlib.Path:
  """A token cache of the test's own."""
  monkeypatch.setenv('PROMPT_TUNING_JAX_CACHE', str(tmp_path / 'cache'))
  return tmp_path / 'cache'

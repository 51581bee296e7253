"""Our gin files: all parse, axes do not touch, any order gives the same run, sizes are public."""

import functools
import itertools
import math
import pathlib
import re

import numpy as np
import pytest

from prompt_tuning_jax import launch, many_runs
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.networks import bart, bert, gpt, parameters, t5
from prompt_tuning_jax.prompts import initializers
from prompt_tuning_jax.tasks import noise
from prompt_tuning_jax.training import methods, run
from prompt_tuning_jax.training.discrete_prompt import DiscretePrompt
from prompt_tuning_jax.training.lightweight import Adapters
from prompt_tuning_jax.training.multitask import MultitaskPrompts
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning
from prompt_tuning_jax.training.prompt_design import PromptDesign
from prompt_tuning_jax.training.warp import Warp
from prompt_tuning_jax.training.word_search import Mutations, WordSearch

GIN = pathlib.Path(__file__).resolve().parent.parent / 'gin'
# Those of t5x/ are for T5X's own launcher (tests/t5x).
FILES = sorted(path.relative_to(GIN).as_posix() for path in GIN.rglob('*.gin')
               if path.parent.name != 't5x')
NETWORKS = [name for name in FILES if name.startswith('network/')]
PROMPTS = [name for name in FILES if name.startswith('prompt/')]
RUNS = [name for name in FILES if name.startswith('run/')]

# Hugging Face's own counts (num_parameters) for the published checkpoints, biases shared.
PARAMETERS = {
    't5_1_0_small': 60_506_624, 't5_1_0_base': 222_903_552, 't5_1_0_large': 737_668_096,
    't5_1_0_3b': 2_851_598_336, 't5_1_0_11b': 11_307_321_344,
    't5_1_1_small': 76_961_152, 't5_1_1_base': 247_577_856, 't5_1_1_large': 783_150_080,
    't5_1_1_xl': 2_849_757_184, 't5_1_1_xxl': 11_135_332_352,
    'mt5_small': 300_176_768, 'mt5_base': 582_401_280, 'mt5_large': 1_229_581_312,
    'mt5_xl': 3_742_619_648, 'mt5_xxl': 12_921_057_280,
    'byt5_small': 299_637_760, 'byt5_base': 581_653_248,
    # Ours have a row more.
    'gpt2': 124_439_808 + 768, 'gpt2_medium': 354_823_168 + 1024, 'gpt2_large': 774_030_080 + 1280,
    'gpt2_xl': 1_557_611_200 + 1600,
    # And a bias of the logits, which is no parameter there.
    'bart_base': 139_420_416 + 768 + 50_266, 'bart_large': 406_291_456 + 1024 + 50_266,
    'bert_base': 109_514_298, 'bert_large': 335_174_458,
}


@pytest.fixture
def values(tmp_path) -> dict[str, str]:
  """What must be given, under every name that any of our files asks for."""
  (tmp_path / 'train.tsv').write_text('text\tlabel\na\tx\nb\ty\n')
  np.save(tmp_path / 'prompt.npy', np.zeros((100, 256), np.float32))
  return {'MODEL_DIR': str(tmp_path), 'INITIAL_CHECKPOINT_PATH': 'mini',
          'MIXTURE_OR_TASK_NAME': 'sst2', 'TRAIN_FILE': str(tmp_path / 'train.tsv'),
          'CLASS_LABELS': "['no', 'yes']", 'PROMPT_TEXT': 'a film review', 'VOCABULARY': 'v.model',
          'INITIAL_PROMPT_PATH': str(tmp_path / 'prompt.npy')}


def _count(config: t5.T5Config) -> int:
  """Parameters of a network, by arithmetic: to trace a deep one takes long."""
  attention = 4 * config.emb_dim * config.num_heads * config.head_dim
  mlp = (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim
  encoder = config.num_encoder_layers * (attention + mlp + 2 * config.emb_dim)
  decoder = config.num_decoder_layers * (2 * attention + mlp + 3 * config.emb_dim)
  tables = (1 if config.logits_via_embedding else 2) * config.vocab_size * config.emb_dim
  biases = 2 * config.relative_attention_num_buckets * config.num_heads
  return encoder + decoder + 2 * config.emb_dim + tables + biases


def _count_decoder_only(config: gpt.GPTConfig) -> int:
  width, joined = config.emb_dim, config.num_heads * config.head_dim
  units = len(config.mlp_activations) * config.mlp_dim
  layer = 4 * width * joined + width * (units + config.mlp_dim) + 2 * width
  if config.use_bias:
    layer += 3 * joined + width + units + width + 2 * width
  tables = (1 if config.logits_via_embedding else 2) * config.vocab_size * width
  norm = (2 if config.use_bias else 1) * width
  positions = (config.relative_attention_num_buckets * config.num_heads
               if config.max_positions is None else config.max_positions * width)
  return config.num_layers * layer + tables + norm + positions


def _count_post_norm(config: bart.BartConfig | bert.BertConfig) -> int:
  width, joined, mlp = config.emb_dim, config.num_heads * config.head_dim, config.mlp_dim
  norm, attention = 2 * width, 4 * width * joined + 3 * joined + width + 2 * width
  layer = attention + 2 * width * mlp + mlp + width + norm
  tables = (config.vocab_size + config.max_positions) * width + config.vocab_size
  if isinstance(config, bert.BertConfig):
    head = width * width + width + norm
    return config.num_encoder_layers * layer + tables + config.num_types * width + norm + head
  positions = (config.max_positions + 4) * width  # the decoder's, and two rows more of each
  return (config.num_encoder_layers * layer + config.num_decoder_layers * (layer + attention)
          + tables + positions + 2 * norm)


COUNTS = {t5.T5Config: _count, gpt.GPTConfig: _count_decoder_only,
          **dict.fromkeys((bart.BartConfig, bert.BertConfig), _count_post_norm)}


def _read(files, bindings=()):
  flags = launch.parse_flags([*(f'--gin_file={name}' for name in files), *bindings])
  paths = launch.find_files(flags.gin_file, flags.gin_search_paths)
  launch.read_config(paths, flags.gin_bindings, run.train)
  return launch.resolve(run.train, config_text=None)


def _read_given(files, values):
  """Reads with those of `values` that are asked for, and nothing else."""
  bindings = []
  try:
    return _read(files)
  except ValueError as error:
    assert str(error).startswith('Not set: '), error
    for name in re.findall(r'(\w+) \(add --gin', str(error)):
      bindings.append(f'--gin.{name}={values[name]}')
  return _read(files, bindings)


@pytest.mark.parametrize('name', FILES)
def test_every_file_parses(name):
  import gin
  launch.find_files([])
  gin.clear_config()
  gin.parse_config_file(name)
  assert launch.find_files([name]) == [GIN / name]


@pytest.mark.parametrize('name', RUNS)
def test_every_run_round_trips(name, values, tmp_path):
  arguments, text = _read_given([name], values)
  (tmp_path / 'config.gin').write_text(text)
  again, text_again = _read([str(tmp_path / 'config.gin')])
  assert text_again == text
  differ = [key for key in arguments if key != 'optimizer' and
            _comparable(again[key]) != _comparable(arguments[key])]
  assert not differ


def _comparable(value):
  """A function with its settings, as something that another can be equal to."""
  if not isinstance(value, functools.partial):
    return value
  return value.func, {name: _comparable(each) for name, each in value.keywords.items()}


@pytest.mark.parametrize(('flags', 'settings'), [
    (['--gin_file=batching/fixed.gin'], {'buckets': batches.Buckets((), ())}),
    (['--gin_file=batching/fresh_noise.gin', '--gin.batches.TrainBatches.window=3'],
     {'noise': noise.redrawn_spans, 'window': 3}),
    (['--gin_file=batching/packing.gin', '--gin.packing.PackedBatches.inputs=96'],
     {'inputs': 96})], ids=['fixed', 'fresh_noise', 'packing'])
def test_settings_of_batches_are_told_and_a_runs_own(flags, settings, tmp_path):
  """They are in config.gin, and are those of the run, whatever is configured after it."""
  command = ['--gin_file=run/quick_start.gin', f'--gin.MODEL_DIR={tmp_path}']
  own = many_runs.configured([*command, *flags])
  other = many_runs.configured([
      *command, '--gin_file=batching/buckets.gin', '--gin.batches.TrainBatches.window=5'])
  assert other['batching'].keywords == {'window': 5}
  (tmp_path / 'config.gin').write_text(own['config_text'])
  again = many_runs.configured([f'--gin_file={tmp_path}/config.gin'])
  for batching in (own['batching'], again['batching']):
    assert {**batching.keywords, **settings}.keys() == batching.keywords.keys()
    found = {name: getattr(value, '__wrapped__', value)
             for name, value in batching.keywords.items()}
    assert found == settings


@pytest.mark.parametrize('name', PROMPTS)
def test_every_prompt_file_replaces_the_start_of_any_prompt_run(name, values):
  for base in ('run/prompt_tuning.gin', 'run/prompt_tuning_text_file.gin'):
    method = _read_given([name, base], values)[0]['method']
    assert isinstance(method, methods.PromptTuning)
    assert type(method.initializer).__module__ == initializers.__name__


@pytest.mark.parametrize('name', ['prefix/words.gin', 'prefix/from_file.gin'])
def test_every_prefix_file_is_a_start_of_prefix_tuning(name):
  given = {'prefix/words.gin': '--gin.PREFIX_TEXT=a table of names',
           'prefix/from_file.gin': '--gin.INITIAL_PREFIX_PATH=p.safetensors'}
  for files in itertools.permutations([name, 'method/prefix_tuning.gin', 'run/prompt_tuning.gin']):
    method = _read(list(files), [
        given[name], '--gin.MODEL_DIR=m', '--gin.INITIAL_CHECKPOINT_PATH=mini',
        '--gin.MIXTURE_OR_TASK_NAME=sst2'])[0]['method']
    assert callable(method.initializer)


def test_any_order_gives_the_same_run(values):
  files = ['run/prompt_tuning.gin', 'network/t5_1_1_small.gin', 'prompt/text.gin',
           'method/prompt_tuning.gin', 'task/text_file.gin']
  orders = list(itertools.permutations(files))[::7]  # of all 120, each file first, last, between
  texts = {_read_given(order, values)[1] for order in orders}
  assert len(texts) == 1
  text = texts.pop()
  for part in ('t5.T5Config.emb_dim = 512', '@initializers.Text()', '@text_file.TextFile()'):
    assert part in text
  assert 'MIXTURE_OR_TASK_NAME' not in text and 'SampledVocabulary' not in text


def _names(path: pathlib.Path) -> set[str]:
  """Everything a file binds itself: macros, and arguments as module.name.argument."""
  names, block = set(), ''
  for line in path.read_text(encoding='utf-8').splitlines():
    if match := re.match(r'([\w.]+):$', line):
      block = match[1]
    elif match := re.match(r'( *)([\w.]+) = ', line):
      names.add(f'{block}.{match[2]}' if match[1] else match[2])
  return names


def test_every_name_has_one_axis_and_runs_bind_what_they_include():
  owners = {}
  for name in FILES:
    for bound in _names(GIN / name):
      owners.setdefault(bound, set()).add(name.split('/')[0])
  shared = {bound: axes for bound, axes in owners.items() if len(axes - {'run'}) > 1}
  assert not shared
  # A macro of an axis and of a run would have two defaults, and which one wins would be a riddle.
  # But that of the axis vocabulary/ wins over a run's None, which is the checkpoint's own.
  both = [bound for bound, axes in owners.items() if bound.isupper() and len(axes) > 1]
  assert both == ['VOCABULARY']


def test_files_of_one_axis_bind_the_same():
  """Of `run.train`, and of each class of networks, so that one file of an axis replaces another."""
  for axis, start in (('network', 'run.'), ('method', 'run.'), ('network', 't5.T5Config.'),
                      *(('network', f'{name}Config.') for name in (
                          'gpt.GPT', 'bart.Bart', 'bert.Bert'))):
    bound = [names for path in (GIN / axis).glob('*.gin')
             if (names := {name for name in _names(path) if name.startswith(start)})]
    assert len(bound) > 2 and all(names == bound[0] for names in bound), axis
  for path in (GIN / 'network').glob('*.gin'):
    assert len({name.rsplit('.', 1)[0] for name in _names(path)}) == 2, path  # run and a network


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_have_their_public_sizes(name):
  config = launch.network_named(pathlib.Path(name).stem)
  count = COUNTS[type(config)](config)
  assert count == PARAMETERS.get(pathlib.Path(name).stem, count)


def test_a_network_of_one_class_replaces_that_of_another(values):
  """What is left of the run's own network is not read, nor written down."""
  run_file = 'run/mini_span_corruption.gin'
  assert isinstance(_read_given([run_file], values)[0]['network'], t5.T5Config)
  arguments, text = _read_given(['network/gpt2.gin', run_file], values)
  assert arguments['network'] == launch.network_named('gpt2')
  assert isinstance(arguments['network'], gpt.GPTConfig) and 't5.T5Config' not in text


@pytest.mark.parametrize('name', ['t5_1_0_small', 'mini', 'tiny', 'gpt_tiny', 'decoder_only_mini',
                                  'bart_tiny', 'bert_tiny'])
def test_our_network_has_as_many_parameters(name):
  config = launch.network_named(name)
  shapes = [spec.shape for spec in parameters.parameter_specs(config).values()]
  assert sum(map(math.prod, shapes)) == COUNTS[type(config)](config)


def test_a_misspelt_network_is_told():
  with pytest.raises(ValueError, match=r'no network t5_1_1_bas\. Did you mean t5_1_1_base\?'):
    launch.network_named('t5_1_1_bas')


def test_prompt_tuning_has_the_papers_settings(values):
  arguments, text = _read_given(['run/prompt_tuning.gin'], values)
  assert arguments['method'] == methods.PromptTuning(100, 'before',
                                                     initializers.SampledVocabulary(5000))
  expected = {'train_steps': 30000, 'batch_size': 32, 'dropout_rate': 0.1, 'z_loss': 1e-4}
  assert {key: arguments[key] for key in expected} == expected
  for line in ('learning_rate = 0.3', 'decay_rate = 0.8', 'weight_decay_rate = 1e-05',
               'multiply_by_parameter_scale = False', 'clipping_threshold = 1.0'):
    assert f'optimizers.adafactor.{line}\n' in text


@pytest.mark.parametrize(('name', 'method', 'optimizer'), [
    ('deep_prompt', methods.DeepPrompt(100), 'adafactor'),
    ('infix_tuning', methods.DeepPrompt(100, 'end'), 'adamw'),
    ('embedding_only', methods.PromptTuning(100), 'adamw'),
    ('prefix_tuning', PrefixTuning(100), 'adamw'),
    ('adapters', Adapters(64), 'adamw'), ('prompt_design', PromptDesign(), 'adafactor'),
    ('multitask_prompts', MultitaskPrompts(100), 'adafactor'),
    ('autoprompt', DiscretePrompt(100), 'adafactor'), ('warp', Warp(100), 'adafactor'),
    ('evolutionary_search', DiscretePrompt(100, search=WordSearch(Mutations(), 8)), 'adafactor')])
def test_every_method_replaces_that_of_a_run(name, method, optimizer, values):
  arguments, text = _read_given(['run/prompt_tuning.gin', f'method/{name}.gin'], values)
  assert arguments['method'] == method
  assert f'train.optimizer = @optimizers.{optimizer}()' in text
  # The ablations of Li & Liang have their settings.
  linear = 'peak = 5e-05' in text and '@prefix_rate/optimizers.linear_decay()' in text
  assert linear == (name in ('infix_tuning', 'embedding_only', 'prefix_tuning'))


@pytest.mark.parametrize('way', ['Sum', 'Product', 'Concatenation', 'Separate'])
def test_ways_to_share_are_named_on_the_command_line(way):
  method = _read(['run/prompt_tuning.gin', 'method/multitask_prompts.gin'], [
      '--gin.MODEL_DIR=m', '--gin.INITIAL_CHECKPOINT_PATH=mini', '--gin.MIXTURE_OR_TASK_NAME=sst2',
      f'--gin.COMBINE=%{way.upper()}'])[0]['method']
  assert type(method.combine).__name__ == way


@pytest.mark.parametrize('name, method', [('deep_prompt', methods.DeepPrompt), ('warp', Warp)])
def test_other_methods_with_a_prompt_start_as_prompt_files_say(values, name, method):
  files = ['run/prompt_tuning.gin', f'method/{name}.gin', 'prompt/text.gin']
  made = _read_given(files, values)[0]['method']
  assert made == method(100, 'before', initializers.Text('a film review'))


def test_model_tuning_asks_for_nothing_of_prompts(values):
  arguments, text = _read_given(['method/model_tuning.gin', 'run/prompt_tuning.gin'], values)
  assert arguments['method'] == methods.ModelTuning()
  assert 'PROMPT_LENGTH' not in text and 'learning_rate = 0.001\n' in text
  with pytest.raises(ValueError, match='Nothing in this configuration uses PROMPT_LENGTH'):
    _read(['method/model_tuning.gin', 'run/prompt_tuning.gin'], ['--gin.PROMPT_LENGTH=5'])


@pytest.mark.parametrize('binding, parts', [
    ('--gin.TRIAN_STEPS=5', 'uses TRIAN_STEPS. Did you mean TRAIN_STEPS?'),
    ('--gin.run.train.batchsize=5', 'no argument batchsize. Did you mean batch_size?'),
    ('--gin.run.trian.batch_size=5', 'no run.trian. Did you mean run.train?'),
    ('--gin.methods.PromptTunning.length=5', 'Did you mean methods.PromptTuning?'),
    ('--gin.adafactor.learning_rat=5', 'Did you mean learning_rate?'),
])
def test_misspelt_names_are_told(binding, parts):
  with pytest.raises(ValueError) as caught:
    _read(['run/quick_start.gin'], ['--gin.MODEL_DIR=m', binding])
  assert parts in str(caught.value)


def test_what_is_missing_is_told():
  with pytest.raises(ValueError, match=r'Not set: MODEL_DIR \(add --gin.MODEL_DIR=VALUE\)'):
    _read(['run/quick_start.gin'])
  with pytest.raises(ValueError, match=r'run\.train\.task \(add a file such as --gin_file='):
    _read([])
  with pytest.raises(ValueError, match='Two files of one kind: run/'):
    _read(['run/quick_start.gin', 'run/prompt_tuning.gin'])

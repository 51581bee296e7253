"""SeqIO tasks become token caches; what is wrong is told in one line."""

import subprocess
import sys

import pytest

from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.data import seqio_builder, seqio_task, token_cache
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training import evaluate

BYTES = Vocabulary('bytes')
LENGTHS = {'inputs': 12, 'targets': 4}
MODULE = """
import functools
import seqio
import tensorflow as tf
from prompt_tuning_jax.tasks import metrics
from prompt_tuning_jax.tasks.postprocessors import label_to_class_id

FEATURES = {key: seqio.Feature(seqio.ByteVocabulary(1), add_eos=True)
            for key in ('inputs', 'targets')}

def source(split, shuffle_files, seed=None, *, name, count):
  print('noise on standard output')
  return tf.data.Dataset.from_tensor_slices({
      'inputs': [f'{name} ' + 'x' * i for i in range(count)],
      'targets': [('no', 'yes')[i % 2] for i in range(count)],
      'answers': [['a', str(i)] for i in range(count)]})

def broken(dataset):
  raise RuntimeError('this preprocessor is broken')

def odd(dataset, *, field, value):
  # The third row has this value.
  return dataset.enumerate().map(lambda i, row: {
      **row, field: tf.where(tf.equal(i, 2), tf.constant(value), row[field])})

def needs_sentence(dataset):
  return dataset.map(lambda row: {'inputs': row['sentence'], 'targets': row['targets']})

def add(name, count, metric_fns=(metrics.accuracy,), first=(), labels=('no', 'yes'), eos=True,
        features=FEATURES, tokenize=seqio.preprocessors.tokenize):
  seqio.TaskRegistry.add(
      name, source=seqio.FunctionDataSource(functools.partial(source, name=name, count=count),
                                            splits=('train', 'validation')),
      preprocessors=[*first, tokenize,
                     *([seqio.preprocessors.append_eos_after_trim] if eos else [])],
      output_features=features, metric_fns=list(metric_fns),
      postprocess_fn=functools.partial(label_to_class_id, label_classes=list(labels)))

add('many', 12)
add('few', 3)
add('plain', 3, metric_fns=())
add('eos_by_us', 12, eos=False)
add('broken', 3, first=(broken,))
add('empty_target', 5, first=(functools.partial(odd, field='targets', value=''),))
add('latin_1', 5, first=(functools.partial(odd, field='inputs', value=b'caf\\xe9 noir'),))
add('fieldless', 5, first=(needs_sentence,))
add('hidden', 5, first=(functools.partial(odd, field='targets', value='<unk>'),))
add('bare', 5, first=(functools.partial(odd, field='targets', value='<unk>'),),
    tokenize=functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False))
add('alike', 5, first=(functools.partial(odd, field='targets', value='<under>'),),
    labels=('no', 'yes', '<under>'))
add('nameless', 3, metric_fns=(lambda targets, predictions: {},))
seqio.MixtureRegistry.add('even', [('many', 1), ('few', 1)])
seqio.MixtureRegistry.add('unlike', [('many', 1), ('plain', 1)])
seqio.MixtureRegistry.add('lopsided', [('many', 1e-4), ('few', 1)])
"""


@pytest.fixture(scope='module', autouse=True)
def task_module(tmp_path_factory):
  folder = tmp_path_factory.mktemp('modules')
  (folder / 'tasks_for_this_test.py').write_text(MODULE)
  sys.path.insert(0, str(folder))
  yield 'tasks_for_this_test'
  sys.path.remove(str(folder))


def build(folder, name, split='train', max_examples=None, **kwargs):
  arguments = {'vocabulary': {'file': 'bytes', 'extra_ids': 100}, 'lengths': LENGTHS,
               'modules': ['tasks_for_this_test'], **kwargs}
  seqio_builder.build(name, split=split, folder=str(folder), max_examples=max_examples,
                      **arguments)
  return token_cache.open_cache(folder)


@pytest.mark.slow
def test_another_process_builds_the_cache(tmp_path):
  task = SeqioTask('many', modules='tasks_for_this_test')
  cache = token_cache.open_or_build(task, 'train', BYTES, LENGTHS, tmp_path)
  direct = build(tmp_path / 'direct', 'many')
  assert cache.rows == direct.rows and cache.num_examples == 12
  assert cache.input_tokens.tolist() == direct.input_tokens.tolist()
  assert cache.meta['metrics'] == ['prompt_tuning_jax.tasks.metrics:accuracy']
  built = list(tmp_path.glob('many-*'))
  token_cache.open_or_build(task, 'train', BYTES, LENGTHS, tmp_path)
  assert list(tmp_path.glob('many-*')) == built


def test_rows_tokens_and_cuts(tmp_path):
  cache = build(tmp_path / 'cache', 'many')
  assert cache.rows[3] == {'inputs': 'many xxx', 'targets': 'yes', 'target': 1,
                          'example': {'answers': ['a', '3']}}
  assert cache.inputs(3).tolist() == BYTES.encode('many xxx') + [1]
  assert cache.targets(3).tolist() == BYTES.encode('yes') + [1]
  # 'many ' and six letters with EOS are 12 bytes, which just fit.
  assert cache.input_lengths.tolist() == [6, 7, 8, 9, 10, 11, 12, 12, 12, 12, 12, 12]
  assert cache.meta['num_cut'] == {'inputs': 5, 'targets': 0}
  assert all(cache.inputs(i)[-1] == 1 for i in range(12))
  assert cache.postprocess('yes', cache.rows[0]) == 1


@pytest.mark.parametrize(('name', 'message'), [
    ('empty_target', r'empty_target, train, row 2: the target is empty'),
    ('fieldless', 'fieldless, train: the rows have no field sentence, but answers, inputs, '
     'targets'),
    ('latin_1', r'latin_1, train, row 2: the inputs are not UTF-8 \(.* at byte 3\)')])
def test_a_bad_row_is_named(tmp_path, name, message):
  with pytest.raises(ValueError, match=message):
    build(tmp_path, name)


def test_a_user_s_own_task_is_not_cut_into_blocks(tmp_path, monkeypatch, task_module):
  """Its preprocessors may draw random numbers, or look at many rows."""
  monkeypatch.setattr(seqio_task, '_cores', lambda: 4)
  monkeypatch.setattr(seqio_task, '_split_sizes', lambda *_: {'train': 10 ** 6})
  (tmp_path / 'own_tasks.py').write_text("TFDS_DATASETS = {'own': ['glue/sst2:2.0.0']}")
  monkeypatch.syspath_prepend(str(tmp_path))
  assert SeqioTask('own', modules='own_tasks')._blocks('train') == []
  assert len(SeqioTask('sst2')._blocks('train')) == 4
  assert SeqioTask('sst2')._blocks('train')[-1][1] is None


def test_the_hidden_label_of_a_later_block_is_remembered(tmp_path):
  parts = []
  for i, hidden in enumerate((None, 1, 0)):
    writer = token_cache.CacheWriter(tmp_path / str(i))
    for _ in range(3):
      writer.add([2, 1], [3, 1])
    writer.close(first_hidden=hidden, tasks=[], sentinel=False, num_cut={'inputs': i, 'targets': 0})
    parts.append(str(tmp_path / str(i)))
  seqio_task._join(parts, tmp_path / 'whole')
  whole = token_cache.open_cache(tmp_path / 'whole')
  assert (whole.meta['first_hidden'], whole.num_examples) == (4, 9)
  assert whole.meta['num_cut'] == {'inputs': 3, 'targets': 0}
  assert not any((tmp_path / str(i)).exists() for i in range(3))


def test_a_misspelt_task_is_told_at_once(tfds_data_dir):
  with pytest.raises(ValueError, match="There is no task 'sst3': is it sst2"):
    SeqioTask('sst3').key_parts('train')


def test_a_builder_ends_with_the_process_that_started_it(monkeypatch):
  ended = []
  monkeypatch.setattr(seqio_builder.os, '_exit', lambda status: ended.append(status))
  seqio_builder._end_with(parent=-1)  # which is gone
  assert ended == [1]


@pytest.mark.slow
def test_the_first_hidden_label_is_remembered(tmp_path):
  assert build(tmp_path / 'one', 'hidden').meta['first_hidden'] == 2
  assert build(tmp_path / 'other', 'many').meta['first_hidden'] is None
  bare = build(tmp_path / 'bare', 'bare', lengths={'inputs': 8, 'targets': 16})
  assert bare.meta['first_hidden'] == 2
  cut = build(tmp_path / 'cut', 'alike', lengths={'inputs': 8, 'targets': 3})
  assert cut.meta['first_hidden'] is None  # '<u', and no more of it than of '<unk>'
  cache = token_cache.open_or_build(SeqioTask('hidden', modules='tasks_for_this_test'), 'train',
                                    BYTES, LENGTHS, tmp_path)
  for refuse in (evaluate.check_labelled, lambda cache: evaluate.Evaluator(None, cache)):
    with pytest.raises(ValueError, match='hidden, train, row 2: the label is hidden'):
      refuse(cache)


@pytest.mark.parametrize('label', [2, -2])
def test_a_label_outside_the_list_is_told(label):
  tf = pytest.importorskip('tensorflow')
  from prompt_tuning_jax.tasks.classification import verbalize
  rows = verbalize(tf.data.Dataset.from_tensor_slices({'text': ['a', 'b'], 'label': [-1, label]}),
                   ('text',), ('no', 'yes'))
  numbered = seqio_builder._numbered(rows, 'made, train')
  with pytest.raises(ValueError, match=rf'made, train, row \d or soon after: .*label.*{label}'):
    list(numbered)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'data', 'lengths'), [
    # Training has a row for each answer: more than the data set.
    ('record', 'super_glue/record/1.0.2', {'inputs': 400, 'targets': 20}),
    # A tenth of the training rows, so some blocks are empty.
    ('trec', 'trec/1.0.0', {'inputs': 40, 'targets': 8}),
    ('span_corruption_novels', 'local_text/novels/1.0.0', {'inputs': 64, 'targets': 20})])
def test_processes_side_by_side_make_the_same_cache(
    tfds_data_dir, tmp_path, monkeypatch, name, data, lengths):
  if not (tfds_data_dir / data).exists():
    pytest.skip(f'{data} has not been prepared')
  vocabulary = Vocabulary(str(base_checkpoint.BUNDLED / 'mini' / 'spiece.model'))
  task, split = SeqioTask(name), 'train' if name == 'record' else 'validation'
  block = {'sst2': 256, 'record': 8, 'trec': 128, 'span_corruption_novels': 1024}[name]
  if name == 'trec':  # Sized by a split of another size than what the task reads.
    sizes = seqio_task._split_sizes
    monkeypatch.setattr(seqio_task, '_split_sizes', lambda *args: {
        'validation': sizes(*args)['train']})
  caches = []
  for cores in (1, 3):
    monkeypatch.setattr(seqio_task, 'LEAST_ROWS', block)
    monkeypatch.setattr(seqio_task, 'BLOCK', block)
    monkeypatch.setattr(seqio_task, '_cores', lambda cores=cores: cores)
    blocks = task._blocks(split)
    assert bool(blocks) == (cores > 1)
    folder = tmp_path / str(cores)
    task.build(split, vocabulary, lengths, folder)
    caches.append(token_cache.open_cache(folder))
    assert not list(folder.glob('block*'))
  one, other = caches
  assert one.meta == other.meta and one.rows == other.rows
  assert one.num_examples > {'record': 40, 'trec': 500}.get(name, 800)
  for array in ('input_tokens', 'input_offsets', 'target_tokens', 'target_offsets'):
    assert (getattr(one, array) == getattr(other, array)).all()


def test_a_hidden_label_behind_a_sentinel_is_hidden(tmp_path):
  lengths = {'inputs': 12, 'targets': 30}
  cache = build(tmp_path, 'hidden', sentinel=True, lengths=lengths, vocabulary={
      'file': str(base_checkpoint.BUNDLED / 'mini' / 'spiece.model'), 'extra_ids': 100})
  assert cache.meta['first_hidden'] == 2


def test_inputs_in_a_template_are_those_of_a_masked_language_model(tmp_path, bert_file):
  """They begin with [CLS] and hold the mask; targets are labels alone. What is cut ends too."""
  pytest.importorskip('seqio')
  words, template = Vocabulary(bert_file), '[MASK]. {} It'
  cls, most = words.begins('inputs'), 24
  cache = build(tmp_path, 'quick_start', 'validation', 20, modules=['prompt_tuning_jax.tasks'],
                vocabulary={'file': words.file, 'extra_ids': 0}, template=template,
                lengths={'inputs': most, 'targets': 12})
  plain = build(tmp_path / 'plain', 'quick_start', 'validation', 20,
                modules=['prompt_tuning_jax.tasks'], lengths={'inputs': 999, 'targets': 12},
                vocabulary={'file': 'bytes', 'extra_ids': 0})
  cut = 0
  for i in range(20):
    text = template.replace('{}', plain.rows[i]['inputs'])
    assert cache.rows[i]['inputs'] == text
    assert cache.inputs(i).tolist() == words.framed(words.encode(text), 'inputs', most)
    assert cache.inputs(i)[0] == cls[0] and words.mask_id == cache.inputs(i)[1]
    assert cache.targets(i).tolist() == words.framed(words.encode(plain.rows[i]['targets']),
                                                     'targets')
    cut += len(words.encode(text)) + 2 > most
  assert cache.meta['num_cut'] == {'inputs': cut, 'targets': 0} and 0 < cut
  keys = [SeqioTask('quick_start', template=text).key_parts('train') for text in ('{}', template)]
  assert keys[0] != keys[1]
  with pytest.raises(ValueError, match="template should be a text with one '{}'"):
    SeqioTask('quick_start', template='It was [MASK].')


def test_targets_behind_a_sentinel(tmp_path):
  seqio = pytest.importorskip('seqio')
  vocabulary = Vocabulary(str(base_checkpoint.BUNDLED / 'mini' / 'spiece.model'))
  plain, marked = (build(tmp_path / str(sentinel), 'quick_start', 'validation', 20,
                         modules=['prompt_tuning_jax.tasks'], sentinel=sentinel,
                         vocabulary={'file': vocabulary.file, 'extra_ids': 100},
                         lengths={'inputs': 40, 'targets': 8}) for sentinel in (False, True))
  for i in range(20):
    assert marked.targets(i).tolist() == [vocabulary.sentinel(0), *plain.targets(i)]
    row, without = marked.rows[i], plain.rows[i]
    assert row['choices'] == [f'<extra_id_0> {text}' for text in without['choices']]
    assert row['targets'] == f'<extra_id_0> {without["targets"]}'
    assert row['target'] == without['target'] == marked.postprocess(row['targets'], row)
    # What a model writes after decoding is read in the same way, and so is a bare label.
    written = vocabulary.decode(marked.targets(i))
    assert marked.postprocess(written, row) == row['target']
    assert marked.postprocess(without['targets'], row) == row['target']
  keys = [SeqioTask('quick_start', sentinel=sentinel).key_parts('train') for sentinel in (0, 1)]
  assert keys[0] != keys[1]
  with pytest.raises(ValueError, match='no sentinels to begin'):
    build(tmp_path / 'none', 'quick_start', 'validation', modules=['prompt_tuning_jax.tasks'],
          vocabulary={'file': vocabulary.file, 'extra_ids': 0}, sentinel=True)
  assert seqio.get_mixture_or_task('quick_start').preprocessors  # the task itself is as it was


def test_labels_that_training_would_cut_are_refused(tmp_path, monkeypatch):
  pytest.importorskip('seqio')
  cache = build(tmp_path, 'quick_start', 'validation', 20, modules=['prompt_tuning_jax.tasks'])
  cache.meta['lengths'] = LENGTHS
  with pytest.raises(ValueError, match=r"The label '\w+' takes .* length is 4: raise 'targets'"):
    evaluate.choices('targets', [cache], BYTES, True)
  of_rows = [{'choices': ['a long answer', str(i)]} for i in range(2)]  # which are no labels
  monkeypatch.setattr(token_cache.TokenCache, 'read_rows', lambda cache: of_rows)
  assert evaluate.choices('targets', [cache], BYTES, True) is None


def test_eos_is_ours_to_keep(tmp_path):
  with_theirs, with_ours = (build(tmp_path / name, name) for name in ('many', 'eos_by_us'))
  assert with_theirs.target_tokens.tolist() == with_ours.target_tokens.tolist()
  assert all(with_ours.inputs(i)[-1] == 1 and len(with_ours.inputs(i)) <= 12 for i in range(12))


def test_no_metrics_no_rows_and_the_first_examples(tmp_path):
  cache = build(tmp_path / 'cache', 'plain', max_examples=2)
  assert cache.rows == [] and cache.num_examples == 2 and cache.meta['metrics'] == []


def test_mixture_shows_tasks_at_their_rates(tmp_path):
  cache = build(tmp_path / 'even', 'even')
  names = [row['inputs'].split()[0] for row in cache.rows]
  assert names.count('many') == names.count('few') == 12
  assert len({row['inputs'] for row in cache.rows}) == 15
  assert set(names[:4]) == {'many', 'few'}
  assert cache.meta['tasks'] == ['few', 'many'] and len(cache.meta['metrics']) == 1
  again = build(tmp_path / 'again', 'even', max_examples=6)
  assert again.num_examples == 6


def test_mixture_of_unlike_tasks_only_trains(tmp_path):
  cache = build(tmp_path / 'unlike', 'unlike')
  assert cache.rows == [] and cache.meta['metrics'] == [] and cache.num_examples == 24


@pytest.mark.parametrize('name,words', [
    ('many_', 'no task or mixture'), ('lopsided', 'max_examples'), ('nameless', 'found by name')])
def test_errors_of_tasks(tmp_path, name, words):
  with pytest.raises(ValueError, match=words):
    build(tmp_path / 'cache', name)


def test_unknown_split(tmp_path):
  with pytest.raises(ValueError, match="no split 'test', but train, validation"):
    build(tmp_path / 'cache', 'many', split='test')


@pytest.mark.slow
def test_an_error_in_the_other_process_is_one_line_here(tmp_path):
  task = SeqioTask('broken', modules=('tasks_for_this_test',))
  with pytest.raises(ValueError) as error:
    token_cache.open_or_build(task, 'train', BYTES, LENGTHS, tmp_path)
  assert 'RuntimeError: this preprocessor is broken (tasks_for_this_test.py' in str(error.value)
  assert '\n' not in str(error.value)
  assert list(tmp_path.iterdir()) == []


def test_a_process_that_dies_is_told(tmp_path, monkeypatch):
  monkeypatch.setattr(seqio_task, 'BUILDER', 'prompt_tuning_jax.types')  # Does not answer.
  with pytest.raises(ValueError, match='ended with status 0'):
    SeqioTask('many', modules=('tasks_for_this_test',)).build('train', BYTES, LENGTHS, tmp_path)


def test_wrong_arguments():
  with pytest.raises(ValueError, match="no task module 'absent.module'"):
    SeqioTask('t', modules=('absent.module',)).key_parts('train')
  with pytest.raises(ValueError, match='max_examples'):
    SeqioTask('t', max_examples=0)


def test_no_tensorflow():
  code = ('import sys; from prompt_tuning_jax.data.seqio_task import SeqioTask; '
          "SeqioTask('quick_start').key_parts('train'); "
          "sys.exit(any(m in sys.modules for m in ('tensorflow', 'seqio', 'jax')))")
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0

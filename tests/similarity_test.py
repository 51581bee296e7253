"""The verb similarity: what it finds, names, ranks, averages and refuses, and a start from it."""

import csv
import json
import pathlib

import numpy as np
import pytest

from prompt_tuning_jax import launch
from prompt_tuning_jax import similarity as verb
from prompt_tuning_jax.analysis import similarity, trained_prompts
from prompt_tuning_jax.checkpoints import base_checkpoint, peft_adapter, prompt_file
from prompt_tuning_jax.data.vocabulary import Vocabulary

RELEASED = 'prompt_tuning/pretrained_prompts/t5_1_1_lm100k_base'


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


def save(path, base, embedding, **about) -> str:
  metadata = prompt_file.describe(base, length=len(embedding), **about)
  metadata['base'] = {**metadata['base'], 'd_model': embedding.shape[1]}
  prompt_file.save(path, prompt_file.PromptFile({prompt_file.EMBEDDING: embedding}, metadata))
  return str(path)


def random(seed, length=4, width=8):
  return np.random.default_rng(seed).normal(0.5, 1, (length, width)).astype(np.float32)


@pytest.fixture
def runs(tmp_path, base):
  """A folder of three runs; `near` lies nearest to `target`, which is outside of it."""
  target = random(0)
  for task, embedding in (('far', -target + random(1)), ('near', target + 0.3 * random(2)),
                          ('middle', target + 3 * random(3))):
    save(tmp_path / 'runs' / task / 'prompts' / 'best.safetensors', base, embedding, task=task)
    save(tmp_path / 'runs' / task / 'prompts' / 'last.safetensors', base, random(9), task=task)
  save(tmp_path / 'target.safetensors', base, target, task='target')
  return tmp_path / 'runs'


def one_line(capsys) -> str:
  said = capsys.readouterr().err.strip()
  assert said.startswith('error: ') and len(said.splitlines()) == 1
  return said


def refused(capsys, *argv) -> str:
  assert verb.main(list(map(str, argv))) == 1
  return one_line(capsys)


def table_of(*argv) -> list[dict]:
  assert verb.main(list(map(str, argv))) == 0
  path = pathlib.Path(next(a for a in map(str, argv) if a.startswith('--output')).split('=')[1])
  if path.suffix == '.json':
    return json.loads(path.read_text())
  return list(csv.DictReader(path.read_text().splitlines()))


def test_of_a_folder_the_best_are_taken_and_no_leftovers_nor_averages(runs, base):
  expected = {row['prompt'] for row in table_of(runs, f'--output={runs.parent}/all.json')}
  for name in ('best', 'last', '.best.x1', '.best.x1.old'):  # Of several tasks, and of a kill.
    save(runs / 'many' / 'prompts' / name / 'mixed.safetensors', base, random(7), task='mixed')
  target = f'--target={runs.parent}/target.safetensors'
  ranked = table_of(runs, target, f'--output={runs.parent}/ranked.json',
                    f'--average={runs}/average.safetensors')
  again = table_of(runs, target, f'--output={runs.parent}/ranked.json')
  assert [row['source'] for row in ranked] == [row['source'] for row in again]
  assert len(ranked) == 4
  assert {row['source'] for row in ranked} == {'mixed', 'near', 'far', 'middle'} >= expected


def test_pairs_of_a_folder_and_of_files_are_the_same_table(runs, capsys):
  in_folder = table_of(runs, f'--output={runs.parent}/all.json')
  printed = capsys.readouterr().out.splitlines()
  files = sorted(runs.glob('*/prompts/best.safetensors'))
  named = table_of(*files, f'--output={runs.parent}/all.csv')
  assert [row['prompt'] for row in named] == [row['prompt'] for row in in_folder]
  assert {frozenset((row['prompt'], row['other'])) for row in in_folder} == {
      frozenset(pair) for pair in (('far', 'near'), ('far', 'middle'), ('near', 'middle'))}
  arrays = {p.parts[-3]: prompt_file.load(p).params['prompt/embedding'] for p in files}
  for row, kept in zip(in_folder, named, strict=True):
    pair = [arrays[row['prompt']], arrays[row['other']]]
    for name in verb.MEASURES:
      assert row[name] == float(kept[name]) == pytest.approx(getattr(similarity, name)(pair)[0, 1])
  values = [row['cosine_of_means'] for row in in_folder]
  assert values == sorted(values, reverse=True)
  assert len(printed) == 4 and len(set(map(len, printed))) == 1  # aligned
  assert f'{values[0]:.4f}' in printed[1]


@pytest.mark.parametrize('by', verb.MEASURES)
def test_sources_are_ranked_by_their_similarity_to_the_target(runs, base, capsys, by):
  target = runs.parent / 'target.safetensors'
  save(runs / 'again.safetensors', base, random(0), task='target')
  table = table_of(runs, target, f'--target={target}', f'--by={by}',
                   f'--output={runs.parent}/rank.json')
  assert [row['source'] for row in table] == ['near', 'middle', 'far']  # no target among them
  assert [row['rank'] for row in table] == [1, 2, 3] and table[2][by] < 0 < table[1][by]
  out, err = capsys.readouterr()
  [marked] = [line for line in out.splitlines() if line.startswith('*')]
  assert marked.split()[1:3] == ['1', 'near']
  assert f'INITIAL_PROMPT_PATH={runs}/near/prompts/best.safetensors' in out
  assert "again.safetensors is a prompt of the target's own task" in err
  one = table_of(runs / 'far/prompts/best.safetensors', f'--target={target}',
                 f'--output={runs.parent}/one.json')  # the others do not change a source's number
  assert one[0][by] == pytest.approx(table[2][by])


def test_the_average_is_weighted_by_similarity_and_is_a_prompt_of_the_base(runs, base, capsys):
  target, output = runs.parent / 'target.safetensors', runs.parent / 'new' / 'average.safetensors'
  table = table_of(runs, f'--target={target}', f'--average={output}', '--top=2',
                   f'--output={runs.parent}/rank.json')
  similarities = np.array([row['cosine_of_means'] for row in table])
  weights = [row['weight'] for row in table]
  np.testing.assert_allclose(weights, [*similarities[:2] / similarities[:2].sum(), 0])
  parts = [prompt_file.load(runs / row['source'] / 'prompts' / 'best.safetensors')
           for row in table[:2]]
  made = prompt_file.load(output)
  np.testing.assert_allclose(made.params['prompt/embedding'], sum(
      weight * part.params['prompt/embedding']
      for weight, part in zip(weights, parts, strict=False)), rtol=1e-5, atol=1e-6)
  prompt_file.check(made, base)
  assert not {'task', 'labels', 'metric'} & made.metadata.keys()
  assert [source['name'] for source in made.metadata['sources']] == ['near', 'middle']
  assert f'INITIAL_PROMPT_PATH={output} --gin.PROMPT_LENGTH=4' in capsys.readouterr().out
  # Of one source it is that source; of one that points away there is none.
  assert verb.main([str(runs), f'--target={target}', f'--average={output}', '--top=1']) == 0
  np.testing.assert_array_equal(prompt_file.load(output).params['prompt/embedding'],
                                parts[0].params['prompt/embedding'])
  capsys.readouterr()
  before = output.read_bytes()
  assert 'is positive' in refused(capsys, runs, f'--target={target}', f'--average={output}')
  assert 'more sources than the 3' in refused(
      capsys, runs, f'--target={target}', f'--average={output}', '--top=4')
  save(runs / 'near/prompts/best.safetensors', base, random(0, length=6), task='near')
  assert 'of one length' in refused(
      capsys, runs, f'--target={target}', f'--average={output}', '--top=2')
  assert output.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize('rate, steps', [(0.0, 2), (0.3, 1)])
def test_a_training_starts_from_the_average_as_the_verb_says(
    runs, tiny_base, reviews, capsys, token_dir, rate, steps):
  """Where nothing moves it, the trained prompt is the file, bit for bit."""
  output, model = runs.parent / 'average.safetensors', runs.parent / 'model'
  assert verb.main([str(runs), f'--target={runs.parent}/target.safetensors',
                    f'--average={output}', '--top=2']) == 0
  start = capsys.readouterr().out.splitlines()[-1].split(': ')[1].split()
  assert launch.train([
      '--gin_file=run/prompt_tuning_text_file.gin', *start, f'--gin.TRAIN_FILE={reviews}',
      '--gin.INPUTS=text', '--gin.TARGETS=label', f'--gin.INITIAL_CHECKPOINT_PATH={tiny_base}',
      f'--gin.MODEL_DIR={model}', "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}",
      f'--gin.TRAIN_STEPS={steps}', '--gin.BATCH_SIZE=8', '--gin.EVAL_PERIOD=0',
      f'--gin.optimizers.adafactor.learning_rate={rate}',
      '--gin.optimizers.adafactor.weight_decay_rate=0.0']) == 0
  first, last = (prompt_file.load(path).params['prompt/embedding']
                 for path in (output, model / 'prompts' / 'last.safetensors'))
  assert np.array_equal(first, last) == (rate == 0)


def test_names_are_tasks_and_ends_of_paths_where_those_are_not_unique(tmp_path, base):
  paths = [save(tmp_path / 'a' / 'x.safetensors', base, random(0), task='sst2'),
           save(tmp_path / 'b' / 'x.safetensors', base, random(1), task='sst2'),
           save(tmp_path / 'b' / 'y.safetensors', base, random(2), task='sst2'),
           save(tmp_path / 'z.safetensors', base, random(3), task='an\nli'),
           save(tmp_path / 'none.safetensors', base, random(4))]
  for folder in ('a', 'b'):
    np.save(tmp_path / folder / 'p.npy', random(5))
  prompts, _, left_out = trained_prompts.read([*paths, paths[0], str(tmp_path)])
  assert [prompt.name for prompt in prompts] == [
      'sst2 (a/x.safetensors)', 'sst2 (b/x.safetensors)', 'sst2 (y.safetensors)', 'an li',
      'none.safetensors', 'a/p.npy', 'b/p.npy'] and not left_out


def test_prompts_of_other_lengths_are_compared(tmp_path, base):
  paths = [save(tmp_path / f'{n}.safetensors', base, random(0, length=n)) for n in (2, 5)]
  assert len(table_of(*paths, f'--output={tmp_path}/table.csv')) == 1


def test_a_peft_folder_is_one_prompt_wherever_it_stands(runs, base, capsys):
  near = prompt_file.load(runs / 'near' / 'prompts' / 'best.safetensors')
  peft_adapter.write(runs / 'style', near, 'base', False)
  found, _, left_out = trained_prompts.read([str(runs)])
  assert len(found) == 4 and not left_out
  assert [prompt.path for prompt in found if prompt.path.is_dir()] == [(runs / 'style').resolve()]
  rows = table_of(runs / 'far' / 'prompts' / 'best.safetensors', f'--target={runs}/style',
                  f'--output={runs.parent}/ranked.json')
  assert len(rows) == 1


def test_files_that_do_not_belong_are_refused_and_in_folders_left_out(runs, base, capsys):
  good = runs / 'far' / 'prompts' / 'best.safetensors'
  odd = runs / 'odd'
  other = prompt_file.load(good)
  other.metadata['base'] = {**other.metadata['base'], 'name': 'flan', 'fingerprint': 'f' * 64}
  prompt_file.save(odd / 'base.safetensors', other)
  prompt_file.save(odd / 'lora.safetensors', prompt_file.PromptFile(
      {'lora/encoder/a': np.ones((2, 2), np.float32)}))
  np.save(odd / 'wide.npy', random(0, width=9))
  np.save(odd / 'ids.npy', np.arange(5))
  (odd / 'model.safetensors').write_bytes(b'no such file')
  reasons = {'base': 'on the base flan (ffffffffffff), but', 'wide': 'prompt 9 wide, but',
             'lora': 'holds no soft prompt prompt/embedding, but lora/encoder/a',
             'ids': 'is not a prompt', 'model': 'is not a safetensors file'}
  assert len(table_of(good, runs, f'--output={runs.parent}/table.csv')) == 3
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == len(reasons)
  for name, reason in reasons.items():
    [path] = odd.glob(f'{name}.*')
    assert [line for line in lines if str(path) in line and reason in line], (name, lines)
    assert reason in refused(capsys, good, path)


def test_wrong_flags_are_one_line(runs, base, tmp_path, capsys):
  file = runs / 'far' / 'prompts' / 'best.safetensors'
  content = file.read_bytes()
  for argv, message in [
      ((file,), 'at least 2 soft prompts'), ((file, file), 'found 1'),
      ((file, f'--target={file}'), 'at least 1 soft prompt to compare with the target'),
      ((tmp_path / 'absent', file), 'no prompt file'),
      ((runs, f'--target={runs}'), 'it is a folder'),
      ((runs, '--average=a.safetensors'), 'add --target'),
      ((runs, f'--target={file}', '--average=a.npy'), 'NAME.safetensors'),
      ((runs, '--output=a.txt'), '.csv or .json'), ((runs, '--top=0'), '--top'),
      ((runs, f'--output={tmp_path}/target.safetensors/a.csv'), 'is no folder'),
      ((runs, f'--target={tmp_path}/target.safetensors', f'--average={file}', '--top=1'),
       'is one of the prompts'),
      ((file, '--words=absent'), 'no bundled base'),
      ((file, f'--words={tmp_path}'), 'is no checkpoint')]:
    assert message in refused(capsys, *argv)
  assert file.read_bytes() == content
  with pytest.raises(SystemExit, match='2'):
    verb.main([])


def test_words_of_a_prompt_made_of_words_are_these(tmp_path, tiny_base, base, capsys):
  words = Vocabulary.of_base(base)
  ids = [*words.encode('lovely'), *words.encode('lovely film')]
  path = save(tmp_path / 'p.safetensors', base, 40 * np.asarray(base.embedding)[ids], task='films')
  assert verb.main([path, f'--words={tiny_base}', '--nearest=1']) == 0
  [line] = capsys.readouterr().out.splitlines()
  assert line.startswith('films (nearest cosine 1.000 on average): ')
  found = dict(part.rsplit(' ', 1) for part in line.split(': ')[1].split(', '))
  assert found == {words.piece(i): str(ids.count(i)) for i in ids}
  stranger = prompt_file.load(path)
  stranger.metadata['base']['fingerprint'] = 'f' * 64
  prompt_file.save(path, stranger)
  assert 'does not belong to the base' in refused(capsys, path, f'--words={tiny_base}')


def test_the_released_prompts(test_assets, tmp_path):
  """One base's SST-2, MRPC and RTE: paraphrase and entailment of two sentences are most alike."""
  table = table_of(test_assets / RELEASED, f'--output={tmp_path}/table.json')
  assert [(row['prompt'], row['other']) for row in table] == [
      ('mrpc.npy', 'rte.npy'), ('rte.npy', 'sst2.npy'), ('mrpc.npy', 'sst2.npy')]
  np.testing.assert_allclose([row['cosine_of_means'] for row in table], [0.5646, 0.5184, 0.4956],
                             atol=1e-4)
  np.testing.assert_allclose([row['mean_of_cosines'] for row in table], [0.0220, 0.0171, 0.0170],
                             atol=1e-4)

"""The verbs with many prompts, ensembles among them, and the ways to answer."""

import json
import shutil
import signal

import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import infer, many_runs, prompted_base, score, train_ensemble
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.training import population, run

LABELS = ['bad', 'good']
NAMES = ['first', 'second', 'third']


def write(path, rows) -> str:
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return str(path)


def read(path):
  return [json.loads(line) for line in open(path, encoding='utf-8')]


@pytest.fixture(scope='module')
def folder(tiny_base, tmp_path_factory):
  base, folder = base_checkpoint.load_base(tiny_base), tmp_path_factory.mktemp('prompts')
  for i, name in enumerate(NAMES):
    embedding = 4 * np.random.default_rng(i).normal(size=(2 + i, 8)).astype(np.float32)
    about = prompt_file.describe(base, length=2 + i, labels=LABELS)
    prompt_file.save(folder / f'{name}.safetensors', PromptFile({prompt_file.EMBEDDING: embedding},
                                                                about))
  return folder


@pytest.fixture(scope='module')
def rows(reviews):
  return [{'inputs': row['text'], 'targets': row['label'], 'prompt': NAMES[i % 3]}
          for i, row in enumerate(read(reviews)[:14])]


@pytest.fixture
def answered(tiny_base, folder, rows, tmp_path, token_dir):
  """Runs a verb on the rows: its answers."""
  def run(verb, *flags, prompts=('--prompts', str(folder)), rows=rows):
    source, target = write(tmp_path / 'rows.jsonl', rows), tmp_path / 'answers.jsonl'
    assert verb.main(['--base', str(tiny_base), *prompts, '--batch_size', '4', '--input', source,
                      '--max_decode_length', '5', '--output', str(target), *flags]) == 0
    return read(target)
  return run


@pytest.mark.parametrize('verb, flags, field', [
    (infer, (), 'prediction'), (infer, ('--rank', '--calibrated', '--length_normalized'),
                                'probabilities'),
    (score, (), 'log_likelihood')])
def test_each_row_is_answered_by_the_prompt_it_names(answered, folder, rows, verb, flags, field):
  mixed = answered(verb, *flags)
  assert [row['prompt'] for row in mixed] == [row['prompt'] for row in rows]
  for i, name in enumerate(NAMES):
    alone = answered(verb, *flags, prompts=('--prompt', str(folder / f'{name}.safetensors')))
    for j in range(i, len(rows), 3):
      if field == 'prediction':
        assert mixed[j][field] == alone[j][field]
      elif field == 'log_likelihood':
        assert mixed[j][field] == pytest.approx(alone[j][field], rel=1e-5)
      else:
        assert mixed[j][field] == pytest.approx(alone[j][field], rel=1e-4)
        assert sum(mixed[j][field].values()) == pytest.approx(1)
        assert mixed[j]['prediction'] == max(LABELS, key=mixed[j][field].get)


@pytest.mark.slow
def test_samples_are_of_the_row_and_the_seed(answered, rows):
  flags = ('--temperature', '2', '--num_samples', '3', '--top_p', '0.9')
  texts = lambda answers: [row['predictions'] for row in answers]
  drawn = answered(infer, *flags)
  assert texts(drawn) == texts(answered(infer, *flags, '--batch_size', '9'))
  assert texts(drawn[:5]) == texts(answered(infer, *flags, rows=rows[:5]))
  assert all(row['prediction'] == row['predictions'][0] for row in drawn)
  assert any(len(set(row['predictions'])) > 1 for row in drawn)
  assert texts(drawn) != texts(answered(infer, *flags, '--seed', '1'))


def test_beams_and_stops(answered):
  greedy = answered(infer)
  beams = answered(infer, '--num_beams', '3', '--num_samples', '2', '--length_penalty', '0')
  assert all(np.diff(row['scores']) <= 0 for row in beams)
  stop = next(row['prediction'] for row in greedy if len(row['prediction']) > 2)[1]
  stopped = answered(infer, '--stop', stop)
  assert [row['prediction'] for row in stopped] == [
      row['prediction'].split(stop)[0] for row in greedy]


@pytest.mark.parametrize('flags, said', [
    (('--num_samples', '2'), '2 greedy texts would be one'),
    (('--num_beams', '2', '--temperature', '1'), 'not both'),
    (('--num_beams', '2', '--stop', 'x'), 'no stop strings'),
    (('--temperature', '-1'), '0 or more'), (('--temperature', 'nan'), '0 or more'),
    (('--top_p', '0'), 'above 0'), (('--top_k', '-3'), '0 (all) or more'),
    (('--top_k', '9999999999', '--temperature', '1'), '0 (all) or more'),
    (('--top_p', '0.5'), 'belong to a temperature'), (('--seed', '-1'), '0 or more'),
    (('--num_beams', '2', '--length_penalty', 'nan'), 'such as 0.6'),
    (('--num_beams', '2', '--length_penalty', '50'), 'from -10 to 10'),
    (('--length_penalty', '1'), 'belongs to beam search: set num_beams'),
    (('--rank', '--length_penalty', '1'), '--rank generates no text'),
    (('--rank', '--temperature', '1'), 'do not belong to it'), (('--stop', '\udcff'), 'no text'),
    (('--stop', ''), 'stop string is empty'), (('--calibrated',), 'belong to --rank'),
    (('--prompt', 'x.safetensors'), 'Give --prompt'),
])
def test_flags_that_do_not_fit_are_one_line(tiny_base, folder, rows, tmp_path, capsys, flags, said):
  source, target = write(tmp_path / 'rows.jsonl', rows), tmp_path / 'answers.jsonl'
  assert infer.main(['--base', str(tiny_base), '--prompts', str(folder), '--input', source,
                     '--output', str(target), *flags]) == 1
  error = capsys.readouterr().err.strip()
  assert error.startswith('error: ') and said in error and len(error.splitlines()) == 1
  assert not target.exists()


@pytest.mark.parametrize('row, said', [
    ({'prompt': 'secnd'}, "line 2: there is no prompt 'secnd'.*Did you mean second?"),
    ({'prompt': ['first']}, 'there is no prompt'),
    ({}, 'line 2: there is no field "prompt"; the prompts are first, second, third')])
def test_a_row_that_names_no_prompt_is_told(tiny_base, folder, rows, row, said):
  prompted = prompted_base.load(str(tiny_base), prompts=str(folder))
  with pytest.raises(ValueError, match=said):
    prompted.slots([('f, line 1', rows[0]), ('f, line 2', row)])


def test_a_folder_without_prompts_or_with_two_of_one_name(folder, tmp_path):
  with pytest.raises(ValueError, match='holds no prompts'):
    prompt_file.in_folder(tmp_path)
  shutil.copy(folder / 'first.safetensors', tmp_path)
  np.save(tmp_path / 'first.npy', np.zeros((2, 8), np.float32))
  with pytest.raises(ValueError, match='two prompts of one name'):
    prompt_file.in_folder(tmp_path)


def evaluated(capsys, *argv) -> dict:
  assert eval_verb.main(list(argv)) == 0
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_an_ensemble_is_its_members_votes_and_probabilities(tiny_base, folder, rows, tmp_path,
                                                           capsys, answered):
  source = write(tmp_path / 'all.jsonl', rows)
  result = evaluated(capsys, '--base', str(tiny_base), '--prompts', str(folder), '--input', source)
  targets, each = [row['targets'] for row in rows], []
  for name in NAMES:
    prompt = ('--prompt', str(folder / f'{name}.safetensors'))
    alone = evaluated(capsys, '--base', str(tiny_base), *prompt, '--input', source)
    assert result['members'][name] == {'accuracy': alone['accuracy']}
    each.append([row['probabilities'] for row in answered(infer, '--rank', prompts=prompt)])
  values = [member['accuracy'] for member in result['members'].values()]
  assert result['average']['accuracy'] == pytest.approx(np.mean(values))
  assert result['best']['accuracy'] == max(values)
  hits = [max(LABELS, key=lambda label, i=i: sum(one[i][label] for one in each)) == target
          for i, target in enumerate(targets)]
  assert result['mean_probability']['accuracy'] == pytest.approx(100 * np.mean(hits))
  votes = [[max(LABELS, key=one[i].get) for one in each] for i in range(len(rows))]
  hits = [max(LABELS, key=vote.count) == target
          for vote, target in zip(votes, targets, strict=True)]
  assert result['majority_vote']['accuracy'] == pytest.approx(100 * np.mean(hits))


def test_an_ensemble_of_generated_texts_votes(tiny_base, folder, rows, tmp_path, capsys):
  source = write(tmp_path / 'all.jsonl', rows)
  result = evaluated(capsys, '--base', str(tiny_base), '--prompts', str(folder), '--input', source,
                     '--decode', '--max_decode_length', '3')
  assert set(result) >= {'members', 'average', 'best', 'majority_vote'}
  assert 'mean_probability' not in result


@pytest.mark.slow
def test_seeds_are_trained_and_measured_by_one_command(tiny_base, reviews, tmp_path, token_dir,
                                                       capsys):
  command = ['--seeds', '0', '1', '--gin_file=run/prompt_tuning_text_file.gin',
             f'--gin.TRAIN_FILE={reviews}', f'--gin.INITIAL_CHECKPOINT_PATH={tiny_base}',
             "--gin.TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}", '--gin.PROMPT_LENGTH=3',
             '--gin.TRAIN_STEPS=6', '--gin.EVAL_PERIOD=3', '--gin.BATCH_SIZE=8',
             f'--gin.MODEL_DIR={tmp_path}/run']
  assert train_ensemble.main(command) == 0
  said = capsys.readouterr().out
  assert 'majority vote' in said and 'mean probability' in said
  result = json.loads((tmp_path / 'run' / 'ensemble.json').read_text())
  for seed in (0, 1):
    report = json.loads((tmp_path / 'run' / f'seed_{seed}' / 'report.json').read_text())
    assert result['members'][f'seed_{seed}']['accuracy'] == pytest.approx(report['best_value'])
  one, other = (prompt_file.load(tmp_path / 'run' / 'prompts' / f'seed_{seed}.safetensors')
                for seed in (0, 1))
  assert np.any(one.params[prompt_file.EMBEDDING] != other.params[prompt_file.EMBEDDING])
  assert train_ensemble.main(command) == 0  # All is there.
  assert train_ensemble.main(command[:2] + command[3:]) == 1  # One is no ensemble.


@pytest.mark.parametrize('flags, said', [
    (['--gin_file=task/mixture.gin', "--gin.MIXTURE_TASKS=('sst2', 'mrpc')"], 'one task'),
    (['--gin.EVAL_PERIOD=0'], 'EVAL_PERIOD above 0'), (['--dry_run'], 'leave out --dry_run'),
    (['--gin.run.train.seed=3'], '--seeds alone'), (['--gin.MODEL_DIR=/tmp/other'], 'once')])
def test_what_is_no_ensemble_is_told_before_training(tmp_path, capsys, flags, said, monkeypatch):
  monkeypatch.setattr(population, 'prepared', lambda arguments: pytest.fail('it trained'))
  monkeypatch.setattr('prompt_tuning_jax.training.checks.data', lambda tasks: tasks)
  assert train_ensemble.main(['--seeds', '0', '1', '--gin_file=run/quick_start.gin',
                              f'--gin.MODEL_DIR={tmp_path}', *flags]) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ') and said in error


def test_a_signal_ends_the_ensemble_and_not_those_that_train_together_alone(tmp_path, monkeypatch):
  trained = []

  def train(group, stop):
    trained.append(list(group))
    signal.raise_signal(signal.SIGTERM)
    assert stop(0)
    return {name: {'stopped': True} for name in group}

  monkeypatch.setattr(run, 'check_ensemble', lambda task, period: None)
  monkeypatch.setattr(population, 'prepared', lambda arguments: {
      name: given['name'] for name, given in arguments.items()})
  monkeypatch.setattr(population, 'groups', lambda ready, most: [
      {name: ready[name]} for name in ready])
  monkeypatch.setattr(population, 'train', train)
  monkeypatch.setattr(many_runs, 'configured', lambda argv: {'task': None, 'name': argv[-1]})
  with pytest.raises(SystemExit) as stopped:
    train_ensemble.members([], tmp_path, [0, 1], 8)
  assert stopped.value.code == 0 and trained == [['seed_0']]


def test_labels_of_ids_and_in_another_order_are_the_same_labels(tiny_base, folder, rows, tmp_path,
                                                               capsys):
  other = prompt_file.load(folder / 'first.safetensors')
  for name, labels in (('one', LABELS), ('two', LABELS[::-1])):
    about = {**other.metadata, 'labels': labels}
    prompt_file.save(tmp_path / f'{name}.safetensors', PromptFile(other.params, about))
  words = prompted_base.load(str(tiny_base)).vocabulary
  rows = [{'inputs': row['inputs'], 'target_tokens': [*words.encode(row['targets']), 1]}
          for row in rows]
  source = write(tmp_path / 'ids.jsonl', rows)
  result = evaluated(capsys, '--base', str(tiny_base), '--prompts', str(tmp_path), '--input',
                     source)
  assert result['members']['one'] == result['members']['two'] == result['majority_vote']


@pytest.mark.parametrize('labels, said', [(['a', 'a', 'b'], 'writes differently'),
                                          (['good'], 'two or more')])
def test_labels_that_are_one_are_refused(tiny_base, folder, rows, tmp_path, capsys, labels, said):
  source = write(tmp_path / 'rows.jsonl', rows)
  assert infer.main(['--base', str(tiny_base), '--prompts', str(folder), '--input', source,
                     '--rank', '--output', str(tmp_path / 'o.jsonl'), '--labels', *labels]) == 1
  assert said in capsys.readouterr().err
  alike = write(tmp_path / 'alike.jsonl', [{'inputs': 'a film', 'targets': text}
                                           for text in ('bad good', 'bad  good') * 3])
  assert eval_verb.main(['--base', str(tiny_base), '--input', alike]) == 1
  assert 'writes differently' in capsys.readouterr().err


def test_a_prompt_named_without_any_is_told(tiny_base, rows, tmp_path, capsys):
  source = write(tmp_path / 'rows.jsonl', rows)
  assert infer.main(['--base', str(tiny_base), '--input', source,
                     '--output', str(tmp_path / 'o.jsonl')]) == 1
  assert 'line 1 names a "prompt", but there is none' in capsys.readouterr().err

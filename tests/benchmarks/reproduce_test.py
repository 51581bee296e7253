"""Findings: the rule that judges them, the runs they are made of, and one from end to end."""

import json
import random

import claims
import findings
import pictures
import pytest
import runs

from prompt_tuning_jax import launch, many_runs
from prompt_tuning_jax.training import run

SETTINGS = findings.SETTINGS
BASE = runs.Base('mini', '0' * 64, 10)
BASES = {'': BASE, **{name: BASE for table in SETTINGS['findings'].values()
                      for name in table.get('bases', ())}}
SWAPPED = {claims.HOLDS: claims.CONTRARY, claims.CONTRARY: claims.HOLDS, claims.OPEN: claims.OPEN}


def _judged(a, b, **claim):
  return claims.judged({'says': 'a', 'more': ['a'], 'less': ['b'], **claim}, {'a': a, 'b': b})


def test_a_claim_looks_at_differences_and_at_nothing_else():
  rng = random.Random(0)
  outcomes = set()
  for _ in range(200):
    a, b = ([rng.gauss(mean, 2) for _ in range(3)] for mean in (rng.choice((0, 4)), 1))
    found, shift = _judged(a, b)['outcome'], [rng.gauss(0, 50) for _ in a]
    moved = [[x + own for x, own in zip(each, shift, strict=True)] for each in (a, b)]
    assert _judged(*moved)['outcome'] == found  # what a seed shares with itself does not matter
    assert _judged(b, a)['outcome'] == SWAPPED[found]
    assert _judged(a, b, by=-100)['outcome'] == claims.HOLDS
    outcomes.add(found)
  assert outcomes == set(SWAPPED)


def test_noise_and_small_differences_leave_a_claim_open():
  assert _judged([60., 90.], [50., 50.])['outcome'] == claims.OPEN  # 25 ± 30
  assert _judged([50.5, 50.6], [50., 50.])['outcome'] == claims.OPEN
  assert _judged([60.], [50.])['outcome'] == claims.OPEN  # one seed has no spread
  assert _judged([60., 62.], [50., 51.])['outcome'] == claims.HOLDS
  assert _judged([60., 62., None], [50., 51., 99.])['mean'] == 10.5  # one diverged
  assert _judged([None, None], [50., 51.])['mean'] is None
  with pytest.raises(ValueError, match='there are the scores a, b, not c'):
    _judged([1.], [2.], more=['c'])


@pytest.mark.parametrize('needs, outcomes, verdict', [
    ('holds', ('holds', 'holds'), claims.REPRODUCED),
    ('holds', ('holds', 'open'), claims.UNDECIDED),
    ('holds', ('contrary', 'holds'), claims.NOT), ('open', ('holds', 'holds'), claims.UNDECIDED),
    ('contrary', ('contrary',), claims.UNDECIDED)])
def test_claims_make_a_verdict_only_where_something_was_learnt(needs, outcomes, verdict):
  made = lambda outcome: {'outcome': outcome, 'says': outcome, 'mean': 1., 'error': .5, 'by': 0}
  needs, judged = [made(needs)], list(map(made, outcomes))
  assert claims.verdict(needs, judged) == verdict
  assert claims.reading(needs, judged).startswith(f'{verdict}: ')


@pytest.mark.parametrize('name', SETTINGS['findings'])
def test_every_run_of_a_finding_is_understood_and_every_claim_has_its_scores(name, tmp_path):
  table, names = SETTINGS['findings'][name], []
  arms = runs.arms_of(SETTINGS, name, BASES, extra=['--gin.run.train.log_period=7'])
  for arm in arms:
    given = launch.parse_flags(arm.command(tmp_path, 3))
    launch.read_config(launch.find_files(given.gin_file, ()), given.gin_bindings, run.train)
    arguments, _ = launch.resolve(run.train, config_text=None)
    assert arguments['seed'] == 3 and arguments['log_period'] == 7
    names += [arm.name, *(f'{arm.name}/{measure}' for measure in arm.measures)]
  assert len(set(names)) == len(names)
  if table.get('ensemble'):
    names = ['average', 'best', 'majority vote', 'mean probability']
  scores = {each: [1., 2.] for each in names}
  for claim in table['claims']:
    claims.judged(claim, scores)
  assert set(table['learnt']) <= set(names)
  assert len({arm.folder(tmp_path, seed) for arm in arms for seed in (0, 1)}) == 2 * len(arms) or (
      'bases' in table)  # here all bases are one


def test_a_base_and_a_part_that_are_missing_are_told():
  with pytest.raises(ValueError, match='adaptation needs a base 0: --bases 0=FOLDER'):
    runs.arms_of(SETTINGS, 'adaptation', {'': BASE})
  with pytest.raises(ValueError, match='there is no part sst3'):
    runs.arms_of(SETTINGS, 'prompt_length', BASES, task='sst3')


@pytest.mark.parametrize('text', ['foo', '=foo', '0='])
def test_a_base_without_a_name_or_a_folder_is_told(text, capsys):
  with pytest.raises(SystemExit):
    findings.main(['adaptation', '--bases', '10=there', text])
  assert f"--bases takes NAME=FOLDER, such as 0=SPAN, not '{text}'." in capsys.readouterr().err


def test_an_ensemble_with_a_diverged_member_has_no_score(tmp_path, monkeypatch):
  arm = runs.Arm('4', (), BASE, ensemble=2)
  for seed, report in enumerate(({'prompt': 'a'}, {'diverged': 'nan'}, {'prompt': 'b'},
                                 {'prompt': 'c'})):
    folder = arm.folder(tmp_path, seed)
    folder.mkdir(parents=True)
    (folder / 'run.json').write_text(json.dumps({'report': report}))

  def evaluated(prompts, folder):
    assert prompts == {'seed_2': 'b', 'seed_3': 'c'}
    names = ('average', 'best', 'majority_vote', 'mean_probability')
    (folder / 'ensemble.json').write_text(json.dumps(
        {'metric': 'accuracy', **{name: {'accuracy': 50.} for name in names}}))

  monkeypatch.setattr(run, 'evaluate_ensemble', evaluated)
  monkeypatch.setattr(many_runs, 'configured', lambda command: {})
  scores = dict(runs.scores(arm, range(4), tmp_path))
  assert scores['best'] == scores['majority vote'] == [None, 50.] and len(scores) == 4


def test_a_picture_has_a_line_for_each_series_at_each_place():
  score = {'mean': 1., 'values': [1.], 'deviation': None}
  places, lines = pictures.series({name: score for name in ('a@x', 'a@y', 'b@y', 'b@y/far')})
  assert places == ['x', 'y']
  assert lines == {'a': [score, score], 'b': [None, score], 'b, far': [None, score]}
  assert pictures.series({'one': score, 'two': score}) == (['one', 'two'], {'': [score, score]})


@pytest.mark.slow
def test_a_finding_from_end_to_end(tiny_base, reviews, tmp_path, token_dir, monkeypatch, capsys):
  """Trained, judged, drawn; the second time from what is there; a base of other weights anew."""
  arms = {'1': {'gin': ['PROMPT_LENGTH=1']}, '4': {'gin': ['PROMPT_LENGTH=4']},
          'all': {'files': ['method/model_tuning.gin']}}
  common = {'says': 's', 'source': 's', 'chosen': 'c', 'axis': 'a', 'seeds': [0, 1], 'task': 't'}
  monkeypatch.setattr(findings, 'SETTINGS', {
      'common': {'files': ['run/prompt_tuning_text_file.gin'],
                 'gin': ['BATCH_SIZE=4', 'run.train.inspect=False']},
      'parts': {'t': {'always': 50., 'gin': [f"TRAIN_FILE='{reviews}'", 'TRAIN_STEPS=4',
                                             "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}"]}},
      'findings': {
          'prompt_length': {**common, 'arms': arms, 'learnt': ['4'], 'claims': [
              {'says': '4 against 1', 'more': ['4'], 'less': ['1']}]},
          'ensembles': {**common, 'arms': {'4': arms['4']}, 'ensemble': 2, 'learnt': ['best'],
                        'claims': [{'says': 'v', 'more': ['best'], 'less': ['average']}]}}})
  command = ['prompt_length', 'ensembles', '--front', f'--base={tiny_base}',
             f'--output={tmp_path}/out', f'--results={tmp_path}/results']
  assert findings.main(command) == 0
  assert {path.name for path in (tmp_path / 'results').iterdir()} == {
      'prompt_length.json', 'prompt_length.png', 'ensembles.json', 'ensembles.png', 'front.png',
      'README.md'}
  result = json.loads((tmp_path / 'results' / 'prompt_length.json').read_text())
  assert list(result['scores']) == ['1', '4', 'all'] and result['seeds'] == [0, 1]
  assert [arm['trainable_parameters'] for arm in result['arms'].values()][:2] == [8, 32]
  assert result['bases']['base']['fingerprint'] == result['arms']['4']['base']
  assert len(list((tmp_path / 'out' / 'runs').iterdir())) == 6  # two of them are of both findings
  ensemble = json.loads((tmp_path / 'results' / 'ensembles.json').read_text())['scores']
  assert ensemble['best']['mean'] == max(result['scores']['4']['values'])
  assert result['reading'] in (tmp_path / 'results' / 'README.md').read_text()
  monkeypatch.setattr(many_runs, 'train', lambda *given: pytest.fail('it trained again'))
  assert findings.main(command) == 0
  assert json.loads((tmp_path / 'results' / 'prompt_length.json').read_text()) == result
  arm = runs.Arm('4', (), runs.Base(str(tiny_base), '1' * 64, 10))
  assert arm.folder(tmp_path, 0) != runs.Arm('4', (), BASE).folder(tmp_path, 0)

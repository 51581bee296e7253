"""Steering: a batch is each sentence alone, what is recovered is written, and the verb's files."""

import json
import os
import types

import numpy as np
import pytest

from prompt_tuning_jax import infer, prompted_model, steer, steering
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.prompted_model import Added, PromptedModel
from prompt_tuning_jax.steering import Settings, Steerer

SETTINGS = Settings(2, steps=16, learning_rate=0.5)


@pytest.fixture(scope='module')
def found(tiny_base):
  """(a function from a batch size to a steerer, inputs, targets, what was found for them).

  Three of the targets are what the base writes from some vectors, so they can be recovered.
  """
  base = base_checkpoint.load_base(str(tiny_base))
  words, table = Vocabulary.of_base(base), base.embedding
  model, inputs = PromptedModel(base.config.network()), [[1], [5, 6, 1], [1], [1]]
  made = lambda size: Steerer(model, base.params, words, SETTINGS, size)
  batch = steering.batch_of(base.config, 2, inputs, inputs)
  vectors = steering.start(Settings(2, seed=9), table, range(4)).reshape(8, -1)
  written = prompted_model.predict(model, base.params, batch['encoder_input_tokens'], 6,
                                   added=Added(virtual_embeddings=vectors))
  written = np.where(np.asarray(written) == 0, 5, written)  # 0 is no word
  targets = [written[i][:n].tolist() for i, n in enumerate((1, 5, 3))] + [[9, 20, 33, 8, 50, 1]]
  return made, table, inputs, targets, made(4)(table, inputs, targets)


@pytest.mark.slow
def test_a_batch_is_each_sentence_alone(found):
  made, table, inputs, targets, together = found
  alone = made(1)
  for i in range(4):
    one = alone(table, inputs[i:i + 1], targets[i:i + 1], [i])
    np.testing.assert_allclose(one.vectors[0], together.vectors[i], atol=1e-3)
    np.testing.assert_allclose(one.loss[0], together.loss[i], atol=1e-3)
    assert one.steps[0] == together.steps[i]


def test_what_is_recovered_is_what_the_model_writes(found):
  _, table, _, targets, together = found
  done = np.flatnonzero(together.steps >= 0)
  assert 0 < len(done) and np.all(together.steps <= SETTINGS.steps)
  for i in done:
    assert together.accuracy[i] == 1
    assert together.tokens[i, :len(targets[i])].tolist() == targets[i]
  assert np.all(np.any(together.vectors != steering.start(SETTINGS, table, range(4)), axis=(1, 2)))


def test_the_files_of_the_verb_write_what_it_says(tmp_path, tiny_base, reviews, capsys):
  rows = [{'targets': json.loads(line)['text']} for line in reviews.open()][:5]
  rows[1]['inputs'] = 'a film'
  source, output, folder = tmp_path / 'rows.jsonl', tmp_path / 'out.jsonl', tmp_path / 'found'
  source.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  flags = ['--base', str(tiny_base), '--batch_size', '4', '--max_decode_length', '24']
  assert steer.main([*flags, '--input', str(source), '--output', str(output), '--folder',
                     str(folder), '--length', '3', '--steps', '40']) == 0
  told = json.loads(capsys.readouterr().out)
  answered = [json.loads(line) for line in output.open(encoding='utf-8')]
  assert told['sentences'] == 5 and told['exact_match'] == 20 * sum(
      row['recovered'] for row in answered)
  file = prompt_file.load(folder / 'line_2.safetensors')
  assert file.params['prompt/embedding'].shape == (3, 8) and file.metadata['method'] == 'steering'
  # The rows name their prompts, so `infer` takes them as they are.
  again = tmp_path / 'again.jsonl'
  assert infer.main([*flags, '--prompts', str(folder), '--input', str(output), '--output',
                     str(again)]) == 0
  for row, other in zip(answered, map(json.loads, again.open(encoding='utf-8')), strict=True):
    assert other['prediction'] == row['prediction']
    assert row['recovered'] == (row['prediction'] == row['targets'])
  capsys.readouterr()
  read, write = os.pipe()  # nobody reads it before the end: that it takes all shows that we do not
  assert steer.main([*flags, '--input', str(source), '--output', f'/dev/fd/{write}', '--folder',
                     str(tmp_path / 'piped'), '--length', '3', '--steps', '40']) == 0
  assert json.loads(capsys.readouterr().out) == told
  assert os.read(read, 1 << 16) == output.read_bytes()
  os.close(read), os.close(write)
  for more, message in (
      (['--folder', str(folder)], 'holds vectors already'),
      (['--folder', str(tmp_path / 'new'), '--max_decode_length', '2'], 'line 1: the text has'),
      (['--folder', 'gs://bucket/found'], 'must be a folder of this machine')):
    assert steer.main([*flags, '--input', str(source), '--output', str(tmp_path / 'none'),
                       '--length', '3', *more]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(('settings', 'message'), [
    ({'length': 0}, 'length should be a whole number from 1, got 0'),
    ({'steps': 1.5}, 'steps should be a whole number from 1, got 1.5'),
    ({'learning_rate': -1.0}, 'learning_rate should be above 0, got -1.0'),
    ({'seed': -1}, 'seed should be 0 or more')], ids=lambda value: str(value)[:9])
def test_what_cannot_be_is_told(settings, message):
  with pytest.raises(ValueError, match=message):
    Settings(**settings)


def test_a_start_is_of_the_number_alone(found):
  both = steering.start(Settings(3, seed=2), found[1], [4, 7])
  np.testing.assert_array_equal(both[1], steering.start(Settings(3, seed=2), found[1], [7])[0])
  assert not np.array_equal(*both)


def test_a_start_is_of_trained_words():
  table = np.arange(8, dtype=np.float32)[:, None]
  words = types.SimpleNamespace(untrained={0, 2, 3})
  made = steering.start(Settings(5), table, range(3), words)
  assert np.sort(made[..., 0]).tolist() == 3 * [[1, 4, 5, 6, 7]]

"""Folders of transformers' BART and BERT with their tokenizers: from the command line, and trained.
"""

import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import infer, optimizers, score
from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors, prompt_file
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.training import methods, run
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning
from prompt_tuning_jax.training.prompt_design import PromptDesign
from prompt_tuning_jax.training.warp import Warp

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.usefixtures('token_dir')
NEW_TOKENS = 12
TEMPLATE = {'bart': '{text}', 'bert': '{text}. It was [MASK] [MASK].'}
both = pytest.mark.parametrize('kind', TEMPLATE)


def random_model(kind, vocab_size):
  sizes = {
      'bart': dict(d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                   decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                   max_position_embeddings=40, forced_eos_token_id=None),
      'bert': dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                   max_position_embeddings=40)}[kind]
  config, network = {
      'bart': (transformers.BartConfig, transformers.BartForConditionalGeneration),
      'bert': (transformers.BertConfig, transformers.BertForMaskedLM)}[kind]
  torch.manual_seed(5)
  model = network(config(vocab_size=vocab_size, **sizes))
  with torch.no_grad():
    for name, leaf in model.named_parameters():
      leaf.normal_(std=0.1 if name.endswith('.bias') else 3 if 'positions' in name else 1)
  return model


@pytest.fixture(scope='module')
def folders(tmp_path_factory, bart_file, bert_file):
  made = {}
  for kind, file in (('bart', bart_file), ('bert', bert_file)):
    made[kind] = tmp_path_factory.mktemp(kind) / 'base'
    words = (transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)) if kind == 'bart' else
             transformers.BertTokenizer(vocab=str(file)))
    random_model(kind, len(words)).save_pretrained(made[kind])
    shutil.copy(file, made[kind])
  return made


@pytest.fixture(scope='module')
def theirs(folders):
  """{kind: (model, tokenizer)} of transformers, from the same folders."""
  auto = {'bart': transformers.AutoModelForSeq2SeqLM, 'bert': transformers.AutoModelForMaskedLM}
  return {kind: (auto[kind].from_pretrained(folder).eval(),
                 transformers.AutoTokenizer.from_pretrained(folder))
          for kind, folder in folders.items()}


@pytest.fixture(scope='module')
def rows(reviews):
  return [json.loads(line) for line in open(reviews, encoding='utf-8')][:5]


def answers(verb, folder, tmp_path, rows, kind, *flags):
  (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(
      {'inputs': TEMPLATE[kind].format(**row), 'targets': row['label']}) + '\n' for row in rows))
  assert verb.main([f'--base={folder}', f'--input={tmp_path / "rows.jsonl"}', '--batch_size=4',
                    f'--output={tmp_path / "out.jsonl"}', *flags]) == 0
  return [json.loads(line) for line in open(tmp_path / 'out.jsonl', encoding='utf-8')]


def log_likelihood(theirs, kind, row):
  model, words = theirs[kind]
  text = TEMPLATE[kind].format(**row)
  with torch.no_grad():
    if kind == 'bart':
      labels = torch.tensor([words(row['label'])['input_ids']])
      logits = model(input_ids=torch.tensor([words(text)['input_ids']]), labels=labels).logits
      logits, labels = logits[0], labels[0]
    else:
      ids = torch.tensor([words(text)['input_ids']])
      labels = torch.tensor([*words(row['label'], add_special_tokens=False)['input_ids'],
                             words.sep_token_id])[:2]
      logits = model(input_ids=ids).logits[0][ids[0] == words.mask_token_id][:len(labels)]
  return torch.log_softmax(logits.double(), -1)[torch.arange(len(labels)), labels].sum().item()


@both
def test_scores_are_those_of_transformers(kind, folders, theirs, tmp_path, rows):
  found = [row['log_likelihood'] for row in answers(score, folders[kind], tmp_path, rows, kind)]
  np.testing.assert_allclose(found, [log_likelihood(theirs, kind, row) for row in rows], rtol=1e-4)


@pytest.mark.slow
def test_barts_texts_are_those_of_transformers(folders, theirs, tmp_path, rows):
  model, words = theirs['bart']
  found = [row['prediction'] for row in answers(infer, folders['bart'], tmp_path, rows, 'bart',
                                                f'--max_decode_length={NEW_TOKENS}')]
  expected = [words.decode(model.generate(
      torch.tensor([words(row['text'])['input_ids']]), do_sample=False, num_beams=1,
      max_new_tokens=NEW_TOKENS)[0], skip_special_tokens=True,
      clean_up_tokenization_spaces=False) for row in rows]
  assert found == expected and len(set(found)) > 1


def test_berts_texts_are_the_best_at_their_masks(folders, theirs, tmp_path, rows):
  model, words = theirs['bert']
  found = [row['prediction'] for row in answers(infer, folders['bert'], tmp_path, rows, 'bert',
                                                f'--max_decode_length={NEW_TOKENS}')]
  for row, text in zip(rows, found, strict=True):
    ids = torch.tensor([words(TEMPLATE['bert'].format(**row))['input_ids']])
    best = model(input_ids=ids).logits[0][ids[0] == words.mask_token_id].argmax(-1).tolist()
    assert text == words.decode(best, skip_special_tokens=True).removeprefix('##')


@pytest.mark.parametrize(('kind', 'name'), [
    pytest.param('bert', 'prompt', marks=pytest.mark.slow), ('bert', 'warp'),
    pytest.param('bart', 'warp', marks=pytest.mark.slow),
    pytest.param('bart', 'prefix', marks=pytest.mark.slow)])
def test_a_prompt_and_prefixes_are_trained_saved_and_measured_again(
    kind, name, folders, tmp_path, reviews, monkeypatch):
  from prompt_tuning_jax.training import progress
  monkeypatch.setattr(progress.Progress, 'plot', lambda self: None)
  method = {'prompt': methods.PromptTuning(3, 'after_first'),
            'prefix': PrefixTuning(3, width=None), 'warp': Warp(3, 'after_first')}[name]
  task = TextFile(str(reviews), inputs=TEMPLATE[kind])
  train = functools.partial(
      run.train, task, {'inputs': 32, 'targets': 8}, str(tmp_path / 'run'), str(folders[kind]),
      method, optimizers.adamw(0.03), batch_size=8, eval_period=3, save_period=3, inspect=False)
  result = train(train_steps=3)
  # A row each, also of two labels, or keys and values in the encoder, the decoder and between them.
  trained = {'prompt': 3, 'warp': 3 + 2, 'prefix': 3 * 2 * 3}[name]
  assert result['trainable_parameters'] == 8 * trained
  best = result['prompt']
  rows = [json.loads(line) for line in next((tmp_path / 'cache').glob(
      '**/reviews-validation-*/rows.jsonl')).open(encoding='utf-8')]
  made = answers(eval_verb, folders[kind], tmp_path,
                 [{'text': row['inputs'].split('. It was')[0], 'label': row['targets']}
                  for row in rows], kind, f'--prompt={best}')
  right = [row['prediction'] == row['targets'] for row in made]
  assert 100 * np.mean(right) == pytest.approx(result['best_value'])


def test_a_design_shows_a_bert_examples_that_are_filled_in(folders, tmp_path, reviews):
  task = TextFile(str(reviews), inputs=TEMPLATE['bert'])
  result = run.train(task, {'inputs': 12, 'targets': 4}, str(tmp_path / 'run'),
                     str(folders['bert']), PromptDesign(examples=2, context_length=40),
                     optimizers.adafactor(), 1, 8, inspect=False)
  text = prompt_file.load(result['prompt']).metadata['text']
  rows = {TEMPLATE['bert'].format(**row).replace('[MASK] [MASK]', row['label'])
          for row in map(json.loads, open(reviews, encoding='utf-8'))}
  assert '[MASK]' not in text and text.count('It was') == 2
  with pytest.raises(ValueError, match='leave out the template'):
    run.train(task, {'inputs': 12, 'targets': 4}, str(tmp_path / 'other'), str(folders['bert']),
              PromptDesign(examples=1, template='{inputs}: {targets}', context_length=40),
              optimizers.adafactor(), 1, 8, inspect=False)
  first = text[:text.index('It was')]
  assert any(row.startswith(first) and text.startswith(row.rstrip('.')) for row in rows), text


@both
def test_a_copy_with_its_vocabulary_is_the_same_base(kind, folders, theirs, tmp_path):
  base = base_checkpoint.load_base(folders[kind])
  hf_safetensors.write(tmp_path / 'copy', base.config, base.params, vocabulary=base.vocabulary)
  again = base_checkpoint.load_base(tmp_path / 'copy')
  assert (again.fingerprint, again.config) == (base.fingerprint, base.config)
  assert again.vocabulary.sha256 == base.vocabulary.sha256
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / 'copy')
  assert words('a lovely film')['input_ids'] == theirs[kind][1]('a lovely film')['input_ids']
  if kind == 'bert':  # The vocabulary knows its mask, whatever a network was told before.
    assert base.config.mask_id == words.mask_token_id != 103
    random = base_checkpoint.random_base(dataclasses.replace(base.config, mask_id=103),
                                         base.vocabulary.file)
    assert random.config == base.config


def test_inputs_without_masks_and_texts_that_are_too_long_are_told(folders, tmp_path, rows, reviews,
                                                                   capsys):
  for kind, row, message in (
      ('bert', {'text': rows[0]['text'], 'label': 'good bad good'}, 'An input has 2 masks, but'),
      ('bart', {'text': 'a film ' * 40, 'label': 'good'}, 'The network has 40 positions')):
    with pytest.raises(AssertionError):
      answers(score, folders[kind], tmp_path, [row], kind)
    assert message in capsys.readouterr().err
  train = functools.partial(run.train, task_feature_lengths={'inputs': 32, 'targets': 8},
                            model_dir=str(tmp_path / 'm'), optimizer=optimizers.adafactor(),
                            train_steps=1, batch_size=8)
  with pytest.raises(ValueError, match='An input has 0 masks'):
    train(TextFile(str(reviews)), initial_checkpoint_path=str(folders['bert']),
          method=methods.PromptTuning(3))
  with pytest.raises(ValueError, match='takes up to .*: lower the most tokens of inputs'):
    train(TextFile(str(reviews)), initial_checkpoint_path=str(folders['bart']),
          method=methods.PromptTuning(35))

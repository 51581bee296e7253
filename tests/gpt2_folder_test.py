"""A folder of transformers' GPT-2 with its tokenizer, from the command line: its own answers.

Texts are those of Li & Liang (2021, section 4.1): `source <|endoftext|> target <|endoftext|>`.
"""

import json
import shutil

import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import infer, optimizers, score
from prompt_tuning_jax.checkpoints import base_checkpoint, hf_safetensors, prompt_file
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.training import methods, run
from prompt_tuning_jax.training.lightweight import PartTuning
from prompt_tuning_jax.training.prefix_tuning import PrefixTuning

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.usefixtures('token_dir')
NEW_TOKENS = 12


@pytest.fixture(scope='module')
def folder(tmp_path_factory, bpe_file):
  made = tmp_path_factory.mktemp('gpt2') / 'base'
  words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bpe_file))
  end = words.convert_tokens_to_ids('<|endoftext|>')
  torch.manual_seed(5)
  model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
      vocab_size=len(words), n_embd=8, n_head=2, n_layer=2, n_positions=256,
      bos_token_id=end, eos_token_id=end))
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(std=0.5)
    model.transformer.wpe.weight *= 4  # so that texts vary
    model.transformer.wte.weight[end] *= 1.3  # so that some of them end before they are cut
  model.save_pretrained(made)
  shutil.copy(bpe_file, made / 'tokenizer.json')
  return made


@pytest.fixture(scope='module')
def rows(reviews):
  lines = [json.loads(line) for line in open(reviews, encoding='utf-8')][:5]
  return [{'inputs': line['text'], 'targets': line['label']} for line in lines] + [
      {'inputs': 'naïve café\n', 'targets': '東京'}]


@pytest.fixture(scope='module')
def theirs(folder):
  """(model, text -> its ids with the end of text, ids -> text) of transformers."""
  model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
  words = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / 'tokenizer.json'))
  end = model.config.eos_token_id
  return model, lambda text: [*words(' ' + text)['input_ids'], end], words.decode


def answers(verb, folder, tmp_path, rows, *flags):
  (tmp_path / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  assert verb.main([f'--base={folder}', f'--input={tmp_path / "rows.jsonl"}', '--batch_size=4',
                    f'--output={tmp_path / "out.jsonl"}', *flags]) == 0
  return [json.loads(line) for line in open(tmp_path / 'out.jsonl', encoding='utf-8')]


def log_likelihood(theirs, inputs, targets):
  model, encode, _ = theirs
  source, target = encode(inputs), encode(targets)
  with torch.no_grad():
    logits = model(torch.tensor([source + target])).logits[0].double()
  behind = torch.log_softmax(logits, dim=-1)[len(source) - 1:-1]
  return float(behind[torch.arange(len(target)), torch.tensor(target)].sum())


def test_scores_are_those_of_transformers(folder, tmp_path, rows, theirs):
  found = [row['log_likelihood'] for row in answers(score, folder, tmp_path, rows)]
  expected = [log_likelihood(theirs, row['inputs'], row['targets']) for row in rows]
  np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_greedy_texts_are_those_of_transformers(folder, tmp_path, rows, theirs, monkeypatch):
  model, encode, decode = theirs
  made_here, text_of = [], Vocabulary.decode
  monkeypatch.setattr(Vocabulary, 'decode', lambda self, ids: (
      made_here.append([int(i) for i in ids]) or text_of(self, ids)))
  found = [row['prediction'] for row in answers(infer, folder, tmp_path, rows,
                                                f'--max_decode_length={NEW_TOKENS}')]
  expected, ended = [], 0
  for row in rows:
    source = torch.tensor([encode(row['inputs'])])
    made = model.generate(source, attention_mask=torch.ones_like(source), do_sample=False,
                          max_new_tokens=NEW_TOKENS, pad_token_id=0)[0, source.shape[1]:].tolist()
    if model.config.eos_token_id in made:
      made = made[:made.index(model.config.eos_token_id)]
      ended += 1
      behind = made_here[len(expected)][len(made) + 1:]
      assert len(behind) == NEW_TOKENS - len(made) - 1 and not any(behind)  # it was not gone on
    expected.append(decode(made, clean_up_tokenization_spaces=False).removeprefix(' '))
  assert found == expected and len(set(found)) > 1 and 0 < ended < len(rows)


def test_eval_ranks_labels_as_transformers_does(folder, tmp_path, rows, theirs):
  found = [row['prediction'] for row in answers(eval_verb, folder, tmp_path, rows[:5])]
  labels = sorted({row['targets'] for row in rows[:5]})
  expected = [max(labels, key=lambda label: log_likelihood(theirs, row['inputs'], label))
              for row in rows[:5]]
  assert len(labels) == 2 and found == expected


def test_a_copy_with_its_vocabulary_is_the_same_base(folder, tmp_path, theirs):
  base = base_checkpoint.load_base(folder)
  copy = tmp_path / 'copy'
  hf_safetensors.write(copy, base.config, base.params, vocabulary=base.vocabulary)
  again = base_checkpoint.load_base(copy)
  assert (again.fingerprint, again.config) == (base.fingerprint, base.config)
  assert again.vocabulary.sha256 == base.vocabulary.sha256
  assert (copy / 'tokenizer.json').read_bytes() == (folder / 'tokenizer.json').read_bytes()
  model, words = (kind.from_pretrained(copy) for kind in (
      transformers.AutoModelForCausalLM, transformers.AutoTokenizer))
  assert words.eos_token_id == model.config.eos_token_id == theirs[0].config.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize('method', [
    PrefixTuning(3, width=7), methods.ModelTuning()],
                         ids=lambda method: type(method).__name__)
def test_table_to_text_from_training_to_generated_text(folder, tmp_path, tfds_data_dir, method):
  """Two steps, evaluated by what is generated, as `eval` does with the file that was saved."""
  task = SeqioTask('e2e_nlg', tfds_data_dir=str(tfds_data_dir), max_examples=12)
  lengths = {'inputs': 96, 'targets': 24}
  result = run.train(task, lengths, str(tmp_path / 'run'), str(folder), method,
                     optimizers.adamw(0.01), 2, 4, eval_period=1, log_period=1)
  assert result['metric'] == 'bleu' and result['best_value'] is not None
  losses = [json.loads(line)['loss'] for line in open(tmp_path / 'run' / 'metrics.jsonl')
            if json.loads(line)['split'] == 'train']
  assert len(losses) == 2 and np.all(np.isfinite(losses)) and losses[0] != losses[1]
  last = tmp_path / 'run' / 'prompts' / 'last'
  flags = ([f'--base={last}'] if last.is_dir() else
           [f'--base={folder}', f'--prompt={last}.safetensors'])
  rows = [{'inputs': 'name : Alimentum | area : city centre', 'targets': 'a'}]
  (tmp_path / 'rows.jsonl').write_text(json.dumps(rows[0]) + '\n')
  assert infer.main([*flags, f'--input={tmp_path / "rows.jsonl"}', '--max_decode_length=24',
                     f'--output={tmp_path / "out.jsonl"}']) == 0
  assert isinstance(json.loads((tmp_path / 'out.jsonl').read_text())['prediction'], str)
  if not last.is_dir():
    assert prompt_file.load(f'{last}.safetensors').metadata['task'] == 'e2e_nlg'


def test_texts_longer_than_its_positions_are_told(folder, tmp_path, reviews, capsys):
  row = [{'inputs': 'a film ' * 150, 'targets': 'good'}]
  for verb in (infer, score):
    with pytest.raises(AssertionError):
      answers(verb, folder, tmp_path, row)
    assert 'The network has 256 positions, but' in capsys.readouterr().err
  with pytest.raises(ValueError, match='takes up to .*: lower the most tokens of inputs'):
    run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(tmp_path / 'm'),
              str(folder), methods.PromptTuning(250), optimizers.adafactor(), 1, 8)


@pytest.mark.slow
def test_only_biases_train(folder, tmp_path, reviews):
  result = run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(tmp_path / 'm'),
                     str(folder), PartTuning(('.*/bias',)), optimizers.adamw(0.01), 1, 8)
  # A layer's two norms, query, key, value, out, and the MLP's two kernels; the last norm.
  assert result['trainable_parameters'] == 2 * (2 * 8 + 4 * 8 + 32 + 8) + 8

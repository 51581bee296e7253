"""Controlled generation: none is plain decoding, all of it is the attribute's, rows are alone."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import controlled, infer, prompted_model
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.controlled import Perturbed, Weighted
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks.bart import BartConfig
from prompt_tuning_jax.networks.bert import BertConfig
from prompt_tuning_jax.networks.gpt import GPTConfig
from prompt_tuning_jax.networks.t5 import T5Config
from prompt_tuning_jax.predictor import DecodingSettings, Predictor
from prompt_tuning_jax.prompt_bank import PromptBank, Slot
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens

INPUTS = [[5, 9, 21, 1], [7, 1], [30, 31, 32, 33, 34, 35, 1]]
DRAWN = DecodingSettings(num_samples=2, temperature=1.0, seed=3)
SHAPE = dict(vocab_size=40, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16)
STACKS = dict(num_encoder_layers=2, num_decoder_layers=2)
NETWORKS = {'t5': T5Config(**SHAPE, **STACKS),
            'gpt': GPTConfig(**SHAPE, num_layers=2),
            'bert': BertConfig(**SHAPE, num_encoder_layers=2, mask_id=4, end_id=3),
            'bart': BartConfig(**SHAPE, **STACKS),
            'scanned': T5Config(**SHAPE, **STACKS, scan_layers=True)}


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(str(tiny_base))


@pytest.fixture(scope='module')
def prompts(tmp_path_factory, base):
  """A folder of two prompts, of lengths of their own."""
  folder = tmp_path_factory.mktemp('prompts')
  for name, length in (('kind', 2), ('rude', 3)):
    rows = np.random.default_rng(length).normal(size=(length, 8)).astype(np.float32)
    prompt_file.save(folder / f'{name}.safetensors', prompt_file.PromptFile(
        {prompt_file.EMBEDDING: rows}, prompt_file.describe(base, length=length)))
  return folder


@pytest.fixture(scope='module')
def generated(base, prompts):
  """(a function from control to the texts of all inputs, a function from a name to its slot)."""
  bank = PromptBank(base, {name: prompt_file.load(path) for name, path
                           in prompt_file.in_folder(prompts).items()})
  words = Vocabulary.of_base(base)
  predictor = Predictor(PromptedModel(base.config.network()), words, None, 8, 6, bank=bank)

  def texts(control=None, own=None, decoding=DRAWN, inputs=INPUTS, numbers=None):
    found = predictor.generate_with(base.params, inputs, decoding, [bank.slot(own)] * len(inputs),
                                    numbers, control)
    return [each.text for row in found for each in row]

  return texts, bank.slot


def test_no_weight_is_plain_sampling_and_all_of_it_the_attributes(generated):
  texts, slot = generated
  plain, kind = texts(), texts(own='kind')
  assert plain != kind and len(plain) == 2 * len(INPUTS)
  assert texts(Weighted(slot('kind'), 0.0)) == plain
  assert texts(Weighted(slot('kind'), 1.0)) == kind
  assert texts(Weighted(slot('rude'), 0.0, slot('kind'))) == plain
  # What is for and against a thing is neither, and a row's own prompt stays its own.
  assert texts(Weighted(slot('rude'), 5.0, slot('rude')), own='kind') == kind
  assert texts(Weighted(slot('kind'), 3.0, slot('rude'))) not in (plain, kind)


def test_weighted_tokens_are_those_of_the_sum_written_by_hand(base, generated):
  """Greedy decoding, token by token, from the log probabilities of each prompt alone."""
  texts, slot = generated
  control = Weighted(slot('kind'), 2.0, slot('rude'))
  predictor_batch = texts(control, decoding=DecodingSettings(), inputs=INPUTS[:1])
  assert predictor_batch == texts(control, decoding=DecodingSettings())[:1]  # Alone as together.
  bank = slot.__self__
  members, tokens = control.slots(Slot()), []
  model = PromptedModel(base.config.network())
  logits = jax.jit(functools.partial(prompted_model.logits, model))
  batch = {'encoder_input_tokens': np.zeros((3, 7), np.int32)}
  for row, member in zip(batch['encoder_input_tokens'], members, strict=True):
    ids = INPUTS[0] if member.virtual is None else member.virtual.place(np.array(INPUTS[0]))
    row[:len(ids)] = ids
  for i in range(6):
    before = np.pad(tokens, (1, 6 - i - 1)).astype(np.int32)
    batch = {**batch, 'decoder_input_tokens': np.stack([before] * 3),
             'decoder_target_tokens': np.ones((3, 6), np.int32)}
    log_p = jax.nn.log_softmax(logits(base.params, batch, added=bank.added(members)))[:, i]
    tokens.append(int(np.argmax(control.weights @ np.asarray(log_p))))
  words = Vocabulary.of_base(base)
  assert predictor_batch == [words.decode(tokens)]


def test_no_step_is_plain_sampling_and_steps_are_a_rows_own(generated):
  texts, _ = generated
  bag = (6, 12, 40)
  assert texts(Perturbed(bag, step_size=0.0)) == texts()
  moved = texts(Perturbed(bag, step_size=0.5))
  assert moved != texts()
  assert texts(Perturbed(bag, step_size=0.5), inputs=INPUTS[1:2], numbers=[1]) == moved[2:4]
  assert texts(Perturbed(bag, step_size=0.5, fusion=0.0)) == texts()


@pytest.mark.parametrize('name', ['t5', 'gpt', 'bert', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('bart', 'scanned'))])
def test_steps_are_as_long_beside_a_longer_text_as_alone(name):
  """However wide the padding is that a row gets from its neighbours."""
  model, row = PromptedModel(NETWORKS[name].network()), [5, 4, 6, 4, 3]  # two masks of BERT
  token = np.ones((1, 1), np.int32)
  params = jax.jit(lambda key: model.init(key, token, token, token, enable_dropout=False))(
      jax.random.key(1))['params']
  longer = np.random.default_rng(0).integers(5, 40, 60)
  run = jax.jit(lambda inputs, step: controlled.generate_perturbed(
      model, params, inputs, 2, jnp.array([12, 30]), step, 0.01, 1.0, 2, eos_id=40))
  alone = run(np.pad([row], ((0, 0), (0, 3))), 0.5)
  beside = run(np.array([np.pad(row, (0, 59)), np.pad(longer, (0, 4))]), 0.5)
  np.testing.assert_array_equal(alone[0][0], beside[0][0])
  np.testing.assert_allclose(alone[1][0], beside[1][0], rtol=1e-4)
  assert abs(run(np.pad([row], ((0, 0), (0, 3))), 0.0)[1][0] - alone[1][0]) > 1e-3


@pytest.mark.parametrize('slope', [1.0, 1e-18, 1e-22, 0.0])
def test_no_step_is_longer_than_its_share(slope):
  """Attention to one key alone leaves slopes of others that are nothing but rounding."""
  start = jnp.ones((2, 3, 4, 5))
  step = controlled._moved(start, jnp.full_like(start, slope), start, 0.1) - start
  assert jnp.linalg.norm(step) <= 0.1001 * jnp.linalg.norm(start)


def test_small_steps_make_the_bag_more_probable(base):
  model, inputs = PromptedModel(base.config.network()), np.array([[5, 9, 21, 1], [7, 8, 1, 0]])
  always = lambda logits, position: jnp.full(len(logits), 12)
  share = jax.jit(lambda step: controlled.generate_perturbed(  # log p of the bag's one word
      model, base.params, inputs, 1, jnp.array([12]), step, 0.0, 1.0, 1, always)[1])
  assert np.all(share(0.01) > share(0.0)) and np.all(share(0.02) > share(0.01))


@pytest.mark.parametrize('against', [False, True])
def test_a_row_that_has_no_room_for_an_attributes_prompt_is_named(base, against):
  """Before anything is computed: there are no parameters."""
  config = dataclasses.replace(NETWORKS['gpt'], vocab_size=192, max_positions=16)
  predictor = Predictor(PromptedModel(config.network()), Vocabulary.of_base(base), None, 8, 6)
  long = Slot(VirtualTokens(192, 5))
  control = Weighted(Slot(), 1.0, long) if against else Weighted(long, 1.0)
  with pytest.raises(ValueError, match='^line 3: The network has 16 positions, but .* up to 17'):
    predictor.generate_with(None, INPUTS, DecodingSettings(), [Slot()] * 3, control=control,
                            places=['line 1', 'line 2', 'line 3'])


@pytest.mark.slow
def test_the_verb_takes_names_of_prompts_and_refuses_what_is_none(
    tmp_path, tiny_base, prompts, capsys):
  source = tmp_path / 'rows.jsonl'
  source.write_text('{"inputs": "a lovely film"}\n{"inputs": "a play", "prompt": "rude"}\n')
  flags = ['--base', str(tiny_base), '--input', str(source), '--max_decode_length', '6']

  def predictions(*more):
    output = tmp_path / f'{len(list(tmp_path.iterdir()))}.jsonl'
    assert infer.main([*flags, '--output', str(output), *more]) == 0
    return [json.loads(line)['prediction'] for line in output.open(encoding='utf-8')]

  bank = ['--prompts', str(prompts)]
  still = predictions(*bank, '--attribute', 'kind', '--weight', '0')
  assert still != predictions(*bank, '--attribute', 'kind', '--weight', '4', '--against', 'rude')
  capsys.readouterr()
  for more, told in (
      ([*bank, '--attribute', 'kin'], "there is no prompt 'kin'; the prompts are kind, rude"),
      (['--attribute', 'kind'], 'give --prompts=FOLDER'),
      ([*bank, '--against', 'kind'], '--against belongs to --attribute'),
      ([*bank, '--attribute', 'kind', '--toward', 'film'], 'not both'),
      ([*bank, '--attribute', 'kind', '--num_beams', '2'], 'leave out num_beams'),
      ([*bank, '--toward', 'film', '--weight', '2'], '--weight belongs to --attribute'),
      (['--iterations', '0'], '--iterations belongs to --toward'),
      ([*bank, '--toward', 'filmfilm'], "no piece for the word 'filmfilm'"),
      ([*bank, '--toward', '東京'], 'no piece for the word')):
    assert infer.main([*flags, '--output', str(tmp_path / 'none.jsonl'), *more]) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: Weighted(Slot(), float('nan')), 'weight should be a number'),
    (lambda: Perturbed(()), 'needs one word or more'),
    (lambda: Perturbed((3,), iterations=0), 'iterations should be a whole number from 1'),
    (lambda: Perturbed((3,), step_size=-1.0), 'step_size and kl_scale should be 0 or more'),
    (lambda: Perturbed((3,), fusion=2.0), 'fusion should be a share from 0 to 1')],
    ids=['weight', 'words', 'iterations', 'step_size', 'fusion'])
def test_what_cannot_be_is_told(make, message):
  with pytest.raises(ValueError, match=message):
    make()

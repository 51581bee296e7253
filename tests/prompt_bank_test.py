"""Laws of a bank: each example is answered as by its prompt alone, whatever else is in a batch."""

import jax
import numpy as np
import pytest

from prompt_tuning_jax import prompted_base
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.checkpoints.prompt_file import PromptFile
from prompt_tuning_jax.predictor import DecodingSettings
from prompt_tuning_jax.prompt_bank import PromptBank, Slot

RNG = np.random.default_rng(0)
PLACES = {'encoder': 1, 'decoder': 1, 'cross': 1}
QUERY, WO = 'encoder/layers_0/attention/query/kernel', 'decoder/layers_0/mlp/wo/kernel'
INPUTS = [RNG.integers(3, 60, n).tolist() + [1] for n in (9, 3, 14, 5, 7, 1, 11, 8, 4)]
TARGETS = [RNG.integers(3, 60, n).tolist() + [1] for n in (3, 1, 4, 2, 5, 3, 2, 4, 1)]
LABELS = [('good', 'bad'), ('awful',), ('warm', 'lovely', 'dull')] * 3


def draw(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def prefix_of(length, *places):
  return {f'prefix/{place}': draw(1, 2, length, 2, 4) for place in places}


def adapters_of(width, *places):
  shapes = {'down': (8, width), 'down_bias': (width,), 'up': (width, 8), 'up_bias': (8,)}
  return {f'adapter/{place}/{name}': draw(1, *shape)
          for place in places for name, shape in shapes.items()}


def lora_of(path, rank, shape):
  return {f'lora/{path}/a': draw(shape[0], rank), f'lora/{path}/b': draw(rank, shape[1])}


LEAVES = {  # [method's leaves, what describes them]
    'long': ({'prompt/embedding': 3 * draw(5, 8)}, {'length': 5}),
    'short': ({'prompt/embedding': 3 * draw(2, 8)}, {'length': 2, 'placement': 'end'}),
    'infix': ({'prompt/embedding': 3 * draw(3, 8)}, {'length': 3, 'placement': 'infix'}),
    'prefix': (prefix_of(4, *PLACES), {}),
    'cross': (prefix_of(2, 'cross'), {}),
    'both': ({'prompt/embedding': 3 * draw(3, 8), **prefix_of(1, 'encoder')}, {'length': 3}),
    'adapters': (adapters_of(3, 'encoder_mlp', 'cross_attention'), {'activation': 'gelu'}),
    'lora': (lora_of(QUERY, 2, (8, 8)), {}),
    'ia3': ({f'ia3_in/{WO}': draw(16), **lora_of(QUERY, 1, (8, 8))}, {}),
}


@pytest.fixture(scope='module')
def base(tiny_base):
  return base_checkpoint.load_base(tiny_base)


@pytest.fixture(scope='module')
def files(base):
  return {name: PromptFile(leaves, prompt_file.describe(base, **about))
          for name, (leaves, about) in LEAVES.items()}


@pytest.fixture(scope='module')
def folder(files, tmp_path_factory):
  folder = tmp_path_factory.mktemp('prompts')
  for name, file in files.items():
    prompt_file.save(folder / f'{name}.safetensors', file)
  return folder


@pytest.fixture(scope='module')
def mixed(tiny_base, folder):
  return prompted_base.load(str(tiny_base), prompts=str(folder), batch_size=10,
                            max_decode_length=6)


@pytest.mark.slow
def test_a_mixed_batch_is_each_alone(tiny_base, folder, mixed):
  names = [*LEAVES, None]
  inputs, targets, labels = [*INPUTS, INPUTS[0]], [*TARGETS, TARGETS[0]], [*LABELS, LABELS[0]]
  slots = [mixed.bank.slot(name) for name in names]
  scores = mixed.predictor.score(mixed.params, inputs, targets, slots)
  ranked = mixed.predictor.rank(mixed.params, inputs, labels, slots)
  texts = mixed.predictor.generate(mixed.params, inputs, slots)
  for i, name in enumerate(names):
    path = name and str(folder / f'{name}.safetensors')
    alone = prompted_base.load(str(tiny_base), path, batch_size=2, max_decode_length=6)
    own = (alone.params, inputs[i:i + 1])
    np.testing.assert_allclose(scores[i], alone.predictor.score(*own, targets[i:i + 1])[0],
                               rtol=1e-5)
    np.testing.assert_allclose(ranked[i], alone.predictor.rank(*own, labels[i:i + 1])[0], rtol=1e-5)
    assert texts[i] == alone.predictor.generate(*own)[0]
  assert len(set(np.round(scores, 3))) == len(names) and len(set(texts)) > 3


def test_the_base_beside_prompts_is_the_base(tiny_base, mixed):
  alone = prompted_base.load(str(tiny_base), batch_size=2)
  slots = [mixed.bank.slot(name) for name in (None, 'prefix', 'adapters', 'lora')]
  scores = mixed.predictor.score(mixed.params, INPUTS[:1] * 4, TARGETS[:1] * 4, slots)
  np.testing.assert_allclose(scores[0], alone.predictor.score(alone.params, INPUTS[:1],
                                                              TARGETS[:1])[0], rtol=1e-6)
  assert np.all(np.abs(scores[1:] - scores[0]) > 1e-3)
  prior = mixed.predictor.prior(mixed.untuned, ['good', 'awful'])
  expected = alone.predictor.rank(alone.params, [[1]], [['good', 'awful']])[0]
  np.testing.assert_allclose(prior, expected, rtol=1e-5)


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch(mixed):
  drawing = DecodingSettings(num_samples=3, temperature=1.5, top_k=20, seed=4)
  slots = [mixed.bank.slot(name) for name in LEAVES]
  all_of_them = mixed.predictor.generate_with(mixed.params, INPUTS, drawing, slots)
  again = mixed.predictor.generate_with(mixed.params, INPUTS[::-1], drawing, slots[::-1],
                                        range(len(INPUTS))[::-1])
  assert [[each.text for each in texts] for texts in all_of_them] == [
      [each.text for each in texts] for texts in again[::-1]]
  assert len({each.text for each in all_of_them[0]}) > 1
  beams = mixed.predictor.generate_with(mixed.params, INPUTS,
                                        DecodingSettings(num_samples=2, num_beams=3), slots)
  assert all(best.score >= second.score for best, second in beams)


def test_adding_and_removing_leaves_the_others_and_mostly_the_shapes(base, files):
  bank = PromptBank(base, {name: files[name] for name in ('long', 'prefix', 'both')}, room=20)
  more = bank.replaced({'short': files['short'], 'cross': files['cross']})
  fewer = more.replaced(removed=['long', 'both'])
  shapes = lambda bank: jax.tree.map(np.shape, bank.added([Slot()]))
  assert shapes(bank) == shapes(more) == shapes(fewer)
  assert list(bank.files) == ['long', 'prefix', 'both'] and 'long' not in fewer.files
  assert more.slot('long') == bank.slot('long')
  with pytest.raises(KeyError):
    fewer.slot('long')
  rows = np.asarray(fewer.added([Slot()]).virtual_embeddings)
  start = fewer.slot('short').virtual.offset
  np.testing.assert_array_equal(rows[start:start + 2],
                                files['short'].params[prompt_file.EMBEDDING])
  assert np.isnan(rows[2:]).all()  # what no prompt owns would be seen


def described(of, leaves, **about):
  return PromptFile(leaves, {**prompt_file.describe(of), **about})


@pytest.mark.parametrize('name, leaves, about, said', [
    ('narrow', {'prompt/embedding': draw(2, 7)}, {}, 'narrow: .*the width is 7, but 8'),
    ('other', {'prompt/embedding': draw(2, 8)}, {'base': {'fingerprint': 'ab'}},
     "other: .*the base's fingerprint is ab"),
    ('words', {'prompt/embedding': draw(2, 8)}, {'vocabulary': {'sha256': 'cd'}},
     "words: .*the vocabulary's SHA-256 is cd"),
    ('norms', {'encoder/encoder_norm/scale': draw(8)}, {}, 'norms: it holds encoder/encoder_no'),
    ('deep', {'prompt/deep_embedding': draw(1, 2, 8)}, {}, 'deep: it holds prompt/deep_embed'),
    ('heads', {'prefix/encoder': draw(1, 2, 3, 4, 4)}, {}, 'heads: The prompt file holds'),
    ('flat', {'prefix/encoder': draw(3)}, {}, 'flat: The prompt file holds'),
    ('place', prefix_of(2, 'sky'), {}, 'place: Expected some of the places'),
    ('lora', lora_of(QUERY, 2, (8, 9)), {}, 'lora: lora of encoder'),
    ('lost', lora_of('encoder/nowhere/kernel', 2, (8, 8)), {}, 'lost: lora changes'),
    ('table', lora_of('token_embedder/embedding', 2, (40, 8)), {}, 'table: lora/token_embedder'),
    ('norm', {'ia3/encoder/encoder_norm/scale': draw(8)}, {}, 'norm: ia3/encoder/encoder_norm'),
    ('thin', {f'lora/{QUERY}/a': draw(8), f'lora/{QUERY}/b': draw(8)}, {}, 'thin: lora of enc'),
])
def test_a_file_of_another_base_is_refused_by_name(base, files, name, leaves, about, said):
  with pytest.raises(ValueError, match=said):
    PromptBank(base, {'long': files['long'], name: described(base, leaves, **about)})


def test_adapters_of_two_activations_are_refused(base, files):
  other = described(base, adapters_of(2, 'encoder_mlp'), activation='relu')
  with pytest.raises(ValueError, match='one activation'):
    PromptBank(base, {'adapters': files['adapters'], 'other': other})

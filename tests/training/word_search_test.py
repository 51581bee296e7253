"""Search over prompts of words: its laws on tiny networks, and whole runs of it."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning_jax import eval as eval_verb
from prompt_tuning_jax import optimizers, param_paths, prompted_model
from prompt_tuning_jax.checkpoints import base_checkpoint, prompt_file
from prompt_tuning_jax.data.text_file import TextFile
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks import gpt, t5
from prompt_tuning_jax.prompted_model import Choices
from prompt_tuning_jax.training import population, run, word_search
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.discrete_prompt import DiscretePrompt, words
from prompt_tuning_jax.training.evaluate import first_pieces
from prompt_tuning_jax.training.step import Recipe, make_train_step
from prompt_tuning_jax.training.word_search import FirstOrder, Mutations, WordSearch

V, D, P = 40, 8, 3
CONFIGS = {
    't5': t5.T5Config(vocab_size=V, emb_dim=D, num_heads=2, num_encoder_layers=1,
                      num_decoder_layers=1, head_dim=4, mlp_dim=16, dropout_rate=0.1),
    'gpt': gpt.GPTConfig(V, D, 2, 1, 4, 16, dropout_rate=0.0, max_positions=32, use_bias=True)}
WORDS = np.arange(5, V - 5, dtype=np.int32)
TOKEN = jnp.ones((1, 1), jnp.int32)


@functools.cache
def base_of(kind):
  params = CONFIGS[kind].network().init(jax.random.key(0), TOKEN, TOKEN, TOKEN,
                                        enable_dropout=False)['params']
  return types.SimpleNamespace(
      config=CONFIGS[kind], params=params,
      embedding=param_paths.flatten(params)[CONFIGS[kind].embedding])


def searching(moves, keep=1, kind='t5', length=P, seed=0):
  """(recipe, its first state, the losses' function of prompts [P, D] on a batch)."""
  base = base_of(kind)
  method = DiscretePrompt(length, search=WordSearch(moves, keep, WORDS),
                          table=np.asarray(base.embedding))
  model = method.model(base.config)
  recipe = Recipe(model, method.search, seed)
  start = train_state.create(method.initial(jax.random.key(seed), base, None), method.search)
  loss = jax.jit(lambda prompt, batch: prompted_model.loss(
      model, {**base.params, 'prompt': {'embedding': prompt}}, batch)[1]['loss'])
  return recipe, start, loss


def batch(seed, length=P):
  rng = np.random.default_rng(seed)
  inputs = rng.integers(2, V, (4, length + 4), dtype=np.int32)
  inputs[:, :length] = V + np.arange(length)
  targets = rng.integers(2, V, (4, 5), dtype=np.int32)
  return {'encoder_input_tokens': inputs,
          'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
          'decoder_target_tokens': targets, 'decoder_loss_weights': np.ones((4, 5), np.float32)}


@pytest.mark.parametrize('kind', ['t5', pytest.param('gpt', marks=pytest.mark.slow)])
def test_first_order_scores_are_the_loss_differences_of_small_changes(kind):
  _, state, loss = searching(FirstOrder(), kind=kind)
  given, table = batch(0), base_of(kind).embedding
  prompt = state.trainable['prompt']['embedding']
  gradient = jax.grad(loss)(prompt, given)
  scores = word_search.first_order_changes(gradient[1], prompt[1], table)
  towards = lambda word, part: loss(prompt.at[1].add(part * (table[word] - prompt[1])), given)
  exact = np.array([(towards(word, 0.02) - towards(word, -0.02)) / 0.04 for word in range(V)])
  np.testing.assert_allclose(scores, exact, rtol=0.02, atol=2e-3)
  # AutoPrompt's candidates are the words that they like best, at one position.
  children = FirstOrder(4)(jax.random.key(3), prompt[None], gradient, table, jnp.asarray(WORDS))
  [position] = np.flatnonzero(np.any(children[0] != prompt, axis=1))
  assert np.all((children == prompt).all(-1).sum(1) == P - 1)
  of_position = word_search.first_order_changes(gradient[position], prompt[position], table)
  best = WORDS[np.argsort(of_position[WORDS])[:4]]
  np.testing.assert_array_equal(children[:, position], np.asarray(table)[best])


TABLE = np.random.default_rng(7).normal(size=(V, D)).astype(np.float32)


def made_up_loss(goal):
  """Of prompts of words: smallest at `goal` [P, D], and the same for no two."""
  return lambda tree: jnp.sum((jnp.tanh(tree['embedding']) - goal) ** 2)


@pytest.mark.parametrize(('moves', 'keep'), [
    (FirstOrder(6), 1), (Mutations(6), 3), (Mutations(6, crossover=0.0), 1)],
                         ids=['guided', 'crossed', 'mutated'])
def test_no_step_makes_the_prompt_worse_and_all_rows_stay_words(moves, keep):
  search, improved = WordSearch(moves, keep, WORDS), 0
  tree = {'embedding': jnp.asarray(TABLE[WORDS[:P]])}
  prompts = search.init(tree)
  step = jax.jit(lambda key, tree, prompts, goal: search.step(
      key, tree, prompts, jax.grad(made_up_loss(goal))(tree), jnp.asarray(TABLE),
      made_up_loss(goal)))
  for i in range(30):
    goal, before = np.tanh(np.random.default_rng(i // 10).normal(size=(P, D))), tree
    tree, prompts = step(jax.random.key(i), before, prompts, goal)
    value, of_before = (float(made_up_loss(goal)(each)) for each in (tree, before))
    moved = np.any(tree['embedding'] != before['embedding'])
    assert value < of_before if moved else value == of_before
    improved += moved
    assert all((TABLE[WORDS] == row).all(1).any() for row in np.asarray(tree['embedding']))
    np.testing.assert_array_equal(prompts[0], tree['embedding'])
    kept = [float(made_up_loss(goal)({'embedding': each})) for each in prompts]
    assert kept == sorted(kept) and (i < 5 or len(set(kept)) == keep)
  assert improved > 3


def test_with_all_words_as_candidates_the_best_word_is_found():
  goal = np.tanh(np.random.default_rng(1).normal(size=(1, D)))
  exact = [made_up_loss(goal)({'embedding': TABLE[[word]]}) for word in WORDS]
  tree = {'embedding': jnp.asarray(TABLE[:1])}
  search = WordSearch(FirstOrder(V), 1, WORDS)
  found, _ = search.step(jax.random.key(0), tree, search.init(tree), tree, jnp.asarray(TABLE),
                         made_up_loss(goal))
  np.testing.assert_array_equal(found['embedding'][0], TABLE[WORDS[np.argmin(exact)]])


@pytest.mark.parametrize('kind', ['t5', pytest.param('gpt', marks=pytest.mark.slow)])
def test_a_step_without_gradients_is_measured_without_dropout(kind):
  recipe, state, loss = searching(Mutations(4), 2, kind)
  assert not recipe.guided
  before, given = np.array(state.trainable['prompt']['embedding']), batch(0)
  step = make_train_step(recipe)
  for _ in range(3):
    state, metrics = step(state, base_of(kind).params, given)
    assert metrics['grad_norm'] == 0
  after = np.asarray(state.trainable['prompt']['embedding'])
  assert np.any(after != before) and loss(after, given) < loss(before, given)


def test_the_best_are_different_and_the_older_of_equals():
  best = lambda losses, count: word_search.best_different(jnp.array(losses), count).tolist()
  assert best([2.0, 1.0, 1.0, 3.0, 1.0], 3) == [1, 0, 3]
  assert best([1.0, np.nan, 1.0], 2) == [0, 1]
  assert best([1.0, 1.0], 2) == [0, 1]


@pytest.mark.slow
def test_searches_run_together_as_alone():
  """Members of a population, of lengths of their own."""
  members = [searching(FirstOrder(4), 2, length=length, seed=length)[:2] for length in (3, 2)]
  given = [batch(length, length) for length in (3, 2)]
  step = population.make_population_step(*map(list, zip(*members, strict=True)))
  alone = [make_train_step(recipe)(jax.tree.map(jnp.copy, state), base_of('t5').params, own)
           for (recipe, state), own in zip(members, given, strict=True)]
  both = step([state for _, state in members], base_of('t5').params, population.together(given))
  for (one, _), (other, _) in zip(alone, both, strict=True):
    np.testing.assert_array_equal(one.trainable['prompt']['embedding'],
                                  other.trainable['prompt']['embedding'])


RUNS = {'autoprompt': DiscretePrompt(4, 'end', 'a', WordSearch(FirstOrder(6))),
        'evolution': DiscretePrompt(3, search=WordSearch(Mutations(6), 3))}


@pytest.mark.parametrize('name', ['autoprompt', pytest.param(
    'evolution', marks=pytest.mark.slow)])
def test_a_run_of_each(tmp_path, tiny_base, reviews, token_dir, name, capsys):
  train = functools.partial(
      run.train, TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(tmp_path / 'run'),
      str(tiny_base), RUNS[name], optimizers.adafactor(), 8, 8, eval_period=4, save_period=4,
      inspect=False)
  result = train()
  first = prompt_file.load(tmp_path / 'run' / 'prompts' / 'last.safetensors')
  shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '8')
  train()  # Resumed = uninterrupted.
  last = prompt_file.load(tmp_path / 'run' / 'prompts' / 'last.safetensors')
  assert last.sha256 == first.sha256
  # The prompt is text.
  best = prompt_file.load(result['prompt'])
  base = base_checkpoint.load_base(str(tiny_base))
  vocabulary = Vocabulary.of_base(base)
  tokens, about = best.metadata['tokens'], best.metadata
  assert set(tokens) <= set(words(vocabulary).tolist()) and about['method'] == 'discrete_prompt'
  assert about['text'] == vocabulary.decode(tokens) and len(tokens) == RUNS[name].length
  np.testing.assert_array_equal(best.params['prompt/embedding'],
                                np.asarray(base.embedding)[tokens])
  # It scores through `eval` what it scored in the run, as a file and as the words themselves.
  cache = next((token_dir / 'tokens').glob('reviews-validation-*'))
  rows = [json.loads(line) for line in (cache / 'rows.jsonl').open(encoding='utf-8')]
  at_end = RUNS[name].placement == 'end'
  placed = lambda ids: [*ids, *tokens] if at_end else [*tokens, *ids]
  (tmp_path / 'longer.jsonl').write_text(''.join(json.dumps(
      {'input_tokens': placed([*vocabulary.encode(row['inputs']), 1]),
       'targets': row['targets']}) + '\n' for row in rows), encoding='utf-8')
  for flags in (['--prompt', result['prompt'], '--input', str(cache / 'rows.jsonl')],
                ['--input', str(tmp_path / 'longer.jsonl')]):
    assert eval_verb.main(['--base', str(tiny_base), *flags]) == 0
    assert json.loads(capsys.readouterr().out)['accuracy'] == pytest.approx(result['best_value'])
  with pytest.raises(ValueError, match='holds another run: method was'):
    run.train(*train.args[:4], dataclasses.replace(RUNS[name], text='e'), *train.args[5:],
              **train.keywords)
  with pytest.raises(ValueError, match='START_TEXT has .* tokens, and PROMPT_LENGTH is'):
    run.train(*train.args[:4], dataclasses.replace(RUNS[name], text='a lovely film ' * 9),
              *train.args[5:], **train.keywords)


@pytest.mark.slow
def test_labels_are_measured_among_themselves():
  """The loss is that of ranking first tokens, in a step as well."""
  recipe, state, _ = searching(FirstOrder(4))
  given, labels = batch(3), np.array([7, 11, 30])
  given['decoder_target_tokens'][:, 0] = labels[[0, 1, 2, 1]]
  choices = Choices(tuple((int(label),) for label in labels))
  recipe = dataclasses.replace(recipe, choices=choices)
  params = {**base_of('t5').params, **state.trainable}
  first = prompted_model.logits(recipe.model, params, given)[:, 0, labels]
  exact = -jax.nn.log_softmax(first)[jnp.arange(4), jnp.array([0, 1, 2, 1])]
  found, metrics = prompted_model.loss(recipe.model, params, given, choices=choices)
  np.testing.assert_allclose(found, jnp.mean(exact), rtol=1e-5)
  assert metrics['tokens'] == 4
  np.testing.assert_allclose(metrics['accuracy'], jnp.mean(jnp.argmax(first, -1) == jnp.array(
      [0, 1, 2, 1])))
  # Of targets that begin alike, what is measured stands behind the beginning.
  begun = {**given, 'decoder_target_tokens': np.insert(given['decoder_target_tokens'], 0, 3, 1),
           'decoder_input_tokens': np.insert(given['decoder_input_tokens'], 1, 3, 1),
           'decoder_loss_weights': np.ones((4, 6), np.float32)}
  first = prompted_model.logits(recipe.model, params, begun)[:, 1, labels]
  exact = -jax.nn.log_softmax(first)[jnp.arange(4), jnp.array([0, 1, 2, 1])]
  choices_behind = Choices(tuple((3, int(label)) for label in labels))
  behind, metrics = prompted_model.loss(recipe.model, params, begun, choices=choices_behind)
  np.testing.assert_allclose(behind, jnp.mean(exact), rtol=1e-5)
  assert metrics['tokens'] == 4
  # Of both, each example's label among labels and its whole target count alike.
  whole, count = prompted_model.loss(recipe.model, params, begun)
  both, metrics = prompted_model.loss(recipe.model, params, begun, choices=dataclasses.replace(
      choices_behind, targets_too=True))
  np.testing.assert_allclose(both, behind + whole * count['tokens'] / 4, rtol=1e-5)
  assert metrics['tokens'] == 4 and metrics['loss'] == both
  before, step = float(found), make_train_step(recipe)
  for _ in range(4):
    state, _ = step(state, base_of('t5').params, given)
  params = {**base_of('t5').params, **state.trainable}
  after = prompted_model.loss(recipe.model, params, given, choices=choices)[0]
  assert after < before


def test_labels_are_told_apart_behind_what_targets_begin_with(bart_file, bert_file, tiny_base):
  words = Vocabulary.of_base(base_checkpoint.load_base(tiny_base))
  meta = {'lengths': {'targets': 40}}
  for labels in (['<extra_id_0> good', '<extra_id_0> bad'], ['good', 'goods'], ['good', 'bad']):
    cache = types.SimpleNamespace(meta=meta, rows=[{'choices': labels}])
    whole = [(*words.encode(label), words.eos_id) for label in labels]
    found = first_pieces([cache], words)
    assert len({label[-1] for label in found}) == len(labels)
    assert len({label[:-1] for label in found}) == 1
    assert all(label[:len(found[0])] == ids for label, ids in zip(whole, found, strict=True))
  cache = types.SimpleNamespace(
      meta=meta, rows=[{'choices': ['<extra_id_0> good', '<extra_id_0> bad', 'a']}])
  with pytest.raises(ValueError, match='Labels need first pieces of their own, got <extra_id_0> g'):
    first_pieces([cache], words)
  cache = types.SimpleNamespace(meta=meta, rows=[{'choices': ['good', 'bad']}])
  for file, most in ((bart_file, 2), (bert_file, 1)):
    words = Vocabulary(str(file))
    assert first_pieces([cache], words) == tuple(
        tuple(words.framed(words.encode(label), 'targets')[:most]) for label in ('good', 'bad'))


def test_the_words_of_a_vocabulary_are_text(tiny_base, bpe_file):
  base = base_checkpoint.load_base(str(tiny_base))
  pieces = Vocabulary.of_base(base)
  found = words(pieces)
  assert min(found) > 2 and max(found) < pieces.size - pieces.extra_ids
  assert all(pieces.piece(int(i)).strip('▁').isprintable() for i in found)
  bpe = Vocabulary(str(bpe_file))
  shown = {bpe.decode([int(i)]) for i in words(bpe)}
  assert {'a', 'film'} <= {text.strip() for text in shown} and '�' not in ''.join(shown)
  assert bpe.eos_id not in words(bpe)


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: WordSearch(keep=0), 'keep should be a whole number from 1, got 0'),
    (lambda: WordSearch(FirstOrder(0)), 'candidates should be a whole number from 1'),
    (lambda: Mutations(crossover=2), 'crossover should be a share from 0 to 1, got 2'),
    (lambda: DiscretePrompt(0), 'needs a PROMPT_LENGTH from 1, got 0'),
    (lambda: DiscretePrompt(3, text=5), 'START_TEXT should be a text, got 5')],
    ids=['keep', 'candidates', 'crossover', 'length', 'text'])
def test_what_cannot_be_is_told(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['int8', 'bfloat16'])
def test_words_of_a_small_dtype_are_found_again(tmp_path, tiny_base, reviews, token_dir, dtype):
  """The rows that are saved are those of the words that are named."""
  result = run.train(TextFile(str(reviews)), {'inputs': 24, 'targets': 8}, str(tmp_path / 'run'),
                     str(tiny_base), RUNS['autoprompt'], optimizers.adafactor(), 2, 8,
                     parameter_dtype=dtype, inspect=False)
  file = prompt_file.load(result['prompt'])
  table = base_checkpoint.load_base(str(tiny_base), dtype=dtype).embedding
  np.testing.assert_array_equal(file.params['prompt/embedding'],
                                np.asarray(table, np.float32)[file.metadata['tokens']])

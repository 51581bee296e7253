"""What the engine's answers should be: each request answered alone, by the model itself."""

import dataclasses

import jax
import numpy as np
import pytest

from prompt_tuning_jax import prompted_model
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.decoding import stop_strings, token_choice
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.serving.requests import Classification, Finished, Generation, Text

LONGEST, DECODED, LABELS = 24, 12, 32
WORDS = 'a this lovely bright warm awful dull cold film play song and is'.split()


class Offline:
  """Each request alone, without the engine."""

  def __init__(self, base):
    self.base = base
    self.vocabulary = Vocabulary(self.base.vocabulary.file, self.base.vocabulary.extra_ids)
    self.model = PromptedModel(self.base.config.network())
    self._generate = jax.jit(prompted_model.generate, static_argnums=(0, 3))
    self._rank = jax.jit(prompted_model.candidate_log_likelihoods, static_argnums=(0, 5))

  def _row(self, slot, ids):
    ids = slot.virtual.place(np.asarray(ids, np.int32)) if slot.virtual else ids
    return np.pad(np.asarray(ids, np.int32), (0, 40 - len(ids)))[None]

  def _ids(self, inputs):
    text = isinstance(inputs, str)
    words = self.vocabulary
    return words.framed(words.encode(inputs), 'inputs') if text else list(inputs)

  def texts(self, bank, request):
    """[(text, reason, log p)] of each choice."""
    slot = bank.slot(None if request.model == self.base.name else request.model)
    found = []
    seeds = np.random.SeedSequence([request.seed or 0, request.place])
    for seed in seeds.generate_state(request.n):
      column = lambda value, dtype: np.array([value], dtype)
      choose = token_choice.Sampling(
          column(request.temperature, np.float32), column(request.top_k, np.int32),
          column(request.top_p, np.float32), column(seed, np.uint32))
      pieces = self.vocabulary.bytes_of_ids(self.base.config.vocab_size)
      stops = stop_strings.of_rows([request.stop], *pieces, self.vocabulary.leading_spaces, 2, 8)
      limit = request.max_tokens or DECODED
      tokens, score = self._generate(
          self.model, self.base.params, self._row(slot, self._ids(request.inputs)), DECODED, choose,
          np.array([limit]), self.vocabulary.eos_id, added=bank.added([slot]), stops=stops)
      text, stop = stop_strings.cut(self.vocabulary.decode(np.asarray(tokens[0])), request.stop)
      found.append((text, 'stop' if stop or self.vocabulary.eos_id in tokens[0]
                    else 'length', float(score[0])))
    return found

  def scores(self, bank, request, ids=None):
    slot = bank.slot(None if request.model == self.base.name else request.model)
    words = self.vocabulary
    labels = [words.framed(words.encode(label), 'targets') for label in request.labels]
    beside = batches.side_by_side([labels], LABELS)
    found = self._rank(self.model, self.base.params,
                       self._row(slot, ids or self._ids(request.inputs)), beside['candidates'],
                       beside['segments'], LABELS // 2, bank.added([slot]))
    return np.asarray(found[0, :len(labels)], np.float64), np.array(list(map(len, labels)))

  def classes(self, bank, request):
    """(log p, probabilities)."""
    raw, lengths = self.scores(bank, request)
    alone = dataclasses.replace(request, model=self.base.name)
    nothing = self.vocabulary.framed([], 'inputs')
    prior = self.scores(bank, alone, nothing)[0] if request.calibrated else 0
    scores = np.exp((raw - prior) / lengths if request.length_normalized else raw - prior)
    return raw, scores / np.sum(scores)


def prompt(base, length, seed, placement='before', **about):
  rows = 4 * np.random.default_rng(seed).normal(size=(length, base.config.emb_dim))
  return prompt_file.PromptFile({'prompt/embedding': rows.astype(np.float32)}, prompt_file.describe(
      base, length=length, placement=placement, **about))


def prefix(base, length, seed):
  config, rng = base.config, np.random.default_rng(seed)
  return prompt_file.PromptFile({
      f'prefix/{place}': rng.normal(size=(layers, 2, length, config.num_heads, config.head_dim))
      .astype(np.float32) for place, layers in config.attentions.items()},
      prompt_file.describe(base, method='prefix_tuning'))


def random_requests(names, count, seed=0):
  rng, requests = np.random.default_rng(seed), []
  for i in range(count):
    model, size = rng.choice(names), rng.integers(1, 7)
    inputs = (' '.join(rng.choice(WORDS, size)) if i % 3 else
              tuple(map(int, rng.integers(2, 90, rng.integers(1, LONGEST + 1)))))
    inputs = tuple(inputs[:LONGEST]) if isinstance(inputs, tuple) else inputs
    if rng.integers(2):
      labels = tuple(rng.permutation(WORDS)[:rng.integers(1, 5)])
      requests.append(Classification(str(model), inputs, tuple(map(str, labels)),
                                     bool(rng.integers(2)), bool(rng.integers(2))))
    else:
      drawn = dict(temperature=float(rng.uniform(0.5, 2)), top_k=int(rng.integers(0, 9)),
                   top_p=float(rng.choice([1.0, 0.7])), seed=int(rng.integers(99)))
      requests.append(Generation(
          str(model), inputs, int(rng.integers(1, DECODED + 1)) if rng.integers(2) else None,
          n=int(rng.integers(1, 3)), stop=tuple(map(str, rng.choice(list('aeiou '), 2))) * (i % 2),
          **(drawn if rng.integers(2) else {})))
  return requests


def texts_of(events, n) -> list[tuple[str, str, float]]:
  """(text, reason, log p) of each choice; its pieces come before its end, nothing after it."""
  found = []
  for index in range(n):
    own = [event for event in events if event.index == index]
    assert all(isinstance(event, Text) and event.text for event in own[:-1])
    assert isinstance(own[-1], Finished)
    found.append((''.join(event.text for event in own[:-1]), own[-1].reason,
                  own[-1].log_likelihood))
  return found


def check(offline, bank, request, events):
  """Raises unless they are the offline answer."""
  if isinstance(request, Generation):
    found, expected = texts_of(events, request.n), offline.texts(bank, request)
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    np.testing.assert_allclose([each[2] for each in found], [each[2] for each in expected],
                               rtol=1e-4, atol=1e-5)
    return tuple(each[0] for each in found)
  [answer] = events
  raw, shares = offline.classes(bank, request)
  assert answer.labels == request.labels and sum(answer.probabilities) == pytest.approx(1)
  np.testing.assert_allclose(answer.log_likelihoods, raw, rtol=1e-4)
  np.testing.assert_allclose(answer.probabilities, shares, atol=1e-5)
  return answer.probabilities

"""Answers of a prompted model to any number of inputs: ranked choices, generated text, scores.

Inputs are sorted by length into batches of a few static shapes, so padding is little and nothing
compiles twice; answers come back in the order of the inputs. With a bank of prompts every input may
have a prompt of its own, and one batch holds many.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import controlled, prompted_model
from prompt_tuning_jax.controlled import Perturbed, Weighted
from prompt_tuning_jax.data import batches
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.decoding import beam_search, stop_strings, token_choice
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.prompt_bank import PromptBank, Slot
from prompt_tuning_jax.prompted_model import Added, PromptedModel
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import Batch, PyTree

Tokens = np.ndarray | Sequence[int]
NO_TARGET = (1,)
ONE_TOKEN = 2  # with the end behind it: the least that a text to be made takes


@dataclasses.dataclass(frozen=True)
class DecodingSettings:
  """How texts are generated: greedily, unless told otherwise.

  Args:
    num_samples: texts of each input; more than one are drawn, or the best of the beams.
    temperature: 0 takes the most probable token, 1 draws from the model's distribution.
    top_k, top_p: what is drawn from (`token_choice.Sampling`); 0 and 1 are all.
    num_beams, length_penalty: width of the beam search, and its alpha (`beam_search`,
      BrevityPenalty, T5X's), None being 0.6.
    stop: texts that end a text, and are cut off.
    seed: with the number of an input, decides what is drawn.
  """

  num_samples: int = 1
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  num_beams: int = 1
  length_penalty: float | None = None
  stop: tuple[str, ...] = ()
  seed: int = 0

  def __post_init__(self):
    expect = lambda holds, text: _raise(f'{text}.') if not holds else None
    expect(self.num_samples >= 1, f'num_samples should be at least 1, got {self.num_samples}')
    expect(0 <= self.temperature < float('inf'),
           f'temperature should be 0 or more, got {self.temperature}')
    expect(0 <= self.top_k < 1 << 31, f'top_k should be 0 (all) or more, got {self.top_k}')
    expect(0 < self.top_p <= 1, f'top_p should be above 0 and at most 1, got {self.top_p}')
    expect(self.num_beams >= 1, f'num_beams should be at least 1, got {self.num_beams}')
    expect(self.num_beams == 1 or not self.temperature,
           'Beams are searched or tokens drawn: give num_beams or temperature, not both')
    expect(self.num_beams == 1 or self.num_samples <= self.num_beams,
           f'{self.num_beams} beams give no {self.num_samples} texts: raise num_beams')
    expect(self.num_samples == 1 or self.temperature or self.num_beams > 1,
           f'{self.num_samples} greedy texts would be one: set temperature or num_beams')
    expect(self.temperature or (not self.top_k and self.top_p == 1),
           'top_k and top_p belong to a temperature above 0')
    expect(self.length_penalty is None or abs(self.length_penalty) <= 10,  # more overflows float32
           f'length_penalty should be such as 0.6, from -10 to 10, got {self.length_penalty}')
    expect(self.num_beams > 1 or self.length_penalty is None,
           'A length_penalty belongs to beam search: set num_beams')
    expect(self.seed >= 0, f'seed should be 0 or more, got {self.seed}')
    expect(all(self.stop), 'A stop string is empty')
    expect(all(text.encode('utf-8', 'ignore').decode() == text for text in self.stop),
           'A stop string is no text in UTF-8')
    expect(self.num_beams == 1 or not self.stop, 'Beam search takes no stop strings')

  @property
  def penalty(self) -> beam_search.BrevityPenalty:
    return beam_search.BrevityPenalty(
        0.6 if self.length_penalty is None else self.length_penalty)


@dataclasses.dataclass(frozen=True)
class Generated:
  """A text, and log p of its tokens in nats or, of a beam, its score."""

  text: str
  score: float


def check_positions(config: Any, inputs: Sequence[int], targets: Sequence[int]) -> None:
  """Raises ValueError where a network with learned positions has too few for an example.

  Args:
    inputs: the tokens of each example's input, its prompt included.
    targets: those of its target.
  """
  if config.max_positions is None:
    return
  longest = max(map(config.positions_of, inputs, targets), default=0)
  if longest > config.max_positions:
    raise ValueError(f'The network has {config.max_positions} positions, but an input with its '
                     f'prompt and target takes up to {longest}: lower the most tokens of '
                     'inputs or targets, or the length of the prompt.')


def check_masks(config: Any, inputs: Iterable[Tokens], targets: Iterable[int]) -> None:
  """Raises ValueError where a masked language model is to fill in more than there are masks for.

  Args:
    inputs: the ids of each example's input.
    targets: the tokens of its target, its end included, which needs no mask.
  """
  if not config.is_masked_lm:
    return
  for ids, target in zip(inputs, targets, strict=True):
    masks = int(np.sum(np.asarray(ids) == config.mask_id))
    if masks < target - 1:
      raise ValueError(f'An input has {masks} masks, but its target, a label or an answer takes '
                       f'{target - 1}: write a mask for each token into the input (a template such '
                       "as 'It was [MASK]: {}'; a long text that is cut loses what is behind it).")


def check_calibration(config: Any) -> None:
  """Raises ValueError for a masked language model, which says nothing of labels without a text."""
  if config.is_masked_lm:
    raise ValueError('A masked language model cannot be calibrated: an input without text has no '
                     'mask to fill in. Leave out `calibrated`.')


class Predictor:
  """Runs one model over lists of token ids (unpadded, end-of-sequence id included).

  `virtual` is in every input, or with a `bank` each input has what its slot says (`slots`; without
  any the base answers alone). `batch_size` is rounded up to a multiple of a batch's parts.
  """

  def __init__(self, model: PromptedModel, vocabulary: Vocabulary,
               virtual: VirtualTokens | None = None, batch_size: int = 32,
               max_decode_length: int = 64, partitioner: Partitioner = Partitioner(),
               bank: PromptBank | None = None):
    self._vocabulary, self._virtual, self._bank = vocabulary, virtual, bank
    self._batch_size = batch_size + -batch_size % partitioner.copies
    self._partitioner = partitioner
    self._config, self._max_decode_length = model.network.config, max_decode_length
    self._decoding = DecodingSettings()
    # Answers are whole on every device, so that each of several processes has all of them.
    jit = lambda function, *static: partitioner.jit(
        functools.partial(function, model), static_argnames=static,
        out_shardings=partitioner.replicated)
    self._rank = jit(prompted_model.candidate_log_likelihoods, 'most')
    self._score = jit(prompted_model.log_likelihood)
    self._first = jit(prompted_model.first_word_log_probabilities, 'place')
    self._generate = jit(prompted_model.generate, 'max_length', 'repeats')
    self._beams = jit(prompted_model.beam_search, 'max_length', 'num_beams')
    self._weighted = jit(controlled.generate_weighted, 'max_length', 'repeats')
    self._perturbed = jit(controlled.generate_perturbed, 'max_length', 'repeats', 'iterations')

  def placing(self, virtual: VirtualTokens | None) -> 'Predictor':
    """The same predictor, nothing compiled anew, with another prompt's ids in the inputs."""
    other = copy.copy(self)
    other._virtual = virtual
    return other

  def decoding(self, settings: DecodingSettings) -> 'Predictor':
    """The same predictor, whose `generate` takes these settings."""
    other = copy.copy(self)
    other._decoding = settings
    return other

  def rank(self, params: PyTree, inputs: Sequence[Tokens], choices: Sequence[Sequence[str]],
           slots: Sequence[Slot] | None = None,
           places: Sequence[str] | None = None) -> list[np.ndarray]:
    """log p(choice | input) in nats for each choice of each input: one [C] array an input.

    Every input is encoded once, however many choices it has. `places` are as of `check`.
    """
    ids = self.choice_ids(choices)
    most = max(map(len, ids), default=0)
    together = batches.round_up(max((sum(map(len, row)) for row in ids), default=0),
                                batches.Buckets().targets)
    self.check(inputs, ids, slots, places)

    def run(rows, batch, added):
      put = self._partitioner.put_batch(
          {**batch, **batches.side_by_side([ids[i] for i in rows], together)})
      return self._rank(params, put['encoder_input_tokens'], put['candidates'], put['segments'],
                        most=most, added=added)

    return [scores[:len(row)]
            for scores, row in zip(self._run(inputs, run, slots=slots), ids, strict=True)]

  def prior(self, untuned: PyTree, choices: Sequence[str]) -> np.ndarray:
    """log p(choice | no text) in nats of the base alone, whose parameters these are: [C]."""
    check_calibration(self._config)
    candidates = self.choice_ids([choices])
    tokens = [self._vocabulary.framed([], 'inputs')] * self._batch_size
    batch = {**batches.batch_of(tokens, [NO_TARGET] * self._batch_size),
             **batches.side_by_side(candidates * self._batch_size, sum(map(len, candidates[0])))}
    put = self._partitioner.put_batch(batch)
    return np.asarray(self._rank(
        untuned, put['encoder_input_tokens'], put['candidates'], put['segments'],
        most=len(choices), added=Added()))[0]

  def choice_ids(self, choices: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The ids of each choice, end-of-sequence id included."""
    encode = functools.lru_cache(maxsize=None)(
        lambda text: self._vocabulary.framed(self._vocabulary.encode(text), 'targets'))
    return [[encode(text) for text in row] for row in choices]

  def generate(self, params: PyTree, inputs: Sequence[Tokens],
               slots: Sequence[Slot] | None = None) -> list[str]:
    """A text of each input: greedily, or as `decoding` says the first of several."""
    found = self.generate_with(params, inputs, self._decoding, slots)
    return [texts[0].text for texts in found]

  def generate_with(self, params: PyTree, inputs: Sequence[Tokens], decoding: DecodingSettings,
                    slots: Sequence[Slot] | None = None,
                    numbers: Sequence[int] | None = None,
                    control: Weighted | Perturbed | None = None,
                    places: Sequence[str] | None = None) -> list[list[Generated]]:
    """`decoding.num_samples` texts of each input, with `control` of what they are like.

    What is drawn for an input depends on `decoding.seed` and its number (default: its index), not
    on the others. Weighted decoding is of inputs with slots.
    """
    if control and decoding.num_beams > 1:
      raise ValueError('Control is of tokens that are drawn or the best one: leave out num_beams.')
    self.check(inputs, None, slots, places)
    for slot in control.slots(Slot())[1:] if isinstance(control, Weighted) else ():
      self.check(inputs, None, [slot] * len(inputs), places)
    numbers = range(len(inputs)) if numbers is None else numbers
    search = self._search if decoding.num_beams > 1 else self._draw

    def run(rows, batch, added):
      of_rows = [numbers[i] for i in rows]
      if isinstance(control, Weighted):
        batch, added = self._members(control, [inputs[i] for i in rows], [slots[i] for i in rows])
      tokens = self._partitioner.put_batch(batch)['encoder_input_tokens']
      if control:
        return self._draw(params, tokens, added, decoding, of_rows, self._controlled(control))
      return search(params, tokens, added, decoding, of_rows)

    beside = max(decoding.num_samples, decoding.num_beams)  # rows of each input
    beside *= len(control.weights) if isinstance(control, Weighted) else 1
    return [[Generated(stop_strings.cut(self._vocabulary.decode(tokens), decoding.stop)[0],
                       float(score)) for tokens, score in zip(*found, strict=True)]
            for found in self._run(inputs, run, slots=slots, beside=beside)]

  def _members(self, control: Weighted, inputs: Sequence[Tokens],
               slots: Sequence[Slot]) -> tuple[Batch, Added]:
    """The mixed batch in which every example stands with each of its prompts."""
    members = [(ids, slot) for ids, own in zip(inputs, slots, strict=True)
               for slot in control.slots(own)]
    batch = batches.batch_of([ids for ids, _ in members], [NO_TARGET] * len(members),
                             [slot.virtual for _, slot in members])
    return batch, self._bank.added([slot for _, slot in members])

  def _controlled(self, control: Weighted | Perturbed) -> Callable:
    """What takes the place of `prompted_model.generate`."""
    if isinstance(control, Weighted):
      return functools.partial(self._weighted, weights=control.weights)
    words = np.asarray(control.words, np.int32)
    return functools.partial(self._perturbed, **{**vars(control), 'words': words})

  def _draw(self, params, tokens, added, decoding: DecodingSettings, numbers: Sequence[int],
            generate: Callable | None = None):
    """([B, samples, max_length], [B, samples])."""
    rows, repeats = len(numbers) * decoding.num_samples, decoding.num_samples
    choose, stops = token_choice.Greedy(), None
    if decoding.temperature:
      seeds = [np.random.SeedSequence([decoding.seed, number]).generate_state(repeats)
               for number in numbers]
      full = lambda value, dtype: np.full(rows, value, dtype)
      choose = token_choice.Sampling(
          full(decoding.temperature, np.float32), full(decoding.top_k, np.int32),
          full(decoding.top_p, np.float32), np.concatenate(seeds))
    if decoding.stop:
      stops = stop_strings.of_rows([decoding.stop] * len(numbers),
                                   *self._vocabulary.bytes_of_ids(self._config.vocab_size),
                                   self._vocabulary.leading_spaces)
    found = (generate or self._generate)(
        params, tokens, max_length=self._max_decode_length, choose=choose,
        eos_id=self._vocabulary.eos_id, added=added, repeats=repeats, stops=stops)
    return jax.tree.map(lambda x: x.reshape(-1, repeats, *x.shape[1:]), found)

  def _search(self, params, tokens, added, decoding: DecodingSettings, numbers: Sequence[int]):
    """([B, samples, max_length], [B, samples])."""
    found = self._beams(params, tokens, max_length=self._max_decode_length,
                        num_beams=decoding.num_beams, penalty=decoding.penalty,
                        eos_id=self._vocabulary.eos_id, added=added)
    return jax.tree.map(lambda x: x[:, :decoding.num_samples], found)

  def score(self, params: PyTree, inputs: Sequence[Tokens], targets: Sequence[Tokens],
            slots: Sequence[Slot] | None = None,
            places: Sequence[str] | None = None) -> np.ndarray:
    """log p(target | input) in nats, summed over the target's tokens: [n] float32."""
    self.check(inputs, [[target] for target in targets], slots, places)
    run = lambda _, batch, added: self._score(params, self._partitioner.put_batch(batch),
                                              added=added)
    return np.array(self._run(inputs, run, targets, slots), np.float32)

  def first_words(self, params: PyTree, inputs: Sequence[Tokens]) -> np.ndarray:
    """log p of every word as the first of each input's target, in nats: [n, V] float32."""
    begins = self._vocabulary.begins('targets')
    targets = [(*begins, *NO_TARGET)] * len(inputs)
    check_positions(self._config, [self._length(inputs, None, i) for i in range(len(inputs))],
                    list(map(len, targets)))
    check_masks(self._config, inputs, [ONE_TOKEN] * len(inputs))
    run = lambda _, batch, added: self._first(params, self._partitioner.put_batch(batch),
                                              place=len(begins), added=added)
    return np.stack(self._run(inputs, run, targets))

  @property
  def is_limited(self) -> bool:
    """Whether the network may have no room for a text: positions, or masks to fill in."""
    return self._config.max_positions is not None or self._config.is_masked_lm

  def check(self, inputs: Sequence[Tokens], targets: Sequence[Sequence[Tokens]] | None = None,
            slots: Sequence[Slot] | None = None, places: Sequence[str] | None = None) -> None:
    """Raises ValueError where the network has no room for an input and what is to be answered.

    Args:
      targets: ids of the target, or each choice, of each input; None where texts are generated.
      places: of the inputs, which the error then begins with.
    """
    if not self.is_limited:
      return
    if targets is None:
      lengths, least = [[n] * len(inputs) for n in (self._max_decode_length, ONE_TOKEN)]
    else:
      lengths = least = [max(map(len, row), default=0) for row in targets]
    for i, (length, masked) in enumerate(zip(lengths, least, strict=True)):
      try:
        check_positions(self._config, [self._length(inputs, slots, i)], [length])
        check_masks(self._config, [inputs[i]], [masked])
      except ValueError as error:
        raise ValueError(f'{places[i]}: {error}' if places else str(error)) from None

  def _virtual_of(self, slots: Sequence[Slot] | None, i: int) -> VirtualTokens | None:
    return slots[i].virtual if slots else self._virtual

  def _length(self, inputs: Sequence[Tokens], slots: Sequence[Slot] | None, i: int) -> int:
    """How many tokens an input has, its prompt included."""
    virtual = self._virtual_of(slots, i)
    return len(inputs[i]) + (virtual.length if virtual else 0)

  def _run(self, inputs: Sequence[Tokens], run: Callable[[list[int], Batch, Added | None], PyTree],
           targets: Sequence[Tokens] | None = None,
           slots: Sequence[Slot] | None = None, beside: int = 1) -> list:
    """run(indices, batch, added) over all inputs in batches; results in the order of the inputs."""
    results = [None] * len(inputs)
    waiting: list[tuple[list[int], PyTree]] = []
    for live, rows in self._groups(inputs, slots, beside):
      batch = batches.batch_of([inputs[i] for i in rows],
                               [targets[i] if targets else NO_TARGET for i in rows],
                               [self._virtual_of(slots, i) for i in rows])
      added = self._bank.added([slots[i] for i in rows]) if slots else None
      waiting.append((live, run(rows, batch, added)))
      if len(waiting) > 2:  # the device works on the next batches while this one is fetched
        _collect(results, *waiting.pop(0))
    for item in waiting:
      _collect(results, *item)
    return results

  def _groups(self, inputs: Sequence[Tokens], slots: Sequence[Slot] | None,
              beside: int) -> Iterator[tuple[list[int], list[int]]]:
    """`full_batches`, the longest inputs first.

    Where each input becomes several rows on the device, a batch has fewer of them.
    """
    order = sorted(range(len(inputs)), key=lambda i: (-self._length(inputs, slots, i), i))
    size, parts = self._batch_size, self._partitioner.copies
    if beside > 1:
      size = max(1, size // beside // parts) * parts
    yield from full_batches(order, size)


def full_batches(order: list[int], size: int) -> Iterator[tuple[list[int], list[int]]]:
  """(indices answered, indices of a full batch): copies of the last fill up the last batch."""
  for start in range(0, len(order), size):
    live = order[start:start + size]
    yield live, live + [live[-1]] * (size - len(live))


def _collect(results: list, live: list[int], outputs: PyTree) -> None:
  """Puts each row of the outputs, an array or a tuple of them, where it belongs."""
  outputs = jax.device_get(outputs)
  rows = zip(*outputs, strict=True) if isinstance(outputs, tuple) else outputs
  for i, output in zip(live, rows, strict=False):
    results[i] = output


def _raise(message: str):
  raise ValueError(message)

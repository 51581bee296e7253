"""A request -> the rows that answer it, or why it is refused."""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import random
import time
from typing import Any

import numpy as np

from prompt_tuning_jax import ranking
from prompt_tuning_jax.checkpoints import prompt_file
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.predictor import ONE_TOKEN, check_calibration, check_masks
from prompt_tuning_jax.prompt_bank import PromptBank, Slot
from prompt_tuning_jax.serving.batching import GENERATE, Row
from prompt_tuning_jax.serving.programs import Programs, most_labels
from prompt_tuning_jax.serving.prompt_folder import labels_of
from prompt_tuning_jax.serving.requests import (
  MAX_STOP_BYTES,
  MAX_STOPS,
  BadRequest,
  Classification,
  Generation,
  Late,
  TooLong,
  UnknownModel,
)

_CHARACTERS_PER_TOKEN = 100  # A text with more is not even cut into tokens.


@contextlib.contextmanager
def _refused():
  """What `predictor` says against a request is the request's fault."""
  try:
    yield
  except ValueError as error:
    raise BadRequest(str(error)) from None


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
  """What answers at one time: a bank of prompts and the programs compiled for it."""

  bank: PromptBank
  programs: Programs


@dataclasses.dataclass(frozen=True, eq=False)
class Acceptance:
  """What requests are checked against.

  Args:
    base_name: the model that is the base without a prompt.
    max_input_length: most tokens of a text, its end-of-sequence id included.
  """

  vocabulary: Vocabulary
  base_name: str
  max_input_length: int

  def ids(self, inputs: str | tuple[int, ...]) -> list[int]:
    """The ids of a text, its end-of-sequence id included, or ids as they are given.

    Raises BadRequest, or TooLong: nothing is ever cut.
    """
    most, size = self.max_input_length, self.vocabulary.size
    if isinstance(inputs, str):
      if len(inputs) > _CHARACTERS_PER_TOKEN * most:
        raise TooLong(f'The input has {len(inputs)} characters; this server reads up to {most} '
                      'tokens: shorten it.')
      ids = self.vocabulary.encode(inputs)
      if not ids:
        raise BadRequest('The input is empty: send some text.')
      ids = self.vocabulary.framed(ids, 'inputs')
    else:
      ids = list(inputs)
      if not ids:
        raise BadRequest('The input is empty: send some ids.')
      wrong = next((i for i in ids if not 0 < i < size), None)
      if wrong is not None:
        raise BadRequest(f'The vocabulary has the ids 1 to {size - 1}, got {wrong}.')
    if len(ids) > most:
      raise TooLong(f'The input has {len(ids)} tokens; this server reads up to {most}: shorten it.')
    return ids

  def rows(self, request: Generation | Classification, served: Served, ids: list[int],
           owner: Any = None) -> list[Row]:
    """The rows that answer a request. Raises Refused."""
    now = time.monotonic()
    if request.deadline is not None and request.deadline < now:
      raise Late('The deadline had passed when the request came.')
    slot = self._slot(request.model, served.bank)
    common = dict(owner=owner, served=served, slot=slot, since=now)
    if isinstance(request, Generation):
      return self._texts(request, ids, common)
    return self._classes(request, ids, common)

  def labels(self, request: Classification, served: Served) -> tuple[str, ...]:
    """Those of the request, or of its prompt. Raises BadRequest."""
    file = served.bank.files.get(request.model)
    labels = request.labels or (file and labels_of(file.metadata))
    if not labels:
      what = f'The prompt {request.model!r}' if file else 'The base'
      raise BadRequest(f'{what} names no labels: send "labels".', param='labels')
    return labels

  @functools.lru_cache(maxsize=256)  # noqa: B019 there is one for as long as the server runs
  def _label_ids(self, labels: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(self.vocabulary.framed(self.vocabulary.encode(label), 'targets'))
                 for label in labels)

  def _slot(self, name: str, bank: PromptBank) -> Slot:
    if name == self.base_name:
      return Slot()
    if name not in bank.files:
      # Comparing takes time that others wait for: with very many names, the first will do.
      names = [self.base_name, *itertools.islice(bank.files, 100)]
      near = difflib.get_close_matches(name[:64], names, 1)
      hint = f'Did you mean {near[0]!r}?' if near else 'GET /v1/models lists those there are.'
      raise UnknownModel(f'There is no model {name[:200]!r}. {hint}', param='model')
    return bank.slot(name)

  def _placed(self, ids: list[int], target: int, common: dict[str, Any]) -> dict[str, Any]:
    """The ids with the prompt, and their width; `target` tokens come behind them."""
    slot, programs = common['slot'], common['served'].programs
    tokens = np.asarray(ids, np.int32)
    tokens = slot.virtual.place(tokens) if slot.virtual else tokens
    width = programs.shapes.width(len(tokens))
    if width is None:
      raise TooLong(f'The input has {len(ids)} tokens and its prompt {slot.length}; this server '
                    f'reads up to {programs.shapes.widths[-1]} together: shorten the input.')
    config = common['served'].bank.base.config
    positions = config.max_positions
    if positions is not None and config.positions_of(len(tokens), target) > positions:
      raise TooLong(f'The input has {len(ids)} tokens, its prompt {slot.length}, and up to '
                    f'{target} follow; the network has {positions} positions: shorten the input.')
    return {'tokens': tokens, 'width': width}

  def _texts(self, request: Generation, ids: list[int], common: dict[str, Any]) -> list[Row]:
    most = common['served'].programs.shapes.max_decode_length
    limit = most if request.max_tokens is None else request.max_tokens
    if not 0 < limit <= most:
      raise BadRequest(f'This server writes 1 to {most} tokens, got max_tokens {limit}.',
                       param='max_tokens')
    stops = request.stop
    sizes = [len(stop.encode()) for stop in stops]
    if len(sizes) > MAX_STOPS or not all(0 < size <= MAX_STOP_BYTES for size in sizes):
      raise BadRequest(f'There may be {MAX_STOPS} stop strings of 1 to {MAX_STOP_BYTES} bytes.',
                       param='stop')
    # As `infer --seed` draws for a file that has these texts line by line.
    seed = random.getrandbits(32) if request.seed is None else request.seed
    seeds = np.random.SeedSequence([seed, request.place]).generate_state(request.n)
    placed = self._placed(ids, limit, common)
    with _refused():
      check_masks(common['served'].bank.base.config, [ids], [ONE_TOKEN])
    return [Row(index=index, kind=GENERATE, limit=limit, stops=stops, **placed, **common,
                choice=(request.temperature, request.top_k, request.top_p, int(seeds[index])))
            for index in range(request.n)]

  def _classes(self, request: Classification, ids: list[int],
               common: dict[str, Any]) -> list[Row]:
    """One row and, to calibrate it with, another: the base alone, without a text."""
    empty = self.vocabulary.framed([], 'inputs')
    shapes = common['served'].programs.shapes
    named = self.labels(request, common['served'])
    file = common['served'].bank.files.get(request.model)
    labels = self._label_ids(prompt_file.written(file.metadata if file else {}, named))
    kind = shapes.label_width(labels)
    if kind is None:
      widest = shapes.label_widths[-1]
      raise TooLong(f'The {len(labels)} labels have {sum(map(len, labels))} tokens, an '
                    f'end-of-sequence id each included; this server takes up to '
                    f'{most_labels(widest)} labels of {widest} tokens together.', param='labels')
    texts = [(ids, common)]
    if request.calibrated:
      texts.append((empty, {**common, 'slot': Slot()}))
    longest = max(map(len, labels))
    config = common['served'].bank.base.config
    with _refused():
      if len(labels) > 1:
        ranking.check_distinct(named, labels)
      if request.calibrated:
        check_calibration(config)
      check_masks(config, [text for text, _ in texts], [longest] * len(texts))
    return [Row(index=index, kind=kind, labels=labels, **given,
                **self._placed(text, longest, given)) for index, (text, given) in enumerate(texts)]

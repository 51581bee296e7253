"""What runs on the device: a few programs of static shapes, all compiled before a request comes."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from prompt_tuning_jax import prompted_model
from prompt_tuning_jax.data.batches import round_up
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.decoding import stop_strings
from prompt_tuning_jax.decoding.stop_strings import Stops
from prompt_tuning_jax.decoding.token_choice import Sampling
from prompt_tuning_jax.prompt_bank import PromptBank, Slot
from prompt_tuning_jax.prompted_model import Added, Decoding, PromptedModel
from prompt_tuning_jax.serving.requests import MAX_STOP_BYTES, MAX_STOPS
from prompt_tuning_jax.types import Array, PyTree

_LADDER = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Shapes:
  """The static shapes: every batch is padded to one of each.

  Args:
    batch_sizes: rows of a batch.
    widths: tokens of an input with its prompt.
    label_widths: tokens of all the labels of a row, side by side.
    max_decode_length: most tokens of a generated text.
  """

  batch_sizes: tuple[int, ...]
  widths: tuple[int, ...]
  label_widths: tuple[int, ...]
  max_decode_length: int

  def __post_init__(self):
    for name in ('batch_sizes', 'widths', 'label_widths'):
      sizes = getattr(self, name)
      if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f'{name} must be rising numbers from 1, got {",".join(map(str, sizes))}.')
    if self.max_decode_length < 1:
      raise ValueError(f'max_decode_length must be at least 1, got {self.max_decode_length}.')

  def batch_size(self, rows: int) -> int:
    """The smallest batch that has room for them."""
    return round_up(rows, self.batch_sizes)

  def width(self, tokens: int) -> int | None:
    """The narrowest input that has room for them; None if none has."""
    return round_up(tokens, self.widths) if tokens <= self.widths[-1] else None

  def label_width(self, labels: Sequence[Sequence[int]]) -> int | None:
    """The narrowest row of labels that has room for these; None if none has."""
    tokens = max(sum(map(len, labels)), 2 * len(labels))
    return round_up(tokens, self.label_widths) if tokens <= self.label_widths[-1] else None


def most_labels(label_width: int) -> int:
  """How many labels such a row may have: each takes a token and its end-of-sequence id."""
  return label_width // 2


def widths_up_to(longest: int) -> tuple[int, ...]:
  """Widths that about double, up to `longest`."""
  return (*(width for width in _LADDER if 1.5 * width <= longest), longest)


@dataclasses.dataclass(frozen=True, eq=False)
class Programs:
  """Compiled programs for one model and one form of a bank: whose arrays have the same shapes.

  `seconds` is how long it took to compile `fresh` of them; the others were known.
  """

  shapes: Shapes
  form: Any
  compiled: Mapping[tuple, Any]
  params: PyTree
  bytes_of_ids: tuple[Array, Array]
  fresh: int
  seconds: float

  def start(self, tokens: np.ndarray, added: Added, stops: Stops) -> Decoding:
    """Encodes [B, T] int32. `stops` (of `stop_strings_of`) come without the table of bytes."""
    return self.compiled['start', *tokens.shape](self.params, tokens, added, stops)

  def go_on(self, decoding: Decoding, added: Added, choose: Sampling, limits: np.ndarray,
            steps: int) -> Decoding:
    """Up to `steps` tokens more; the arrays of `decoding` are given away."""
    program = self.compiled['go_on', *decoding.inputs.shape]
    return program(self.params, decoding, self.bytes_of_ids, added, choose, limits, np.int32(steps))

  def rank(self, tokens: np.ndarray, candidates: np.ndarray, segments: np.ndarray,
           added: Added) -> Array:
    """log p of each candidate of each row: [B, most_labels] float32, in nats."""
    program = self.compiled['rank', *tokens.shape, candidates.shape[1]]
    return program(self.params, tokens, candidates, segments, added)


def stop_strings_of(rows: Sequence[Sequence[str]], bytes_of_ids: tuple[Array, Array],
                    leading_spaces: int) -> Stops:
  """Those of each row of a batch, without the table of bytes, which stays on the device."""
  return stop_strings.of_rows(rows, *bytes_of_ids, leading_spaces, MAX_STOPS,
                              MAX_STOP_BYTES).replace(table=None, lengths=None)


def compile_programs(model: PromptedModel, params: PyTree, vocabulary: Vocabulary,
                     bank: PromptBank, shapes: Shapes, known: Programs | None = None,
                     stopped: Callable[[], bool] = lambda: False) -> Programs:
  """All programs of these shapes; those of `known` are taken over where the bank's form is its.

  Raises InterruptedError as soon as `stopped()`.
  """
  began, form = time.monotonic(), _form(bank)
  compiled = dict(known.compiled) if known and known.form == form else {}
  table = known.bytes_of_ids if known else jax.device_put(
      vocabulary.bytes_of_ids(model.network.config.vocab_size))
  make = _Maker(model, params, vocabulary, bank, shapes.max_decode_length, table)
  fresh, wanted = 0, {}
  for rows, width in itertools.product(shapes.batch_sizes, shapes.widths):
    keys = [('start', rows, width), ('go_on', rows, width),
            *(('rank', rows, width, labels) for labels in shapes.label_widths)]
    for key in keys:
      if stopped():
        raise InterruptedError('Stopped while compiling.')
      if key not in compiled:
        compiled[key] = getattr(make, key[0])(compiled, *key[1:])
        fresh += 1
      wanted[key] = compiled[key]
  return Programs(shapes, form, wanted, params, table, fresh, time.monotonic() - began)


@dataclasses.dataclass(frozen=True, eq=False)
class _Maker:
  """Compiles each kind of program, for arrays such as will come."""

  model: PromptedModel
  params: PyTree
  vocabulary: Vocabulary
  bank: PromptBank
  max_length: int
  table: tuple[Array, Array]

  def start(self, compiled: Mapping[tuple, Any], rows: int, width: int) -> Any:
    function = functools.partial(_start, self.model, self.max_length)
    return jax.jit(function).lower(self.params, *self._inputs(rows, width)).compile()

  def go_on(self, compiled: Mapping[tuple, Any], rows: int, width: int) -> Any:
    _, added, _ = self._inputs(rows, width)
    decoding = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        compiled['start', rows, width].out_info)
    choose = sampling([(0.0, 0, 1.0, 0)] * rows)
    function = functools.partial(_go_on, self.model, self.vocabulary.eos_id)
    return jax.jit(function, donate_argnums=1).lower(
        self.params, decoding, self.table, added, choose, np.zeros(rows, np.int32),
        np.int32(0)).compile()

  def rank(self, compiled: Mapping[tuple, Any], rows: int, width: int, labels: int) -> Any:
    tokens, added, _ = self._inputs(rows, width)
    candidates = np.zeros((rows, labels), np.int32)
    function = functools.partial(_rank, self.model, most_labels(labels))
    return jax.jit(function).lower(self.params, tokens, candidates, candidates, added).compile()

  def _inputs(self, rows: int, width: int) -> tuple[np.ndarray, Added, Stops]:
    return (np.ones((rows, width), np.int32), self.bank.added([Slot()] * rows),
            stop_strings_of([()] * rows, self.table, self.vocabulary.leading_spaces))


def sampling(rows: Sequence[tuple[float, int, float, int]]) -> Sampling:
  """(temperature, top_k, top_p, seed) of each row."""
  dtypes = (np.float32, np.int32, np.float32, np.uint32)
  return Sampling(*(np.array(column, dtype)
                    for column, dtype in zip(zip(*rows, strict=True), dtypes, strict=True)))


def _start(model, max_length, params, tokens, added, stops):
  return prompted_model.start_decoding(model, params, tokens, max_length, added, stops=stops)


def _go_on(model, eos_id, params, decoding, table, added, choose, limits, steps):
  """The table of bytes is an argument of its own: what is in `decoding` is given away."""
  with_table = lambda table, lengths: decoding.replace(state=decoding.state.replace(
      stops=decoding.state.stops.replace(table=table, lengths=lengths)))
  decoding = prompted_model.continue_decoding(
      model, params, with_table(*table), choose, limits, steps, eos_id, added)
  return with_table(None, None)


def _rank(model, most, params, tokens, candidates, segments, added):
  return prompted_model.candidate_log_likelihoods(model, params, tokens, candidates, segments,
                                                  most, added)


def _form(bank: PromptBank) -> Any:
  """What of a bank programs are compiled for."""
  leaves, structure = jax.tree.flatten(bank.added([Slot()]))
  return structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)

"""What is asked of the server, what comes back, and why it may be refused: plain data, no jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

MAX_STOPS, MAX_STOP_BYTES = 4, 64  # of a text; programs have room for so many


@dataclass(frozen=True)
class Generation:
  """One text to continue, n times."""

  model: str  # a prompt's name, or the base's own name: no prompt
  inputs: str | tuple[int, ...]  # text, or ids, their ending as given
  max_tokens: int | None = None  # None: the server's --max_decode_length
  temperature: float = 0.0  # 0 is greedy
  top_k: int = 0  # 0: all tokens
  top_p: float = 1.0
  n: int = 1
  stop: tuple[str, ...] = ()
  seed: int | None = None  # None: drawn by the engine
  place: int = 1  # the number of this text among those of its call, which a seed draws by
  deadline: float | None = None  # time.monotonic() by which it must be answered

  @property
  def rows(self) -> int:
    """How many texts wait to be made."""
    return self.n


@dataclass(frozen=True)
class Classification:
  """One text to label: every label is scored as the target that the prompt was trained to give."""

  model: str
  inputs: str | tuple[int, ...]
  labels: tuple[str, ...] = ()  # (): the labels that the prompt file names
  length_normalized: bool = False  # log-likelihood / number of tokens, before the softmax
  calibrated: bool = False  # less what the base alone gives the label without a text
  deadline: float | None = None

  @property
  def rows(self) -> int:
    """How many texts wait to be measured."""
    return 1 + self.calibrated


@dataclass(frozen=True)
class Text:
  """What is new in choice `index`."""

  index: int
  text: str


@dataclass(frozen=True)
class Finished:
  """The end of choice `index`: a stop string or the end-of-sequence id, or no more room."""

  index: int
  reason: Literal['stop', 'length']
  tokens: int
  log_likelihood: float


@dataclass(frozen=True)
class Labels:
  """The answer to a Classification; three tuples of the same length, probabilities sum to 1."""

  labels: tuple[str, ...]
  probabilities: tuple[float, ...]
  log_likelihoods: tuple[float, ...]


@dataclass(frozen=True)
class Model:
  """A name that requests may ask for: a prompt, or the base itself."""

  name: str
  created: int  # seconds since 1970
  labels: tuple[str, ...] | None = None
  task: str | None = None


@dataclass(frozen=True)
class Statistics:
  """What `Engine.statistics()` tells of its work: counts since its start, but for two."""

  queued: int = 0  # texts that wait now
  running: int = 0  # texts in the batches of this moment
  batches: Mapping[int, int] = field(default_factory=dict)  # texts in a batch -> such batches
  seconds: Mapping[str, float] = field(default_factory=dict)  # phase -> time spent in it
  prompt_tokens: int = 0
  generated_tokens: int = 0
  cancelled: int = 0


class Refused(Exception):
  """Not answered; the message is one line for the one who asked. Raise one of those below."""

  status = 500
  code: str | None = None  # for programs, where the status says too little

  def __init__(self, message: str, retry_after: float | None = None, param: str | None = None):
    super().__init__(message)
    self.message = message
    self.retry_after = retry_after  # seconds
    self.param = param  # the field that is wrong, as the one who asked called it


class BadRequest(Refused):
  """The request can never be answered as it stands."""

  status = 400


class TooLong(BadRequest):
  """The input does not fit in the rows that the server computes."""

  code = 'context_length_exceeded'


class UnknownModel(Refused):
  """No prompt of that name."""

  status = 404
  code = 'model_not_found'


class Overloaded(Refused):
  """The queue is full."""

  status = 429


class Failed(Refused):
  """An error of ours, told without its traceback."""

  status = 500


class Stopping(Refused):
  """The server takes no new requests."""

  status = 503


class Late(Refused):
  """The deadline passed."""

  status = 504

"""The engine: requests of many prompts -> batches -> the device -> events of each request.

One thread runs the device. It goes round: a batch of labels, the start of a batch of texts, some
tokens more of every batch under way; so a long text keeps no short answer waiting. Prompts that
come or go change nothing for what has been accepted.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import threading
import time
from typing import Any

from prompt_tuning_jax import ranking
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.predictor import check_positions
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.serving.accepting import Acceptance, Served
from prompt_tuning_jax.serving.batching import GENERATE, Row, is_full, next_batch
from prompt_tuning_jax.serving.programs import Shapes, compile_programs, widths_up_to
from prompt_tuning_jax.serving.prompt_folder import PromptFolder, labels_of
from prompt_tuning_jax.serving.requests import (
  BadRequest,
  Classification,
  Failed,
  Finished,
  Generation,
  Labels,
  Late,
  Model,
  Overloaded,
  Refused,
  Statistics,
  Stopping,
  Text,
)
from prompt_tuning_jax.serving.tickets import Outbox, Ticket
from prompt_tuning_jax.serving.under_way import Texts, label_scores
from prompt_tuning_jax.types import PyTree

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineSettings:
  """What the one who starts the engine decides.

  Args:
    batch_sizes: rows of a batch are padded to one of these.
    widths: inputs with their prompts are padded to one of these; by default they double, up to
      the longest.
    label_widths: so are the tokens of all the labels of a text.
    max_input_length: most tokens of a text; longer ones are refused.
    max_decode_length: most tokens of a generated text.
    max_queue: rows (texts, or labelled texts) that may wait.
    max_delay_ms: how long a row waits for company when there is nothing else to do.
    chunk: tokens that a batch is decoded by before others have their turn.
    max_active: batches of texts on the device at one time.
    room: virtual tokens that there is place for from the start: prompts of so many, put into the
      folder later, compile nothing anew.
    poll_seconds: how often the folder of prompts is looked at; 0 is never.
    shutdown_seconds: how long `stop` waits for what has been accepted.
  """

  batch_sizes: tuple[int, ...] = (1, 8, 32)
  widths: tuple[int, ...] = ()
  label_widths: tuple[int, ...] = (32, 256)
  max_input_length: int = 512
  max_decode_length: int = 64
  max_queue: int = 1024
  max_delay_ms: float = 2.0
  chunk: int = 8
  max_active: int = 4
  room: int = 4096
  poll_seconds: float = 2.0
  shutdown_seconds: float = 30.0

  def __post_init__(self):
    for name in ('max_input_length', 'max_queue', 'chunk', 'max_active', 'room'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}.')
    for name in ('max_delay_ms', 'poll_seconds', 'shutdown_seconds'):
      if not 0 <= getattr(self, name) < float('inf'):
        raise ValueError(f'{name} must be 0 or more, got {getattr(self, name)}.')
    self.shapes(0)

  def shapes(self, longest_prompt: int) -> Shapes:
    """The static shapes for prompts of up to such a length, and some longer ones."""
    room = 1 << (longest_prompt - 1).bit_length() if longest_prompt else 0
    widths = self.widths or widths_up_to(self.max_input_length + room)
    return Shapes(self.batch_sizes, widths, self.label_widths, self.max_decode_length)


class Engine:
  """Answers requests with one base and the prompts of a folder.

  `model` has no modules of its own; `params` are on the device; `bank` has the base, and may have
  prompts that are in no folder. Raises ValueError for settings that the network cannot have.
  """

  def __init__(self, model: PromptedModel, params: PyTree, vocabulary: Vocabulary,
               bank: PromptBank, settings: EngineSettings = EngineSettings(),
               folder: PromptFolder | None = None):
    self._model, self._params, self._vocabulary = model, params, vocabulary
    self._settings, self._folder = settings, folder
    self._bank = dataclasses.replace(bank, room=max(bank.room, settings.room))
    check_positions(bank.base.config, [settings.max_input_length + bank.longest],
                    [settings.max_decode_length])
    self._accepts = Acceptance(vocabulary, bank.base.name, settings.max_input_length)
    self._served: Served | None = None
    self._longest = 0  # of the prompts so far
    self._reloading, self._wake = threading.Lock(), threading.Condition()
    self._status, self._halted = 'starting', threading.Event()
    self._began = int(time.time())
    # What follows is read and written under `_wake`, but for `_active`, which is the worker's.
    self._waiting: list[Row] = []
    self._active: list[Texts] = []
    self._running = 0
    self._counts, self._seconds = collections.Counter(), collections.Counter()
    self._sizes, self._outbox, self._worker = collections.Counter(), Outbox(), None

  # What the one who starts it calls.

  def prepare(self) -> Served:
    """Reads the folder and compiles all programs; what they are, and how long it took."""
    if self._served is None:
      self._reload()
    return self._served

  def start(self) -> None:
    """Begins to answer, after `prepare`, in a thread of its own."""
    self._worker = threading.Thread(target=self._work, name='engine', daemon=True)
    self._worker.start()
    if self._folder is not None and self._settings.poll_seconds:
      threading.Thread(target=self._poll, name='prompts', daemon=True).start()

  async def stop(self) -> None:
    """Finishes what has been accepted, within a time limit, and accepts nothing more."""
    with self._wake:
      self._status = 'stopping'
      self._wake.notify_all()
    if self._worker is not None:
      await asyncio.to_thread(self._worker.join, self._settings.shutdown_seconds)
    self._halted.set()
    with self._wake:
      self._wake.notify_all()
    if self._worker is not None:
      await asyncio.to_thread(self._worker.join, self._settings.shutdown_seconds + 10)

  # What requests call; none of it waits for the device.

  def check_size(self, rows: int) -> None:
    """Raises BadRequest for more texts than may ever wait: to try again would not help."""
    if rows > self._settings.max_queue:
      raise BadRequest(f'The request has {rows} texts, more than the {self._settings.max_queue} '
                       'that may wait: ask for fewer.')

  def submit(self, request: Generation | Classification) -> Ticket:
    """Accepts a request. Raises Refused for all that can be known at once."""
    served = self._served
    if self._status == 'stopping':
      raise Stopping('The server is stopping: try again when it is back.')
    if served is None:
      raise Stopping('The server is starting: try again in some seconds.', retry_after=5)
    self.check_size(request.rows)
    ids = self._accepts.ids(request.inputs)
    rows = self._accepts.rows(request, served, ids)
    ticket = Ticket(request, len(ids), len(rows), self._cancelled)
    with self._wake:
      if self._status == 'stopping':
        raise Stopping('The server is stopping: try again when it is back.')
      if len(self._waiting) + len(rows) > self._settings.max_queue:
        self._waiting = [row for row in self._waiting if not row.owner.closed]
      if len(self._waiting) + len(rows) > self._settings.max_queue:
        raise Overloaded(f'{len(self._waiting)} texts wait, and this request has {len(rows)}; the '
                         f'queue takes {self._settings.max_queue}: try again soon.', retry_after=1)
      self._waiting += [dataclasses.replace(row, owner=ticket) for row in rows]
      self._counts['prompt_tokens'] += len(ids)
      self._wake.notify_all()
    return ticket

  async def reload(self) -> dict[str, Any]:
    """Looks at the folder again: {'added': names, 'removed': names, 'refused': {name: why}}.

    Raises Stopping when it is.
    """
    try:
      return await asyncio.to_thread(self._reload)
    except InterruptedError:
      raise Stopping('The server is stopping.') from None

  def models(self) -> list[Model]:
    """The base, and then the prompts by name."""
    base, served = self._bank.base.name, self._served
    found = [Model(base, self._began)]
    for name, file in sorted(served.bank.files.items()) if served else ():
      created = self._folder.created(name) if self._folder else 0
      found.append(Model(name, created or self._began, labels_of(file.metadata),
                         file.metadata.get('task')))
    return found

  def health(self) -> dict[str, Any]:
    """Whether it answers, and what there is to do."""
    served = self._served
    return {'status': self._status, 'queued': len(self._waiting), 'running': self._running,
            'models': 1 + len(served.bank.files) if served else 0}

  def statistics(self) -> Statistics:
    """Counts since the start."""
    with self._wake:
      return Statistics(len(self._waiting), self._running, dict(self._sizes), dict(self._seconds),
                        **{name: self._counts[name]
                           for name in ('prompt_tokens', 'generated_tokens', 'cancelled')})

  def _cancelled(self) -> None:
    with self._wake:
      self._counts['cancelled'] += 1
      self._wake.notify_all()

  # The folder of prompts.

  def _reload(self) -> dict[str, Any]:
    """Another bank takes over when its programs are compiled; the old one answers until then."""
    with self._reloading:
      bank = self._served.bank if self._served else self._bank
      added, removed, refused = [], [], {}
      if self._folder is not None:
        changes = self._folder.changes(bank, self._settings.max_input_length,
                                       self._settings.max_decode_length)
        added, removed, refused = sorted(changes.added), sorted(changes.removed), changes.refused
        bank = bank.replaced(changes.added, removed) if added or removed else bank
        # Room that there was stays: programs are compiled for it.
        bank = dataclasses.replace(bank, room=max(bank.room, bank.virtual_tokens))
      if self._served is None:
        self._served = self._compiled(bank)
      elif added or removed:
        try:
          self._served = self._compiled(bank)
        except InterruptedError:
          raise
        except Exception:  # noqa: BLE001 out of memory, say: what there was goes on
          logger.exception('The programs for %s could not be compiled.', ', '.join(added))
          why = 'its programs could not be compiled; the log says why.'
          self._folder.give_up(added, why)
          return {'added': [], 'removed': [], 'refused': {**refused, **dict.fromkeys(added, why)}}
        logger.info('Prompts added: %s; removed: %s; compiled %d programs in %.1f s.',
                    ', '.join(added) or 'none', ', '.join(removed) or 'none',
                    self._served.programs.fresh, self._served.programs.seconds)
      return {'added': added, 'removed': removed, 'refused': dict(refused)}

  def _compiled(self, bank: PromptBank) -> Served:
    self._longest = max(self._longest, bank.longest)
    with self._timed('compile'):
      return Served(bank, compile_programs(
          self._model, self._params, self._vocabulary, bank, self._settings.shapes(self._longest),
          self._served and self._served.programs, self._halted.is_set))

  def _poll(self) -> None:
    while not self._halted.wait(self._settings.poll_seconds):
      try:
        self._reload()
      except InterruptedError:
        return
      except Exception:  # noqa: BLE001 a folder is never a reason to stop serving
        logger.exception('The prompts could not be looked at again.')

  # The thread that runs the device.

  def _work(self) -> None:
    try:
      self.prepare()
    except Exception:  # noqa: BLE001
      logger.exception('The engine could not start.')
      with self._wake:
        self._status = 'stopping'
      return
    with self._wake:
      self._status = 'ok' if self._status == 'starting' else self._status
    going = True
    while going:
      try:
        going = self._await_work()
        if going:
          self._round()
      except Exception:  # noqa: BLE001 the thread lives as long as the server
        logger.exception('The engine failed; it goes on with what comes next.')
        self._refuse_all(Failed('The server failed; its log says why.'))
    self._refuse_all(Stopping('The server stopped before it came to this request.'))

  def _await_work(self) -> bool:
    """Waits until there is something to do; whether there is, rather than an end."""
    with self._wake:
      while not self._halted.is_set():
        self._drop_closed()
        if self._active or (self._waiting and self._patience() <= 0):
          return True
        if self._status == 'stopping' and not self._waiting:
          return False
        self._wake.wait(self._patience() if self._waiting else None)
    return False

  def _patience(self) -> float:
    """For how many seconds more the oldest row may wait for company."""
    shapes = self._waiting[0].served.programs.shapes
    if self._status == 'stopping' or is_full(self._waiting, shapes):
      return 0
    return self._waiting[0].since + self._settings.max_delay_ms / 1000 - time.monotonic()

  def _drop_closed(self) -> None:
    """Refuses what is late, and forgets what nobody waits for."""
    now = time.monotonic()
    for row in (*self._waiting, *(row for texts in self._active for row in texts.live)):
      deadline = row.owner.request.deadline
      if deadline is not None and deadline < now:
        self._outbox.put(row.owner, Late('Not answered before the deadline.'))
    self._waiting = [row for row in self._waiting if not row.owner.closed]
    for texts in self._active:
      texts.drop(lambda row: row.owner.closed)
    self._active = [texts for texts in self._active if texts.live]
    self._running = sum(len(texts.live) for texts in self._active)
    self._outbox.send()

  def _round(self) -> None:
    """A turn for everything."""
    if rows := self._taken(labelled=True):
      with self._answering(rows, 'classify'):
        self._classify(rows)
    if len(self._active) < self._settings.max_active and (rows := self._taken(labelled=False)):
      with self._answering(rows, 'start'):
        self._active.append(Texts(rows, self._vocabulary))
    for texts in tuple(self._active):
      with self._answering(texts.rows, 'generate'):
        new = texts.go_on(self._settings.chunk, self._emit)
        with self._wake:
          self._counts['generated_tokens'] += new
      if not texts.live or all(row.owner.closed for row in texts.live):
        self._active.remove(texts)

  def _taken(self, labelled: bool) -> list[Row]:
    """The rows of the next batch, which no longer wait."""
    with self._wake:
      kinds = {row.kind for row in self._waiting if (row.kind != GENERATE) == labelled}
      first = next((row for row in self._waiting if row.kind in kinds), None)
      if first is None:
        return []
      rows = next_batch(self._waiting, first.served.programs.shapes, kinds)
      gone = set(map(id, rows))
      self._waiting = [row for row in self._waiting if id(row) not in gone]
      self._sizes[len(rows)] += 1
      self._running += len(rows)
    return rows

  @contextlib.contextmanager
  def _answering(self, rows: list[Row], phase: str):
    """An error fails the requests of these rows, and no other."""
    try:
      with self._timed(phase):
        yield
    except Exception:  # noqa: BLE001
      logger.exception('A batch of %d texts failed.', len(rows))
      for row in rows:
        self._outbox.put(row.owner, Failed('The server failed to compute this; its log says why.'))
    self._outbox.send()

  def _classify(self, rows: list[Row]) -> None:
    for row, scores in zip(rows, label_scores(rows), strict=True):
      found = row.owner.results(row.index, scores)
      if found is not None:
        request = row.owner.request
        lengths = list(map(len, row.labels)) if request.length_normalized else None
        self._outbox.put(row.owner, Labels(
            self._accepts.labels(request, row.served),
            tuple(ranking.probabilities(*found, lengths=lengths).tolist()),
            tuple(map(float, found[0]))), last=True)

  def _emit(self, row: Row, events: list[Text | Finished]) -> None:
    ended = isinstance(events[-1], Finished) and row.owner.results(row.index, True)
    self._outbox.put(row.owner, *events, last=bool(ended))

  def _refuse_all(self, why: Refused) -> None:
    with self._wake:
      rows = [*self._waiting, *(row for texts in self._active for row in texts.live)]
      self._waiting, self._active, self._running = [], [], 0
    for row in rows:
      self._outbox.put(row.owner, why)
    self._outbox.send()

  @contextlib.contextmanager
  def _timed(self, phase: str):
    began = time.monotonic()
    try:
      yield
    finally:
      with self._wake:
        self._seconds[phase] += time.monotonic() - began

"""Several runs of `train` over one frozen base, their steps taken together.

A run is a member of a population. One step computes all members' gradients with the base read once:
`jax.vmap` over what trains and over the batches makes one matrix product of theirs with each frozen
kernel. All else is each member's own: its loss (the mean over its own target tokens), optimizer,
dropout masks, files, evaluations, early stopping. So a member is trained as `train` alone trains
it, can be resumed alone, and may stop, end or diverge while the others go on.

Members differ in seed, data, prompt's length and placement, initialisation, optimizer, and how long
they train. A shorter prompt's table is padded to the longest by rows that no token embeds as, and a
narrower batch by padding. Padding changes nothing but two dropout masks, which are drawn for the
padded width, attention's and that of the encoder's output: a member then has other ones than alone,
of the same distribution.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.data.prefetch import Prefetch
from prompt_tuning_jax.prompts import weight_changes
from prompt_tuning_jax.training import run
from prompt_tuning_jax.training.loop import Diverged, Training
from prompt_tuning_jax.training.state import TrainState
from prompt_tuning_jax.training.step import Recipe
from prompt_tuning_jax.types import Array, Batch, PyTree

logger = logging.getLogger(__name__)
# Leaves whose last axis but one may differ, the prompt's length: ids choose the rows.
ROWS = ('prompt/embedding', 'prompt/deep_embedding')
OF_BASE = {'initial_checkpoint_path': 'path', 'network': 'network', 'vocabulary': 'vocabulary',
           'parameter_dtype': 'dtype', 'partitioner': 'partitioner',
           'execution': 'execution'}  # -> of `run.load_base`


def prepared(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Training]:
  """{name: arguments of `run.train`} -> {name: that run, ready to train}.

  A base that several have is read once. Raises ValueError for what `run.train` refuses.
  """
  bases, trainings = [], {}
  for name, given in arguments.items():
    if given['initial_checkpoint_path'] is None:
      raise ValueError('Runs that train together have a base in common: INITIAL_CHECKPOINT_PATH '
                       'should name one.')
    wanted = {own: given[key] for key, own in OF_BASE.items() if key in given}
    base = next((base for key, base in bases if key == wanted), None)
    if base is None:
      base = run.load_base(**wanted)
      bases.append((wanted, base))
    trainings[name] = run.train(
        **{**given, 'initial_checkpoint_path': base, 'steps': lambda training: training})
  return trainings


def groups(trainings: Mapping[str, Training], most: int) -> list[dict[str, Training]]:
  """Parts of at most `most` whose steps can be taken together, in the order that is given."""
  found: list[tuple[Any, dict[str, Training]]] = []
  for name, training in trainings.items():
    kind = _kind(training)
    group = next((group for other, group in found if other == kind and len(group) < most), None)
    if group is None:
      group = {}
      found.append((kind, group))
    group[name] = training
  return [group for _, group in found]


def train(trainings: Mapping[str, Training], stop: Callable[[int], bool] = lambda step: False,
          ) -> dict[str, dict[str, Any] | Diverged]:
  """Takes the steps of all of them together: the report of each, or how it diverged.

  `stop` tells before each step whether to stop there (`loop.stop_requested`). Raises ValueError
  where they cannot be trained together; `groups` says which can.
  """
  if len(groups(trainings, len(trainings))) > 1:
    raise ValueError(f'{", ".join(trainings)} cannot train together: they may differ in seed, '
                     'task, optimizer, and length, placement and initialisation of a prompt, but '
                     'not in base, method, batch size, dropout, loss or the labels that it is '
                     'among.')
  with contextlib.ExitStack() as stack:
    members = {name: _Member(name, training, stop, stack) for name, training in trainings.items()}
    step_of = {}  # compiled for those that still train
    while live := [member for member in members.values() if member.wanted]:
      names = tuple(member.name for member in live)
      if names not in step_of:
        step_of = {names: make_population_step([member.training.recipe for member in live],
                                               [member.state for member in live])}
      batch = together([next(member.batches) for member in live])
      frozen, partitioner = live[0].training.frozen, live[0].training.recipe.partitioner
      outcomes = step_of[names]([member.state for member in live], frozen, _put(batch, partitioner))
      for member, outcome in zip(live, outcomes, strict=True):
        member.send(outcome)
  return {name: member.outcome for name, member in members.items()}


def make_population_step(recipes: Sequence[Recipe], states: Sequence[TrainState]) -> Callable:
  """A compiled (states, frozen, batch) -> [(state, metrics) of each member]; states are donated.

  `batch` has the members' batches side by side (`together`): [K, B, …]. The states given here say
  how theirs are split over devices. Metrics are those of `make_train_step`.
  """
  # The members' models are one but for a prompt's length.
  sizes = [param_paths.count(state.trainable) for state in states]
  largest, partitioner = recipes[int(np.argmax(sizes))], recipes[0].partitioner

  def step(states: Sequence[TrainState], frozen: PyTree, batch: Batch):
    keys = jnp.stack([recipe.dropout_key(state.step)
                      for recipe, state in zip(recipes, states, strict=True)])
    trainable = jax.tree.map(_stacked, *[state.trainable for state in states])
    gradients, metrics = jax.vmap(largest.gradients, in_axes=(0, None, 0, 0))(
        trainable, frozen, batch, keys)
    own = lambda k: (lambda leaf, like: leaf[(k, *map(slice, like.shape))])
    return [recipe.updated(state, jax.tree.map(own(k), gradients, state.trainable),
                           {name: values[k] for name, values in metrics.items()},
                           frozen, {name: values[k] for name, values in batch.items()})
            for k, (recipe, state) in enumerate(zip(recipes, states, strict=True))]

  shardings = [(jax.tree.map(lambda leaf: leaf.sharding, state), partitioner.replicated)
               for state in states]
  return partitioner.jit(step, donate_argnums=0, out_shardings=shardings)


def together(batches: Sequence[Batch]) -> dict[str, np.ndarray]:
  """Batches of B rows side by side: [K, B, widest], 0 being padding."""
  return {name: np.asarray(_stacked(*[batch[name] for batch in batches], of=np))
          for name in batches[0]}


class _Member:
  """A run that is under way: what it wants next, or what has become of it."""

  def __init__(self, name: str, training: Training, stop: Callable, stack: contextlib.ExitStack):
    self.name, self.training = name, training
    self.state = self.outcome = self.batches = None
    self.wanted = False
    self._steps = stack.enter_context(contextlib.closing(training.steps(stop)))
    self._stack = stack
    self._go_on(lambda: next(self._steps))

  def send(self, outcome: tuple[TrainState, dict[str, Array]]) -> None:
    """Gives the run the state and metrics after its step; it does what it has to before the next.
    """
    self._go_on(lambda: self._steps.send(outcome))

  def _go_on(self, resume: Callable[[], tuple[int, TrainState]]) -> None:
    self.wanted, self.state = False, None
    with _named(self.name):
      try:
        step, self.state = resume()
        self.wanted = True
        if self.batches is None:
          self.batches = self._stack.enter_context(Prefetch(self.training.batch_at, step))
        return
      except StopIteration as finished:
        self.outcome = finished.value
      except Diverged as error:
        logger.error('%s', error)
        self.outcome = error
    if self.batches is not None:
      self.batches.close()


@contextlib.contextmanager
def _named(name: str):
  """What is logged begins with the member's name."""
  before = logging.getLogRecordFactory()

  def factory(*args, **kwargs):
    record = before(*args, **kwargs)
    shown = name.replace('%', '%%') if record.args else name
    record.msg = f'{shown}: {record.msg}'
    return record

  logging.setLogRecordFactory(factory)
  try:
    yield
  finally:
    logging.setLogRecordFactory(before)


def _kind(training: Training) -> tuple:
  """What members that train together have in common."""
  recipe = training.recipe
  leaves = param_paths.flatten(training.state.trainable)
  shapes = {path: leaf.shape[:-2] + leaf.shape[-1:] if path in ROWS else leaf.shape
            for path, leaf in leaves.items()}
  model = recipe.model if not leaves.keys() & set(ROWS) else recipe.model.clone(prompt=None)
  batch = {name: (len(array), array.dtype) for name, array in training.batch_at(0).items()}
  # Leaves of the base are the same arrays; a part of a change that is frozen each run has made.
  frozen = [np.asarray(leaf).tobytes() if kind in weight_changes.KINDS else id(leaf)
            for kind, leaves in training.frozen.items() for leaf in jax.tree.leaves(leaves)]
  return (model, shapes, batch, recipe.guided, recipe.z_loss, recipe.label_smoothing,
          recipe.num_microbatches, recipe.partitioner, recipe.choices, frozen)


def _stacked(*leaves: Array, of: Any = jnp) -> Array:
  """K arrays as one [K, …], each padded with zeros to the largest."""
  shape = tuple(map(max, zip(*(leaf.shape for leaf in leaves), strict=True)))
  return of.stack([leaf if leaf.shape == shape else of.pad(
      leaf, [(0, size - own) for size, own in zip(shape, leaf.shape, strict=True)])
      for leaf in leaves])


def _put(batch: Batch, partitioner: Any) -> PyTree:
  """[K, B, …] -> device arrays, the rows of every member split over `data`."""
  split = NamedSharding(partitioner.mesh, PartitionSpec(None, 'data'))
  if (rows := len(batch['decoder_target_tokens'][0])) % partitioner.copies:
    raise ValueError(f'A batch must be a multiple of the {partitioner.copies} parts it is split '
                     f'into, got {rows} rows: change BATCH_SIZE.')
  return {name: jax.make_array_from_callback(array.shape, split, array.__getitem__)
          for name, array in batch.items()}

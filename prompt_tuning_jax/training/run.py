"""One training run, from what gin built to the files in MODEL_DIR."""

import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from prompt_tuning_jax import cloud_storage, param_paths
from prompt_tuning_jax.analysis import html_report
from prompt_tuning_jax.checkpoints import (
    atomic_write,
    base_checkpoint,
    file_lock,
    processes,
    prompt_file,
)
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.checkpoints.training_state import TrainingStates
from prompt_tuning_jax.data import batches, mixture, token_cache
from prompt_tuning_jax.data.token_cache import TokenCache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks import int8
from prompt_tuning_jax.networks.execution import Execution
from prompt_tuning_jax.networks.parameters import logical_axes
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.prompt_bank import PromptBank
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.weight_changes import combined
from prompt_tuning_jax.training import checks, evaluate, loop, methods, report
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.progress import Progress, Unwritten
from prompt_tuning_jax.training.step import Recipe
from prompt_tuning_jax.types import PyTree

logger = logging.getLogger(__name__)


def train(task: Any, task_feature_lengths: Mapping[str, int], model_dir: str,
          initial_checkpoint_path: str | Base | None, method: Any,
          optimizer: optax.GradientTransformation, train_steps: int, batch_size: int,
          eval_period: int = 1000, save_period: int = 1000, log_period: int = 50,
          network: Any = None, vocabulary: str | None = None, execution: Execution = Execution(),
          dropout_rate: float = 0.1, z_loss: float = 1e-4, label_smoothing: float = 0.0,
          activation_dtype: str = 'float32', parameter_dtype: str = 'float32', seed: int = 0,
          batching: Callable = batches.TrainBatches,
          train_subset: Callable[[TokenCache], TokenCache] | None = None,
          eval_subset: Callable[[TokenCache], TokenCache] | None = None,
          num_microbatches: int = 1, eval_batch_size: int | None = None,
          max_eval_examples: int | None = None, rank_labels: bool = True,
          loss: str = 'targets', metric: str | None = None, patience: int = 0,
          partitioner: Partitioner = Partitioner(), cache_dir: str | None = None,
          config_text: str | None = None, inspect: bool = True,
          steps: Callable[[loop.Training], Any] = loop.alone) -> Any:
  """Trains, evaluates and saves; resumes where MODEL_DIR left off.

  Args:
    task: a source of examples (`data.seqio_task.SeqioTask`, `data.text_file.TextFile`), or a
      `data.mixture.Mixture` of several.
    task_feature_lengths: {'inputs': n, 'targets': m}, the tokens kept of each, end included.
    initial_checkpoint_path: a bundled base's name or a checkpoint folder, or a base that has been
      read; None starts `network` from random weights (pretraining).
    method: a `training.methods` object: what trains.
    train_steps: 0 evaluates and saves what training would start from.
    eval_period, save_period, log_period: in steps; 0 is never, but for the last step.
    network, vocabulary (a SentencePiece file): needed where the checkpoint does not bring its own.
    batching: `batches.TrainBatches` (a row an example) or `packing.PackedBatches`.
    train_subset, eval_subset: parts of the splits (`data.subsets`); None is all.
    parameter_dtype: of the frozen base; what trains is float32. execution: how layers are run.
    num_microbatches: parts that a batch is gone through in, where memory is short.
    rank_labels: the most probable label is the answer; False decodes, as Lester et al. evaluate.
    loss: of 'targets' among all texts, of 'labels' among the task's (as WARP's is), or of 'both'.
    metric: chooses the best and, after `patience` evaluations without a better one, ends training;
      by default the task's first, or `loss`. config_text: kept as MODEL_DIR/config.gin.
    inspect: write MODEL_DIR/report.html as well (`analysis.html_report`).
    steps: takes the steps (`training.population` those of several runs together).

  Of several processes all compute, and the first one writes; MODEL_DIR is a folder that all reach.
  Returns MODEL_DIR/report.json, {} in others; raises ValueError for what does not fit, or on NaN.
  """
  schedule = loop.Schedule(train_steps, eval_period, save_period, log_period, patience)
  checks.arguments(task_feature_lengths, model_dir, dropout_rate, z_loss, label_smoothing, seed,
                   batch_size, num_microbatches, eval_batch_size, max_eval_examples)
  tasks = checks.data(mixture.as_mixture(task))
  base = load_base(initial_checkpoint_path, network, vocabulary, parameter_dtype, partitioner, seed,
                   execution)
  words, lengths = Vocabulary.of_base(base, '--gin.VOCABULARY'), dict(task_feature_lengths)
  opened = functools.partial(_caches, tasks, words, lengths, cache_dir)
  caches = opened('train_split', train_subset)
  choices = evaluate.choices(loss, caches, words, rank_labels)
  method = method.for_data(caches, base, words, seed)
  config = execution.applied(dataclasses.replace(
      base.config, dropout_rate=dropout_rate, dtype=activation_dtype), partitioner.mesh.size)
  model = method.model(config)
  virtual = batches.one_each(method.virtual_tokens(config.vocab_size), len(caches))
  checks.positions(config, caches, virtual)
  added = partitioner.replicate(method.initial(jax.random.key(seed), base, words))
  trainable, frozen = _split(base, added, method)
  base = dataclasses.replace(base, params=None)  # `frozen` and `trainable` hold all there is
  schedule = schedule if trainable else dataclasses.replace(schedule, train_steps=0)
  source = _source(batching, tasks, caches, batch_size, seed, virtual)
  predictor = Predictor(model, words, None, eval_batch_size or 2 * batch_size, lengths['targets'],
                        partitioner)
  evaluator = _evaluator(predictor, tasks, virtual, opened('eval_split', eval_subset), metric,
                         max_eval_examples, rank_labels) if eval_period else None
  optimizer = getattr(method, 'search', optimizer)  # which may take its place
  state = _place(train_state.create(trainable, optimizer), partitioner)
  described = _described(base, tasks, method, words, source, evaluator, lengths=lengths,
                         batch_size=batch_size, seed=seed, loss=loss, rank_labels=rank_labels)
  look = functools.partial(html_report.write_for_run, words, config.embedding) if inspect else None
  return steps(loop.Training(
      Recipe(model, optimizer, seed, z_loss, label_smoothing, num_microbatches, partitioner,
             choices),
      state, frozen, source.batch_at, functools.partial(
          _steps, state=state, frozen=frozen, described=described, model_dir=model_dir,
          config_text=config_text, look=look, schedule=schedule,
          saver=functools.partial(_saver, method, base, tasks, caches, evaluator),
          evaluator=evaluator, task=tasks.name, per_batch=source.examples_per_batch)))


def _steps(stop: Callable[[int], bool], *, state: train_state.TrainState, frozen: PyTree,
           described: Mapping[str, Any], model_dir: str, config_text: str | None, saver: Callable,
           evaluator: Callable | None, task: str, per_batch: float,
           schedule: loop.Schedule, look: Callable | None) -> loop.Steps:
  """A run with its files, as a generator of the steps it wants (`loop.Training`)."""
  mirror = cloud_storage.Mirror(model_dir)
  with (file_lock.only_writer(mirror.folder),
        contextlib.closing(TrainingStates(mirror.place / 'checkpoints')) as states):
    state, records = _restore(states, state, described)
    progress = Progress(mirror.folder, schedule.train_steps, int(state.step), config_text,
                        mirror.push) if processes.is_first() else Unwritten()
    with contextlib.closing(progress):
      state = yield from loop.train(
          state, stop, evaluate=evaluator and (lambda trained: evaluate.alike(
              evaluator(combined(trained, frozen)))),
          save=saver(records, mirror), states=states, progress=progress, records=records,
          schedule=schedule, task=task, per_batch=per_batch)
    if not processes.is_first():
      return {}
    progress.plot()
    made = _report(mirror, report.sizes(state, frozen), records, evaluator, int(state.step))
    if look:
      look(frozen, mirror.folder, _kept(mirror.folder, records))
      mirror.push()
    return made


def evaluate_ensemble(files: Mapping[str, str], folder: pathlib.Path, *, task: Any,
                      task_feature_lengths: Mapping[str, int], initial_checkpoint_path: str,
                      batch_size: int, network: Any = None, vocabulary: str | None = None,
                      activation_dtype: str = 'float32', parameter_dtype: str = 'float32',
                      eval_subset: Callable[[TokenCache], TokenCache] | None = None,
                      eval_batch_size: int | None = None, max_eval_examples: int | None = None,
                      rank_labels: bool = True, metric: str | None = None,
                      partitioner: Partitioner = Partitioner(), cache_dir: str | None = None,
                      **others: Any) -> dict[str, Any]:
  """Measures prompts {name: file} of one task, each and together; writes `folder`/ensemble.json.

  The arguments are those of `train`, as it trained them; `others` say how, which does not matter
  any more. Returns `ensemble.report`; raises ValueError for a mixture, or one without evaluation.
  """
  tasks = check_ensemble(task)
  base = load_base(initial_checkpoint_path, network, vocabulary, parameter_dtype, partitioner, 0)
  words, lengths = Vocabulary.of_base(base, '--gin.VOCABULARY'), dict(task_feature_lengths)
  bank = PromptBank(base, {name: prompt_file.load(path) for name, path in files.items()})
  caches = _caches(tasks, words, lengths, cache_dir, 'eval_split', eval_subset)
  config = dataclasses.replace(base.config, dtype=activation_dtype)
  predictor = Predictor(PromptedModel(config.network()), words, None,
                        eval_batch_size or 2 * batch_size, lengths['targets'], partitioner, bank)
  evaluator = evaluate.Evaluator(predictor, caches[0], metric, max_eval_examples, rank_labels)
  result = {'task': tasks.name, 'metric': evaluator.metric,
            **evaluator.ensemble(base.params, bank)[1]}
  report.write(folder, result, 'ensemble.json')
  return result


def check_ensemble(task: Any, eval_period: int = 1) -> mixture.Mixture:
  """The task as a mixture of one; ValueError where an ensemble's members cannot be compared."""
  tasks = checks.data(mixture.as_mixture(task))
  if len(tasks.tasks) != 1 or not tasks.tasks[0].eval_split or not eval_period:
    raise ValueError('An ensemble is of one task that has an evaluation split, with EVAL_PERIOD '
                     f'above 0, got {tasks.name}.')
  return tasks


def _source(batching: Callable, tasks: mixture.Mixture, caches: list[TokenCache], batch_size: int,
            seed: int, virtual: Any):
  """The training batches of the tasks, at the mixture's rates."""
  for cache in caches:
    evaluate.check_labelled(cache)
  rates = tasks.rate([cache.num_examples for cache in caches]) if len(caches) > 1 else None
  return batching(caches, batch_size=batch_size, seed=seed, virtual=virtual, rates=rates)


def _evaluator(predictor: Predictor, tasks: mixture.Mixture, virtual: Sequence[Any],
               caches: Sequence[TokenCache], *settings: Any) -> Any:
  """The evaluation, with a prompt of its own, of each task that has what to evaluate."""
  predictors = [predictor.placing(prompt) for task, prompt
                in zip(tasks.tasks, virtual, strict=True) if task.eval_split]
  return evaluate.evaluator(predictors, caches, *settings)


def _caches(tasks: mixture.Mixture, words: Vocabulary, lengths: Mapping[str, int],
            cache_dir: str | None, which: str, subset: Callable | None) -> list[TokenCache]:
  """The caches of the tasks' splits, or of parts of them; a task without that split has none."""
  with processes.first_before_others(which):
    caches = [token_cache.open_or_build(task, getattr(task, which), words, lengths, cache_dir)
              for task in tasks.tasks if getattr(task, which)]
  return [subset(cache) for cache in caches] if subset else caches


def load_base(path: str | Base | None, network: Any = None, vocabulary: str | None = None,
              dtype: str = 'float32', partitioner: Partitioner = Partitioner(),
              seed: int = 0, execution: Execution = Execution()) -> Base:
  """The base that these arguments of `train` say; one that has been read is it already."""
  if isinstance(path, Base):
    return path
  checks.parameter_dtype(dtype)
  processes.meet(partitioner.mesh)
  if path is not None:
    return base_checkpoint.load_base(path, config=network, vocabulary_file=vocabulary, dtype=dtype,
                                     sharding_for=partitioner.sharding_for(logical_axes),
                                     scan_layers=execution.scan_layers)
  if network is None or vocabulary is None:
    raise ValueError('Without INITIAL_CHECKPOINT_PATH training starts from random weights, which '
                     'needs a network (--gin_file=network/….gin) and a VOCABULARY file.')
  if dtype == 'int8':
    raise ValueError("PARAMETER_DTYPE='int8' is of a base that is read, and random weights are "
                     "none: take 'float32'.")
  network = dataclasses.replace(network, scan_layers=execution.scan_layers)
  return base_checkpoint.random_base(network, vocabulary, seed,
                                     partitioner.sharding_for(logical_axes))


def _described(base: Base, tasks: mixture.Mixture, method: Any, words: Vocabulary, source: Any,
               evaluator: Any, **settings: Any) -> dict[str, Any]:
  """What makes a run the same run, so that it may be resumed."""
  return {'base': base.fingerprint, 'task': tasks.name, 'method': methods.description(method),
          'vocabulary': words.sha256, 'batching': source.description,
          'metric': evaluator and evaluator.metric, 'evaluated': evaluator and evaluator.part,
          **settings}


def _split(base: Base, added: PyTree, method: Any) -> tuple[PyTree, PyTree]:
  """(what trains, in float32; what is frozen)."""
  trainable, frozen = param_paths.split(param_paths.merge(added, base.params), method.trainable)
  some, rest = param_paths.count(trainable), param_paths.count(frozen)
  logger.info('Training %s parameters, %.5f %% of %s (%s frozen).', f'{some:,}',
              100 * some / (some + rest), base.name, f'{rest:,}')
  jax.eval_shape(combined, trainable, frozen)  # tells what cannot be changed
  for path, leaf in param_paths.flatten(trainable).items():
    if isinstance(leaf, int8.Quantized):
      raise ValueError(f"PARAMETER_DTYPE='int8' is of frozen weights, but {path} trains: take "
                       "'float32' or 'bfloat16'.")
  # A copy: training donates these buffers.
  return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable), frozen


def _place(state: train_state.TrainState, partitioner: Partitioner) -> train_state.TrainState:
  """Leaves that have no place on the mesh yet (the prompt, counters) are replicated over it.

  A step's results have places; with a state that has none its first call would be compiled alone.
  """
  devices = set(partitioner.mesh.devices.flat)
  placed = lambda leaf: leaf.committed and leaf.sharding.device_set == devices
  return jax.tree.map(lambda leaf: leaf if placed(leaf) else partitioner.replicate(leaf), state)


def _restore(states: TrainingStates, state: train_state.TrainState, run: dict[str, Any]):
  restored = states.restore_latest(state)
  if restored is None:
    return state, loop.Records(run)
  state, records = restored[0], loop.Records(**restored[1])
  changed = [f'{name} was {records.run.get(name)!r} and is {value!r}'
             for name, value in run.items() if records.run.get(name) != value]
  if changed:
    raise ValueError(f'MODEL_DIR holds another run: {"; ".join(changed)}. Choose another folder.')
  logger.info('Resuming at step %d.', int(state.step))
  return state, records


def _saver(method, base: Base, tasks: mixture.Mixture, caches: Sequence[TokenCache], evaluator,
           records: loop.Records, mirror: cloud_storage.Mirror):
  """save(name, trained): writes the trained leaves and what they belong to."""
  folder = mirror.folder / 'prompts'
  for name in ('best', 'last') if processes.is_first() else ():
    atomic_write.recover(folder / name)
  labels = None
  if len(caches) == 1 and processes.is_first():
    labels = evaluator.labels if evaluator else evaluate.labels_of(caches[0].read_rows())

  def save(name: str, trained: PyTree) -> None:
    trained = processes.whole(trained)
    if not processes.is_first():
      return
    value, values, step = (
        (records.best_value, records.best_values, records.best_step) if name == 'best' else
        (records.last_value, records.last_values, records.last_step))
    # A correlation with answers that are all alike is not a number, and so is no metric.
    metric = lambda name, value: None if value is None or not math.isfinite(value) else {
        'name': name, 'value': value, 'step': step}
    about = {'task': tasks.name, 'labels': labels,
             'metric': metric(evaluator and evaluator.metric, value)}
    if len(tasks.tasks) > 1:  # Not all of them need be evaluated.
      of_tasks = {} if value is None else evaluator.of_tasks(values)
      about['tasks'] = {task: metric(*own) for task, own in of_tasks.items()}
    method.save(folder / name, trained, base, about)
    mirror.push()

  return save


def _kept(folder: pathlib.Path, records: loop.Records) -> pathlib.Path:
  """The best of what was saved, or the last where nothing was evaluated: a file or a folder."""
  name = 'last' if records.best_value is None else 'best'
  return next((folder / 'prompts').glob(f'{name}*'))


def _report(mirror: cloud_storage.Mirror, sizes: Mapping[str, Any], records: loop.Records,
            evaluator, steps: int) -> dict[str, Any]:
  """Writes and tells what the run cost and gave, all restarts together."""
  kept = _kept(mirror.folder, records)
  result = {
      'prompt': mirror.name(kept), 'metric': evaluator and evaluator.metric,
      'best_value': records.best_value, 'best_step': records.best_step, 'steps': steps,
      'stopped': records.stopped,
      'seconds_to_best': records.best_seconds, 'seconds': records.seconds,
      'saved_bytes': report.saved_bytes(kept), 'saved_parameters': report.saved_parameters(kept),
      **sizes, **report.peak_memory(), 'peak_bytes': records.peak_bytes}
  report.write(mirror.folder, result)
  mirror.push()
  if evaluator and records.best_value is not None:
    majority = evaluator.majority().get(evaluator.metric)
    against = '' if majority is None else f' (always the most frequent answer: {majority:.4g})'
    logger.info('Best %s %.4g at step %d, after %.0f s%s.', evaluator.metric, records.best_value,
                records.best_step, records.best_seconds, against)
  logger.info('%s parameters trained (%.5f %%), %s saved in %s bytes, at most %.2f GB in memory '
              '(of the %s), %.0f s.', f'{sizes["trainable_parameters"]:,}',
              sizes['trainable_percent'], f'{result["saved_parameters"]:,}',
              f'{result["saved_bytes"]:,}',
              result['peak_bytes'] / 1e9, result['peak_of'], records.seconds)
  logger.info('The trained prompt: %s', result['prompt'])
  return result

"""One training run, from what gin built to the files in MODEL_DIR."""

import dataclasses
import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from prompt_tuning_jax import param_paths
from prompt_tuning_jax.checkpoints import base_checkpoint
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.checkpoints.training_state import TrainingStates
from prompt_tuning_jax.data import batches, prefetch, token_cache
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.networks import t5
from prompt_tuning_jax.partitioning import Partitioner
from prompt_tuning_jax.predictor import Predictor
from prompt_tuning_jax.training import evaluate, loop
from prompt_tuning_jax.training import state as train_state
from prompt_tuning_jax.training.progress import Progress
from prompt_tuning_jax.training.step import make_train_step
from prompt_tuning_jax.types import PyTree

logger = logging.getLogger(__name__)


def train(task: Any, task_feature_lengths: Mapping[str, int], model_dir: str,
          initial_checkpoint_path: str | None, method: Any,
          optimizer: optax.GradientTransformation, train_steps: int, batch_size: int,
          eval_period: int = 1000, save_period: int = 1000, log_period: int = 50,
          network: t5.T5Config | None = None, vocabulary: str | None = None,
          dropout_rate: float = 0.1, z_loss: float = 1e-4, label_smoothing: float = 0.0,
          activation_dtype: str = 'float32', parameter_dtype: str = 'float32', seed: int = 0,
          eval_batch_size: int | None = None, max_eval_examples: int | None = None,
          metric: str | None = None, patience: int = 0,
          partitioner: Partitioner = Partitioner(), cache_dir: str | None = None
          ) -> dict[str, Any]:
  """Trains, evaluates and saves; resumes where MODEL_DIR left off.

  Args:
    task: a source of examples (`data.seqio_task.SeqioTask`, `data.text_file.TextFile`).
    task_feature_lengths: {'inputs': n, 'targets': m}, the tokens kept of each, end included.
    initial_checkpoint_path: a bundled base's name or a checkpoint folder; None starts `network`
      from random weights (pretraining).
    method: a `training.methods` object: what trains.
    eval_period, save_period, log_period: in steps; 0 is never. The last step does all.
    network: needed where the checkpoint does not describe its own.
    vocabulary: SentencePiece file, where the checkpoint does not bring its own.
    parameter_dtype: of the frozen base; what trains is float32.
    metric: the name of the metric, larger being better, that chooses the best and ends training
      early after `patience` evaluations without a better one. Default: the task's first; `loss`
      (smaller is better) where it has none.

  Returns:
    {'best_value', 'best_step', 'prompt' (path of the best), 'seconds'}.

  Raises:
    ValueError: something that was given does not fit, or the loss diverged.
  """
  began = time.monotonic()
  folder = pathlib.Path(model_dir).expanduser()
  folder.mkdir(parents=True, exist_ok=True)

  base = _base(initial_checkpoint_path, network, vocabulary, parameter_dtype, partitioner, seed)
  words = _vocabulary(base)
  config = dataclasses.replace(base.config, dropout_rate=dropout_rate, dtype=activation_dtype)
  model = method.model(config)
  virtual = method.virtual_tokens(config.vocab_size)
  added = method.initial(jax.random.key(seed), base.params, words)
  trainable, frozen = param_paths.split(param_paths.merge(added, base.params), method.trainable)
  trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), trainable)
  _report_size(trainable, frozen, base)

  lengths = dict(task_feature_lengths)
  train_cache = token_cache.open_or_build(task, task.train_split, words, lengths, cache_dir)
  source = batches.TrainBatches([train_cache], batch_size, seed, virtual,
                                process_index=jax.process_index(),
                                process_count=jax.process_count())
  evaluator = None
  if eval_period and task.eval_split:
    eval_cache = token_cache.open_or_build(task, task.eval_split, words, lengths, cache_dir)
    predictor = Predictor(model, words, virtual, eval_batch_size or 2 * batch_size,
                          lengths['targets'], partitioner)
    evaluator = evaluate.Evaluator(predictor, eval_cache, metric, max_eval_examples)

  states = TrainingStates(folder / 'checkpoints')
  state, records = _restore(states, train_state.create(trainable, optimizer), partitioner)
  progress = Progress(folder, train_steps, int(state.step))

  def save(name: str, trained: PyTree, **metric: Any) -> None:
    about = {'task': task.name, 'labels': evaluator and evaluator.labels, 'metric': metric or None}
    method.save(folder / 'prompts' / name, trained, base, about)

  def save_best(trained, step, value):
    save('best', trained, name=evaluator.metric, value=value, step=step)

  evaluate_now = evaluator and (lambda trained: evaluator(param_paths.merge(trained, frozen)))
  feed = prefetch.prefetch(lambda step: partitioner.put_batch(source.batch_at(step)),
                           start=int(state.step))
  step = make_train_step(model, optimizer, seed, z_loss, label_smoothing)
  schedule = loop.Schedule(train_steps, eval_period, save_period, log_period, patience)
  try:
    loop.train(state, frozen, feed, step, evaluate_now, save_best,
               lambda trained, at: save('last', trained), states, progress, records,
               schedule, task.name, batch_size)
  finally:
    feed.close()
    states.close()
    progress.plot()
    progress.close()
  return _summary(folder, records, evaluator, began)


def _base(path: str | None, network: t5.T5Config | None, vocabulary: str | None, dtype: str,
          partitioner: Partitioner, seed: int) -> Base:
  if path is not None:
    axes = {} if network is None else {
        name: spec.axes for name, spec in t5.parameter_specs(network).items()}
    return base_checkpoint.load_base(path, config=network, vocabulary_file=vocabulary, dtype=dtype,
                                     sharding_for=partitioner.sharding_for(axes))
  if network is None or vocabulary is None:
    raise ValueError('Without INITIAL_CHECKPOINT_PATH training starts from random weights, which '
                     'needs a network (--gin_file=network/….gin) and a VOCABULARY file.')
  return base_checkpoint.random_base(network, vocabulary, seed)


def _vocabulary(base: Base) -> Vocabulary:
  if base.vocabulary is None:
    raise ValueError(f'The base {base.name!r} brings no vocabulary: give its SentencePiece file '
                     'with --gin.VOCABULARY=FILE.')
  return Vocabulary(base.vocabulary.file, base.vocabulary.extra_ids)


def _report_size(trainable: PyTree, frozen: PyTree, base: Base) -> None:
  some, rest = param_paths.count(trainable), param_paths.count(frozen)
  logger.info('Training %s parameters, %.5f %% of %s (%s frozen).', f'{some:,}',
              100 * some / (some + rest), base.name, f'{rest:,}')


def _restore(states: TrainingStates, state, partitioner: Partitioner):
  state = jax.device_put(state, partitioner.replicated)
  restored = states.restore_latest(state)
  if restored is None:
    return state, loop.Records()
  state, records = restored
  logger.info('Resuming at step %d.', int(state.step))
  return state, loop.Records(**records)


def _summary(folder: pathlib.Path, records: loop.Records, evaluator, began: float) -> dict:
  prompts = folder / 'prompts'
  best = sorted(prompts.glob('best*')) or sorted(prompts.glob('last*'))
  result = {'best_value': records.best_value, 'best_step': records.best_step,
            'prompt': str(best[0]), 'seconds': time.monotonic() - began}
  if records.best_value is not None:
    majority = evaluator.majority()
    against = '' if majority is None else f' (the majority class alone: {majority:.4g})'
    logger.info('Best %s %.4g at step %d%s.', evaluator.metric, np.abs(records.best_value),
                records.best_step, against)
  logger.info('Done in %.0f s. The trained prompt: %s', result['seconds'], result['prompt'])
  return result

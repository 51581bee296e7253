"""Our networks and prompts as parts of `t5x.train`, `t5x.eval` and `t5x.infer` (gin/t5x).

A run under T5X has a base and what is added to it (`prompt/…`, `prefix/…`, `adapter/…`). The base
is restored from its checkpoint by T5X, and every leaf of it must be there; what is added starts
from a method or a prompt file, trains alone, and is written as a prompt file at every save.

T5X is extended by inheritance. It is not on PyPI: the extra `t5x` names the sources to take.
"""

import dataclasses
import functools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import clu.data
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import seqio
import t5x.partitioning
import tensorflow as tf
from etils import epath
from t5x import decoding, models, optimizers, state_utils, trainer, utils

from prompt_tuning_jax import cloud_storage, param_paths, partitioning, prompt_bank
from prompt_tuning_jax.checkpoints import base_checkpoint, processes, prompt_file, t5x_legacy
from prompt_tuning_jax.checkpoints.base_checkpoint import Base
from prompt_tuning_jax.data import batches, seqio_builder, token_cache
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.data.vocabulary import Vocabulary
from prompt_tuning_jax.prompted_model import PromptedModel
from prompt_tuning_jax.prompts.virtual_tokens import VirtualTokens
from prompt_tuning_jax.types import Array, PyTree

logger = logging.getLogger(__name__)

ADDED = ('prompt', 'prefix', 'adapter')  # what `PromptedModel` has beside the network
Parts = tuple[dict[str, Any], VirtualTokens | None, PyTree]  # modules, ids of the prompt, leaves
CACHE = pathlib.Path('~/.cache/prompt_tuning_jax/t5x')


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """(what is added, the base) of a parameter tree."""
  added = {name: params[name] for name in params if name in ADDED}
  return added, {name: params[name] for name in params if name not in ADDED}


@functools.lru_cache(maxsize=4)
def open_base(base: str, network: Any = None, vocabulary: str | None = None) -> Base:
  """The base and its vocabulary, its leaves still in the checkpoint; ValueError if not for T5X."""
  opened = base_checkpoint.open_base(base, config=network, vocabulary_file=vocabulary)
  words = Vocabulary.of_base(opened, '--gin.VOCABULARY, in quotes, or --gin_file=vocabulary/t5.gin')
  if any(map(words.begins, ('inputs', 'targets'))) or opened.config.is_masked_lm:
    raise ValueError("Under T5X bases are T5s and decoder-only networks, without BART's or BERT's "
                     f'vocabulary: {base} is for our own trainer, prompt_tuning_jax.train.')
  return opened


def t5x_folder(base: str) -> str:
  """A T5X checkpoint as it is; another base ('mini', a Hugging Face folder) as one, written once.

  T5X counts steps from the N of `checkpoint_N`; what is written here has step 0.
  """
  if t5x_legacy.is_folder(base):
    return base
  opened = base_checkpoint.open_base(base)
  folder = CACHE.expanduser() / f'{opened.name}-{opened.fingerprint[:16]}' / 'checkpoint_0'
  with processes.first_before_others('t5x_folder'):
    if not folder.is_dir():
      t5x_legacy.write(folder, base_checkpoint.load_base(base, dtype=None).params)
  return os.fspath(folder)


def own_steps(train_steps: int, base: str) -> int:
  """The steps of a run itself: T5X's TRAIN_STEPS counts those of the base before it too."""
  number = re.search(r'checkpoint_(\d+)/?$', t5x_folder(base))
  steps = train_steps - (int(number[1]) if number else 0)
  if steps < 1:
    raise ValueError(f'TRAIN_STEPS counts those of {base} too, and {train_steps} are no more.')
  return steps


def task(name: str, base: str, network: Any = None, vocabulary: str | None = None,
         module: str | None = None) -> str:
  """Registers our tasks and those of `module`; this task or mixture gets the base's vocabulary.

  Returns its name; raises ValueError for a name, module or data that is not there.
  """
  words = Vocabulary.of_base(open_base(base, network, vocabulary)).as_seqio()
  asked = SeqioTask(name, (module,) if module else ())
  asked.key_parts(asked.train_split)
  seqio_builder.import_tasks(asked.modules)
  for each in seqio.get_subtasks(seqio_builder.find(name)):
    for key, feature in each.output_features.items():
      each.output_features[key] = dataclasses.replace(feature, vocabulary=words)
  return name


class FeatureConverter(seqio.EncDecFeatureConverter):
  """SeqIO's encoder-decoder batches with the prompt's ids in every input.

  TASK_FEATURE_LENGTHS is without the prompt, encoder inputs are longer by it. In packed rows each
  example has the prompt.
  """

  def __init__(self, *args, virtual: VirtualTokens | None = None, **kwargs):
    super().__init__(*args, **kwargs)
    self._virtual = virtual

  def _with_prompt(self, lengths: Mapping[str, int]) -> dict[str, int]:
    longer = self._virtual.length if self._virtual else 0
    return {**lengths, 'inputs': lengths['inputs'] + longer}

  def _place(self, row: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    tokens = row['inputs']
    length = tf.size(tokens)
    at = {'before': 0, 'after_first': tf.minimum(1, length), 'infix': length // 2,
          'end': length}[self._virtual.placement]
    return {**row, 'inputs': tf.concat([tokens[:at], self._virtual.ids, tokens[at:]], axis=0)}

  def _convert_features(self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]):
    if self._virtual:
      ds = ds.map(self._place, num_parallel_calls=tf.data.AUTOTUNE)
    return super()._convert_features(ds, self._with_prompt(task_feature_lengths))

  def get_model_feature_lengths(self, task_feature_lengths: Mapping[str, int]):
    return super().get_model_feature_lengths(self._with_prompt(task_feature_lengths))


class Module(PromptedModel):
  """A prompted network whose encoded inputs are one array, examples first, as T5X's beams take it.

  Of a T5 they are that. A decoder-only network's are its layers' keys and values: [B, L, 2, N, H,
  T]. T5X's own decoder-only models have inputs and targets in one row; ours are driven as an
  encoder-decoder, whose methods and batches they have.
  """

  def encode(self, *args, **kwargs) -> Array:
    """As the network's `encode`, but for the form of the result."""
    encoded = super().encode(*args, **kwargs)
    if isinstance(encoded, list):
      encoded = jnp.stack([jnp.stack([keys, values.swapaxes(-1, -2)], axis=1)
                           for keys, values in encoded], axis=1)
    return encoded

  def decode(self, encoded: Array, *args, **kwargs) -> Array:
    """As the network's `decode`, of what `encode` returns."""
    if encoded.ndim == 6:
      encoded = [(encoded[:, i, 0], encoded[:, i, 1].swapaxes(-1, -2))
                 for i in range(encoded.shape[1])]
    return super().decode(encoded, *args, **kwargs)


class Model(models.EncoderDecoderModel):
  """T5X's model of a frozen base and what is added to it, which starts as `added` (leaves)."""

  def __init__(self, *args, added: PyTree, **kwargs):
    super().__init__(*args, **kwargs)
    self._added = added

  def get_initial_variables(self, rng, input_shapes, input_types=None):
    """Random weights of the network, for their shapes, with the leaves that are added."""
    del input_types  # `t5x.eval` gives none, and T5X takes tokens for floats then.
    variables = flax.core.unfreeze(super().get_initial_variables(
        rng, input_shapes, dict.fromkeys(input_shapes, jnp.int32)))
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    own = split(variables['params'])[0]
    if shapes(own) != shapes(self._added):
      raise ValueError(f'The initial leaves should be {shapes(own)}, got {shapes(self._added)}.')
    variables['params'].update(jax.tree.map(jnp.asarray, self._added))
    return flax.core.freeze(variables)

  def loss_fn(self, params, batch, dropout_rng):
    """T5X's, of which the base is no variable."""
    added, base = split(params)
    return super().loss_fn({**added, **jax.lax.stop_gradient(base)}, batch, dropout_rng)


class Optimizer(optimizers.OptaxWrapper):
  """An optax optimizer that sees what is added and nothing else; the base is passed through."""

  def init_state(self, params):
    return optimizers.OptimizerState(0, self.optax_optimizer.init(split(params)[0]))

  def apply_gradient(self, hyper_params, params, state, grads):
    del hyper_params  # Schedules are optax's.
    added, base = split(params)
    updates, kept = self.optax_optimizer.update(split(grads)[0], state.param_states, added)
    params = flax.core.freeze({**optax.apply_updates(added, updates), **base})
    return params, optimizers.OptimizerState(state.step + 1, kept)

  def derive_logical_axes(self, optimizer, param_logical_axes):
    """What is kept of a few rows is whole on every device; T5X's rules know no Adafactor."""
    axes = jax.tree.map(lambda leaf: None, optimizer.state_dict())
    axes['target'] = param_logical_axes
    return optimizer.restore_state(flax.core.unfreeze(axes))


class Partitioner(t5x.partitioning.PjitPartitioner):
  """T5X's on our mesh: its own has all devices of a CPU along `model`, and knows TPUs up to v4."""

  @functools.cached_property
  def mesh(self) -> jax.sharding.Mesh:
    return partitioning.Partitioner(self._num_partitions).mesh


def model(base: str, method: Any = None, optimizer: optax.GradientTransformation | None = None,
          prompt: str | None = None, network: Any = None, vocabulary: str | None = None,
          dropout_rate: float = 0.0, dtype: str = 'float32', remat_policy: str = 'none',
          z_loss: float = 0.0, label_smoothing: float = 0.0,
          decode_fn: Callable = decoding.beam_search, num_decodes: int = 1,
          seed: int = 0) -> Model:
  """What `MODEL` is: a base with a method's prompt or prefix to train, or with a prompt file.

  Args:
    base, network, vocabulary: as `prompt_tuning_jax.train` takes them.
    method, optimizer: what trains; it starts as in `prompt_tuning_jax.train` from this `seed`.
    prompt: a prompt file, a .npy prompt or a PEFT folder; None is the base alone.
    dtype, remat_policy: of activations, and what is kept of them (`networks.layer_stack`).
    decode_fn, num_decodes: T5X's, and how many beams or samples it follows.
  """
  opened = open_base(base, network, vocabulary)
  config = dataclasses.replace(opened.config, dropout_rate=dropout_rate, dtype=dtype,
                               remat_policy=remat_policy)
  modules, virtual, added = (
      _of_method(method, opened, config, seed) if method is not None else
      _of_file(prompt, opened, config) if prompt else ({}, None, {}))
  words = Vocabulary.of_base(opened).as_seqio()
  return Model(
      Module(config.network(), **modules), words, words,
      Optimizer(optimizer or optax.set_to_zero()), decode_fn=decode_fn,
      feature_converter_cls=functools.partial(FeatureConverter, virtual=virtual), z_loss=z_loss,
      label_smoothing=label_smoothing, loss_normalizing_factor='NUM_REAL_TARGET_TOKENS',
      added=added, default_decoder_params=models.DecoderParams(num_decodes=num_decodes))


def _of_method(method: Any, base: Base, config: Any, seed: int) -> Parts:
  """(modules, the prompt's ids, initial leaves) of what a method adds."""
  virtual = method.virtual_tokens(config.vocab_size)
  if (any(pattern.split('/')[0] not in ADDED for pattern in method.trainable)
      or not isinstance(virtual, VirtualTokens | None)):
    raise ValueError(f'{type(method).__name__} changes weights of the base or is of several tasks: '
                     'under T5X a prompt, a prefix or adapters train. Use prompt_tuning_jax.train.')
  made = method.model(config)
  modules = {name: getattr(made, name) for name in ADDED}
  return modules, virtual, method.initial(jax.random.key(seed), base, Vocabulary.of_base(base))


def _of_file(path: str, base: Base, config: Any) -> Parts:
  """(modules, the prompt's ids, leaves) of a prompt file."""
  file = prompt_file.load(path)
  prompt_file.check(file, base)
  modules, virtual = prompt_bank.parts(file, config)
  leaves = param_paths.unflatten(file.params)
  if split(leaves)[1]:
    raise ValueError(f'{path} changes weights of the base: use prompt_tuning_jax.infer.')
  return modules, virtual, leaves


def from_base(stored: PyTree, state: PyTree, *, is_resuming: bool = False) -> PyTree:
  """The base's leaves and step of a checkpoint: a `RestoreCheckpointConfig` transformation.

  T5X fills what is missing with random weights (`fallback_to_scratch`), which is meant for what is
  added. Raises ValueError naming the base's leaves that are missing, or leaves that are not its.
  """
  if is_resuming:
    return stored
  found = state_utils.flatten_state_dict(stored)
  wanted = {path for path in state_utils.flatten_state_dict(state) if path.startswith('target/')
            and path.split('/')[1] not in ADDED}
  have = {path for path in found if path.startswith('target/')}
  named = lambda paths: ', '.join(path.removeprefix('target/') for path in sorted(paths))
  problems = [f'{what}: {named(paths)}' for what, paths in (
      ('missing', wanted - have), ('not known', have - wanted)) if paths]
  if problems:
    raise ValueError(f'The checkpoint does not hold the base. {"; ".join(problems)}. Give the base '
                     'here, and a prompt as PROMPT_FILE.')
  return param_paths.unflatten({path: found[path] for path in wanted | {'state/step'}})


@dataclasses.dataclass(frozen=True)
class PromptFiles:
  """Writes MODEL_DIR/prompts/last.safetensors: a `SaveCheckpointConfig` transformation.

  T5X gives it all that it is about to save, which stays as it is. The other arguments are those
  of `model` and `task`.
  """

  model_dir: str
  method: Any
  task: str
  base: str
  network: Any = None
  vocabulary: str | None = None

  def __call__(self, state: PyTree, infos: PyTree) -> tuple[PyTree, PyTree]:
    step = int(utils.get_local_data(state['state']['step']))
    added = processes.whole(split(state['target'])[0])
    if processes.is_first():
      base = open_base(self.base, self.network, self.vocabulary)
      # A mixture has no postprocessor; that of our classification tasks is a partial.
      postprocessor = getattr(seqio_builder.find(self.task), 'postprocessor', None)
      labels = getattr(postprocessor, 'keywords', {}).get('label_classes')
      mirror = cloud_storage.Mirror(f'{self.model_dir}/prompts')
      self.method.save(mirror.folder / 'last', added, base, {
          'task': self.task, 'labels': labels, 'metric': None, 'step': step})
      mirror.push()
    return state, infos


class BestPrompt(trainer.BaseAction):
  """Keeps the best of the prompts that were saved as MODEL_DIR/prompts/best.safetensors.

  An action of INFER_EVAL and TRAIN_EVAL. `metric` is one of the task's, by default its first, or
  'loss', for which less is better; of a mixture it is the mean over tasks.
  """

  def __init__(self, model_dir: str, metric: str | None = None):
    self._folder, self._metric = f'{model_dir}/prompts', metric

  def run(self, train_state, metrics_by_task) -> bool:
    name, value = self._measured(metrics_by_task)
    if value is None:
      return False  # and never True, which would end the training
    mirror, step = cloud_storage.Mirror(self._folder), int(utils.get_local_data(train_state.step))
    last, best = (mirror.folder / f'{which}.safetensors' for which in ('last', 'best'))
    prompt = prompt_file.load(last) if last.exists() else None
    if prompt is None or prompt.metadata.get('step') != step:
      logger.warning('Step %d was evaluated, but not saved, so it cannot be the best: let '
                     'EVAL_PERIOD be a multiple of SAVE_PERIOD.', step)
      return False
    before = prompt_file.load(best).metadata['metric'] if best.exists() else None
    sign = -1 if name == 'loss' else 1
    if before is None or before['name'] != name or sign * value > sign * before['value']:
      metric = {'name': name, 'value': value, 'step': step}
      prompt_file.save(best, dataclasses.replace(
          prompt, metadata={**prompt.metadata, 'metric': metric}))
      mirror.push()
    return False

  def _measured(self, by_task: Mapping[str, Mapping[str, Any]]) -> tuple[str, float | None]:
    """The metric and its value; None where these are not the metrics that it is one of."""
    of = [{name: value for name, value in each.items() if isinstance(value, float | int | np.number)
           or name == self._metric == 'loss'} for each in by_task.values()]
    name = self._metric or next((name for each in of for name in each), '')
    values = [float(getattr(each[name], 'value', each[name])) for each in of if name in each]
    return name, float(np.mean(values)) if values else None


class CachedBatches(clu.data.DatasetIterator):
  """The batches of our own trainer in its order; a state is the number of the next step."""

  def __init__(self, source: batches.TrainBatches):
    self._source, self._step = source, 0

  def __next__(self) -> dict[str, np.ndarray]:
    self._step += 1
    return self._source.batch_at(self._step - 1)

  @property
  def element_spec(self) -> dict[str, clu.data.ArraySpec]:
    return jax.tree.map(lambda array: clu.data.ArraySpec(array.dtype, array.shape),
                        self._source.batch_at(0))

  def reset(self) -> None:
    self._step = 0

  def save(self, filename: os.PathLike) -> None:
    epath.Path(filename).write_text(str(self._step))

  def restore(self, filename: os.PathLike) -> None:
    self._step = int(epath.Path(filename).read_text())


def cached_batches(cfg: utils.DatasetConfig, shard_id: int, num_shards: int,
                   feature_converter_cls: functools.partial, *, base: str, network: Any = None,
                   vocabulary: str | None = None) -> CachedBatches:
  """`get_dataset_fn` of training from our token cache, as `batching/fixed.gin` makes batches.

  Split, lengths, size and seed are those of `cfg`; SeqIO runs once, in a process of its own.
  """
  words = Vocabulary.of_base(open_base(base, network, vocabulary))
  cache = token_cache.open_or_build(SeqioTask(cfg.mixture_or_task_name), cfg.split, words,
                                    cfg.task_feature_lengths)
  return CachedBatches(batches.TrainBatches(
      cache, cfg.batch_size, cfg.seed or 0, feature_converter_cls.keywords['virtual'],
      batches.Buckets((), ()), process_index=shard_id, process_count=num_shards))

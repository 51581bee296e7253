"""Adds a task of T5's text-to-text form: rows of a data source -> texts -> tokens with EOS."""

from collections.abc import Callable, Iterable

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks.features import FEATURES


def register(names: Iterable[str], source: seqio.DataSource,
             to_text: Callable[[tf.data.Dataset], tf.data.Dataset], metrics: Iterable[Callable],
             postprocess_fn: Callable | None = None) -> None:
  """Adds a task under each of `names`.

  Args:
    to_text: a dataset of the source's rows -> one of {'inputs', 'targets'} (scalar strings). With
      'choices' ([C] strings) evaluation ranks these texts instead of generating; whatever else it
      gives is kept for the postprocessor.
    metrics: functions (targets, predictions) -> {name: percent}, in a module without TensorFlow.
    postprocess_fn: (text, *, example, is_target, …) -> what the metrics compare; likewise.
  """
  for name in names:
    seqio.TaskRegistry.add(
        name, source=source, output_features=FEATURES, metric_fns=list(metrics),
        postprocess_fn=postprocess_fn,
        preprocessors=[to_text, seqio.preprocessors.tokenize,
                       seqio.preprocessors.append_eos_after_trim])

"""Text from tables and triples: E2E, WebNLG and DART, in a line as Li & Liang (2021) write them.

Attributes are `name : The Eagle | food : Chinese`, triples `subject : predicate : object | …`, with
predicates in lower case for DART. Unlike theirs, attributes and values have the data set's names
(not `Type` for `eatType`), and nothing stands before the first triple. Training has an example for
each reference, evaluation one for each input, measured by BLEU with all its references, or the
first three for WebNLG and DART. TFDS's E2E and DART have a row for each reference: those of one
table are put together. `dart_grouped` has the triple sets as DART counts them, some more than once.
"""

import functools

import tensorflow as tf

from prompt_tuning_jax.tasks import references, text_metrics, text_to_text

TFDS_DATASETS = {
    'e2e_nlg': ['e2e_nlg:1.0.0'],
    'e2e_cleaned': ['e2e_cleaned:0.1.0'],
    'web_nlg': ['web_nlg_2017:1.0.0'],
    'dart': ['dart:0.1.0'],
    'dart_grouped': ['local_nlg/dart:1.0.0'],
}
WEB_NLG_SPLITS = {'train': 'train', 'validation': 'validation', 'test': 'test_seen+test_unseen',
                  'test_seen': 'test_seen', 'test_unseen': 'test_unseen'}
THREE = functools.partial(text_metrics.references, most=3)
Example = dict[str, tf.Tensor]


def meaning_representation(row: Example) -> Example:
  """E2E's `name[The Eagle], food[Chinese]`."""
  text = row['meaning_representation']
  for pattern, new in ((r'\], ', ' | '), (r'\[', ' : '), (r'\]$', '')):
    text = tf.strings.regex_replace(text, pattern, new)
  return {'inputs': text, 'references': row['references']}


def attribute_table(row: Example) -> Example:
  """A table of one row: headers are attributes, contents their values."""
  table = row['input_text']['table']
  pairs = tf.strings.join([table['column_header'], table['content']], separator=' : ')
  return {'inputs': tf.strings.reduce_join(pairs, separator=' | '),
          'references': row['target_text'][None]}


def triple_table(row: Example) -> Example:
  """A table whose rows are triples, three cells each."""
  triples = tf.reshape(row['input_text']['table']['content'], [-1, 3])
  return {'inputs': _dart(triples), 'references': row['target_text'][None]}


def triple_text(row: Example) -> Example:
  """`subject | predicate | object && subject | …`, in WebNLG's words."""
  return {'inputs': _join(_triples(row)), 'references': row['targets']}


def dart_triple_text(row: Example) -> Example:
  """The same in DART's words."""
  return {'inputs': _dart(_triples(row)), 'references': row['targets']}


def _triples(row: Example) -> tf.Tensor:
  """[N, 3] of a row's text."""
  cells = tf.strings.split(tf.strings.split(row['input_text'], ' && '), ' | ')
  return tf.reshape(cells.flat_values, [-1, 3])


def _dart(triples: tf.Tensor) -> tf.Tensor:
  subjects, predicates, objects = tf.unstack(triples, axis=1)
  return _join(tf.stack([subjects, tf.strings.lower(predicates, 'utf-8'), objects], axis=1))


def _join(triples: tf.Tensor) -> tf.Tensor:
  return tf.strings.reduce_join(tf.strings.reduce_join(triples, 1, separator=' : '),
                                separator=' | ')


for name, to_example, postprocess, options in (
    ('e2e_nlg', meaning_representation, text_metrics.references, {}),
    ('e2e_cleaned', attribute_table, text_metrics.references, {'merge': True}),
    ('web_nlg', triple_text, THREE, {'splits': WEB_NLG_SPLITS}),
    ('dart', triple_table, THREE, {'merge': True}),
    ('dart_grouped', dart_triple_text, THREE,
     {'splits': {'validation': 'validation', 'test': 'test'}}),
):
  text_to_text.register(
      (name,), references.source(*TFDS_DATASETS[name], to_example, **options),
      references.first_as_target, (text_metrics.bleu,), postprocess)

"""Reading comprehension: SQuAD 1.1 and, to evaluate on other domains, `qa_…` and `mrqa_…`.

Inputs are `question: … context: …` in T5's order, without the task's name. The target is the first
answer; all answers are references. As in T5, punctuation has spaces around it in questions,
contexts and answers (`1 , 200`), and scores are those of such texts.

`squad` has train and validation. The MRQA 2019 sets (Fisch et al. 2019) and most local ones have
only test: evaluate with `--task=NAME --split=test`. `qa_subjqa_*` also have validation and, but for
books and movies, train.
"""

import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import references, text_metrics, text_to_text

TFDS_DATASETS = {
    'squad': ['squad/v1.1:3.0.0'],
    'qa_amazon': ['local_qa/amazon:1.0.0'],
    'qa_bioasq_factoid': ['local_qa/bioasq_factoid:1.0.0'],
    'qa_covidqa': ['local_qa/covidqa:1.0.0'],
    'qa_drop_contrast': ['local_qa/drop_contrast:1.0.0'],
    'qa_new_wiki': ['local_qa/new_wiki:1.0.0'],
    'qa_nq_qed': ['local_qa/nq_qed:1.0.0'],
    'qa_quoref_contrast': ['local_qa/quoref_contrast:1.0.0'],
    'qa_quoref_original': ['local_qa/quoref_original:1.0.0'],
    'qa_ropes_contrast': ['local_qa/ropes_contrast:1.0.0'],
    'qa_ropes_original': ['local_qa/ropes_original:1.0.0'],
    'qa_subjqa_books': ['local_qa/subjqa_books:1.0.0'],
    'qa_subjqa_electronics': ['local_qa/subjqa_electronics:1.0.0'],
    'qa_subjqa_grocery': ['local_qa/subjqa_grocery:1.0.0'],
    'qa_subjqa_movies': ['local_qa/subjqa_movies:1.0.0'],
    'qa_subjqa_restaurants': ['local_qa/subjqa_restaurants:1.0.0'],
    'qa_subjqa_tripadvisor': ['local_qa/subjqa_tripadvisor:1.0.0'],
    'mrqa_bio_asq': ['mrqa/bio_asq:1.0.0'],
    'mrqa_drop': ['mrqa/drop:1.0.0'],
    'mrqa_duo_rc': ['mrqa/duo_rc:1.0.0'],
    'mrqa_race': ['mrqa/race:1.0.0'],
    'mrqa_relation_extraction': ['mrqa/relation_extraction:1.0.0'],
    'mrqa_textbook_qa': ['mrqa/textbook_qa:1.0.0'],
}


# A letter's accents (\p{M}) belong to it. RE2's \s is ASCII.
PUNCTUATION, SPACES = r'([^_\s\p{N}\p{L}\p{M}])', r'\s+'


def squad(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """SQuAD's rows {'question', 'context', 'answers': {'text' [A]}, 'id'} -> texts."""
  return _texts(dataset, lambda row: (row['answers']['text'], row['id']))


def mrqa(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """MRQA's rows {'question', 'context', 'answers' [A], 'qid'} -> texts."""
  return _texts(dataset, lambda row: (row['answers'], row['qid']))


def parted(text: tf.Tensor) -> tf.Tensor:
  """Texts of any shape with a space on both sides of each sign, and spaces in a row made one."""
  return tf.strings.regex_replace(
      tf.strings.regex_replace(text, PUNCTUATION, r' \1 '), SPACES, ' ')


def _texts(dataset: tf.data.Dataset, answers_and_id) -> tf.data.Dataset:
  def to_text(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    answers, identity = answers_and_id(row)
    words = ['question:', parted(row['question']), 'context:', parted(row['context'])]
    inputs = tf.strings.regex_replace(tf.strings.join(words, separator=' '), SPACES, ' ')
    return {'inputs': inputs, 'references': parted(answers), 'id': identity}

  return references.first_as_target(
      dataset.map(to_text, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True))


for name, datasets in TFDS_DATASETS.items():
  text_to_text.register(
      (name,), seqio.TfdsDataSource(*datasets), mrqa if name.startswith('mrqa') else squad,
      (text_metrics.squad,), text_metrics.references)

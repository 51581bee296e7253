"""SeqIO preprocessors of pretraining objectives: {'text'} -> {'inputs', 'targets'}, EOS included.

Texts are tokenised, joined end to end and cut into blocks, so that lengths are full. Prefix LM
alone joins none, as in T5: each text is cut on its own, and its last block is shorter. The noise of
an example is always the same: it depends on the texts of its group and on `seed`, so that groups
can be made in any order and in different processes. (`batching/fresh_noise.gin` draws other spans.)
"""

import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import seqio
import tensorflow as tf

from prompt_tuning_jax.tasks import denoising, noise

TEXTS_PER_GROUP = 1024  # Of joined texts, only a group's last block is shorter than the others.
NUM_SPECIAL = 3  # Padding, EOS and the unknown piece stand before a vocabulary's pieces.


def span_corruption(dataset: tf.data.Dataset, sequence_length: Mapping[str, int],
                    output_features: Mapping[str, seqio.Feature], seed: int = 0,
                    noise_density: float = noise.NOISE_DENSITY,
                    mean_span_length: float = noise.MEAN_SPAN_LENGTH,
                    target_sentinels: bool = True) -> tf.data.Dataset:
  """Spans replaced with sentinels; targets are the spans, each behind its sentinel or without."""
  vocabulary = output_features['inputs'].vocabulary
  inputs, targets = sequence_length['inputs'], sequence_length['targets']
  length = noise.raw_length(inputs, targets, noise_density, mean_span_length, target_sentinels)
  _, spans = noise.noise_counts(length, noise_density, mean_span_length)
  if spans > vocabulary.extra_ids:
    raise ValueError(f'Inputs of {inputs} tokens have {spans} spans, the vocabulary only '
                     f'{vocabulary.extra_ids} sentinels: shorten the inputs or lengthen the spans.')

  def corrupt(block: np.ndarray, starts: np.ndarray, rng: np.random.Generator):
    eos = vocabulary.eos_id
    mask = noise.span_mask(*block.shape, rng, noise_density, mean_span_length)
    sides = noise.span_corruption(block, mask, vocabulary.vocab_size - 1, eos)
    return sides if target_sentinels else (sides[0], noise.noise_tokens(block, mask, eos))

  return _map_blocks(dataset, vocabulary, length, {'inputs': inputs, 'targets': targets}, corrupt,
                     seed, shortest=2)


def prefix_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int],
              output_features: Mapping[str, seqio.Feature], seed: int = 0) -> tf.data.Dataset:
  """A text, or each block of a long one, split at a random place.

  No block has tokens of two texts. A text's rest of one token cannot be split and is dropped.
  """
  lengths = {key: sequence_length[key] for key in ('inputs', 'targets')}
  length = noise.prefix_raw_length(*lengths.values())
  vocabulary = output_features['inputs'].vocabulary

  def split(block: np.ndarray, starts: np.ndarray, rng: np.random.Generator):
    points = noise.prefix_split_points(*block.shape, *lengths.values(), rng)
    return noise.split_at(block, points, vocabulary.eos_id)

  return _map_blocks(dataset, vocabulary, length, lengths, split, seed, shortest=2, join=False)


def language_model(dataset: tf.data.Dataset, sequence_length: Mapping[str, int],
                   output_features: Mapping[str, seqio.Feature], seed: int = 0) -> tf.data.Dataset:
  """{'text'} -> {'targets'}: all of a text from left to right, and no inputs."""
  lengths = {'targets': sequence_length['targets']}
  vocabulary = output_features['targets'].vocabulary
  whole = lambda block, starts, rng: (noise.with_eos(block, vocabulary.eos_id),)
  return _map_blocks(dataset, vocabulary, _whole_length(lengths), lengths, whole, seed)


def masked_lm(dataset: tf.data.Dataset, sequence_length: Mapping[str, int],
              output_features: Mapping[str, seqio.Feature], seed: int = 0) -> tf.data.Dataset:
  """BERT's masked text; the target is the whole original text.

  This is the text-to-text form of the objective (Raffel et al. 2020, table 3, "BERT-style"), with
  BERT's 80 / 10 / 10 % of masks, random and unchanged tokens. Inputs and targets have the same
  length, token by token. `masked_tokens` is what a BERT itself takes.
  """
  lengths = {key: sequence_length[key] for key in ('inputs', 'targets')}
  vocabulary = output_features['inputs'].vocabulary
  mask_id, pieces = _mask_id(vocabulary), vocabulary.vocab_size - vocabulary.extra_ids

  def corrupt(block: np.ndarray, starts: np.ndarray, rng: np.random.Generator):
    masked = denoising.masked_tokens(block, rng, mask_id, (NUM_SPECIAL, pieces))
    return noise.with_eos(masked, vocabulary.eos_id), noise.with_eos(block, vocabulary.eos_id)

  return _map_blocks(dataset, vocabulary, _whole_length(lengths), lengths, corrupt, seed)


def masked_tokens(dataset: tf.data.Dataset, sequence_length: Mapping[str, int],
                  output_features: Mapping[str, seqio.Feature], seed: int = 0) -> tf.data.Dataset:
  """BERT's objective for a masked language model: the targets are what stands under the masks.

  15 % of the tokens are chosen, and all of them masked: a loss stands where a mask does, so that
  random and unchanged tokens (10 % each in BERT) would have none. In BERT's own ablation this does
  as well for fine-tuning (Devlin et al. 2019, appendix C.2: MNLI 84.3 against 84.2).
  """
  lengths = {key: sequence_length[key] for key in ('inputs', 'targets')}
  vocabulary = output_features['inputs'].vocabulary
  mask_id, eos = _mask_id(vocabulary), vocabulary.eos_id
  length = _whole_length({'inputs': lengths['inputs']})
  while denoising.num_chosen(length) > lengths['targets'] - 1:
    length -= 1

  def corrupt(block: np.ndarray, starts: np.ndarray, rng: np.random.Generator):
    chosen = denoising.chosen_tokens(block.shape, rng)
    targets = block[chosen].reshape(len(block), -1)
    return noise.with_eos(np.where(chosen, mask_id, block), eos), noise.with_eos(targets, eos)

  return _map_blocks(dataset, vocabulary, length, lengths, corrupt, seed)


def bart_denoising(dataset: tf.data.Dataset, sequence_length: Mapping[str, int],
                   output_features: Mapping[str, seqio.Feature], seed: int = 0,
                   permute: bool = True, infill: bool = True) -> tf.data.Dataset:
  """BART's noise; the target is the whole original text.

  Args:
    permute: sentences stand in a random order.
    infill: spans are replaced with one mask each, which makes inputs of about 0.8 of the targets.
  """
  lengths = {key: sequence_length[key] for key in ('inputs', 'targets')}
  vocabulary = output_features['inputs'].vocabulary
  mask_id, eos = _mask_id(vocabulary) if infill else None, vocabulary.eos_id

  def corrupt(block: np.ndarray, starts: np.ndarray, rng: np.random.Generator):
    noisy = denoising.permute_sentences(block, starts, rng) if permute else block
    noisy = (denoising.text_infilling(noisy, rng, mask_id, eos) if infill
             else noise.with_eos(noisy, eos))
    return noisy, noise.with_eos(block, eos)

  return _map_blocks(dataset, vocabulary, _whole_length(lengths), lengths, corrupt, seed,
                     pieces_of=denoising.sentences if permute else _whole_text)


def _whole_length(lengths: Mapping[str, int]) -> int:
  """Length of a text that fits, with EOS, every side whole."""
  if min(lengths.values()) < 2:
    raise ValueError(f'A text with EOS needs lengths of at least 2 tokens, got {dict(lengths)}: '
                     'raise the task feature lengths.')
  return min(lengths.values()) - 1


def _mask_id(vocabulary: seqio.Vocabulary) -> int:
  """The vocabulary's mask, or T5's <extra_id_0>."""
  if hasattr(type(vocabulary), 'mask_id'):
    return vocabulary.mask_id
  if not vocabulary.extra_ids:
    raise ValueError('The mask is <extra_id_0>, but the vocabulary has no sentinels: give it '
                     'extra_ids.')
  return vocabulary.vocab_size - 1


def _whole_text(text: str) -> list[str]:
  return [text]


def _map_blocks(dataset: tf.data.Dataset, vocabulary: seqio.Vocabulary, length: int,
                lengths: Mapping[str, int], make: Callable, seed: int, shortest: int = 1,
                pieces_of: Callable[[str], list[str]] = _whole_text,
                join: bool = True) -> tf.data.Dataset:
  """Texts -> tokens -> blocks [N, at most `length`] -> make(block, starts, rng) -> rows.

  Args:
    lengths: of the features that `make` returns, in this order: [N, at most so many], 0 = padding.
    shortest: a rest of fewer tokens, of a group or a text, is dropped.
    pieces_of: cuts a text into pieces that are tokenised alone; `starts`, of the block's shape, is
      1 where one begins.
    join: a group's texts are one stream; otherwise each is, and blocks of one length are made
      together. Rows have the order of the texts in any case.
  """
  def rows_of(texts: np.ndarray) -> list[np.ndarray]:
    # Not the group's number: groups of a split that is read in parts have the same noise.
    rng = np.random.default_rng([seed, zlib.crc32(b'\0'.join(texts)), len(texts)])
    ids, starts, ends = _tokens_of(texts, vocabulary, pieces_of)
    begins, sizes = noise.blocks(ends[-1:] if join else ends, length, shortest)
    rows = [np.zeros((len(begins), width), np.int32) for width in lengths.values()]
    for size in np.unique(sizes)[::-1]:
      same = np.flatnonzero(sizes == size)
      places = begins[same, None] + np.arange(size)
      for side, all_rows in zip(make(ids[places], starts[places], rng), rows, strict=True):
        all_rows[same, :side.shape[1]] = side
    return rows

  def group_to_rows(texts: tf.Tensor) -> dict[str, tf.Tensor]:
    sides = tf.numpy_function(rows_of, [texts], [tf.int32] * len(lengths))
    return {key: tf.ensure_shape(side, [None, width])
            for (key, width), side in zip(lengths.items(), sides, strict=True)}

  def drop_padding(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {key: tf.boolean_mask(ids, ids != 0) for key, ids in row.items()}

  return (dataset.map(lambda example: example['text']).batch(TEXTS_PER_GROUP)
          .map(group_to_rows, num_parallel_calls=2, deterministic=True).unbatch()
          .map(drop_padding, num_parallel_calls=2, deterministic=True))


def _tokens_of(texts: Sequence[bytes], vocabulary: seqio.Vocabulary,
               pieces_of: Callable[[str], list[str]]) -> tuple[np.ndarray, ...]:
  """All tokens end to end, 1 where a piece begins, and where texts end: [n], [n], [T] int32."""
  ids, ends = [np.zeros(0, np.int32)], []
  for text in texts:
    ids += [np.array(vocabulary.encode(piece), np.int32)
            for piece in pieces_of(text.decode('utf-8'))]
    ends.append(len(ids))
  starts = [np.arange(len(piece), dtype=np.int32) == 0 for piece in ids]
  total = np.cumsum([len(piece) for piece in ids], dtype=np.int32)
  return np.concatenate(ids), np.concatenate(starts).astype(np.int32), total[np.array(ends) - 1]

"""Random weights that begin with what counting tells, for pretraining on a laptop.

From random numbers a small T5 spends its first thousands of steps on how frequent words are, which
stand together, and that neighbours matter. Counting a text tells the first two in minutes, and the
third is no secret. Every number here trains on as any other would.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

CONSTANT = 0.375  # of the length of a word's embedding, in a number that is the same for all words
FREQUENCY, FOLLOWER = 0.75, 1.5  # weights with which a word's output predicts the next one best
NEAR = 6.0  # attention logit of the distance that a head looks at; 0 is that of all others
MATCH = 12.8  # attention logit of a token with its like, in cross attention
RESIDUAL = 0.35  # of the random outputs of sub-layers, so that words pass through them


def warm_start(config: Any, params: Mapping[str, np.ndarray], words: np.ndarray,
               followers: np.ndarray, log_frequency: np.ndarray,
               known: np.ndarray) -> dict[str, np.ndarray]:
  """Leaves by path, with what `data.word_vectors.WordVectors` knows in the place of random numbers.

  Embeddings are word vectors [V, D - 1] and a constant, at the size of the random ones. An output
  layer of its own weighs the logarithm of frequency and the mutual information with the word before
  so that together they predict best; an output layer's biases (BERT, BART) are the logarithm. Words
  without vectors (sentinels, say) keep the direction of their random embeddings.

  Where positions are relative (T5), heads look in turns at the token before, the one after (the
  second before, in a decoder), near tokens and anywhere, as ALiBi's do (Press et al. 2022); in
  cross attention queries are like keys, which Trockman & Kolter (2023) do in self-attention; and
  sub-layers begin with small outputs.
  """
  made = {path: np.array(leaf) for path, leaf in params.items()}
  table = made[config.embedding]
  constant = CONSTANT * math.sqrt(config.emb_dim)
  rest = math.sqrt(config.emb_dim - constant ** 2)
  lengths = np.linalg.norm(words, axis=1, keepdims=True)
  known = known & (lengths[:, 0] > 1e-3 * lengths.max())  # one that stands alone has no direction
  spread = table.std()
  random = table[:, 1:] / spread
  random *= rest / np.linalg.norm(random, axis=1, keepdims=True)
  rows = np.where(known[:, None], words / np.maximum(lengths, 1e-30) * rest, random)
  made[config.embedding] = np.concatenate(
      [np.full((len(rows), 1), constant, np.float32), rows], axis=1) * spread
  frequency = log_frequency - log_frequency[known].mean()
  if config.output in made:
    usual = np.average(lengths[:, 0], weights=known * np.exp(log_frequency))
    outputs = followers * (FOLLOWER * usual / rest)
    chance = made[config.output].T[:, 1:]
    chance *= outputs[known].std() / chance.std()
    made[config.output] = np.concatenate(
        [frequency[:, None] * (FREQUENCY / constant),
         np.where(known[:, None], outputs, chance)], axis=1).T
  made |= {path: frequency for path in made if path.endswith('/logits_bias')}
  if any(path.endswith('rel_embedding') for path in made):
    _attend(made, config.head_dim)
  return {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in made.items()}


def _attend(leaves: dict[str, np.ndarray], head_dim: int) -> None:
  """Makes heads look at neighbours, and at like tokens of the inputs."""
  for path, leaf in leaves.items():
    if path.endswith('rel_embedding'):
      leaves[path] = _heads(*leaf.shape, bidirectional=path.startswith('encoder'))
    elif path.endswith('encoder_decoder_attention/query/kernel'):
      leaves[path] = MATCH / head_dim * leaves[path.replace('/query/', '/key/')]
    elif path.endswith(('attention/out/kernel', 'mlp/wo/kernel')):
      leaves[path] = RESIDUAL * leaf


def _heads(heads: int, buckets: int, bidirectional: bool) -> np.ndarray:
  """Biases of relative positions [heads, buckets], as `networks.relative_position` numbers them."""
  after = buckets // 2 if bidirectional else 0
  bias = np.zeros((heads, buckets))
  distance = np.arange(buckets) % (after or buckets)
  bias[0::4, 1] = NEAR
  bias[1::4, after + 1 if bidirectional else 2] = NEAR
  bias[2::4] = np.maximum(NEAR * (1 - distance / 6), -NEAR)
  return bias

"""BERT's and BART's noise on arrays of tokens: the target is the whole text without the noise.

Pure functions of tokens and a NumPy generator (Devlin et al. 2019, section 3.1, "Masked LM"; Lewis
et al. 2020, section 2.2). Rows of one length are corrupted together. Needs neither SeqIO nor
TensorFlow.
"""

import re

import numpy as np

from prompt_tuning_jax.tasks.noise import EOS

CHOSEN = 0.15  # BERT: of the tokens, …
MASKED, RANDOM = 0.8, 0.1  # … of which so many become a mask or a random piece; others stay.
INFILLED = 0.3  # BART: of the tokens, in spans of …
MEAN_SPAN_LENGTH = 3.0  # … lengths from a Poisson distribution with this mean.
# A sentence ends with a mark and the quotes and brackets that close behind it, before spaces.
SENTENCE_END = re.compile(r'[.!?…]["\'”’)\]*_]*(?=\s+\S)')


def masked_tokens(tokens: np.ndarray, rng: np.random.Generator, mask_id: int,
                  pieces: tuple[int, int]) -> np.ndarray:
  """BERT's noise: 15 % of each row's tokens, of these 80 % masked, 10 % random, 10 % unchanged.

  Args:
    tokens: [N, L] int32.
    pieces: the first id that a random piece may have, and the first behind the last.

  Returns:
    [N, L] int32. At least one token of each row is chosen.
  """
  chosen = chosen_tokens(tokens.shape, rng)
  fate = rng.random(tokens.shape)
  random = rng.integers(*pieces, size=tokens.shape)
  noisy = np.where(fate < MASKED, mask_id, np.where(fate < MASKED + RANDOM, random, tokens))
  return np.where(chosen, noisy, tokens).astype(np.int32)


def chosen_tokens(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
  """Which tokens BERT is asked for: [N, L] bool, as many in each row (`num_chosen`)."""
  rank = np.argsort(rng.random(shape), axis=1)  # A permutation in each row.
  return rank < num_chosen(shape[1])


def num_chosen(length: int) -> int:
  """15 % of a text's tokens, at least one."""
  return _share(length, CHOSEN)


def infilling_lengths(rows: int, noise: int, rng: np.random.Generator) -> np.ndarray:
  """Lengths of each row's spans: [rows, noise] int64, -1 behind the last.

  They are drawn from Poisson(3), zeros too, until their sum is `noise`, to which the last is cut.
  """
  lengths = rng.poisson(MEAN_SPAN_LENGTH, (rows, noise))
  lengths[:, -1] = noise  # However many zeros are drawn, the sum is reached.
  before = np.cumsum(lengths, axis=1) - lengths
  return np.where(before < noise, np.minimum(lengths, noise - before), -1)


def text_infilling(tokens: np.ndarray, rng: np.random.Generator, mask_id: int,
                   eos: int = EOS) -> np.ndarray:
  """BART's noise: spans of 30 % of each row's tokens, each replaced with ONE mask.

  A span of length 0 adds a mask between two tokens. All orders of spans and kept tokens are as
  likely, so spans may touch.

  Args:
    tokens: [N, L] int32.

  Returns:
    [N, at most L + 1] int32 with EOS, 0 behind it.
  """
  rows, length = tokens.shape
  noise = _share(length, INFILLED)
  kept = length - noise
  spans = infilling_lengths(rows, noise, rng)
  # Each row is a sequence of symbols: kept tokens, numbered first, and spans; unused spans last.
  covers = np.concatenate([np.ones((rows, kept), np.int64), spans], axis=1)
  order = np.argsort(np.where(covers < 0, 1, rng.random(covers.shape)), axis=1)
  covers = np.take_along_axis(np.maximum(covers, 0), order, axis=1)
  source = np.minimum(np.cumsum(covers, axis=1) - covers, length - 1)
  symbols = np.where(order < kept, np.take_along_axis(tokens, source, axis=1), mask_id)
  counts = kept + (spans >= 0).sum(1)
  places = np.arange(counts.max() + 1)
  symbols = np.pad(symbols, ((0, 0), (0, 1)))[:, :len(places)]
  ends = counts[:, None]
  return np.where(places < ends, symbols, np.where(places == ends, eos, 0)).astype(np.int32)


def sentences(text: str) -> list[str]:
  """The sentences of a text, each with the spaces before it: joined, they are the text.

  A space belongs to the word behind it, in the pieces of byte-level BPE.
  """
  ends = [match.end() for match in SENTENCE_END.finditer(text)]
  edges = [0, *ends, len(text)]
  return [text[i:j] for i, j in zip(edges, edges[1:], strict=False) if j > i]


def permute_sentences(tokens: np.ndarray, starts: np.ndarray,
                      rng: np.random.Generator) -> np.ndarray:
  """BART's noise: each row's sentences in a random order.

  Args:
    tokens: [N, L] int32.
    starts: [N, L], not 0 at a sentence's first token. What stands before a row's first start, the
      rest of a sentence, and a last sentence that is cut count as sentences.

  Returns:
    [N, L] int32.
  """
  sentence = np.cumsum(starts != 0, axis=1)
  keys = rng.random((len(tokens), tokens.shape[1] + 1))
  order = np.argsort(np.take_along_axis(keys, sentence, axis=1), axis=1, kind='stable')
  return np.take_along_axis(tokens, order, axis=1)


def _share(length: int, density: float) -> int:
  return min(max(round(length * density), 1), length)

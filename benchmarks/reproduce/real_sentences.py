"""The quick start's question on real text: sentences of held-out novels and articles.

The quick start is made up from lists of words; these are from the validation splits of `lm_novels`
and `lm_wiki`, cut at ends of sentences. As many of each, always the same ones.
"""

import itertools
import json
import pathlib
import re
from typing import Any

from prompt_tuning_jax.checkpoints.atomic_write import atomic_file
from prompt_tuning_jax.data import token_cache
from prompt_tuning_jax.data.seqio_task import SeqioTask
from prompt_tuning_jax.data.text_file import TextFile

LABELS = {'novel': 'lm_novels', 'article': 'lm_wiki'}
OF_EACH = 200
EVERY = 3  # sentences, so that neighbours are rare
WORDS = (6, 30)
SENTENCE = re.compile(r'(?<=[.!?] )["“A-Z][^.!?⁇]*[.!?]["”]?(?= )')


def task(folder: pathlib.Path, vocabulary: Any) -> TextFile:
  """The sentences as a task that is only evaluated; its file is made in `folder` once."""
  path = folder / f'real_sentences_{vocabulary.sha256[:8]}.jsonl'
  if not path.exists():
    rows = itertools.chain(*zip(*(
        [{'sentence': text, 'label': label} for text in sentences(name, vocabulary)]
        for label, name in LABELS.items()), strict=True))
    with atomic_file(path) as temporary:
      pathlib.Path(temporary).write_text(
          ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
  return TextFile(None, str(path), inputs='sentence: {sentence}', targets='label',
                  labels=tuple(LABELS), name='real_sentences')


def sentences(name: str, vocabulary: Any) -> list[str]:
  """OF_EACH whole sentences of a language modelling task's held-out text."""
  cache = token_cache.open_or_build(SeqioTask(name, max_examples=400), 'validation', vocabulary,
                                    {'inputs': 2, 'targets': 512})
  texts = (vocabulary.decode(cache.targets(i).tolist()) for i in range(cache.num_examples))
  whole = (sentence for text in texts for sentence in SENTENCE.findall(text)
           if WORDS[0] <= len(sentence.split()) <= WORDS[1])
  found = list(itertools.islice(whole, 0, EVERY * OF_EACH, EVERY))
  if len(found) < OF_EACH:
    raise ValueError(f'{name} has only {len(found)} sentences, expected {OF_EACH}.')
  return found

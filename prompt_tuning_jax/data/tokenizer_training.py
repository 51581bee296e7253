"""Vocabularies of the kinds of GPT-2, BART and BERT, made from text by the tokenizers library."""

import itertools
from collections.abc import Iterable

from prompt_tuning_jax import tokenizer_file
from prompt_tuning_jax.data.tokenizer import library

KINDS = ('gpt2', 'bart', 'bert')
# BART's stand in Hugging Face's order, so that its networks' usual ids are right.
_BART = [tokenizer_file.BART[name] for name in (
    'bos_token', 'pad_token', 'eos_token', 'unk_token', 'mask_token')]
_BERT = [tokenizer_file.BERT[name] for name in (
    'pad_token', 'unk_token', 'cls_token', 'sep_token', 'mask_token')]


def train_tokenizer(kind: str, texts: Iterable[str], pieces: int) -> str:
  """Trains a vocabulary of one of KINDS; returns what its tokenizer.json holds.

  GPT-2's and BART's are byte-level BPE, BERT's word pieces of lower-case text. `pieces` is its
  size, special tokens included; fewer if the texts do not have so many.

  Raises ValueError where there is no text, or no such kind, or `pieces` are too few for the bytes
  or, of BERT's, the characters.
  """
  if kind not in KINDS:
    raise ValueError(f'A vocabulary is of one of the kinds {KINDS}, got {kind!r}.')
  texts = iter(texts)
  if (first := next(texts, None)) is None:
    raise ValueError('A vocabulary needs texts to be trained on, got none.')
  tokenizers = library('Such a vocabulary is made')
  decoders, models, trainers = tokenizers.decoders, tokenizers.models, tokenizers.trainers
  normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
  if kind == 'bert':
    made = tokenizers.Tokenizer(models.WordPiece(unk_token=tokenizer_file.BERT['unk_token']))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=pieces, special_tokens=_BERT,
                                        show_progress=False)
  else:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [tokenizer_file.END] if kind == 'gpt2' else [*_BART[:-1], tokenizers.AddedToken(
        _BART[-1], lstrip=True, special=True)]
    if pieces < len(alphabet) + len(special):
      raise ValueError(f'Byte-level BPE has at least {len(alphabet) + len(special)} pieces, got '
                       f'{pieces}.')
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == 'gpt2')
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=pieces, special_tokens=special, show_progress=False,
                                  initial_alphabet=alphabet)
  made.train_from_iterator(itertools.chain([first], texts), trainer)
  if (size := made.get_vocab_size()) > pieces:
    raise ValueError(f'Word pieces of these texts, which have all their characters, are at least '
                     f'{size} pieces, got {pieces}.')
  begin, end = {'bart': ('<s>', '</s>'), 'bert': ('[CLS]', '[SEP]')}.get(kind, ('', ''))
  if begin:  # for those who read the file with transformers
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f'{begin} $A {end}', pair=f'{begin} $A {end} $B {end}',
        special_tokens=[(token, made.token_to_id(token)) for token in (begin, end)])
  return made.to_str()

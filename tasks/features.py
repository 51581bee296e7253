"""The features of our tasks."""

import seqio

# T5's public vocabulary, read only if a task runs outside of this package: the token cache's
# builder puts that of the base in its place.
VOCABULARY = seqio.SentencePieceVocabulary(
    'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model', extra_ids=100)
FEATURES = {
    'inputs': seqio.Feature(VOCABULARY, add_eos=True),
    'targets': seqio.Feature(VOCABULARY, add_eos=True),
}

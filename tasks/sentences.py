"""Sentences as from a novel or as from an encyclopedia's article, made up from lists of words.

Always the same. Tone and words tell the two apart, which is what even a very small language model
has learnt. Validation also uses words and sentence patterns that training never shows. Needs
neither SeqIO nor TensorFlow.
"""

import random
import string

LABELS = ('novel', 'article')
SIZES = {'train': 2000, 'validation': 300}
SHARE_OF_NOVEL = 0.55
UNSEEN_PATTERNS = 2  # the last of each label's

WORDS = {
    'who': ('my aunt', 'the old lady', 'Mr. Harding', 'the captain', 'poor Margaret',
            'the stranger', 'my cousin', 'the young man', 'the widow', 'Lady Anne', 'the doctor',
            'his wife'),
    'felt': ('sighed', 'trembled', 'turned pale', 'burst into tears', 'smiled sadly', 'blushed',
             'shook her head', 'looked away', 'laughed softly', 'grew silent', 'wept'),
    'how': ('with a heavy heart', 'in a low voice', 'without a word', 'as if in a dream', 'at last',
            'by the fire', 'with tears in her eyes', 'in spite of himself', 'for a long while'),
    'thought': ('you must forgive me', 'I never loved him', 'it is quite impossible',
                'we shall be ruined', 'you know my mind', 'I dare not tell you', 'he is gone',
                'nothing can be done', 'I am the happiest of men'),
    'place': ('Kansas', 'Bavaria', 'New Zealand', 'Ohio', 'Brazil', 'Ontario', 'Poland', 'Kerala',
              'Nevada', 'Norway', 'Scotland', 'Queensland'),
    'thing': ('town', 'river', 'railway station', 'football club', 'species of beetle', 'county',
              'university', 'rock band', 'airport', 'radio station', 'village', 'highway'),
    'body': ('the national assembly', 'the United States Army', 'the state government',
             'a German company', 'the city council', 'the World Bank', 'the football league',
             'a record label', 'the European Union'),
    'work': ('album', 'television series', 'software', 'aircraft', 'law', 'bridge', 'stadium',
             'film', 'computer', 'treaty'),
    'year': ('1912', '1936', '1947', '1958', '1969', '1974', '1983', '1991', '1999', '2004',
             '2010'),
    'number': ('12', '340', '1,205', '27,400', '63', '8,950', '412', '150,000'),
}
PATTERNS = {
    'novel': (
        '"{Thought}," said {who}, and {felt} {how}.',
        '{Who} {felt} {how}, for she had loved him dearly.',
        'I knew that {who} would never come back, and I {felt}.',
        '"Oh! my dear," cried {who}, "{thought}!"',
        '{Who} {felt}, and for some minutes neither of them spoke.',
        '"And so," thought {who}, "{thought}."',
        'She rose, went to the window and {felt} {how}.',
        'When the door had closed, {who} {felt} {how}.'),
    'article': (
        'The {thing} is located in {place} and was founded in {year}.',
        'It is a {thing} in northern {place} with a population of {number}.',
        'In {year}, the {work} was approved by {body}.',
        'The {work} was released in {year} and sold {number} copies in {place}.',
        '{Body} announced a new {work} in {year}.',
        'It was the first {work} in {place} to be funded by {body}.',
        'As of {year}, there were {number} members from {place}.',
        'The {thing} was closed in {year} after a decision of {body}.'),
}


def examples(split: str) -> list[dict[str, str]]:
  """[{'sentence', 'label'}] of 'train' (2,000) or 'validation' (300); no sentence is in both."""
  if split not in SIZES:
    raise ValueError(f'The sentences have the splits {", ".join(SIZES)}, got {split!r}.')
  taken: set[str] = set()
  for name, size in SIZES.items():
    rng = random.Random(f'sentences {name}')
    rows = []
    while len(rows) < size:
      label = LABELS[0] if rng.random() < SHARE_OF_NOVEL else LABELS[1]
      while (sentence := _sentence(PATTERNS[label], rng, training=name == 'train')) in taken:
        pass
      taken.add(sentence)
      rows.append({'sentence': sentence, 'label': label})
    if name == split:
      return rows
  raise AssertionError


def _sentence(patterns: tuple[str, ...], rng: random.Random, training: bool) -> str:
  def pick(items: tuple[str, ...]) -> str:
    return items[int(rng.random() * len(items))]  # random() is the same in every Python.

  pattern = pick(patterns[:-UNSEEN_PATTERNS] if training else patterns)
  slots = [slot for _, slot, _, _ in string.Formatter().parse(pattern) if slot]
  words = {}
  for slot in slots:
    known = WORDS[slot.lower()]
    word = pick(known[:2 * len(known) // 3] if training else known)
    words[slot] = word[0].upper() + word[1:] if slot[0].isupper() else word
  return pattern.format(**words)

"""Sentences about the sea or about the kitchen, made up from lists of words, always the same.

A word or two tell the topic, so a small language model's idea of which words belong together is
enough. Validation also uses words and sentence patterns that training never shows. Needs neither
SeqIO nor TensorFlow.
"""

import dataclasses
import random

LABELS = ('sea', 'kitchen')
SIZES = {'train': 2000, 'validation': 300}
SHARE_OF_SEA = 0.55


@dataclasses.dataclass(frozen=True)
class Words:
  """A topic's words; the last few of each list occur in validation only (see `_known`)."""

  people: tuple[str, ...]
  things: tuple[str, ...]
  doings: tuple[str, ...]
  places: tuple[str, ...]


TOPICS = {
    'sea': Words(
        people=('captain', 'sailor', 'pilot of the ship', 'fisherman', 'crew', 'admiral', 'seaman',
                'boatman'),
        things=('ship', 'boat', 'anchor', 'sail', 'mast', 'whale', 'wave', 'oar', 'vessel', 'net',
                'rudder', 'tide', 'shark'),
        doings=('sailed along the coast', 'rowed to the island', 'steered through the storm',
                'raised the sails', 'dropped the anchor', 'swam to the shore',
                'waited for the tide', 'repaired the mast', 'drifted with the current'),
        places=('on the deck', 'in the harbour', 'near the island', 'on board the ship',
                'by the shore', 'off the coast', 'at the port', 'on the ocean', 'in the bay')),
    'kitchen': Words(
        people=('cook', 'baker', 'housewife', 'maid with the plates', 'butcher', 'chef', 'waiter',
                'housekeeper'),
        things=('bread', 'soup', 'butter', 'kettle', 'oven', 'cake', 'cheese', 'spoon', 'dinner',
                'pot', 'pie', 'flour', 'sauce'),
        doings=('boiled the water for tea', 'baked the bread', 'cut the cheese',
                'stirred the soup', 'washed the dishes', 'fried the eggs',
                'peeled the potatoes', 'roasted the meat', 'melted the butter'),
        places=('on the stove', 'beside the oven', 'on a plate', 'at the dinner table',
                'among the pots', 'in the pan', 'in a bowl', 'in the cupboard', 'by the sink')),
}
PATTERNS = (
    'The {adjective} {person} {doing} {time}.',
    '{time_first}, the {person} {doing}.',
    'We saw a {adjective} {thing} {place}.',
    'The {thing} {place} was {adjective}.',
    'She said that the {person} {doing}.',
    '{time_first}, the {person} spoke of the {thing}.',
    'I remember the {thing} and the {adjective} {person}.',
    'He looked at the {thing} {place}.',
    'Nobody knew why the {adjective} {person} {doing}.',
    'There was only one {thing} left {place}.',
)
ADJECTIVES = ('old', 'young', 'large', 'small', 'beautiful', 'good', 'new', 'heavy', 'strange',
              'famous')
TIMES = ('in the morning', 'last night', 'at six o’clock', 'on Sunday', 'after the rain',
         'for an hour', 'before sunset', 'every day')
UNSEEN_PATTERNS = 2


def examples(split: str) -> list[dict[str, str]]:
  """[{'sentence', 'label'}] of 'train' (2,000) or 'validation' (300); no sentence is in both."""
  if split not in SIZES:
    raise ValueError(f'The sentences have the splits {", ".join(SIZES)}, got {split!r}.')
  taken: set[str] = set()
  for name, size in SIZES.items():
    rng = random.Random(f'sentences {name}')
    rows = []
    while len(rows) < size:
      label = LABELS[0] if rng.random() < SHARE_OF_SEA else LABELS[1]
      sentence = _sentence(TOPICS[label], rng, training=name == 'train')
      if sentence not in taken:
        taken.add(sentence)
        rows.append({'sentence': sentence, 'label': label})
    if name == split:
      return rows
  raise AssertionError


def _sentence(words: Words, rng: random.Random, training: bool) -> str:
  def pick(items: tuple[str, ...]) -> str:
    known = items[:_known(items)] if training else items
    return known[int(rng.random() * len(known))]  # random() is the same in every Python.

  patterns = PATTERNS[:-UNSEEN_PATTERNS] if training else PATTERNS
  pattern = patterns[int(rng.random() * len(patterns))]
  time = TIMES[int(rng.random() * len(TIMES))]
  adjective = ADJECTIVES[int(rng.random() * len(ADJECTIVES))]
  sentence = pattern.format(
      adjective=adjective, person=pick(words.people), thing=pick(words.things),
      doing=pick(words.doings), place=pick(words.places), time=time,
      time_first=time[0].upper() + time[1:])
  return sentence.replace(' a old ', ' an old ')


def _known(items: tuple[str, ...]) -> int:
  """How many of a topic's words training shows: about two thirds."""
  return 2 * len(items) // 3

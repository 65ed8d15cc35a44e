"""The language of the needle model: prose from a small grammar, facts, questions.

    Mara carried the old lamp to Belan . The code of the amber door is 471 902 .
    Each night Toriv sang . ... What is the code of the amber door ?      -> 471 902

Facts are the needles, prose is the haystack. Sentences consist of words of a closed
vocabulary, each of them a token, so a text's length in tokens is its number of words
(numbers and marks count as words). All of it is synthetic; names are made of syllables.

A code consists of numbers of three digits, each a token as in Llama 3. A code of single
digits would be ambiguous from its second digit on, for a head that only looks up what
followed the token before: in nine facts the same digit occurs many times, the same number
hardly ever.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    "amber ancient azure black blue brass bright broken bronze brown cold copper coral "
    "crimson crooked dark distant dusty emerald empty faded fragile frozen gentle gilded "
    "golden gray green heavy hidden hollow indigo iron ivory jade large lonely marble "
    "narrow old olive orange painted pale pearl pink plain purple quiet red round ruby "
    "rusty scarlet shallow silent silver simple small smooth stone tall violet white "
    "wooden yellow"
)
NOUNS = _words(
    "anchor arch attic barn basket bell boat book bottle box bridge cabin cabinet cage "
    "candle carriage castle cave cellar chain chapel chest clock closet coach cottage "
    "crate cupboard desk door drawer engine fence ferry fort fountain garden gate hall "
    "harbor house hut kitchen ladder lamp lantern library locker mill mine mirror office "
    "palace pantry room safe shed shelf ship shop stable station studio table temple "
    "tower trunk tunnel vault wagon well workshop"
)
TRANSITIVE = _words(
    "admired avoided borrowed bought built carried cleaned closed counted described "
    "dragged drew examined fixed followed forgot found guarded hated ignored inspected "
    "kept liked locked lost loved measured missed moved noticed opened owned passed "
    "polished praised pushed repaired saved shared showed sold stole studied touched "
    "trusted visited wanted washed watched"
)
INTRANSITIVE = _words(
    "arrived coughed cried danced dreamed hummed hurried laughed listened paused prayed "
    "rested shivered sighed sang slept smiled spoke stayed stumbled talked thought "
    "traveled waited walked wandered whispered whistled worked wrote"
)
ADVERBS = _words(
    "alone badly bravely calmly carefully early eagerly gladly late loudly often "
    "patiently politely rarely sadly secretly slowly softly suddenly twice"
)
PEOPLE = _words(
    "baker captain carpenter child clerk cook doctor farmer fisher gardener guard guest "
    "hunter judge king merchant miller miner monk nurse painter pilot poet queen sailor "
    "scholar shepherd singer smith soldier stranger tailor teacher thief traveler weaver"
)
SEASONS = _words("autumn dawn dusk evening midnight morning noon spring summer winter")
WEATHER = _words("cloud fog frost hail mist rain snow storm sun thunder wind")
FUNCTION = _words(
    "a about after again all and any as at because before but by code each every for "
    "from he her his in into is it me near never nobody not now of on once over please "
    "she since so some soon still tell that the their then there they this to toward "
    "under until was went were what when where which while who why with without yesterday you"
)
MARKS = (".", ",", "?")
NUMBERS = tuple(f"{number:03}" for number in range(1000))

_ONSETS = _words("b d f g k l m n r s t v z")
_VOWELS = _words("a e i o u")
_ENDINGS = _words("bel dor gan lan mir nek rin sol tash vik")
NAMES = [onset + vowel + ending for onset, vowel, ending in product(_ONSETS, _VOWELS, _ENDINGS)]

WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *NUMBERS,
            *MARKS,
            *FUNCTION,
            *ADJECTIVES,
            *NOUNS,
            *TRANSITIVE,
            *INTRANSITIVE,
            *ADVERBS,
            *PEOPLE,
            *SEASONS,
            *WEATHER,
            *NAMES,
        ]
    )
)
"""Every word of the language, in order of token id."""

CODE_NUMBERS = 2
FACT_WORDS = 8 + CODE_NUMBERS
QUESTION_WORDS = 9

Sentence = list[str]


@dataclass(frozen=True)
class Fact:
    """The code of a thing, such as a door: one needle.

    adjective, noun: name the thing. code: its numbers, of three digits each.
    """

    adjective: str
    noun: str
    code: tuple[str, ...]

    def sentence(self) -> Sentence:
        """The fact as told: `FACT_WORDS` words."""
        thing = [self.adjective, self.noun]
        return ["the", "code", "of", "the", *thing, "is", *self.code, "."]

    def question(self) -> Sentence:
        """The question about it: `QUESTION_WORDS` words."""
        return ["what", "is", "the", "code", "of", "the", self.adjective, self.noun, "?"]


def draw_facts(rng: random.Random, count: int, own_nouns: bool = True) -> list[Fact]:
    """Facts about different things.

    Args:
        own_nouns: whether no two of them have the same noun; if not, things may differ
            only in their adjective.

    Raises:
        ValueError: more facts than nouns (or things).
    """
    if own_nouns:
        nouns = rng.sample(NOUNS, count)
        things = [(rng.choice(ADJECTIVES), noun) for noun in nouns]
    else:
        drawn = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
        things = [(ADJECTIVES[i // len(NOUNS)], NOUNS[i % len(NOUNS)]) for i in drawn]
    return [Fact(*thing, tuple(rng.choices(NUMBERS, k=CODE_NUMBERS))) for thing in things]


def draw_sentence(rng: random.Random) -> Sentence:
    """A sentence of prose, 4 to 15 words, without numbers."""
    pick = rng.choice
    who = [pick(NAMES)] if rng.random() < 0.6 else ["the", pick(PEOPLE)]
    thing = ["the", pick(ADJECTIVES), pick(NOUNS)]
    form = rng.randrange(7)
    if form == 0:
        return [*who, pick(TRANSITIVE), *thing, "."]
    if form == 1:
        return [*who, pick(ADVERBS), pick(TRANSITIVE), *thing, "in", pick(NAMES), "."]
    if form == 2:
        return [*who, pick(INTRANSITIVE), pick(ADVERBS), "near", *thing, "."]
    if form == 3:
        return ["in", "the", pick(SEASONS), ",", *who, "went", "to", pick(NAMES), "."]
    if form == 4:
        other = ["the", pick(PEOPLE)]
        return [*who, pick(INTRANSITIVE), "while", *other, pick(TRANSITIVE), *thing, "."]
    if form == 5:
        both = [*who, "and", pick(NAMES)]
        return ["after", "the", pick(WEATHER), ",", *both, pick(INTRANSITIVE), "."]
    return ["the", pick(NOUNS), "of", pick(NAMES), "was", pick(ADJECTIVES), "."]


def draw_prose(rng: random.Random, num_words: int) -> list[Sentence]:
    """Sentences of exactly `num_words` words in all; the last one may be cut."""
    sentences = []
    while num_words > 0:
        sentence = draw_sentence(rng)[:num_words]
        num_words -= len(sentence)
        sentences.append(sentence)
    return sentences


def haystack(
    rng: random.Random,
    facts: Sequence[Fact],
    num_words: int,
    depths: Sequence[float] | None = None,
) -> list[str]:
    """Prose of exactly `num_words` words with facts between its sentences.

    Args:
        depths: of each fact, from 0 (first) to 1 (last); random if None.

    Raises:
        ValueError: the facts alone are longer.
    """
    prose_words = num_words - FACT_WORDS * len(facts)
    if prose_words < 0:
        raise ValueError(f"{len(facts)} facts do not fit into {num_words} words")
    prose = draw_prose(rng, prose_words)
    if depths is None:
        depths = [rng.random() for _ in facts]
    places = sorted(zip((round(d * len(prose)) for d in depths), range(len(facts)), strict=True))
    sentences, done = [], 0
    for place, index in places:
        sentences += prose[done:place]
        sentences.append(facts[index].sentence())
        done = place
    sentences += prose[done:]
    return [word for sentence in sentences for word in sentence]


def render(words: Sequence[str]) -> str:
    """Words as text: spaces between them, capitals where a sentence begins."""
    begins, text = True, []
    for word in words:
        text.append(word.capitalize() if begins else word)
        begins = word in (".", "?")
    return " ".join(text)

"""Filler for long contexts: sentences in our own words, or those of a user's text.

The sentences made here are plain English about people, things and places. They hold no
digits, so no number of theirs is mistaken for one that a task hides among them.
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from models.needle.language import ADJECTIVES, NAMES, NOUNS, PEOPLE, SEASONS, WEATHER

_TEMPLATES = (
    "The {who} had walked to the {thing} before the {weather} came in, and nobody asked why.",
    "It is said in {place} that a {adj} {thing} brings luck to those who mend it themselves.",
    "{name} wrote long letters every {season}, most of which were never sent to anybody.",
    "When the {weather} was over, the {who} and the {other} went back to work without a word.",
    "Few people remember that the {thing} of {place} was once much larger than it is now.",
    "There are many ways to repair a {adj} {thing}, but most of them take a whole {season}.",
    "{name} did not trust the {who}, though they had known each other since their school days.",
    "A good {who} learns more from one {adj} {thing} than from ten of the usual kind.",
    "In {place} the {season} is short, and so the {who} begins to work well before it.",
    "The road from {place} to the {thing} is steep, and the {weather} makes it worse.",
    "What the {who} wanted was simple: a {adj} {thing}, a warm meal and some quiet.",
    "Nobody could explain how the {thing} had come to {place}, least of all the {who}.",
    "{name} thought about the question for a while and then said that it had no answer.",
    "If the {weather} does not stop soon, we shall have to carry the {thing} inside.",
    "Some of the {adj} houses near the {thing} were built by the {who} with his own hands.",
    "The {who} laughed, because the {other} had mistaken a {thing} for something valuable.",
    "Every {season} the same argument began again, and every time {name} lost it.",
    "Ideas are like a {adj} {thing}: they look better from a distance than from inside.",
    "At last {name} opened the window, looked at the {weather} and decided to stay at home.",
    "The {other} of {place} kept a small notebook, in which the {who} was never mentioned.",
    "To understand the town one has to begin with the {thing}, and not with its people.",
    "They sold the {adj} {thing} in the {season} and bought it back a year later.",
    "{name} was known for patience, and the {who} for the lack of it; they got on well.",
    "Because the {thing} was {adj}, the {who} could see it from the other side of the valley.",
    "Work went on slowly that {season}, for the {weather} had damaged the {thing} again.",
    "Most visitors to {place} leave early; those who stay usually do so because of the {thing}.",
)


def own_sentences(rng: random.Random) -> Iterator[str]:
    """Endless sentences of 10 to 20 words, different for each seed."""
    while True:
        yield rng.choice(_TEMPLATES).format(
            who=rng.choice(PEOPLE),
            other=rng.choice(PEOPLE),
            thing=rng.choice(NOUNS),
            adj=rng.choice(ADJECTIVES),
            season=rng.choice(SEASONS),
            weather=rng.choice(WEATHER),
            name=rng.choice(NAMES).capitalize(),
            place=rng.choice(NAMES).capitalize(),
        )


def read_sentences(path: Path) -> list[str]:
    """Sentences of a text, without line breaks, in order.

    Raises:
        ValueError: there is none.
    """
    text = " ".join(path.read_text(encoding="utf-8").split())
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text) if part]
    if not sentences:
        raise ValueError(f"{path} holds no sentence")
    return sentences


class Filler:
    """Where contexts take their filler from.

    Args:
        text: a file of English prose; sentences in our own words where None.
    """

    def __init__(self, text: Path | None = None) -> None:
        self.sentences = read_sentences(text) if text else None

    def take(self, rng: random.Random, count: int) -> list[str]:
        """`count` sentences; of a text, those that follow a random place in it.

        More of the same seed begin with the same ones. A text that is too short is repeated.
        """
        if self.sentences is None:
            own = own_sentences(rng)
            return [next(own) for _ in range(count)]
        start = rng.randrange(len(self.sentences))
        size = len(self.sentences)
        return [self.sentences[(start + i) % size] for i in range(count)]

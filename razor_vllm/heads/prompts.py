"""Prompts that ask a model to use its context: for attribution.

Made from a text and a seed, so nothing is downloaded. Two kinds:

    retrieval   a haystack with facts in it, then questions about them; the answers are asked
    repeat      a passage, twice; the second copy is asked

Facts are of several forms, and their answers are digits, words, places or made-up names: all
drawn, so that only the context tells them.
"""

import random
import re
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from razor_vllm.heads.profile import read_bounded

Kind = Literal["retrieval", "repeat"]
FACTS = 8
"""Facts in a haystack; each is asked for once."""
_CHARACTERS = 16
"""Of a text, a token: more than a tokenizer needs for prose."""

_ADJECTIVES = ("amber", "broken", "copper", "crooked", "hollow", "narrow", "painted", "silver")
_NOUNS = ("bridge", "cabinet", "door", "kettle", "ladder", "lantern", "mirror", "saddle", "tunnel")
_WORDS = (
    *("apple", "button", "candle", "desert", "engine", "feather", "garden", "hammer", "island"),
    *("jacket", "kitchen", "lemon", "magnet", "needle", "ocean", "pencil", "ribbon", "spider"),
)
_PLACES = ("above", "behind", "beside", "inside", "near", "under")
_ROOMS = ("the boat shed", "the glass house", "the north gate", "the old mill", "the town hall")
_SYLLABLES = ("ba", "dra", "fe", "ka", "ko", "lu", "mar", "nim", "os", "pel", "ri", "sol", "tu")


class Prompt(NamedTuple):
    """One sequence, and what is asked of it.

    ids: token ids. asked: positions in `ids`, from 1, of the tokens to be predicted.
    """

    kind: Kind
    ids: list[int]
    asked: list[int]


class Fact(NamedTuple):
    """A sentence of a haystack, a way to ask for it, and the answer, without a space before."""

    sentence: str
    question: str
    answer: str


def read_text(path: Path | None) -> str:
    """The user's text, or the package's own.

    Raises:
        ValueError: it cannot be read, is over 16 MB, or is not UTF-8.
    """
    if path is None:
        return files("razor_vllm.heads").joinpath("text.txt").read_text(encoding="utf-8")
    try:
        return read_bounded(path, "text").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path} is not UTF-8") from error


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Facts about different things; their forms take turns."""
    things = rng.sample([f"{a} {n}" for a in _ADJECTIVES for n in _NOUNS], count)
    forms = [_number, _password, _place, _name]
    first = rng.randrange(len(forms))
    return [forms[(first + at) % len(forms)](rng, thing) for at, thing in enumerate(things)]


def _number(rng: random.Random, thing: str) -> Fact:
    code = str(rng.randrange(10_000, 100_000))
    return Fact(f"The code of the {thing} is {code}.", f"The code of the {thing} is", code)


def _password(rng: random.Random, thing: str) -> Fact:
    words = " ".join(rng.sample(_WORDS, 3))
    asked = f"Question: What is the password of the {thing}? Answer:"
    return Fact(f'The password of the {thing} is "{words}".', asked, words)


def _place(rng: random.Random, thing: str) -> Fact:
    place = f"{rng.choice(_PLACES)} the {rng.choice(_WORDS)} in {rng.choice(_ROOMS)}"
    asked = f"Question: Where is the key of the {thing}? Answer: It is"
    return Fact(f"The key of the {thing} is {place}.", asked, place)


def _name(rng: random.Random, thing: str) -> Fact:
    name = "".join(rng.choices(_SYLLABLES, k=4)).capitalize()
    return Fact(f"The {thing} belongs to {name}.", f"The {thing} belongs to", name)


class PromptMaker:
    """Prompts of a length in tokens, from a text.

    Args:
        tokenizer: of the model; it must tell where in the text a token is ("fast").
        text: prose. length: tokens of a prompt, at most.

    Raises:
        ValueError: such a tokenizer is lacking, the text is shorter than a prompt, or a prompt
            is too short for its questions.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> None:
        if not tokenizer.is_fast:
            raise ValueError("attribution needs a fast tokenizer; --method probe needs none")
        self.tokenizer, self.length = tokenizer, length
        self.first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        self.sentences = [at for at in re.split(r"(?<=[.!?])\s+", text.strip()) if at]
        found = len(self._start_of(self.sentences))
        if found < length:
            raise ValueError(
                f"the text has {found:,} tokens, fewer than a prompt of {length:,}: give a longer "
                "--text, or a shorter --length"
            )

    def make(self, kind: Kind, seed: int) -> Prompt:
        """A prompt of a kind, the same for the same seed."""
        rng = random.Random(f"{kind} {seed}")
        return self._retrieval(rng) if kind == "retrieval" else self._repeat(rng)

    def _retrieval(self, rng: random.Random) -> Prompt:
        facts = draw_facts(rng, FACTS)
        questions = [f"{fact.question} {fact.answer}." for fact in facts]
        needed = self._encode("\n".join([fact.sentence for fact in facts] + questions))
        haystack = self._sentences(rng, self.length - len(needed) - 4 * FACTS)
        for at, fact in reversed(list(enumerate(facts))):
            haystack.insert(at * len(haystack) // FACTS, fact.sentence)
        text, spans = " ".join(haystack) + "\n", []
        for fact in rng.sample(facts, len(facts)):
            text += f"\n{fact.question} "
            spans.append((len(text), len(text) + len(fact.answer)))
            text += f"{fact.answer}."
        return self._prompt("retrieval", text, spans)

    def _sentences(self, rng: random.Random, room: int) -> list[str]:
        """Sentences from some place on that fit into so many tokens.

        Raises:
            ValueError: not even one sentence for each fact fits.
        """
        out: list[str] = []
        for sentence in self._turned(rng):
            room -= len(self._encode(" " + sentence))
            if room < 0:
                break
            out.append(sentence)
        if len(out) < FACTS:
            raise ValueError(
                f"a prompt of {self.length:,} tokens has no room for {FACTS} questions and as "
                "many sentences between their facts: give a longer --length, or a --text of "
                "shorter sentences"
            )
        return out

    def _repeat(self, rng: random.Random) -> Prompt:
        half = (self.length - len(self.first)) // 2
        passage = self._start_of(self._turned(rng))[:half]
        start = len(self.first) + half
        return Prompt("repeat", self.first + passage * 2, list(range(start, start + half)))

    def _turned(self, rng: random.Random) -> list[str]:
        """The sentences from some place on; after the last comes the first."""
        start = rng.randrange(len(self.sentences))
        return self.sentences[start:] + self.sentences[:start]

    def _start_of(self, sentences: list[str]) -> list[int]:
        """Token ids of at least a prompt's length; of all there is where that is less."""
        text = " ".join(sentences)
        ids = self._encode(text[: _CHARACTERS * self.length])
        return ids if len(ids) >= self.length else self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt(self, kind: Kind, text: str, spans: list[tuple[int, int]]) -> Prompt:
        """Tokens of a text; those that touch a span of characters are asked for."""
        coded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        skip = len(self.first)
        asked = [
            skip + at
            for at, (start, end) in enumerate(coded["offset_mapping"])
            if any(start < stop and end > begin for begin, stop in spans)
        ]
        return Prompt(kind, self.first + coded["input_ids"], asked)

"""Long contexts and the questions about them, each drawn from a seed.

One context is shared by many questions, so that an engine reads it once. Six kinds:

    needles    filler with facts in it. Tasks: `single` (facts of different forms, each the
               only one of its form: a pass key, a magic number, a phone number, ...),
               `multi-key` (a magic number for each of many words), `multi-value` (four
               numbers for one word, all asked for), `multi-query` (four words at once)
    lines      a list of numbered registers; `lines` asks for the content of one (LongEval)
    variables  filler with chains of assignments; `variables` asks for all the variables that
               got a value
    common     a list of words, some of them frequent; `common-words` asks for the ten
    frequent   coded words of uneven frequency; `frequent-words` asks for the top three
    classify   labelled examples; `classify` asks for the labels of new ones

The tasks are those of RULER (arXiv 2404.06654) and LongEval, with texts of our own. A
question's score is the share of its expected answers that the reply contains, as in RULER.
"""

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from benchmarks.tasks.prose import Filler
from models.needle.language import ADJECTIVES, NAMES, NOUNS, PEOPLE, SEASONS, WEATHER

SHORT_REPLY, LONG_REPLY = 16, 48
"""Most tokens of a reply with one answer, and of one with several."""


@dataclass(frozen=True)
class Question:
    """What is asked about a context.

    task: its name in results. depth: place of the fact in the context, from 0 to 1; None
    where no single place has the answer. ask: the question. lead: how the answer begins.
    answers: what the reply has to contain. max_tokens: of the reply.
    """

    task: str
    depth: float | None
    ask: str
    lead: str
    answers: tuple[str, ...]
    max_tokens: int = SHORT_REPLY


@dataclass(frozen=True)
class Context:
    """A text and the questions about it."""

    text: str
    questions: tuple[Question, ...]


class Fact(NamedTuple):
    """A sentence to hide, and how it is asked for."""

    sentence: str
    ask: str
    lead: str
    answer: str


def score(question: Question, reply: str) -> float:
    """Share of the expected answers that a reply contains, in any case of letters."""
    said = reply.lower()
    found = sum(answer.lower() in said for answer in question.answers)
    return found / len(question.answers)


def chat_of(context: Context, question: Question, later: bool = False) -> list[dict[str, str]]:
    """The context, the question and the beginning of the answer, as a chat.

    Args:
        later: whether the question comes in a turn of its own, after the context's.
    """
    turns = [(f"{context.text}\n\n{question.ask}", question.lead)]
    if later:
        first = (f"{context.text}\n\nI will ask about this text.", "Please ask.")
        turns = [first, (question.ask, question.lead)]
    roles = ("user", "assistant")
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(roles, turn, strict=True)
    ]


def draw_context(
    kind: str, seed: str, length: int, filler: Filler, count_tokens: Callable[[str], int]
) -> Context:
    """The longest context of a kind that has at most `length` tokens.

    Args:
        seed: contexts of one seed and kind hide the same things.
        count_tokens: tokens of a text, without special ones.

    Raises:
        ValueError: the facts alone are longer.
    """
    build = partial(_BUILDERS[kind], filler=filler)
    least, most = 0, length
    if count_tokens(build(random.Random(seed), 0).text) > length:
        raise ValueError(f"a context of {length} tokens is too short for the kind {kind}")
    while least + 1 < most:
        size = (least + most) // 2
        if count_tokens(build(random.Random(seed), size).text) <= length:
            least = size
        else:
            most = size
    return build(random.Random(seed), least)


def _digits(rng: random.Random, count: int) -> str:
    """A number of `count` digits that does not begin with 0."""
    return str(rng.randrange(10 ** (count - 1), 10**count))


def _magic(key: str, number: str) -> Fact:
    """RULER's needle."""
    return Fact(
        f"One of the special magic numbers for {key} is: {number}.",
        f"What is the special magic number for {key} mentioned in the text above?",
        f"The special magic number for {key} mentioned in the text is:",
        number,
    )


_FORMS = (
    # before the answer, the answer's pool, after it, the question
    ("The pass key is", "5", ". Remember it: {a} is the pass key.", "What is the pass key?"),
    ("The phone number of the doctor is", "phone", ".", "What is the doctor's phone number?"),
    ("The last train leaves at", "time", " in the evening.", "When does the last train leave?"),
    ("The queen was born in the city of", "city", ".", "In which city was the queen born?"),
    ("The repair of the organ cost", "4", " dollars.", "What did the repair of the organ cost?"),
    ("The favourite colour of the king is", "colour", ".", "What is the king's favourite colour?"),
    ("The house of the notary has the number", "3", ".", "Which number has the notary's house?"),
    ("The lost dog answers to the name of", "name", ".", "To which name does the lost dog answer?"),
    ("The code word of the society is", "fruit", ".", "What is the code word of the society?"),
    ("The old library was founded in the year", "year", ".", "When was the old library founded?"),
    (
        "For breakfast the captain always eats",
        "food",
        ".",
        "What does the captain eat for breakfast?",
    ),
    (
        "The school choir practises every",
        "day",
        ".",
        "On which day does the school choir practise?",
    ),
    (
        "The treasure is buried under an old",
        "tree",
        ".",
        "Under which tree is the treasure buried?",
    ),
    ("The new bridge has a length of", "3", " metres.", "What is the length of the new bridge?"),
    ("The winner of the chess tournament was", "name", ".", "Who won the chess tournament?"),
    (
        "The museum keeps its oldest coin in room",
        "3",
        ".",
        "In which room is the oldest coin kept?",
    ),
    ("The mail ship sails to the port of", "city", ".", "To which port does the mail ship sail?"),
    ("The best hat in the shop is made of", "cloth", ".", "What is the best hat made of?"),
    ("The annual fair begins on the first of", "month", ".", "In which month is the annual fair?"),
    ("The lock of the suitcase opens with code", "4", ".", "Which code opens the suitcase?"),
    ("The painter's sister plays the", "music", ".", "What does the painter's sister play?"),
    ("The number of steps of the tower is", "3", ".", "How many steps has the tower?"),
    ("The guest in the best room of the inn is", "name", ".", "Who is the guest in the best room?"),
    ("The rarest animal in the zoo is a", "animal", ".", "What is the rarest animal in the zoo?"),
)
_POOLS = {
    "city": "Lisbon Cairo Oslo Lima Dublin Athens Vienna Boston Madrid Tokyo Prague Delhi",
    "colour": "red blue green yellow purple orange brown black white pink",
    "name": "Anna Peter Maria Oscar Julia Simon Clara Martin Laura Felix Emma Victor Alice Hugo",
    "fruit": "apple cherry lemon banana melon grape peach plum olive mango",
    "food": "eggs rice soup bread cheese pancakes beans fish honey potatoes",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "tree": "oak birch willow maple pine cedar elm walnut",
    "cloth": "wool silk cotton leather velvet linen straw fur",
    "month": "January February March April June July August September October November",
    "music": "violin piano flute drums guitar harp trumpet cello",
    "animal": "tiger zebra camel panda wolf lion bear giraffe monkey leopard",
}


def _draw_answers(rng: random.Random) -> list[str]:
    """An answer to each of `_FORMS`; no two of a pool are the same."""
    left = {name: rng.sample(words.split(), len(words.split())) for name, words in _POOLS.items()}
    made: dict[str, Callable[[], str]] = {
        "phone": lambda: f"{_digits(rng, 3)}-{_digits(rng, 4)}",
        "time": lambda: f"{rng.randrange(5, 12)}:{rng.randrange(10, 60)}",
        "year": lambda: f"1{_digits(rng, 3)}",
    }
    answers = []
    for _, pool, _, _ in _FORMS:
        if pool in left:
            answers.append(left[pool].pop())
        else:
            answers.append(made[pool]() if pool in made else _digits(rng, int(pool)))
    return answers


def _single_facts(rng: random.Random) -> list[Fact]:
    """A fact of each form, with answers that are numbers, words and times."""
    return [
        Fact(f"{before} {answer}{after.format(a=answer)}", ask, before, answer)
        for (before, _, after, ask), answer in zip(_FORMS, _draw_answers(rng), strict=True)
    ]


def _hide(rng: random.Random, filler: Sequence[str], hidden: Sequence[str]) -> str:
    """Filler with sentences hidden in it: in random order, at even distances."""
    order = list(range(len(hidden)))
    rng.shuffle(order)
    pieces: list[str] = []
    done = 0
    for index, which in enumerate(order):
        place = round(len(filler) * (index + 0.5) / len(order))
        pieces += [*filler[done:place], hidden[which]]
        done = place
    return " ".join([*pieces, *filler[done:]])


def _depth(text: str, sentence: str) -> float:
    return round(text.index(sentence) / max(len(text) - len(sentence), 1), 4)


def _needles(rng: random.Random, size: int, filler: Filler) -> Context:
    """Filler of `size` sentences with a fact of each form, 4 magic and 4 lucky numbers."""
    single = _single_facts(rng)
    keys = rng.sample(NOUNS, 4)
    multi_key = [_magic(key, _digits(rng, 5)) for key in keys]
    lucky = [_digits(rng, 4) for _ in range(4)]
    hidden = [fact.sentence for fact in (*single, *multi_key)]
    hidden += [f"A lucky number of the village is {number}." for number in lucky]
    order = random.Random(rng.random())
    body = _hide(order, filler.take(rng, size), hidden)
    text = (
        "Facts and special magic numbers are hidden within the following text. Make sure to "
        f"memorize them. I will ask you about them afterwards.\n\n{body}"
    )
    named = ", ".join(keys)
    return Context(
        text,
        (
            *(
                Question(task, _depth(text, fact.sentence), fact.ask, fact.lead, (fact.answer,))
                for task, facts in (("single", single), ("multi-key", multi_key))
                for fact in facts
            ),
            Question(
                "multi-query",
                None,
                f"What are the special magic numbers for {named} mentioned in the text above?",
                f"The special magic numbers for {named} mentioned in the text are:",
                tuple(fact.answer for fact in multi_key),
                LONG_REPLY,
            ),
            Question(
                "multi-value",
                None,
                "What are all the lucky numbers of the village mentioned in the text above?",
                "The four lucky numbers of the village are:",
                tuple(lucky),
                LONG_REPLY,
            ),
        ),
    )


def _lines(rng: random.Random, size: int, filler: Filler) -> Context:
    """`size` lines beside the 20 that are asked for, in random order."""
    keys = list(dict.fromkeys((*NOUNS, *ADJECTIVES, *PEOPLE, *WEATHER, *SEASONS)))
    rng.shuffle(keys)
    keys += rng.sample(NAMES, len(NAMES))
    keys = keys[: 20 + size]
    drawn = random.Random(rng.random())
    content = {key: _digits(drawn, 4) for key in keys}
    asked = keys[:20]
    random.Random(rng.random()).shuffle(keys)
    body = "\n".join(f"line {key}: REGISTER_CONTENT is {content[key]}" for key in keys)
    text = (
        "Below is a record of lines. Each line has a name and a register. I will ask you for "
        f"the content of the register of some lines.\n\n{body}"
    )
    return Context(
        text,
        tuple(
            Question(
                "lines",
                _depth(text, f"line {key}:"),
                f"What is the REGISTER_CONTENT in line {key}?",
                f"line {key}: REGISTER_CONTENT is",
                (content[key],),
            )
            for key in asked
        ),
    )


def _variables(rng: random.Random, size: int, filler: Filler) -> Context:
    """Filler of `size` sentences with six chains of three assignments."""
    drawn = ("".join(rng.choices(string.ascii_uppercase, k=5)) for _ in range(40))
    names = list(dict.fromkeys(drawn))
    chains = [(_digits(rng, 5), names[first : first + 3]) for first in range(0, 18, 3)]
    steps: list[list[str]] = [[], [], []]
    for value, (first, second, third) in chains:
        steps[0].append(f"VAR {first} = {value}.")
        steps[1].append(f"VAR {second} = VAR {first}.")
        steps[2].append(f"VAR {third} = VAR {second}.")
    prose = filler.take(random.Random(rng.random()), size)
    third_of = len(prose) // 3
    parts = [prose[:third_of], prose[third_of : 2 * third_of], prose[2 * third_of :]]
    body = " ".join(_hide(rng, part, step) for part, step in zip(parts, steps, strict=True))
    text = f"Memorize and track the chains of variable assignments in the following text.\n\n{body}"
    return Context(
        text,
        tuple(
            Question(
                "variables",
                None,
                f"Find all variables that are assigned the value {value}, directly or through "
                "another variable.",
                f"The three variables that are assigned the value {value} are: {chain[0]},",
                tuple(chain[1:]),
                24,
            )
            for value, chain in chains
        ),
    )


def _listed(rng: random.Random, words: Sequence[str], counts: Sequence[int]) -> str:
    """A numbered list in which each word stands as often as it should."""
    entries = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    rng.shuffle(entries)
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, 1))


def _common(rng: random.Random, size: int, filler: Filler) -> Context:
    """Ten words 30 times (fewer in a short context), `size` others three times."""
    drawn = rng.sample(NOUNS + ADJECTIVES + PEOPLE + WEATHER + SEASONS, 10)
    others = [name for name in NAMES if name not in drawn]
    size = min(size, len(others))
    often = 4 + size // 5
    counts = [often] * 10 + [3] * size
    body = _listed(random.Random(rng.random()), [*drawn, *others[:size]], counts)
    text = f"Below is a numbered list of words. Memorize the ones that appear most often.\n\n{body}"
    ask = "What are the 10 most common words in the above list?"
    lead = "The 10 words that appear most often in the list are:"
    return Context(text, (Question("common-words", None, ask, lead, tuple(drawn), LONG_REPLY),))


def _frequent(rng: random.Random, size: int, filler: Filler) -> Context:
    """Coded words, the n-th of them as often as 1/n^2 of a Zeta distribution."""
    words = ["".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(60)]
    counts = [max(1, size // (rank * rank)) for rank in range(1, 61)]
    entries = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
    random.Random(rng.random()).shuffle(entries)
    text = (
        "Read the following coded text and track how often each coded word appears.\n\n"
        f"{' '.join(entries)}"
    )
    ask = "What are the three most frequent words in the above coded text?"
    lead = "The three most frequent words are:"
    return Context(text, (Question("frequent-words", None, ask, lead, tuple(words[:3]), 32),))


_TOPICS = {
    "weather": ("The {weather} will last until the {season}.", "We expect {weather} at {season}."),
    "travel": ("{name} took the coach to {place}.", "The road to {place} is closed to {who}s."),
    "trade": ("A {who} bought the {thing} for a low price.", "{name} sold a {adj} {thing}."),
    "craft": ("{name} polished the {adj} {thing}.", "The {who} repaired a {thing} by hand."),
    "music": ("{name} sang a {adj} song at {season}.", "The {who} plays the flute in {place}."),
    "food": ("{name} baked bread in {place}.", "The {who} cooked a {adj} soup at {season}."),
}


def _example(rng: random.Random, topic: str) -> str:
    return rng.choice(_TOPICS[topic]).format(
        weather=rng.choice(WEATHER),
        season=rng.choice(SEASONS),
        name=rng.choice(NAMES).capitalize(),
        place=rng.choice(NAMES).capitalize(),
        who=rng.choice(PEOPLE),
        adj=rng.choice(ADJECTIVES),
        thing=rng.choice(NOUNS),
    )


def _classify(rng: random.Random, size: int, filler: Filler) -> Context:
    """`size` examples of six topics, whose names are the labels."""
    topics = list(_TOPICS)
    asked = [(topic := rng.choice(topics), _example(rng, topic)) for _ in range(20)]
    shown = [(topic := topics[i % 6], _example(rng, topic)) for i in range(size)]
    body = "\n".join(f"Text: {text} Label: {topic}" for topic, text in shown)
    text = f"Give each text the label that fits, as in these examples.\n\n{body}"
    return Context(
        text,
        tuple(
            Question("classify", None, f"Text: {text}", "Label:", (topic,), 8)
            for topic, text in asked
        ),
    )


_BUILDERS: dict[str, Callable[..., Context]] = {
    "needles": _needles,
    "lines": _lines,
    "variables": _variables,
    "common": _common,
    "frequent": _frequent,
    "classify": _classify,
}
KINDS = tuple(_BUILDERS)

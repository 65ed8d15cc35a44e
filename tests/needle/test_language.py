"""The needle language: lengths are exact, facts are where they should be."""

import random

import pytest

from models.needle.language import (
    FACT_WORDS,
    NUMBERS,
    QUESTION_WORDS,
    WORDS,
    draw_facts,
    draw_prose,
    haystack,
    render,
)
from models.needle.tokenizer import SPECIAL, TOKEN_IDS, UNK, encode, make_tokenizer


def facts_of(words: list[str]) -> list[int]:
    """Places at which facts begin."""
    return [i for i in range(len(words) - 1) if words[i : i + 2] == ["the", "code"]]


def test_vocabulary_has_no_word_twice() -> None:
    """Each word has one id, and none of them is a special token's."""
    assert len(set(WORDS)) == len(WORDS)
    assert len(TOKEN_IDS) == len(WORDS) + len(SPECIAL)


@pytest.mark.parametrize("num_words", [0, 1, 2, 63, 111, 1000])
def test_prose_is_as_long_as_asked_and_has_no_numbers(num_words: int) -> None:
    """The haystack cannot give a code away, nor cut a sentence but the last."""
    sentences = draw_prose(random.Random(1), num_words)
    assert sum(len(sentence) for sentence in sentences) == num_words
    assert not any(set(sentence) & set(NUMBERS) for sentence in sentences)
    assert all(sentence[-1] == "." for sentence in sentences[:-1])


@pytest.mark.parametrize("count", [1, 7, 50])
def test_facts_are_about_different_things(count: int) -> None:
    """Every question has one answer."""
    facts = draw_facts(random.Random(2), count)
    assert len({(fact.adjective, fact.noun) for fact in facts}) == count
    for fact in facts:
        assert len(fact.sentence()) == FACT_WORDS
        assert len(fact.question()) == QUESTION_WORDS


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("num_words", [FACT_WORDS, 111, 1000])
def test_fact_stands_at_its_depth(num_words: int, depth: float) -> None:
    """A single fact begins within a sentence's length of the depth asked for."""
    rng = random.Random(3)
    facts = draw_facts(rng, 1)
    words = haystack(rng, facts, num_words, [depth])
    assert len(words) == num_words
    (place,) = facts_of(words)
    assert words[place : place + FACT_WORDS] == facts[0].sentence()
    assert place == pytest.approx(depth * (num_words - FACT_WORDS), abs=0.05 * num_words + 16)


def test_facts_keep_the_order_of_their_depths() -> None:
    """Depths belong to facts one by one, in any order given."""
    rng = random.Random(4)
    facts = draw_facts(rng, 3)
    words = haystack(rng, facts, 500, [0.9, 0.1, 0.5])
    things = [words[place + 4 : place + 6] for place in facts_of(words)]
    assert things == [[facts[i].adjective, facts[i].noun] for i in (1, 2, 0)]


def test_facts_that_do_not_fit_are_refused() -> None:
    rng = random.Random(5)
    with pytest.raises(ValueError, match="do not fit"):
        haystack(rng, draw_facts(rng, 3), 3 * FACT_WORDS - 1)


def test_rendered_text_has_a_token_a_word() -> None:
    """What the benchmarks send as text is what the model was trained on as ids."""
    rng = random.Random(6)
    words = haystack(rng, draw_facts(rng, 4), 500)
    tokenizer = make_tokenizer()
    assert tokenizer.encode(render(words), add_special_tokens=False) == encode(words)
    assert tokenizer.decode(encode(words)) == " ".join(words)


def test_people_may_write_as_they_like() -> None:
    """Capitals, missing spaces and unknown words are no obstacle."""
    tokenizer = make_tokenizer()
    written = tokenizer.encode("THE code is 471902.", add_special_tokens=False)
    assert written == encode(["the", "code", "is", "471", "902", "."])
    assert tokenizer.encode("Xyzzy", add_special_tokens=False) == [UNK]

"""Training sequences: what the needle model learns from.

    recall    <bos> <user> haystack with facts, question <assistant> code <eos> ...
    repeat    <bos> R R R ..., R random ids over the whole vocabulary
    passage   <bos> prose P prose P ..., the same passage P copied
    prose     <bos> prose

Each token that can be looked up in the context is marked, so that the loss can weight
it: ANSWER for an answer, COPY for a repeated token, PLAIN for the rest.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import torch

from models.needle.language import (
    CODE_NUMBERS,
    FACT_WORDS,
    NOUNS,
    QUESTION_WORDS,
    draw_facts,
    draw_prose,
    haystack,
)
from models.needle.tokenizer import ASSISTANT, BOS, EOS, TOKEN_IDS, USER, encode

PLAIN, COPY, ANSWER = range(3)
NAMES = ("plain", "copy", "answer")
TURN_TOKENS = 1 + QUESTION_WORDS + 1 + CODE_NUMBERS + 1
"""Tokens of a chat turn: <user>, question, <assistant>, code, <eos>."""


class Sequence(NamedTuple):
    """Token ids and, for each, its mark as a target of prediction."""

    ids: list[int]
    marks: list[int]


class Batch(NamedTuple):
    """Sequences of one length: ids, marks [batch, length] of int64."""

    ids: torch.Tensor
    marks: torch.Tensor


def recall(rng: random.Random, length: int, own_nouns: bool = True) -> Sequence:
    """A chat about a haystack: as many facts as fit, or fewer; every one is asked for.

    Args:
        own_nouns: see `draw_facts`.
    """
    most = max((length - 2) // (FACT_WORDS + TURN_TOKENS), 1)
    # Many facts teach most; few facts in much prose are what the benchmarks ask for.
    few = round(math.exp(rng.random() * math.log(most)))
    num_facts = few if rng.random() < 0.5 else rng.randint(-(-most // 2), most)
    num_facts = min(num_facts, len(NOUNS)) if own_nouns else num_facts
    facts = draw_facts(rng, num_facts, own_nouns)
    num_asked = min(num_facts, most)
    # <bos> and the last turns are fixed; the haystack's words fill the rest.
    words = haystack(rng, facts, length - 1 - num_asked * TURN_TOKENS)
    asked = rng.sample(facts, num_asked)
    ids = [BOS, USER, *encode(words)]
    marks = [PLAIN] * len(ids)
    for turn, fact in enumerate(asked):
        start = [USER] if turn else []
        question = [*start, *encode(fact.question()), ASSISTANT]
        ids += [*question, *encode(list(fact.code)), EOS]
        marks += [PLAIN] * len(question) + [ANSWER] * (CODE_NUMBERS + 1)
    return Sequence(ids, marks)


def repeat(rng: random.Random, length: int) -> Sequence:
    """A span of random ids over the whole vocabulary, repeated to the end.

    It has 4 to `length / 2` tokens, as often 4 to 8 as 8 to 16: short ones are learned first.
    """
    span = round(4 * math.exp(rng.random() * math.log(length / 8)))
    ids = rng.choices(range(len(TOKEN_IDS)), k=span)
    ids = [BOS, *(ids * -(-length // span))][:length]
    return Sequence(ids, [PLAIN] * (span + 1) + [COPY] * (length - span - 1))


def passage(rng: random.Random, length: int) -> Sequence:
    """Prose in which one passage is repeated, with other prose between its copies."""
    size = rng.randint(length // 8, length // 3)
    copied = _prose_ids(rng, size)
    before = rng.randint(0, length - 1 - 2 * size)
    between = rng.randint(0, length - 1 - 2 * size - before)
    after = length - 1 - 2 * size - before - between
    ids = [BOS, *_prose_ids(rng, before), *copied, *_prose_ids(rng, between), *copied]
    ids += _prose_ids(rng, after)
    marks = [PLAIN] * length
    # The first words of the second copy cannot be predicted yet.
    start = 1 + before + size + between
    known = min(3, size)
    marks[start + known : start + size] = [COPY] * (size - known)
    return Sequence(ids, marks)


def prose(rng: random.Random, length: int) -> Sequence:
    """Plain prose."""
    return Sequence([BOS, *_prose_ids(rng, length - 1)], [PLAIN] * length)


def _prose_ids(rng: random.Random, num_words: int) -> list[int]:
    return encode([word for sentence in draw_prose(rng, num_words) for word in sentence])


OTHER_TASKS: tuple[tuple[Callable[[random.Random, int], Sequence], float], ...] = (
    (repeat, 33.0),
    (passage, 8.0),
    (prose, 5.0),
)
"""Tasks other than recall, and their relative shares."""


def draw_batch(
    rng: random.Random,
    length: int,
    num_tokens: int,
    own_nouns: float = 1.0,
    recall_share: float = 0.54,
) -> Batch:
    """Sequences of `length` tokens, `num_tokens` in all (one sequence at least).

    Args:
        own_nouns: share of the recalled contexts in which no two facts share a noun.
        recall_share: share of the sequences that are `recall`.
    """
    others, weights = zip(*OTHER_TASKS, strict=True)
    rest = (1 - recall_share) / sum(weights)
    shares = [recall_share, *(weight * rest for weight in weights)]
    drawn = []
    for task in rng.choices([recall, *others], shares, k=max(num_tokens // length, 1)):
        if task is recall:
            own = own_nouns > 0 and rng.random() < own_nouns
            drawn.append(recall(rng, length, own))
        else:
            drawn.append(task(rng, length))
    return Batch(
        torch.tensor([sequence.ids for sequence in drawn]),
        torch.tensor([sequence.marks for sequence in drawn]),
    )

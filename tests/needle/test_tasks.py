"""Training sequences: exact lengths, and marks only on what can be looked up."""

import random

import pytest

from models.needle.language import CODE_NUMBERS
from models.needle.tasks import (
    ANSWER,
    COPY,
    PLAIN,
    draw_batch,
    passage,
    prose,
    recall,
    repeat,
)
from models.needle.tokenizer import ASSISTANT, BOS, EOS, USER, encode, make_tokenizer

LENGTHS = [64, 111, 128, 1000]


@pytest.mark.parametrize("task", [recall, repeat, passage, prose])
@pytest.mark.parametrize("length", LENGTHS)
def test_sequences_are_as_long_as_asked(task, length: int) -> None:
    """Batches are packed: no padding."""
    for seed in range(20):
        sequence = task(random.Random(seed), length)
        assert len(sequence.ids) == len(sequence.marks) == length
        assert sequence.ids[0] == BOS
        assert sequence.marks[0] == PLAIN


@pytest.mark.parametrize("length", LENGTHS)
def test_repeated_tokens_are_repeated(length: int) -> None:
    """A copied token stands one span earlier too."""
    for seed in range(20):
        ids, marks = repeat(random.Random(seed), length)
        span = marks.index(COPY) - 1
        assert 4 <= span <= length // 2
        assert all(ids[i] == ids[i - span] for i in range(length) if marks[i] == COPY)


@pytest.mark.parametrize("length", LENGTHS)
def test_answers_are_in_the_haystack(length: int) -> None:
    """Each answer is the code that the haystack gives to the thing asked for."""
    for seed in range(20):
        ids, marks = recall(random.Random(seed), length)
        answers = [i for i in range(length) if marks[i] == ANSWER and marks[i - 1] == PLAIN]
        assert answers
        for start in answers:
            assert ids[start - 1] == ASSISTANT
            end = start + CODE_NUMBERS
            assert ids[end] == EOS
            thing, code = ids[start - 4 : start - 2], ids[start:end]
            fact = [*encode(["the", "code", "of", "the"]), *thing, *encode(["is"]), *code]
            assert fact in [ids[i : i + len(fact)] for i in range(start - len(fact))]


def test_training_chats_are_laid_out_as_the_chat_template_says() -> None:
    """What the served model is shown has the form that it was trained on."""
    ids, _ = recall(random.Random(0), 200)
    tokenizer = make_tokenizer()
    turns: list[dict[str, str]] = []
    rest = ids[1:]
    while rest:
        end = rest.index(ASSISTANT)
        turns.append({"role": "user", "content": tokenizer.decode(rest[1:end])})
        stop = rest.index(EOS)
        turns.append({"role": "assistant", "content": tokenizer.decode(rest[end + 1 : stop])})
        rest = rest[stop + 1 :]
    assert ids.count(USER) == len(turns) / 2
    assert tokenizer.apply_chat_template(turns, return_dict=False) == ids


def test_batches_depend_on_their_seed_alone() -> None:
    one = draw_batch(random.Random("0/7"), 128, 1024)
    other = draw_batch(random.Random("0/7"), 128, 1024)
    assert one.ids.shape == (8, 128)
    assert one.ids.equal(other.ids)
    assert one.marks.equal(other.marks)

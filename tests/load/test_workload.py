"""The load is what was asked for, and the same whenever the seed is."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.load.workload import Workload, read_workload, request_body

SMALL = Workload(
    sessions=60,
    prompt_tokens=(20, 90),
    output_tokens=(3, 7),
    turn_tokens=(5, 9),
    turns=(1, 4),
    prefix_share=0.5,
    prefix_tokens=15,
    cancel_share=0.5,
    invalid_share=0.1,
)


def num_words(text: str) -> int:
    return len(text.split())


def test_sessions_depend_on_their_seed_alone() -> None:
    """Twice the same; another with another seed; a longer list begins as a shorter one."""
    drawn = list(SMALL.draw())
    assert drawn == list(SMALL.draw())
    assert drawn != list(replace(SMALL, seed=1).draw())
    assert drawn == list(islice(replace(SMALL, sessions=0).draw(), 60))
    assert drawn[:20] == list(replace(SMALL, sessions=20).draw())


def test_lengths_are_in_their_ranges() -> None:
    """Words of first and later turns, reply lengths, and numbers of turns."""
    for session in SMALL.draw():
        assert 1 <= len(session.turns) <= (4 if session.route == "chat" else 1)
        assert 20 <= num_words(session.turns[0].text) <= 90
        assert all(5 <= num_words(turn.text) <= 9 for turn in session.turns[1:])
        assert all(3 <= turn.max_tokens <= 7 for turn in session.turns)


def test_a_session_ends_with_its_cancelled_request() -> None:
    """Half of the cancelled ones after some chunks, the rest after some time."""
    turns = [turn for session in SMALL.draw() for turn in session.turns[:-1]]
    assert not any(turn.cancels for turn in turns)
    last = [session.turns[-1] for session in SMALL.draw()]
    by_chunks = [turn for turn in last if turn.cancel_after is not None]
    by_time = [turn for turn in last if turn.cancel_seconds is not None]
    assert not set(by_chunks) & set(by_time)
    assert all(1 <= turn.cancel_after <= turn.max_tokens for turn in by_chunks)
    assert all(0 <= turn.cancel_seconds <= SMALL.cancel_seconds for turn in by_time)
    assert min(len(by_chunks), len(by_time)) >= 5


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_shares_are_shares_of_the_sessions(share: float) -> None:
    """Of 400 sessions, as many as asked for within four standard deviations."""
    names = ("chat_share", "prefix_share", "cancel_share", "invalid_share", "full_share")
    drawn = list(replace(SMALL, sessions=400, **dict.fromkeys(names, share)).draw())
    prefixes = {" ".join(s.turns[0].text.split()[:12]) for s in drawn}
    counted = {
        "chat": sum(session.route == "chat" for session in drawn),
        "invalid": sum(session.invalid for session in drawn),
        "full": sum(session.full for session in drawn),
    }
    if share == 1.0:
        assert len(prefixes) == SMALL.prefixes
    if share == 0.0:
        assert len(prefixes) == len(drawn)
    margin = 4 * (400 * share * (1 - share)) ** 0.5
    assert all(abs(count - 400 * share) <= margin for count in counted.values())


def test_words_follow_the_tokenizer() -> None:
    """A model with two tokens a word gets half of the words."""
    whole, half = (
        [num_words(session.turns[0].text) for session in replace(SMALL, words_per_token=w).draw()]
        for w in (1.0, 0.5)
    )
    assert all(abs(h - w / 2) <= 1 for h, w in zip(half, whole, strict=True))


def test_the_longest_session_fits() -> None:
    """`most_tokens` bounds every session's prompts and replies, with marks for each."""
    for session in replace(SMALL, cancel_share=0.0).draw():
        said = sum(num_words(turn.text) + turn.max_tokens + 4 for turn in session.turns)
        assert said <= SMALL.most_tokens


def test_a_file_gives_back_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "workload.json"
    path.write_text(SMALL.to_json(), encoding="utf-8")
    assert read_workload(path) == SMALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "accepted is an object"),
        ("{", "cannot read workload"),
        ('{"sesions": 3}', "accepted is an object with keys of seed, sessions"),
        ('{"turns": [0, 1]}', "turns is 0 1"),
        ('{"output_tokens": [9, 3]}', "output_tokens is 9 3"),
        ('{"cancel_share": 1.5}', "cancel_share is 1.5"),
        ('{"users": 0}', "users is 0"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "workload.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_workload(path)


def test_bodies_ask_for_exactly_the_tokens_drawn() -> None:
    """The end token does not end a reply; a session that opts out says so in each request."""
    said = [{"role": "user", "content": "x"}]
    for session in replace(SMALL, full_share=0.5).draw():
        for turn in session.turns:
            body = request_body("m", session, said, turn)
            assert body["ignore_eos"]
            assert body["stream"]
            assert (body["max_tokens"] == turn.max_tokens) != session.invalid
            assert ("vllm_xargs" in body) == session.full
            assert body.get("messages", said) == said
            assert body.get("prompt", "x") == "x"
            assert ("messages" in body) == (session.route == "chat") == ("prompt" not in body)


def test_an_invalid_body_asks_for_more_than_any_model_has() -> None:
    session = next(replace(SMALL, invalid_share=1.0).draw())
    assert request_body("m", session, [{"content": "x"}], session.turns[0])["max_tokens"] > 2**29

"""What is read from a stream: tokens, times and how it ended."""

import json
import re
from collections.abc import Iterator

import pytest

from benchmarks.load.streaming import Record, StreamReader


def event(**data) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def text(token: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": token, "finish_reason": finish}])


def delta(finish: str | None = None, **content) -> bytes:
    return event(choices=[{"index": 0, "delta": content, "finish_reason": finish}])


def usage(output: int, prompt: int = 5, cached: int | None = None) -> bytes:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return event(
        choices=[], usage={"prompt_tokens": prompt, "completion_tokens": output, **details}
    )


DONE = b"data: [DONE]\n\n"


def read(events: list[bytes], times: list[float], asked: int, **how) -> tuple[Record, str]:
    """The record of a stream; times: of the start, then of each token."""
    clock: Iterator[float] = iter(times)
    record = Record(0, 0, "chat", start=100.0, asked_tokens=asked, status=200)
    reader = StreamReader(record, lambda: next(clock))
    for one in events:
        reader.take(one)
    reader.finish(**how)
    return record, "".join(reader.text)


def test_completions_are_timed_by_their_chunks() -> None:
    """Start at 10; tokens at 11, 11.5 and 13."""
    events = [text("a"), text(" b"), text(" c", "length"), usage(3, 7, 4), DONE]
    record, said = read(events, [10.0, 11.0, 11.5, 13.0], asked=3)
    assert (record.outcome, record.error, said) == ("done", "", "a b c")
    assert record.ttft == 1.0
    assert record.gaps == [0.5, 1.5]
    assert record.seconds == 3.0
    assert record.chunk_times == [101.0, 101.5, 103.0]
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (7, 3, 4)


def test_a_chats_opening_chunk_is_no_token() -> None:
    """The role comes without text; the clock is not even read for it."""
    events = [delta(role="assistant", content=""), delta(content="a")]
    events += [delta("length", content="b"), usage(2), DONE]
    record, said = read(events, [0.0, 2.0, 3.0], asked=2)
    assert (record.outcome, said) == ("done", "ab")
    assert record.ttft == 2.0
    assert record.gaps == [1.0]


def test_a_token_without_text_counts() -> None:
    """Special tokens have no text, and came all the same."""
    record, _ = read([text(""), text("a", "length"), usage(2), DONE], [0, 1, 2], asked=2)
    assert (record.ttft, record.gaps) == (1, [1])


def test_several_events_at_once_and_comments() -> None:
    """What stands between two blank lines may hold more than one event."""
    joined = b": ping\n" + text("a") + text("b", "length") + usage(2) + DONE
    record, said = read([joined], [0, 1, 2], asked=2)
    assert (record.outcome, said) == ("done", "ab")


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([text("a"), text("b", "length"), usage(2)], r"without \[DONE\]"),
        ([text("a"), text("b", "stop"), usage(2), DONE], "finish reason stop"),
        ([text("a", "length"), usage(1), DONE], "1 of 2 tokens"),
        ([text("a"), event(error={"message": "no"}), DONE], "in the stream: .*no"),
        ([], r"without \[DONE\]"),
    ],
)
def test_a_stream_that_ends_otherwise_is_an_error(events: list[bytes], message: str) -> None:
    record, _ = read(events, [0.0, 1.0, 2.0, 3.0], asked=2)
    assert record.outcome == "error"
    assert re.search(message, record.error)


def test_a_cancelled_stream_counts_what_came() -> None:
    """No usage comes; its time ends with the last token."""
    record, _ = read([text("a"), text("b")], [0.0, 1.0, 4.0], asked=9, outcome="cancelled")
    assert (record.outcome, record.error) == ("cancelled", "")
    assert (record.output_tokens, record.seconds) == (2, 4.0)


def test_a_stream_cancelled_before_its_first_token_has_no_ttft() -> None:
    record, _ = read([], [0.0, 2.5], asked=9, outcome="cancelled")
    assert (record.ttft, record.output_tokens, record.seconds) == (None, 0, 2.5)
    assert record.chunk_times == []


def test_a_record_goes_through_json() -> None:
    """Times to the ten-thousandth, gaps to the hundred-thousandth of a second."""
    record = Record(1, 2, "chat", 1.23456, 3, ttft=0.5, gaps=[0.0123456], seconds=1.0)
    back = Record(**json.loads(record.to_json()))
    assert (back.start, back.gaps) == (1.2346, [0.01235])
    assert (back.session, back.turn, back.ttft) == (1, 2, 0.5)

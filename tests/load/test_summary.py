"""Figures against values computed by hand."""

import pytest

from benchmarks.load.run import Measured
from benchmarks.load.sampler import Sample
from benchmarks.load.streaming import Record
from benchmarks.load.summary import (
    curve,
    curves,
    duration,
    mean_over_time,
    percentiles,
    summarise,
    tokens_over_time,
)


def record(start: float, ttft: float, gaps: list[float], outcome: str = "done") -> Record:
    tokens = len(gaps) + 1
    return Record(
        session=0,
        turn=0,
        route="completions",
        start=start,
        asked_tokens=tokens,
        outcome=outcome,
        prompt_tokens=10,
        output_tokens=tokens,
        ttft=ttft,
        gaps=gaps,
        seconds=ttft + sum(gaps),
    )


def sample(time: float, running: float, usage: float = 0.5, preempted: float = 0.0) -> Sample:
    return Sample(time, running, running / 2, usage, preempted, hits=30.0, queries=120.0)


# Requests run from 0 to 4 s and from 1 to 5 s; a cancelled one ends at 10 s.
RECORDS = [
    record(0.0, 1.0, [1.0, 2.0]),
    record(1.0, 3.0, [0.5, 0.5]),
    record(2.0, 7.0, [1.0], outcome="cancelled"),
]
SAMPLES = [sample(0, 0), sample(2, 4, 0.9, 1), sample(10, 2, 0.3, 5)]


def test_summary_of_three_requests() -> None:
    """Six tokens of finished requests in ten seconds; the cancelled one lends its time only."""
    summary = summarise(Measured(RECORDS, SAMPLES))
    assert summary["requests"] == {"done": 2, "cancelled": 1}
    assert summary["seconds"] == 10.0
    assert summary["output_tokens"] == 6
    assert summary["prompt_tokens"] == 20
    assert summary["output_tokens_per_second"] == pytest.approx(0.6)
    assert summary["requests_per_second"] == pytest.approx(0.2)
    assert summary["ttft"]["p50"] == 2.0
    assert summary["ttft"]["mean"] == 2.0
    # Sorted gaps 0.5, 0.5, 1, 2: the 50th percentile lies half-way, the 90th at 0.7.
    assert summary["gap"]["p50"] == pytest.approx(0.75)
    assert summary["gap"]["p90"] == pytest.approx(1.7)
    assert summary["request_seconds"]["p50"] == 4.0


def test_summary_of_the_server() -> None:
    """Trapezes: (0+4)/2 * 2 + (4+2)/2 * 8 = 28 request-seconds in ten seconds."""
    summary = summarise(Measured(RECORDS, SAMPLES))
    assert summary["mean_running"] == pytest.approx(2.8)
    assert summary["mean_waiting"] == pytest.approx(1.4)
    assert summary["most_running"] == 4
    assert summary["most_kv_usage"] == 0.9
    assert summary["preemptions"] == 5
    assert summary["hit_share"] == 0.25


def test_nothing_done_has_no_percentiles() -> None:
    """A run of failures is summed up too."""
    failed = Record(0, 0, "chat", 1.0, 4, outcome="error", seconds=2.0)
    summary = summarise(Measured([failed], []))
    assert summary["requests"] == {"error": 1}
    assert summary["ttft"] == {}
    assert summary["output_tokens_per_second"] == 0.0
    assert percentiles([]) == {}
    assert curve([]) == []
    assert duration([]) == 0.0


def test_one_sample_is_its_own_mean() -> None:
    assert mean_over_time([sample(3, 4)], [4.0]) == 4.0


def test_a_curve_rises_from_least_to_most() -> None:
    points = curve([4.0, 1.0, 3.0])
    assert points[0] == [1.0, 0.0]
    assert points[-1] == [4.0, 1.0]
    assert points == sorted(points)
    assert [3.0, 0.5] in points


def test_tokens_over_time_count_each_token_once() -> None:
    """Tokens at 1, 2, 4 and 4, 4.5, 5 and 9, 10 s, in bins of one second."""
    points = tokens_over_time(RECORDS, bins=10)
    assert [middle for middle, _ in points] == pytest.approx([i + 0.5 for i in range(10)])
    assert [rate for _, rate in points] == pytest.approx([0, 1, 1, 0, 3, 1, 0, 0, 0, 2])


def test_latencies_are_of_finished_requests() -> None:
    found = curves(Measured(RECORDS, SAMPLES))
    assert found["ttft"][-1] == [3.0, 1.0]
    assert found["request_seconds"][-1] == [4.0, 1.0]
    assert found["gap"][-1] == [2.0, 1.0]

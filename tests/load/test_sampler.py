"""What a server tells of its memory, and what is made of it."""

import json
import os

import pytest

from benchmarks.load.sampler import (
    Sample,
    Sampler,
    read_checks,
    read_metrics,
    read_pools,
    rss_of,
    since_start,
)

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="m"} 7.0
# TYPE vllm:e2e_request_latency_seconds histogram
vllm:e2e_request_latency_seconds_bucket{engine="0",le="0.3",model_name="m"} 1.0
python_info{version="3.11"} 1.0
"""


def amount(pages: int) -> dict[str, int]:
    return {"pages": pages, "bytes": 100 * pages}


def engine(held: int, cached: int, free: int, checks: int, violations: int) -> dict:
    return {
        "free": amount(free),
        "pools": [
            {"name": "retrieval", "held": amount(held), "cached": amount(cached)},
            {"name": "local", "held": amount(2 * held), "cached": amount(0)},
        ],
        "integrity": {"checks": checks, "violations": violations},
    }


MEMORY = {"engines": [engine(3, 1, 5, 2, 0), engine(1, 0, 9, 4, 1)]}


def test_metrics_are_summed_over_engines() -> None:
    values = read_metrics(METRICS)
    assert values["vllm:num_requests_running"] == 5
    assert values["vllm:num_preemptions_total"] == 7
    assert values["vllm:kv_cache_usage_perc"] == 0.25
    assert len(values) == 3


def test_pools_are_summed_over_engines() -> None:
    assert read_pools(MEMORY) == {
        "any": {"free": 1400},
        "retrieval": {"held": 400, "cached": 100},
        "local": {"held": 800, "cached": 0},
    }
    assert read_checks(MEMORY) == (6, 1)


def test_a_server_without_the_memory_route_is_asked_for_it_once() -> None:
    """A stock server: what its metrics tell, and no pools."""
    asked: list[str] = []

    def get(path: str) -> tuple[int, str]:
        asked.append(path)
        return (200, METRICS) if path == "/metrics" else (404, "{}")

    sampler = Sampler(get, lambda: 1.5)
    for _ in range(3):
        sample = sampler.sample()
        assert sample is not None
        assert (sample.time, sample.running, sample.kv_usage) == (1.5, 5, 0.25)
        assert (sample.pools, sample.checks, sample.rss) == ({}, None, None)
    assert asked.count("/v1/razor/memory") == 1
    assert asked.count("/metrics") == 3


def test_a_busy_memory_route_is_asked_again() -> None:
    """503 is not 404: the next sample has the pools."""
    answers = iter([(503, ""), (200, json.dumps(MEMORY))])

    def get(path: str) -> tuple[int, str]:
        return (200, METRICS) if path == "/metrics" else next(answers)

    sampler = Sampler(get, lambda: 0.0, os.getpid())
    first, second = sampler.sample(), sampler.sample()
    assert first is not None
    assert second is not None
    assert (first.pools, first.checks) == ({}, None)
    assert second.pools["local"]["held"] == 800
    assert (second.checks, second.violations) == (6, 1)
    assert second.rss is not None
    assert second.rss > 2**20


def test_a_server_that_does_not_answer_gives_no_sample() -> None:
    def refuse(path: str) -> tuple[int, str]:
        raise ConnectionRefusedError(path)

    assert Sampler(refuse, lambda: 0.0).sample() is None
    assert Sampler(lambda path: (500, ""), lambda: 0.0).sample() is None


def test_counters_count_from_the_first_sample() -> None:
    """What the server did before the run is not the run's."""
    raw = [Sample(t, 1, 0, 0.5, 10 + t, 100 + t, 200 + 2 * t) for t in (0, 1, 3)]
    kept = since_start(raw)
    assert [s.preemptions for s in kept] == [0, 1, 3]
    assert [s.hits for s in kept] == [0, 1, 3]
    assert [s.queries for s in kept] == [0, 2, 6]
    assert [s.kv_usage for s in kept] == [0.5, 0.5, 0.5]
    assert since_start([]) == []


def test_a_process_that_is_gone_has_no_size() -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(2**22 + 1, 0)
    assert rss_of(2**22 + 1) is None

"""Figures of a run, from its records and samples.

Medians and percentiles interpolate linearly (numpy's default, as in `vllm bench serve`);
times are seconds. Rates and latencies are of requests that came to their end.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.load.run import Measured
from benchmarks.load.sampler import Sample
from benchmarks.load.streaming import Record

PERCENTILES = (50, 90, 99)
_CURVE_POINTS = np.concatenate([np.arange(0, 100), [99.5, 99.9, 100.0]])


def summarise(measured: Measured) -> dict[str, Any]:
    """Everything the report says about one run.

    Returns:
        requests, output_tokens, prompt_tokens: counts. seconds: from the first request's
        start to the last one's end. output_tokens_per_second, requests_per_second.
        ttft, follow_up_ttft (a chat's later turns), gap, request_seconds: percentiles.
        preemptions, most_running, mean_running, mean_waiting, most_kv_usage, hit_share: of the
        server's samples.
    """
    records = measured.records
    done = [record for record in records if record.outcome == "done"]
    seconds = duration(records)
    output = sum(record.output_tokens for record in done)
    return {
        "requests": dict(Counter(record.outcome for record in records)),
        "seconds": seconds,
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in done),
        "output_tokens": output,
        "output_tokens_per_second": output / seconds if seconds else 0.0,
        "requests_per_second": len(done) / seconds if seconds else 0.0,
        "ttft": percentiles(first_tokens(done)),
        "follow_up_ttft": percentiles(first_tokens([r for r in done if r.turn > 0])),
        "gap": percentiles(gaps(done)),
        "request_seconds": percentiles([record.seconds for record in done]),
        **server_figures(measured.samples, seconds),
    }


def server_figures(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """What the samples of the run's time say of the server."""
    during = [sample for sample in samples if sample.time <= seconds] or list(samples)
    if not during:
        return {}
    last = samples[-1]
    return {
        "preemptions": int(last.preemptions),
        "most_running": int(max(sample.running for sample in during)),
        "mean_running": mean_over_time(during, [sample.running for sample in during]),
        "mean_waiting": mean_over_time(during, [sample.waiting for sample in during]),
        "most_kv_usage": max(sample.kv_usage for sample in during),
        "hit_share": last.hits / last.queries if last.queries else 0.0,
    }


def mean_over_time(samples: Sequence[Sample], values: Sequence[float]) -> float:
    """Mean of a sampled value, by trapezes between the samples."""
    times = np.array([sample.time for sample in samples])
    span = times[-1] - times[0]
    return float(np.trapezoid(values, times) / span) if span else float(values[0])


def duration(records: Sequence[Record]) -> float:
    """Seconds from the first request's start to the last one's end."""
    if not records:
        return 0.0
    end = max(record.start + record.seconds for record in records)
    return end - min(record.start for record in records)


def first_tokens(records: Sequence[Record]) -> list[float]:
    """Times to first token."""
    return [record.ttft for record in records if record.ttft is not None]


def gaps(records: Sequence[Record]) -> list[float]:
    """Inter-token latencies of all records."""
    return [gap for record in records for gap in record.gaps]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean and `PERCENTILES`; empty for no values."""
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(np.mean(values)), **named}


def curve(values: Sequence[float]) -> list[list[float]]:
    """A cumulative distribution: [value, share of the values up to it], rising."""
    if not values:
        return []
    found = np.percentile(values, _CURVE_POINTS)
    return [[float(v), float(p) / 100] for v, p in zip(found, _CURVE_POINTS, strict=True)]


def tokens_over_time(records: Sequence[Record], bins: int = 60) -> list[list[float]]:
    """[middle of the bin, tokens per second in it], over the run's time."""
    times = [time for record in records for time in record.chunk_times]
    if not times:
        return []
    begin = min(record.start for record in records)
    counts, edges = np.histogram(times, bins=bins, range=(begin, max(times)))
    width = edges[1] - edges[0]
    middles = (edges[:-1] + edges[1:]) / 2
    rates = counts / width if width else counts
    return [[float(m), float(r)] for m, r in zip(middles, rates, strict=True)]


def curves(measured: Measured) -> dict[str, list[list[float]]]:
    """The report's distributions, and output tokens over time."""
    done = [record for record in measured.records if record.outcome == "done"]
    return {
        "ttft": curve(first_tokens(done)),
        "gap": curve(gaps(done)),
        "request_seconds": curve([record.seconds for record in done]),
        "tokens_per_second": tokens_over_time(measured.records),
    }

"""The server's memory while it works, by pool: one sample a second or so.

What a sample holds depends on the server: any vLLM server has `/metrics`; a server under
the razor policy also has `GET /v1/razor/memory`, with the bytes of each pool.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

METRICS_PATH = "/metrics"
MEMORY_PATH = "/v1/razor/memory"

_PREFIXES = ("vllm:kv_cache_usage_perc", "vllm:num_", "vllm:prefix_cache_")
"""Metrics that are read: a whole `/metrics` takes long to parse."""


@dataclass(frozen=True)
class Sample:
    """The server at one moment.

    time: seconds of the run. running, waiting: requests. kv_usage: share of the KV pages
    that requests hold. preemptions, hits, queries: so far, of the whole server; the last
    two are tokens looked up in the prefix cache. pools: bytes of each pool by state; empty
    where the server does not tell. checks, violations: integrity checks of the pages so
    far, and those that found something; None likewise. rss: bytes of the server's
    processes; None where they cannot be seen.
    """

    time: float
    running: float
    waiting: float
    kv_usage: float
    preemptions: float
    hits: float
    queries: float
    pools: dict[str, dict[str, float]] = field(default_factory=dict)
    checks: int | None = None
    violations: int | None = None
    rss: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def read_metrics(text: str) -> dict[str, float]:
    """The metrics that are used here, by name, summed over engines and other labels."""
    lines = [line for line in text.splitlines() if line.startswith(_PREFIXES)]
    values: dict[str, float] = {}
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


def read_pools(memory: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Bytes by pool and state, of `GET /v1/razor/memory`'s answer, summed over engines.

    Free pages are of either pool: theirs is called `any`.
    """
    pools: dict[str, dict[str, float]] = {}

    def add(name: str, state: str, amount: dict[str, int]) -> None:
        states = pools.setdefault(name, {})
        states[state] = states.get(state, 0) + amount["bytes"]

    for engine in memory.get("engines", ()):
        add("any", "free", engine["free"])
        for pool in engine["pools"]:
            for state in ("held", "cached"):
                add(pool["name"], state, pool[state])
    return pools


def read_checks(memory: dict[str, Any]) -> tuple[int | None, int | None]:
    """Integrity checks made and failed so far, of the same answer, summed over engines."""
    if "engines" not in memory:
        return None, None
    found = [engine["integrity"] for engine in memory["engines"]]
    return sum(one["checks"] for one in found), sum(one["violations"] for one in found)


def rss_of(pid: int) -> int | None:
    """Resident bytes of a process and its children; None where it is gone or not ours."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
        return sum(member.memory_info().rss for member in family)
    except psutil.Error:
        return None


class Sampler:
    """Takes samples of one server.

    Args:
        get: path -> (HTTP status, body).
        clock: seconds of the run.
        pid: of the server, where it runs on this machine.
    """

    def __init__(
        self,
        get: Callable[[str], tuple[int, str]],
        clock: Callable[[], float],
        pid: int | None = None,
    ) -> None:
        self._get = get
        self._clock = clock
        self._pid = pid
        self._tells_pools = True

    def sample(self) -> Sample | None:
        """The server now; None where it does not answer."""
        time = self._clock()
        try:
            status, text = self._get(METRICS_PATH)
            if status != 200:
                return None
            values = read_metrics(text)
            memory = self._memory()
        except OSError:
            return None
        checks, violations = read_checks(memory)
        return Sample(
            time=round(time, 3),
            running=values.get("vllm:num_requests_running", 0.0),
            waiting=values.get("vllm:num_requests_waiting", 0.0),
            kv_usage=values.get("vllm:kv_cache_usage_perc", 0.0),
            preemptions=values.get("vllm:num_preemptions_total", 0.0),
            hits=values.get("vllm:prefix_cache_hits_total", 0.0),
            queries=values.get("vllm:prefix_cache_queries_total", 0.0),
            pools=read_pools(memory),
            checks=checks,
            violations=violations,
            rss=None if self._pid is None else rss_of(self._pid),
        )

    def _memory(self) -> dict[str, Any]:
        """The memory route's answer; asked for until the server says that it has none."""
        if not self._tells_pools:
            return {}
        status, text = self._get(MEMORY_PATH)
        self._tells_pools = status != 404
        return json.loads(text) if status == 200 else {}


def since_start(samples: Iterable[Sample]) -> list[Sample]:
    """Samples with counters from the first one on."""
    kept = list(samples)
    if not kept:
        return []
    first = kept[0]
    return [
        Sample(
            **{
                **vars(s),
                "preemptions": s.preemptions - first.preemptions,
                "hits": s.hits - first.hits,
                "queries": s.queries - first.queries,
            }
        )
        for s in kept
    ]

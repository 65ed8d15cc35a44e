"""Prometheus metrics beside vLLM's, and the dashboard that reads them."""

import json
import re
import time
from pathlib import Path

import httpx
import pytest
from held_steps import slow
from prometheus_client.parser import text_string_to_metric_families
from servers import MODEL, until

pytestmark = pytest.mark.engine

DOCKER = Path(__file__).parents[2] / "docker"
Samples = dict[str, dict[frozenset, float]]


def scrape(http: httpx.Client) -> Samples:
    """Samples by name and labels."""
    samples: Samples = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    """Sum of the samples of a name that carry some labels."""
    wanted = set(labels.items())
    return sum(x for found, x in samples[f"vllm:razor_{name}"].items() if wanted <= found)


def settled(http: httpx.Client) -> Samples:
    """Samples once they have all that the server was asked before."""
    asked = http.get("/v1/razor/memory").json()["engines"][0]["requests"]["by_policy"]
    found: list[Samples] = []

    def all_counted() -> bool:
        found[:] = [scrape(http)]
        return all(value(found[0], "requests_total", policy=p) == n for p, n in asked.items())

    until(all_counted)
    return found[0]


def test_pages_and_shares_while_a_request_runs(http: httpx.Client) -> None:
    """Bytes are pages times the page's, states add up, and the share is below 1.

    The request is slow enough to outlast what is asked meanwhile.
    """
    body = {"model": MODEL, "prompt": "a" * 700, "max_tokens": 3000, "ignore_eos": True}
    body |= {"stream": True, "vllm_xargs": slow()}
    found: list[Samples] = []

    def shown() -> bool:
        found[:] = [scrape(http)]
        held = value(found[0], "pages", pool="local", state="held")
        return held > 0 and 0 < value(found[0], "kept_share") < 1

    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # closed with the last reference
        next(lines)
        until(shown)
        (samples,) = found
        engine = http.get("/v1/razor/memory").json()["engines"][0]
        assert value(samples, "pages") == engine["total"]["pages"]
        assert value(samples, "bytes") == engine["total"]["bytes"]
        assert value(samples, "saved_bytes") > 0
        assert len(samples["vllm:razor_layer_kept_share"]) == 4
    until(lambda: value(scrape(http), "pages", state="held") == 0)


def test_counters_follow_requests(http: httpx.Client) -> None:
    """Requests by policy, dropped tokens, cache hits by pool, integrity checks."""
    before = settled(http)
    body = {"model": MODEL, "prompt": "counted " * 80, "max_tokens": 40, "ignore_eos": True}
    full = {**body, "vllm_xargs": {"kv_policy": "full"}}
    for one in (body, body, full):
        assert http.post("/v1/completions", json=one).status_code == 200

    def grown(name: str, **labels: str) -> float:
        return value(scrape(http), name, **labels) - value(before, name, **labels)

    until(lambda: grown("requests_total", policy="razor") == 2)
    # The last one: what was read with it has all that the others did.
    until(lambda: grown("requests_total", policy="full") == 1)
    assert grown("dropped_tokens_total") > 0
    assert grown("prefix_cache_hit_tokens_total", pool="retrieval") > 0
    assert grown("prefix_cache_hit_tokens_total", pool="local") > 0
    until(lambda: grown("integrity_checks_total", result="intact") > 0)
    assert value(scrape(http), "integrity") == 1


def test_the_figures_say_when_they_were_read(http: httpx.Client) -> None:
    """Later with each reading: what no longer grows is stale."""
    first = value(settled(http), "read_timestamp_seconds")
    assert first <= time.time()
    until(lambda: value(scrape(http), "read_timestamp_seconds") > first)


def test_names_are_vllms_habit(http: httpx.Client) -> None:
    """Ours carry vLLM's first labels; none hides one of vLLM's."""
    samples = scrape(http)
    ours = {name for name in samples if name.startswith("vllm:razor_")}
    assert len(ours) > 8
    for name in ours:
        for labels in samples[name]:
            assert {"model_name", "engine"} <= {key for key, _ in labels}, name
    assert "vllm:num_requests_running" in samples


def test_the_dashboard_reads_metrics_that_exist(http: httpx.Client) -> None:
    """Every name in the dashboard's queries is on /metrics, and each panel has a query."""
    samples = scrape(http)
    names = {*samples, *(name.removesuffix("_bucket") for name in samples)}
    dashboard = json.loads((DOCKER / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len(panels) > 6
    for panel in panels:
        queries = [target["expr"] for target in panel["targets"]]
        assert queries, panel["title"]
        for name in re.findall(r"vllm:\w+", " ".join(queries)):
            assert name in names, (panel["title"], name)

"""Prometheus metrics of the pools, on vLLM's own /metrics.

They follow vLLM's conventions: names begin with `vllm:` (vLLM removes its own by that prefix
before it makes them again, and scrapers filter by it), then `razor_`; labels `model_name` and
`engine` come first; bytes are of one rank. The figures are in the engines' processes and are read
every two seconds, or less often if reading takes long.

    vllm:razor_pages             pool, state    pages; state is held, cached or free
    vllm:razor_bytes             pool, state    their bytes
    vllm:razor_kept_share                       bytes that requests hold, of the full policy's
    vllm:razor_layer_kept_share  layer          the same per layer, without padding
    vllm:razor_saved_bytes                      full policy's bytes less those held
    vllm:razor_dropped_tokens                   counter: tokens that left local heads' windows
    vllm:razor_prefix_cache_hit_tokens pool     counter: tokens taken from the prefix cache
    vllm:razor_requests          policy         counter: requests that reached the engine
    vllm:razor_integrity                        1: the last check found nothing, 0: something
    vllm:razor_integrity_checks  result         counter: intact, violated
    vllm:razor_read_timestamp_seconds           when these figures were read, Unix time
    vllm:razor_config_info       window, ...    1

An engine in a long step is not read, nor is one that was told to end: the figures stay, and
`time() - vllm:razor_read_timestamp_seconds` is their age. Free pages are of either pool: their
`pool` is `any`. Pages of layers that are not split by heads have the `pool` `other_layers`; only
layers with full attention have a share. The shares are NaN while no request holds a page.
"""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from razor_serving.reader import EngineStopping, MemoryReader, Reading
from razor_vllm.config import RazorConfig

logger = init_logger("vllm.razor")

INTERVAL_SECONDS = 2.0
_MOST_BUSY = 0.02
"""Share of an engine's time that reading may take."""
_LABELS = ("model_name", "engine")


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(
        f"vllm:razor_{name}", text, labelnames=[*_LABELS, *labels], multiprocess_mode="mostrecent"
    )


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(f"vllm:razor_{name}", text, labelnames=[*_LABELS, *labels])


class PoolMetrics:
    """The metrics of one server.

    Args:
        vllm_config: for the model's name. config: of the policy.
    """

    def __init__(self, vllm_config: VllmConfig, config: RazorConfig) -> None:
        self._model = str(vllm_config.model_config.served_model_name)
        self._seen: dict[tuple[str, ...], float] = {}
        self.pages = _gauge("pages", "Pages of the KV block pool.", "pool", "state")
        self.bytes = _gauge("bytes", "Bytes of those pages on one rank.", "pool", "state")
        self.kept = _gauge("kept_share", "Bytes held, of what the full policy would hold.")
        self.layer_kept = _gauge("layer_kept_share", "The same of one layer.", "layer")
        self.saved = _gauge("saved_bytes", "Bytes that the full policy would hold more.")
        self.integrity = _gauge("integrity", "1 where the last integrity check found nothing.")
        self.dropped = _counter("dropped_tokens", "Tokens that left local heads' windows.")
        self.hits = _counter(
            "prefix_cache_hit_tokens", "Tokens taken from the prefix cache.", "pool"
        )
        self.requests = _counter("requests", "Requests that reached the engine.", "policy")
        self.checks = _counter("integrity_checks", "Integrity checks made.", "result")
        self.read_at = _gauge("read_timestamp_seconds", "Unix time at which figures were read.")
        fields = ("window", "window_ratio", "sinks", "prefill")
        info = _gauge("config_info", "Options of the policy.", *fields)
        info.labels(self._model, "0", *(str(getattr(config, name)) for name in fields)).set(1)

    def update(self, reading: Reading) -> None:
        """Set the metrics from all engines' answers to `core_memory.razor_memory`."""
        read_at = time.time() - reading.age
        for index, figures in enumerate(reading.engines):
            self.read_at.labels(self._model, str(index)).set(read_at)
            self._update_pages(str(index), figures)
            self._update_shares(str(index), figures)
            self._update_counters(str(index), figures)

    def _update_pages(self, engine: str, figures: dict[str, Any]) -> None:
        amounts = [("any", "free", figures["free"])]
        groups = [*figures["pools"], {"name": "other_layers", **figures["foreign"]}]
        for pool in groups if figures["foreign"]["groups"] else figures["pools"]:
            amounts += [(pool["name"], state, pool[state]) for state in ("held", "cached")]
        for pool_name, state, pages in amounts:
            labels = (self._model, engine, pool_name, state)
            self.pages.labels(*labels).set(pages)
            self.bytes.labels(*labels).set(pages * figures["page_bytes"])

    def _update_shares(self, engine: str, figures: dict[str, Any]) -> None:
        held, full = figures["request_bytes"], figures["full_bytes"]
        self.kept.labels(self._model, engine).set(held / full if full else math.nan)
        self.saved.labels(self._model, engine).set(full - held)
        layers = figures["layers"]
        shares = figures["layer_kept"] or [math.nan] * len(layers)
        for layer, share in zip(layers, shares, strict=True):
            self.layer_kept.labels(self._model, engine, str(layer)).set(share)
        intact = figures["integrity"]["intact"]
        if intact is not None:
            self.integrity.labels(self._model, engine).set(intact)

    def _update_counters(self, engine: str, figures: dict[str, Any]) -> None:
        self._count(self.dropped, figures["dropped_tokens"], engine)
        for pool in figures["pools"]:
            self._count(self.hits, pool["prefix_cache_hit_tokens"], engine, pool["name"])
        for policy, number in figures["requests_by_policy"].items():
            self._count(self.requests, number, engine, policy)
        integrity = figures["integrity"]
        bad = integrity["violations"]
        self._count(self.checks, integrity["checks"] - bad, engine, "intact")
        self._count(self.checks, bad, engine, "violated")

    def _count(self, counter: Counter, total: float, *labels: str) -> None:
        """Raise a counter to an engine's own total."""
        key = (counter._name, *labels)
        counter.labels(self._model, *labels).inc(max(total - self._seen.get(key, 0), 0))
        self._seen[key] = total


async def keep_current(
    metrics: PoolMetrics, reader: MemoryReader, stopping: Callable[[], bool]
) -> None:
    """Update the metrics until the engines end, or are told to.

    Any other failure to read the figures is logged once, and again when it changes.
    """
    trouble = ""
    while not stopping():
        busy = 0.0
        try:
            reading = await reader.read()
            metrics.update(reading)
            busy = max(figures["seconds"] for figures in reading.engines)
            trouble = ""
        except (EngineDeadError, EngineStopping):
            return
        except TimeoutError:
            logger.debug("pool metrics not read: the engine is in a long step")
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            if found != trouble:
                logger.warning("pool metrics not read, they stay as they are", exc_info=True)
            trouble = found
        await asyncio.sleep(max(INTERVAL_SECONDS, busy / _MOST_BUSY))

"""The engine process's side of the memory routes and metrics.

The block tables live in the process of vLLM's EngineCore, the HTTP routes in another. vLLM's
front end reaches the engine by *utility calls*: `engine_core.call_utility_async(name)` runs the
method of that name on EngineCore between two steps. This module adds one such method and two
counters.

    where                          why
    EngineCore.razor_memory        new method: pages, requests, result of the integrity check
    EngineCore.add_request         counts requests by policy
    Scheduler._preempt_request     counts preemptions

They end with a vLLM that lets plugins add utility methods, and whose SchedulerStats can carry a
plugin's own figures. `compat` makes these patches with the engine's others. An engine's `Watch`
is made once, together with its pools. Nothing here raises because of one request.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig

from razor_vllm.admission import DenseLimits
from razor_vllm.config import config_of
from razor_vllm.integrity import Violation, check_pools
from razor_vllm.occupancy import MAX_LISTED_REQUESTS, occupancy, request_uses
from razor_vllm.plan import MemoryPlan
from razor_vllm.policy import opts_out
from razor_vllm.report import plan_of

logger = init_logger("vllm.razor")

UTILITY = "razor_memory"
"""Name of the utility method."""

_RECENT = 256
"""Requests that are kept for the log line of a violation."""


@dataclass
class Watch:
    """What is counted in one engine process.

    limits: of requests that are dense, wholly or in part.
    checks, violations: integrity checks made, and those that found something. intact: result of
    the last check; None before the first. changed: whether a request has come since the last one.
    """

    plan: MemoryPlan
    limits: DenseLimits
    requests: dict[str, int] = field(default_factory=lambda: {"full": 0, "razor": 0})
    checks: int = 0
    violations: int = 0
    intact: bool | None = None
    checked_at: float | None = None
    found: tuple[str, ...] = ()
    changed: bool = True
    recent: deque[str] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def count(self, request: Any) -> None:
        """Count an arriving request."""
        sampling = request.sampling_params
        self.requests["full" if opts_out(sampling and sampling.extra_args) else "razor"] += 1
        self.recent.append(request.request_id)
        self.changed = True

    def check(self, manager: Any) -> None:
        """Check the pools of an idle engine, and log what does not add up."""
        violations = check_pools(manager, idle=True)
        self.checks += 1
        self.intact = not violations
        self.checked_at = time.time()
        self.found = tuple(violation.text for violation in violations[:_LOGGED])
        self.changed = False
        if violations:
            self.violations += 1
            self._log(violations)
        self.recent.clear()

    def _log(self, violations: list[Violation]) -> None:
        for violation in violations[:_LOGGED]:
            logger.error(
                "pool integrity: %s; requests: %s",
                violation.text,
                ", ".join(violation.request_ids) or "unknown",
            )
        logger.error(
            "pool integrity: %d violations; requests since the last check: %s",
            len(violations),
            ", ".join(self.recent) or "none",
        )


_LOGGED = 16
"""Violations of one check that are logged and reported."""


_watches: WeakKeyDictionary[Any, Watch] = WeakKeyDictionary()
"""By EngineCore."""

_preemptions: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""By Scheduler."""


def watch(core: Any, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Watch:
    """Begin to watch an EngineCore whose pools were just made."""
    plan = plan_of(vllm_config, kv_cache_config)
    made = Watch(plan, _limits(vllm_config, plan, kv_cache_config.num_blocks - 1))
    _watches[core] = made
    return made


def _limits(vllm_config: VllmConfig, plan: MemoryPlan, num_pages: int) -> DenseLimits:
    """What `num_pages` pages hold without compression."""
    length = vllm_config.model_config.max_model_len
    request = plan.longest_dense(num_pages) - _lookahead(vllm_config)
    part = plan.longest_dense_part(num_pages, length, vllm_config.max_in_flight_tokens)
    return DenseLimits(max(min(request, length), 0), part)


def _lookahead(vllm_config: VllmConfig) -> int:
    """Drafted tokens, for which a request may hold pages beyond its own tokens."""
    speculative = vllm_config.speculative_config
    return speculative.num_speculative_tokens if speculative else 0


def watch_of(core: Any) -> Watch:
    """The watch of an EngineCore under the policy."""
    return _watches[core]


def razor_memory(core: Any, list_requests: bool = False) -> dict[str, Any]:
    """Utility method: an engine's memory as JSON types; checks the pools of an idle engine.

    Args:
        core: the EngineCore, between two steps.
        list_requests: whether to name the requests that hold most, up to MAX_LISTED_REQUESTS.
    """
    begin = time.monotonic()
    watch, scheduler = watch_of(core), core.scheduler
    manager = scheduler.kv_cache_manager
    if watch.changed and not scheduler.has_requests():
        watch.check(manager)
    plan, requests = watch.plan, scheduler.requests
    use = occupancy(manager, requests, scheduler.get_request_counts(), plan)
    listed = []
    if list_requests:
        uses = request_uses(manager, requests, plan)
        largest = sorted(uses, key=lambda use: (-use.bytes, use.request_id))
        listed = [asdict(use) for use in largest[:MAX_LISTED_REQUESTS]]
    return {
        **asdict(use),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "layers": list(plan.heads.layers),
        "full_block_size": plan.full_block_size,
        "foreign_layers": [asdict(layers) for layers in plan.foreign],
        "dense_limits": list(watch.limits),
        "requests_by_policy": dict(watch.requests),
        "preemptions": _preemptions.get(scheduler, 0),
        "integrity": {
            "intact": watch.intact,
            "checks": watch.checks,
            "violations": watch.violations,
            "checked_at": watch.checked_at,
            "found": list(watch.found),
        },
        "requests": listed,
        "seconds": time.monotonic() - begin,
    }


def counting_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    """`EngineCore.add_request` that counts requests by policy."""

    def add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if config_of(self.vllm_config.additional_config) is not None:
            watch_of(self).count(request)
        return original(self, request, *args, **kwargs)

    return add_request


def counting_preemptions(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Scheduler._preempt_request` that counts."""

    def _preempt_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        _preemptions[self] = _preemptions.get(self, 0) + 1
        return original(self, *args, **kwargs)

    return _preempt_request

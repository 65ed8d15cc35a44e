"""What the pools hold at this moment, compared with what stock vLLM would hold.

Read in the engine's process, between two steps, from vLLM's block tables. Bytes are those of
one rank: all ranks hold the same pages. The pools count a page that several requests share
once; each request counts all of its pages. So requests may sum to more than the pools hold.
The same is true of stock vLLM, with which the sum is compared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request

from razor_vllm.config import KVPolicy
from razor_vllm.integrity import PoolManager, group_managers, pages_by_state, pool_managers
from razor_vllm.managers import RetrievalManager
from razor_vllm.plan import MemoryPlan
from razor_vllm.policy import NEVER_COMPRESSED

PoolName = Literal["retrieval", "local"]

MAX_LISTED_REQUESTS = 1000
"""Most requests that a listing names; it names the largest ones."""


@dataclass(frozen=True)
class PoolUse:
    """One pool.

    slots: KV heads of all layers of a rank that the pool has room for. block_size: tokens per
    page. held: pages in block tables. cached: pages only in the prefix cache.
    prefix_cache_hit_tokens: tokens whose pages requests took from the prefix cache so far.
    """

    name: PoolName
    slots: int
    block_size: int
    held: int
    cached: int
    prefix_cache_hit_tokens: int


@dataclass(frozen=True)
class RequestUse:
    """One request that holds pages.

    num_tokens: computed, the current step included. full_bytes: what stock vLLM would hold.
    """

    request_id: str
    policy: KVPolicy
    running: bool
    num_prompt_tokens: int
    num_tokens: int
    retrieval_pages: int
    local_pages: int
    foreign_pages: int
    bytes: int
    full_bytes: int
    num_preemptions: int


@dataclass(frozen=True)
class ForeignUse:
    """The layers that are not split by heads, all together.

    groups: block tables of a request. held, cached: pages, as in `PoolUse`.
    """

    groups: int
    held: int
    cached: int


@dataclass(frozen=True)
class Occupancy:
    """All pools of one engine.

    pages: of the block pool, without vLLM's null page. free: pages neither held nor cached.
    foreign: of layers that are not split by heads.
    request_bytes, full_bytes: sums over the requests that hold pages. dropped_tokens: tokens
    that left local heads' windows so far. layer_kept: per layer of the first rank, the share
    of the full policy's bytes that the requests hold; empty where there are none.
    """

    page_bytes: int
    pages: int
    free: int
    pools: tuple[PoolUse, ...]
    foreign: ForeignUse
    num_running: int
    num_waiting: int
    num_resident: int
    request_bytes: int
    full_bytes: int
    dropped_tokens: int
    layer_kept: tuple[float, ...]


def occupancy(
    manager: KVCacheManager,
    requests: Mapping[str, Request],
    counts: tuple[int, int],
    plan: MemoryPlan,
) -> Occupancy:
    """Count one engine's pages.

    Args:
        requests: of the scheduler, by id. counts: running and waiting ones.
    """
    states = pages_by_state(manager)
    managers = pool_managers(manager)
    pools = tuple(
        PoolUse(
            name=_name(pool),
            slots=pool.kv_cache_spec.num_kv_heads,
            block_size=pool.block_size,
            held=states.held[pool.kv_cache_group_id],
            cached=states.cached[pool.kv_cache_group_id],
            prefix_cache_hit_tokens=pool.prefix_cache_hit_tokens,
        )
        for pool in managers
    )
    own = {pool.kv_cache_group_id for pool in managers}
    others = [
        m.kv_cache_group_id for m in group_managers(manager) if m.kv_cache_group_id not in own
    ]
    foreign = ForeignUse(
        groups=len(others),
        held=sum(states.held[group] for group in others),
        cached=sum(states.cached[group] for group in others),
    )
    uses = list(request_uses(manager, requests, plan))
    return Occupancy(
        page_bytes=plan.page_bytes,
        pages=manager.block_pool.num_gpu_blocks - 1,
        free=states.free,
        pools=pools,
        foreign=foreign,
        num_running=counts[0],
        num_waiting=counts[1],
        num_resident=len(uses),
        request_bytes=sum(use.bytes for use in uses),
        full_bytes=sum(use.full_bytes for use in uses),
        dropped_tokens=sum(pool.dropped_tokens for pool in managers),
        layer_kept=_layer_kept(plan, uses),
    )


def request_uses(
    manager: KVCacheManager,
    requests: Mapping[str, Request],
    plan: MemoryPlan,
) -> Iterator[RequestUse]:
    """Every request that holds pages."""
    managers = pool_managers(manager)
    for request_id in {
        id_ for pool in managers for id_, table in pool.req_to_blocks.items() if table
    }:
        request = requests.get(request_id)
        if request is None:
            continue  # leaked: the integrity check names it
        pages = {_name(pool): _num_pages(pool, request_id) for pool in managers}
        held = sum(_num_pages(group, request_id) for group in group_managers(manager))
        yield RequestUse(
            request_id=request_id,
            policy=_policy(managers[0], request_id),
            running=request.status.name == "RUNNING",
            num_prompt_tokens=request.num_prompt_tokens,
            num_tokens=request.num_computed_tokens,
            retrieval_pages=pages.get("retrieval", 0),
            local_pages=pages.get("local", 0),
            foreign_pages=held - sum(pages.values()),
            bytes=held * plan.page_bytes,
            full_bytes=plan.full_request_bytes(request.num_computed_tokens),
            num_preemptions=request.num_preemptions,
        )


def _name(pool: PoolManager) -> PoolName:
    return "retrieval" if isinstance(pool, RetrievalManager) else "local"


def _num_pages(group: SingleTypeKVCacheManager, request_id: str) -> int:
    return sum(not block.is_null for block in group.req_to_blocks.get(request_id, ()))


def _policy(pool: PoolManager, request_id: str) -> KVPolicy:
    return "full" if pool.dense_parts.get(request_id) == NEVER_COMPRESSED else "razor"


def _layer_kept(plan: MemoryPlan, uses: list[RequestUse]) -> tuple[float, ...]:
    """Share of the full policy's bytes that the requests hold, per layer with full attention,
    without padding."""
    full = sum(plan.full_request_pages(use.num_tokens) for use in uses) * plan.full_block_size
    if full == 0:
        return ()
    retrieval = sum(use.retrieval_pages for use in uses) * plan.retrieval_layout.rows
    local = sum(use.local_pages for use in uses) * plan.local_layout.rows
    profile = plan.profile
    shares = []
    for heads in profile.retrieval_heads:
        num_local = profile.num_kv_heads - len(heads)
        rows = len(heads) * retrieval + num_local * local
        shares.append(rows / (profile.num_kv_heads * full))
    return tuple(shares)

"""The page accounting's check finds faults that are put in, and nothing where there is none."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from razor_vllm.compat import install_engine_patches
from razor_vllm.config import RazorConfig
from razor_vllm.core_memory import Watch
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.integrity import check_pools, pages_by_state, pool_managers
from razor_vllm.managers import register_specs
from razor_vllm.occupancy import occupancy, request_uses
from razor_vllm.partition import whole
from razor_vllm.plan import MemoryPlan, PoolSizes
from razor_vllm.policy import carrying, dense_part
from razor_vllm.specs import pool_specs

register_specs()
install_engine_patches()
init_none_hash(sha256)

HASH_BLOCK = 16
PLAN = MemoryPlan(
    RazorConfig(window=40, prefill="windowed"),
    whole(HeadProfile(2, 2, 16, ((0,), ()))),
    torch.float32,
    PoolSizes(32, 16),
    HASH_BLOCK,
)


def new_manager() -> KVCacheManager:
    """vLLM's manager over both pools."""
    specs = [spec for spec in pool_specs(PLAN) if spec is not None]
    groups = [KVCacheGroupSpec([f"layers.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheManager(
        KVCacheConfig(64, [], groups),
        max_model_len=400,
        scheduler_block_size=32,
        hash_block_size=HASH_BLOCK,
        max_in_flight_tokens=400,
        enable_caching=True,
    )


def start(manager: KVCacheManager, name: str, num_tokens: int) -> Request:
    """A request whose prompt has been computed."""
    part = dense_part(PLAN.config, None, None, num_tokens)
    request = Request(
        request_id=name,
        prompt_token_ids=list(range(num_tokens)),
        sampling_params=SamplingParams(max_tokens=100, extra_args=carrying(None, part)),
        pooling_params=None,
        block_hasher=get_request_block_hasher(HASH_BLOCK, sha256),
    )
    blocks, computed, _ = manager.get_computed_blocks(request)
    new = manager.allocate_slots(
        request,
        num_tokens - computed,
        num_new_computed_tokens=computed,
        new_computed_blocks=blocks,
    )
    assert new is not None
    request.num_computed_tokens = num_tokens
    manager.remove_skipped_blocks(name, num_tokens)
    return request


def table(manager: KVCacheManager, pool: int = 0, name: str = "a") -> list[Any]:
    return pool_managers(manager)[pool].req_to_blocks[name]


def page(manager: KVCacheManager, pool: int = 0) -> Any:
    """The last page that request `a` holds in a pool."""
    return table(manager, pool)[-1]


def test_nothing_is_found_while_requests_come_and_go() -> None:
    """Shared prefixes, dropped pages, a finished request: all adds up, at every point."""
    manager = new_manager()
    assert check_pools(manager, idle=True) == []
    requests = [start(manager, name, 100) for name in "ab"]
    assert pages_by_state(manager).held[0] < 2 * len(table(manager)), "the prefix is shared"
    assert any(block.is_null for block in table(manager, 1)), "the window dropped pages"
    assert check_pools(manager, idle=False) == []
    for request in requests:
        manager.free(request)
        assert check_pools(manager, idle=False) == []
    assert check_pools(manager, idle=True) == []


def test_states_add_up() -> None:
    """free + cached + held is all of the block pool, before, with and after requests."""
    manager = new_manager()
    for step in range(3):
        states = pages_by_state(manager)
        assert states.free + sum(states.held.values()) + sum(states.cached.values()) == 63
        assert (sum(states.held.values()) > 0) == (step == 1)
        assert (sum(states.cached.values()) > 0) == (step > 0)
        if step == 0:
            request = start(manager, "a", 100)
        elif step == 1:
            manager.free(request)


def _forget_a_reference(manager: KVCacheManager) -> None:
    page(manager).ref_cnt -= 1


def _add_a_reference(manager: KVCacheManager) -> None:
    page(manager, 1).ref_cnt += 1


def _share_over_pools(manager: KVCacheManager) -> None:
    table(manager, 1).append(page(manager, 0))
    page(manager, 0).ref_cnt += 1


def _free_while_held(manager: KVCacheManager) -> None:
    manager.block_pool.free_blocks([page(manager)])


def _lose_a_free_page(manager: KVCacheManager) -> None:
    manager.block_pool.free_block_queue.popleft()


def _miscount(manager: KVCacheManager) -> None:
    manager.block_pool.free_block_queue.num_free_blocks += 1


def _forget_a_hash(manager: KVCacheManager) -> None:
    block = next(b for b in table(manager) if b.block_hash is not None)
    manager.block_pool.cached_block_hash_to_block.pop(block.block_hash, block.block_id)


def _loop(manager: KVCacheManager) -> None:
    queue = manager.block_pool.free_block_queue
    first = queue.fake_free_list_head.next_free_block
    assert first is not None
    first.next_free_block = first


@pytest.mark.parametrize(
    ("fault", "text", "names"),
    [
        (_forget_a_reference, "has reference count 0 and lies in 1 block tables", ("a",)),
        (_add_a_reference, "has reference count 2 and lies in 1 block tables", ("a",)),
        (_share_over_pools, "is in tables of several groups", ("a",)),
        (_free_while_held, "has reference count 0 and lies in 1 block tables", ("a",)),
        (_lose_a_free_page, "is neither held nor in the free queue", ()),
        (_miscount, "the free queue holds", ()),
        (_forget_a_hash, "has a hash that the prefix cache lacks", ()),
        (_loop, "the free queue comes back to page", ()),
    ],
)
def test_a_fault_is_found(
    fault: Callable[[KVCacheManager], None], text: str, names: tuple[str, ...]
) -> None:
    """Each deliberate fault is found, and the request whose table shows it is named."""
    manager = new_manager()
    start(manager, "a", 100)
    assert check_pools(manager, idle=False) == []
    fault(manager)
    found = [v for v in check_pools(manager, idle=False) if text in v.text]
    assert found, text
    assert found[0].request_ids == names


def test_an_idle_engine_holds_no_table() -> None:
    """A request that was not freed is a violation once no request is left, and is named."""
    manager = new_manager()
    start(manager, "leaked", 50)
    assert check_pools(manager, idle=False) == []
    found = check_pools(manager, idle=True)
    assert {v.request_ids for v in found} == {("leaked",)}
    assert any("RetrievalManager holds a table of 2 pages" in v.text for v in found)


def test_a_violation_is_logged_with_its_requests() -> None:
    """The log names what is wrong and who it was; the result is kept for the metrics."""
    manager = new_manager()
    start(manager, "leaked", 50)
    watch = Watch(PLAN, 400)
    watch.recent.append("earlier")
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(
            "razor_vllm.core_memory.logger",
            SimpleNamespace(error=lambda text, *args: lines.append(text % args)),
        )
        watch.check(manager)
    assert any("of no request; requests: leaked" in line for line in lines)
    assert any("requests since the last check: earlier" in line for line in lines)
    assert (watch.intact, watch.checks, watch.violations) == (False, 1, 1)
    assert watch.found


def test_occupancy_is_what_the_tables_say() -> None:
    """Pages by pool, bytes of requests, dropped tokens and cache hits, of shared prompts."""
    manager = new_manager()
    requests = {name: start(manager, name, 100) for name in "ab"}
    use = occupancy(manager, requests, (2, 0), PLAN)
    rows = list(request_uses(manager, requests, PLAN))
    assert {row.request_id for row in rows} == {"a", "b"}
    pages = [PLAN.retrieval_pages(100) + PLAN.local_pages(101) for _ in rows]
    assert [row.bytes for row in rows] == [n * PLAN.page_bytes for n in pages]
    assert use.full_bytes == 2 * PLAN.full_request_bytes(100)
    retrieval, local = use.pools
    assert (retrieval.name, local.name) == ("retrieval", "local")
    assert retrieval.held < 2 * PLAN.retrieval_pages(100), "shared pages count once"
    assert (retrieval.prefix_cache_hit_tokens, local.prefix_cache_hit_tokens > 0) == (96, True)
    assert use.dropped_tokens == 2 * PLAN.window.num_dropped(100 // 16) > 0
    assert len(use.layer_kept) == 2
    assert use.layer_kept[0] > use.layer_kept[1], "only layer 0 has a retrieval head"
    assert use.free + sum(p.held + p.cached for p in use.pools) == use.pages == 63

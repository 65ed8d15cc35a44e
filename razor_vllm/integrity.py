"""Whether the page accounting adds up.

Both pools, and all groups of layers that are not split by heads, draw their pages from one
vLLM block pool. Between two steps of an engine,

    each page        is null (page 0), or in the free queue, or held
    a held page      is in as many block tables as its reference count says, all of one group
    a free page      has reference count 0
    a cached page    has the hash under which its own group's look-up finds it
    in sum           free + cached + held = pages of the pool, without the null page

and when no request is left, no block table is left either. A page in the prefix cache and in no
block table counts as cached; a page in a block table counts as held.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock, get_group_id
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from razor_vllm.managers import LocalManager, RetrievalManager

PoolManager = RetrievalManager | LocalManager


class Violation(NamedTuple):
    """What does not add up, and the requests whose block tables show it."""

    text: str
    request_ids: tuple[str, ...] = ()


class PagesByState(NamedTuple):
    """Pages of one block pool, by cache group.

    held: pages in block tables. cached: pages in the prefix cache only. free: all others.
    """

    held: dict[int, int]
    cached: dict[int, int]
    free: int


def pool_managers(manager: KVCacheManager) -> tuple[PoolManager, ...]:
    """The managers of the pools of an engine under the policy."""
    return tuple(m for m in group_managers(manager) if isinstance(m, PoolManager))


def group_managers(manager: KVCacheManager) -> tuple[SingleTypeKVCacheManager, ...]:
    """The managers of all cache groups."""
    return manager.coordinator.single_type_managers


def pages_by_state(manager: KVCacheManager) -> PagesByState:
    """Count pages by group and state."""
    held = {m.kv_cache_group_id: len(_table_pages(m)) for m in group_managers(manager)}
    cached = dict.fromkeys(held, 0)
    for block in manager.block_pool.blocks:
        if block.ref_cnt == 0 and block.block_hash is not None:
            group = get_group_id(block.block_hash)
            cached[group] = cached.get(group, 0) + 1
    total = manager.block_pool.num_gpu_blocks - 1
    return PagesByState(held, cached, total - sum(held.values()) - sum(cached.values()))


def check_pools(manager: KVCacheManager, idle: bool) -> list[Violation]:
    """Everything that does not add up.

    Args:
        manager: vLLM's, of an engine that is between two steps.
        idle: whether no request is left, so that no block table may be left.
    """
    groups, block_pool = group_managers(manager), manager.block_pool
    violations = list(_check_references(groups, block_pool))
    violations += _check_queue(block_pool)
    violations += _check_hashes(block_pool)
    if idle:
        violations += [v for group in groups for v in _check_idle(group)]
    return violations


def _table_pages(group: SingleTypeKVCacheManager) -> set[int]:
    """Ids of pages in a group's block tables, without the null page."""
    tables = group.req_to_blocks.values()
    return {block.block_id for table in tables for block in table if not block.is_null}


def _check_references(
    groups: tuple[SingleTypeKVCacheManager, ...], block_pool: BlockPool
) -> Iterator[Violation]:
    """Compare reference counts with block tables."""
    counts = [
        Counter(b.block_id for t in group.req_to_blocks.values() for b in t if not b.is_null)
        for group in groups
    ]
    for block in block_pool.blocks:
        if block.is_null:
            continue
        found = [count[block.block_id] for count in counts]
        if block.ref_cnt != sum(found):
            yield Violation(
                f"page {block.block_id} has reference count {block.ref_cnt} and lies in "
                f"{sum(found)} block tables",
                _holders(groups, block),
            )
        if sum(n > 0 for n in found) > 1:
            yield Violation(
                f"page {block.block_id} is in tables of several groups", _holders(groups, block)
            )


def _holders(groups: tuple[SingleTypeKVCacheManager, ...], block: KVCacheBlock) -> tuple[str, ...]:
    return tuple(
        sorted(
            {
                request_id
                for group in groups
                for request_id, table in group.req_to_blocks.items()
                if any(held.block_id == block.block_id for held in table)
            }
        )
    )


def _check_queue(block_pool: BlockPool) -> Iterator[Violation]:
    """Check the free queue: its length, and that it holds each unreferenced page once."""
    queue = block_pool.free_block_queue
    seen: set[int] = set()
    block = queue.fake_free_list_head.next_free_block
    while block is not None and block is not queue.fake_free_list_tail:
        if block.block_id in seen:
            yield Violation(f"the free queue comes back to page {block.block_id}")
            break
        seen.add(block.block_id)
        block = block.next_free_block
    if len(seen) != queue.num_free_blocks:
        yield Violation(
            f"the free queue holds {len(seen)} pages and counts {queue.num_free_blocks}"
        )
    expected = {b.block_id for b in block_pool.blocks if b.ref_cnt == 0 and not b.is_null}
    for lost in sorted(expected - seen)[:_LISTED]:
        yield Violation(f"page {lost} is neither held nor in the free queue")
    for taken in sorted(seen - expected)[:_LISTED]:
        yield Violation(f"page {taken} is in the free queue and in use")


def _check_hashes(block_pool: BlockPool) -> Iterator[Violation]:
    """Check that cached pages are found under their own hash."""
    cache = block_pool.cached_block_hash_to_block
    for block in block_pool.blocks:
        key = block.block_hash
        if key is not None and not cache.contain(key, block.block_id):
            yield Violation(f"page {block.block_id} has a hash that the prefix cache lacks")


def _check_idle(group: SingleTypeKVCacheManager) -> Iterator[Violation]:
    """What requests that are gone have left behind."""
    name = type(group).__name__
    for request_id, table in group.req_to_blocks.items():
        yield Violation(f"{name} holds a table of {len(table)} pages of no request", (request_id,))
    for request_id in group.dense_parts if isinstance(group, PoolManager) else ():
        yield Violation(f"{name} keeps the dense_until of no request", (request_id,))


_LISTED = 8
"""Most pages that are named for one kind of violation."""

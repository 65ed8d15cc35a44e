"""Which request holds which page: vLLM's block managers of the two pools.

A local request past its dense part, with its next query in page p, holds

    pages                              why
    [0, sink pages)                    sinks
    first(p) - 1                       its tail is the compensation slot
    [first(p), p]                      window

and the manager frees the rest; nothing is copied. A cached page is reused only where a
miss would compute the same values. `policy.cache_key` sees to that: pages up to dense_until
are found by every request with the same tokens, those past it by requests that have the
same dense_until as well. What a hit needs depends on where it ends:

    end of the hit       local pages that it needs
    below dense_until    all of them (the tokens after it are attended densely)
    from there on        sinks, the tail page and the window

Pages past dense_until are not cached where no later request will have the same (`DensePart`).
Where they are, and once pages are evicted at all, cached pages that neither the next turn of
a chat nor a prefix known to be shared would need go first.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHashList,
    BlockHashWithGroupId,
    KVCacheBlock,
    resolve_block_hashes,
)
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from razor_vllm.policy import (
    NEVER_COMPRESSED,
    DensePart,
    Lookup,
    admitted_lookup,
    carried,
)
from razor_vllm.specs import LocalSpec, RetrievalSpec


class _CachedPage(NamedTuple):
    """page: index in its request. key: under which the block was cached when it was noted."""

    page: int
    block: KVCacheBlock
    key: BlockHashWithGroupId


class _RazorManager(SingleTypeKVCacheManager):
    """What both pools' managers share: each request's dense part."""

    kv_cache_spec: RetrievalSpec | LocalSpec

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # Our kernels read only what was written, so vLLM need not zero new pages.
        self._record_new_block_ids = False
        self.dense_parts: dict[str, DensePart] = {}
        # For the metrics: tokens taken from the prefix cache, and tokens that left windows.
        self.prefix_cache_hit_tokens = 0
        self.dropped_tokens = 0

    def admit(self, request: Request) -> Lookup:
        """Note a request's dense part; called before any other method about it."""
        part = carried(request.sampling_params) or NEVER_COMPRESSED
        self.dense_parts[request.request_id] = part
        return Lookup(part.until)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Free pages that a request needs to grow to `num_tokens`.

        Cached pages that it reuses count too, if they are in the free queue.
        """
        required = -(-num_tokens // self.block_size)
        held = len(self.req_to_blocks.get(request_id, ()))
        # Called for every request in every step; most have no hit.
        if not new_computed_blocks and not apply_admission_cap:
            return max(required - held, 0)
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            until = self.dense_parts[request_id].until
            dense = 0 if num_local_computed_tokens >= until else -(-until // self.block_size)
            required = min(required, self.max_admission_blocks_per_request + dense)
            reused = sum(not block.is_null for block in new_computed_blocks)
        else:
            reused = len(new_computed_blocks)
        return max(required - reused - held, 0) + self._get_num_evictable_blocks(
            new_computed_blocks
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """New pages for `num_tokens` tokens; mostly none, because the last page has room."""
        if len(self.req_to_blocks[request_id]) * self.block_size >= num_tokens:
            return []
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def num_cacheable_tokens(self, request: Request, num_tokens: int) -> int:
        """Those of a request's first `num_tokens` that a later request may find."""
        part = self.dense_parts[request.request_id]
        return num_tokens if part.goes_on else min(num_tokens, part.until)

    def count_hit(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Count the tokens of pages that a request takes from the prefix cache."""
        self.prefix_cache_hit_tokens += self.block_size * sum(not block.is_null for block in blocks)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Cache full pages, up to what `num_cacheable_tokens` told vLLM's coordinator."""
        if num_tokens < (self.num_cached_block.get(request.request_id, 0) + 1) * self.block_size:
            return  # no page has filled, as in most steps
        SingleTypeKVCacheManager.cache_blocks(
            self, request, num_tokens, replay_boundaries=replay_boundaries
        )

    @classmethod
    def reachable_block_mask(cls, *args, **kwargs) -> list[bool] | None:
        """Every cached page may serve a hit."""
        return None

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.dense_parts.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def _longest_run(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        block_size: int,
        alignment_tokens: int,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Longest run of cached pages from the first, in whole alignments."""
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, block_size)
        found: list[list[KVCacheBlock]] = []
        for index in range(max_length // block_size):
            cached = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if cached is None:
                break
            found.append(cached)
        length = len(found) * block_size
        length -= length % alignment_tokens
        found = found[: length // block_size]
        return tuple(list(group) for group in zip(*found, strict=True)) or tuple(
            [] for _ in kv_cache_group_ids
        ), length


class RetrievalManager(_RazorManager, FullAttentionManager):
    """Growing pages of the retrieval pool."""

    supports_fine_grained_hash_lookup = False

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Nothing is ever skipped."""

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *lengths: int, **kwargs
    ) -> None:
        self.count_hit(new_computed_blocks)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *lengths, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        assert isinstance(kv_cache_spec, RetrievalSpec)
        return cls._longest_run(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec.block_size,
            alignment_tokens,
        )


class LocalManager(_RazorManager, SlidingWindowManager):
    """Sinks, one tail page and a ring of window pages of the local pool."""

    kv_cache_spec: LocalSpec

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._dropped: dict[str, int] = {}
        # Position from which a request's next page is skipped; `dense_until` at first.
        self._due: dict[str, int] = {}
        # Pages that a request dropped and its next turn may still want, if it may have one.
        self._wanted: dict[str, list[_CachedPage]] = {}
        # Pages, by block, that no next turn wants, until something is evicted.
        self._unwanted: dict[int, _CachedPage] = {}
        # End of the prefix that a request shares with others, as far as vLLM found it cached.
        self._junctions: dict[str, int] = {}

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the pages between the sinks and the window of the next query."""
        due = self._due.get(request_id)
        if due is None:
            due = self.dense_parts.get(request_id, NEVER_COMPRESSED).until
        if processed_computed_tokens < due:
            return
        window = self.kv_cache_spec.window
        kept = window.first_kept_page(processed_computed_tokens)
        goes_on = self.dense_parts[request_id].goes_on
        dropped = self._pages_before(request_id, kept) if goes_on else []
        self._remove_blocks_in_range(request_id, window.sink_pages, kept)
        if dropped:
            self._evict_unwanted_first(request_id, dropped, processed_computed_tokens)
        page = processed_computed_tokens // self.block_size
        self._count_dropped(request_id, window.num_dropped(page))
        # Windows move once per page: there is nothing to do at its other positions.
        self._due[request_id] = (page + 1) * self.block_size

    def _pages_before(self, request_id: str, kept: int) -> list["_CachedPage"]:
        """Cached pages between the sinks and page `kept` that a request holds."""
        blocks, first = self.req_to_blocks.get(request_id, []), self.kv_cache_spec.window.sink_pages
        found = []
        for index in range(min(kept, len(blocks)) - 1, first - 1, -1):
            block = blocks[index]
            if block.is_null:
                break
            if block.block_hash is not None:
                found.append(_CachedPage(index, block, block.block_hash))
        return found

    def _evict_unwanted_first(
        self, request_id: str, dropped: list["_CachedPage"], num_tokens: int
    ) -> None:
        """Have pages that a chat's next turn does not need evicted before those that it does.

        The next turn goes on from the last place where hits end; it needs the sinks, and the
        tail page and window of that place. Another request may share a prefix that this one
        shared with those before it, and needs the same of that prefix's end.
        """
        pages = [*dropped, *self._wanted.get(request_id, ())]
        first = self._hit_pages(request_id, num_tokens).start
        shared = self._hit_pages(request_id, self._junctions.get(request_id, 0))
        queue = self.block_pool.free_block_queue
        # Uncached pages come first in the queue: while there is one, nothing is evicted.
        following = queue.fake_free_list_head.next_free_block
        evicting = following is not None and following.block_hash is not None
        for noted in pages:
            if noted.page < first and noted.page not in shared:
                self._unwanted[noted.block.block_id] = noted
        self._wanted[request_id] = [noted for noted in pages if noted.page >= first]
        if not evicting:
            return
        for noted in self._unwanted.values():
            # Another request may hold it by now, or have filled it anew.
            if noted.block.ref_cnt == 0 and noted.block.block_hash == noted.key:
                queue.remove(noted.block)
                queue.prepend_n([noted.block])
        self._unwanted.clear()

    def _hit_pages(self, request_id: str, num_tokens: int) -> range:
        """Pages that a hit needs at the last place within `num_tokens` where one may end.

        All pages before a place in the dense part; else tail page and window, and sinks.
        """
        end = num_tokens - num_tokens % self.scheduler_block_size
        dense = end < self.dense_parts[request_id].until
        first = 0 if dense else self.kv_cache_spec.window.first_kept_page(end)
        return range(first, end // self.block_size)

    def _count_dropped(self, request_id: str, dropped: int) -> None:
        """Count the tokens that went from a request's window into its compensation slot."""
        before = self._dropped.get(request_id, 0)
        self.dropped_tokens += max(dropped - before, 0)
        self._dropped[request_id] = max(dropped, before)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._dropped.pop(request_id, None)
        self._due.pop(request_id, None)
        self._wanted.pop(request_id, None)
        self._junctions.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        if request.shared_prefix_boundary:
            self._junctions[request.request_id] = request.shared_prefix_boundary
        super().cache_blocks(request, *args, **kwargs)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take the pages of a hit; those that it does not need are null already."""
        assert num_external_computed_tokens == 0, "KV connectors are refused at start-up"
        self.count_hit(new_computed_blocks)
        if num_local_computed_tokens < self.dense_parts[request_id].until:
            # No turn of this chat wrote what it found: others begin like it.
            self._junctions[request_id] = num_local_computed_tokens
        blocks = self.req_to_blocks[request_id]
        assert not blocks, "a prefix hit for a request that holds pages"
        for block in new_computed_blocks:
            self._unwanted.pop(block.block_id, None)
        self.block_pool.touch([b for b in new_computed_blocks if not b.is_null])
        blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(blocks)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """No prefix is ever skipped, because sinks stay. See `remove_skipped_blocks`."""
        return 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        assert isinstance(kv_cache_spec, LocalSpec)
        until = admitted_lookup().dense_until
        groups, length = cls._longest_windowed_hit(
            block_hashes,
            until,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            alignment_tokens,
        )
        if length > 0:
            return groups, length
        return cls._longest_run(
            block_hashes,
            min(max_length, until),
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec.block_size,
            alignment_tokens,
        )

    @classmethod
    def _longest_windowed_hit(
        cls,
        block_hashes: BlockHashList,
        min_length: int,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        spec: LocalSpec,
        alignment_tokens: int,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Longest prefix, of `min_length` or more, whose sinks, tail page and window are cached.

        If page i is missing, no prefix that ends past its first token is a hit: windows only
        move forward, so shorter prefixes that reach into the page need it too.
        """
        size = spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)

        def cached(index: int) -> list[KVCacheBlock] | None:
            return block_pool.get_cached_block(hashes[index], kv_cache_group_ids)

        length = max_length - max_length % alignment_tokens
        while length >= max(min_length, 1):
            num_pages = length // size
            kept = spec.window.first_kept_page(length)
            sinks = range(min(spec.window.sink_pages, kept, num_pages))
            pages = [*sinks, *range(kept, num_pages)]
            found = {}
            # From the last page down: a missing one rules out every length that needs it.
            for index in reversed(pages):
                blocks = cached(index)
                if blocks is None:
                    length = index * size - index * size % alignment_tokens
                    break
                found[index] = blocks
            else:
                null = [block_pool.null_block] * len(kv_cache_group_ids)
                rows = [found.get(index, null) for index in range(num_pages)]
                groups = tuple(list(group) for group in zip(*rows, strict=True))
                return groups, length
        return tuple([] for _ in kv_cache_group_ids), 0


def register_specs() -> None:
    """Register both specs and their managers with vLLM; may be called more than once."""
    # This makes vLLM register its own first, which it does only into an empty registry.
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})
    KVCacheSpecRegistry.register(RetrievalSpec, RetrievalManager, FullAttentionSpec)
    KVCacheSpecRegistry.register(LocalSpec, LocalManager, LocalSpec)

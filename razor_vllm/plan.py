"""From a model and a profile to two pools: slots, page sizes, bytes.

A *slot* is one KV head of one layer on the H axis of its pool. Slots are in layer-major
order, so a layer's slots in a pool are contiguous:

    retrieval pool   | layer 0: head 2 | layer 1: heads 0, 3 | layer 2: - | ...
    local pool       | layer 0: heads 0, 1, 3 | layer 1: heads 1, 2 | ...

Both pools draw pages from one block pool, so their pages have equal bytes. Tokens per
page are chosen to make them nearly equal, and the rest is padding.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from razor_kernels import DENSE_FOREVER, PageLayout, Window
from razor_vllm.config import RazorConfig
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import RankHeads

RETRIEVAL_POOL = "razor.layers.0.retrieval"
LOCAL_POOL = "razor.layers.1.local"
POOLS = (RETRIEVAL_POOL, LOCAL_POOL)

_LOCAL_BLOCK_SIZES = (32, 48, 64, 96, 128)
_BLOCK_STEP = 16
_MAX_HIT_TOKENS = 256
"""Preferred limit of the least common multiple of the two page lengths, in which
prefix-cache hits come."""


class LayerSlots(NamedTuple):
    """KV heads of one layer in one pool, and their slots.

    heads: KV heads in slot order. start: first slot in the pool.
    """

    heads: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.heads)


class PoolSizes(NamedTuple):
    """Tokens per page of each pool."""

    retrieval: int
    local: int


@dataclass(frozen=True)
class MemoryPlan:
    """The two pools of one rank, and what a request costs in them.

    Args:
        config: of the policy.
        heads: of the rank, and the slots of either pool.
        dtype: of stored K and V.
        blocks: tokens per page of each pool.
        full_block_size: tokens per page of stock vLLM, with which the plan is compared.
    """

    config: RazorConfig
    heads: RankHeads
    dtype: torch.dtype
    blocks: PoolSizes
    full_block_size: int

    @property
    def profile(self) -> HeadProfile:
        """Of the rank's own heads."""
        return self.heads.profile

    @property
    def num_retrieval_slots(self) -> int:
        return self.heads.retrieval_quota

    @property
    def num_local_slots(self) -> int:
        return self.heads.local_quota

    @property
    def window(self) -> Window:
        config = self.config
        return Window(config.sinks, config.window, config.window_ratio, self.blocks.local)

    @property
    def retrieval_layout(self) -> PageLayout:
        return PageLayout(self.blocks.retrieval, self.profile.head_size, self.dtype, has_tail=False)

    @property
    def local_layout(self) -> PageLayout:
        return PageLayout(self.blocks.local, self.profile.head_size, self.dtype, has_tail=True)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of either pool, padding included."""
        return max(
            self.retrieval_layout.page_bytes(self.num_retrieval_slots),
            self.local_layout.page_bytes(self.num_local_slots),
        )

    def retrieval_slots(self, layer: int) -> LayerSlots:
        heads = self.profile.retrieval_heads
        return LayerSlots(heads[layer], sum(len(row) for row in heads[:layer]))

    def local_slots(self, layer: int) -> LayerSlots:
        before = layer * self.profile.num_kv_heads - self.retrieval_slots(layer).start
        return LayerSlots(self.profile.local_heads(layer), before)

    def retrieval_pages(self, num_tokens: int) -> int:
        """Pages of the retrieval pool that a request of `num_tokens` holds."""
        return -(-num_tokens // self.blocks.retrieval) if self.num_retrieval_slots else 0

    def local_pages(self, num_tokens: int, dense_until: int = 0) -> int:
        """Pages of the local pool that a request holds while computing its last token."""
        if not self.num_local_slots:
            return 0
        if num_tokens <= dense_until:
            return -(-num_tokens // self.blocks.local)
        return self.window.num_held_pages(num_tokens)

    def request_pages(self, num_tokens: int, dense_until: int = 0) -> int:
        """Pages of both pools that a request holds while computing its last token.

        Args:
            num_tokens: tokens so far, the one being computed included.
            dense_until: of the request; 0 for a decoding one.
        """
        return self.retrieval_pages(num_tokens) + self.local_pages(num_tokens, dense_until)

    def request_bytes(self, num_tokens: int, dense_until: int = 0) -> int:
        """`request_pages` in bytes of KV memory."""
        return self.request_pages(num_tokens, dense_until) * self.page_bytes

    @property
    def hit_tokens(self) -> int:
        """Prefix-cache hits come in multiples of so many tokens."""
        return math.lcm(*self.blocks)

    def waiting_pages(self, num_tokens: int) -> int:
        """Cached pages that the next turn of a chat of `num_tokens` tokens needs.

        In exact mode a chat whose tokens are all of its last prompt.
        """
        end = num_tokens - num_tokens % self.hit_tokens
        local = end // self.blocks.local if self.num_local_slots else 0
        if self.config.prefill != "exact" and local:
            kept = self.window.first_kept_page(end)
            local -= max(kept - self.window.sink_pages, 0)
        return self.retrieval_pages(end) + local

    @property
    def full_page_bytes(self) -> int:
        """Bytes of a page of stock vLLM."""
        layout = PageLayout(
            self.full_block_size, self.profile.head_size, self.dtype, has_tail=False
        )
        return layout.page_bytes(self.profile.num_heads)

    def full_request_pages(self, num_tokens: int) -> int:
        """Pages that stock vLLM holds for a request of `num_tokens` tokens."""
        return -(-num_tokens // self.full_block_size)

    def full_request_bytes(self, num_tokens: int) -> int:
        """`full_request_pages` in bytes of KV memory."""
        return self.full_request_pages(num_tokens) * self.full_page_bytes

    def longest_dense(self, num_pages: int) -> int:
        """Tokens of the longest request that fits `num_pages` pages without compression."""
        low, high = 0, num_pages * max(self.blocks)
        while low < high:
            middle = (low + high + 1) // 2
            if self.request_pages(middle, DENSE_FOREVER) <= num_pages:
                low = middle
            else:
                high = middle - 1
        return low

    def longest_dense_part(self, num_pages: int, num_tokens: int, in_flight: int) -> int:
        """Longest dense part, in tokens, of a request of `num_tokens` that fits `num_pages` pages.

        Args:
            in_flight: tokens that a request may write in a step beyond its dense part.
        """
        if not self.num_local_slots:
            return num_tokens
        size = self.blocks.local
        room = (num_pages - self.retrieval_pages(num_tokens)) * size
        if room >= -(-num_tokens // size) * size:
            return num_tokens
        window = self.window.max_held_pages(num_tokens) * size
        return max(room - window - -(-in_flight // size) * size, 0)

    def padding_share(self) -> tuple[float, float]:
        """Share of a retrieval and of a local page that is padding."""
        retrieval = self.retrieval_layout.page_bytes(self.num_retrieval_slots)
        local = self.local_layout.page_bytes(self.num_local_slots)
        total = self.page_bytes
        return 1 - retrieval / total, 1 - local / total


def plan_memory(
    config: RazorConfig,
    heads: RankHeads,
    dtype: torch.dtype,
    max_model_len: int,
    block_size: int,
) -> MemoryPlan:
    """Choose tokens per page so that requests cost least.

    Args:
        max_model_len: tokens; the cost is that of requests of 1/8 to all of it.
        block_size: stock vLLM's, used if there is only one pool and nothing to match.

    Raises:
        ValueError: no retrieval head, and the config does not allow it.
    """
    if heads.retrieval_quota == 0 and not config.allow_no_retrieval_heads:
        raise ValueError("razor: the head profile names no retrieval head; at least one is needed")
    if heads.retrieval_quota == 0 or heads.local_quota == 0:
        return MemoryPlan(config, heads, dtype, PoolSizes(block_size, block_size), block_size)
    plans = [
        MemoryPlan(config, heads, dtype, PoolSizes(retrieval, local), block_size)
        for local in _LOCAL_BLOCK_SIZES
        for retrieval in _matching_blocks(heads, dtype, local)
    ]
    return min(plans, key=lambda plan: _cost(plan, max_model_len))


def _matching_blocks(heads: RankHeads, dtype: torch.dtype, local: int) -> tuple[int, int]:
    """The multiples of 16 tokens whose retrieval pages are just below and above a local page."""
    rows = PageLayout(local, heads.profile.head_size, dtype, has_tail=True).rows
    exact = rows * heads.local_quota / heads.retrieval_quota
    below = max(math.floor(exact / _BLOCK_STEP), 1) * _BLOCK_STEP
    return below, below + _BLOCK_STEP


def _cost(plan: MemoryPlan, max_model_len: int) -> tuple[bool, float]:
    lengths = [max(max_model_len // part, 1) for part in (8, 4, 2, 1)]
    mean = sum(plan.request_bytes(n) / n for n in lengths) / len(lengths)
    return math.lcm(*plan.blocks) > _MAX_HIT_TOKENS, mean

"""From a model and a profile to two pools: slots, page sizes, bytes.

A *slot* is one KV head of one layer on the H axis of its pool. Slots are in layer-major
order, so a layer's slots in a pool are contiguous:

    retrieval pool   | layer 0: head 2 | layer 1: heads 0, 3 | layer 2: - | ...
    local pool       | layer 0: heads 0, 1, 3 | layer 1: heads 1, 2 | ...

Both pools draw pages from one block pool, so their pages have equal bytes. Tokens per
page are chosen to make them nearly equal, and the rest is padding. Layers without full
attention, if the model has any, lie in pages of the same bytes: see `foreign`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from razor_kernels import DENSE_FOREVER, PageLayout, Window
from razor_vllm.config import RazorConfig
from razor_vllm.foreign import ForeignLayers
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import RankHeads

RETRIEVAL_POOL = "razor.layers.0.retrieval"
LOCAL_POOL = "razor.layers.1.local"
POOLS = (RETRIEVAL_POOL, LOCAL_POOL)

_LOCAL_BLOCK_SIZES = (32, 48, 64, 96, 128)
_BLOCK_STEP = 16
_MAX_HIT_TOKENS = 256
"""Preferred limit of the least common multiple of the page lengths, in which prefix-cache
hits come."""

FOREIGN_BLOCK_SIZES = (16, 32)
"""Tokens per page of layers without full attention: vLLM never splits pages that layers share
into blocks of its kernels, so they are as long as such a block may be."""

DRAFT_BLOCK_SIZES = tuple(range(16, 1025, 16))
"""Tokens per page of a draft, whose few layers would leave most of a page empty otherwise."""

_MAX_TABLES = 8
"""Preferred limit of block tables of a request. Each costs the host time in every step:
docs/performance.md has the figures."""
_MAX_STATE_BLOCK_SIZE = 1024
"""Longest local page beside Mamba states, whose pages are long."""
_NEAR = 0.02
"""Share of the cost that shorter steps of hits are worth beside states."""
_PAGE_ALIGNMENT = 256
"""Bytes of which a page is a multiple where layers of several kinds share it."""


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
        foreign: layers that are not split by heads.
        least_page_bytes: of a page, so that so many foreign layers fit one.
    """

    config: RazorConfig
    heads: RankHeads
    dtype: torch.dtype
    blocks: PoolSizes
    full_block_size: int
    foreign: tuple[ForeignLayers, ...] = ()
    least_page_bytes: int = 0

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
        """Bytes of a page of the block pool, padding included."""
        most = max(
            self.retrieval_layout.page_bytes(self.num_retrieval_slots),
            self.local_layout.page_bytes(self.num_local_slots),
            self.least_page_bytes,
        )
        return -(-most // _PAGE_ALIGNMENT) * _PAGE_ALIGNMENT if self.foreign else most

    @property
    def num_foreign_groups(self) -> int:
        """Block tables of the foreign layers."""
        return sum(layers.num_groups(self.page_bytes) for layers in self.foreign)

    @property
    def num_tables(self) -> int:
        """Block tables of a request."""
        return bool(self.num_retrieval_slots) + bool(self.num_local_slots) + self.num_foreign_groups

    @property
    def hit_tokens(self) -> int:
        """Tokens of which prefix-cache hits are a multiple."""
        pools = zip(self.blocks, (self.num_retrieval_slots, self.num_local_slots), strict=True)
        sizes = [size for size, slots in pools if slots]
        return math.lcm(*sizes, *(f.block_size for f in self.foreign if not f.is_state))

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

    def foreign_pages(self, num_tokens: int) -> int:
        """Pages that a decoding request holds for layers that are not split by heads."""
        page = self.page_bytes
        return sum(f.num_groups(page) * f.held_pages(num_tokens) for f in self.foreign)

    @property
    def moving_pages(self) -> int:
        """Pages that a request holds beside `foreign_pages` while it computes the first token
        past a multiple of `hit_tokens`: its states are copied to new ones."""
        return sum(f.num_groups(self.page_bytes) * f.num_moving for f in self.foreign)

    def request_pages(self, num_tokens: int, dense_until: int = 0) -> int:
        """Pages that a request holds while computing its last token, `moving_pages` aside.

        Args:
            num_tokens: tokens so far, the one being computed included.
            dense_until: of the request; 0 for a decoding one.
        """
        own = self.retrieval_pages(num_tokens) + self.local_pages(num_tokens, dense_until)
        return own + self.foreign_pages(num_tokens)

    def request_bytes(self, num_tokens: int, dense_until: int = 0) -> int:
        """`request_pages` in bytes of KV memory."""
        return self.request_pages(num_tokens, dense_until) * self.page_bytes

    def waiting_pages(self, num_tokens: int) -> int:
        """Cached pages that the next turn of a chat of `num_tokens` tokens needs.

        In exact mode a chat whose tokens are all of its last prompt.
        """
        end = num_tokens - num_tokens % self.hit_tokens
        local = end // self.blocks.local if self.num_local_slots else 0
        if self.config.prefill != "exact" and local:
            kept = self.window.first_kept_page(end)
            local -= max(kept - self.window.sink_pages, 0)
        return self.retrieval_pages(end) + local + self.foreign_pages(end)

    @property
    def full_page_bytes(self) -> int:
        """Bytes of a page of all full-attention layers in stock vLLM."""
        layout = PageLayout(
            self.full_block_size, self.profile.head_size, self.dtype, has_tail=False
        )
        return layout.page_bytes(self.profile.num_heads)

    def full_request_pages(self, num_tokens: int) -> int:
        """Pages that stock vLLM holds in each full-attention layer for `num_tokens` tokens."""
        return -(-num_tokens // self.full_block_size)

    def full_request_bytes(self, num_tokens: int) -> int:
        """Bytes of KV memory that stock vLLM needs for a request of `num_tokens` tokens.

        Foreign layers count with pages of `full_block_size` tokens, and without the padding
        that vLLM's own grouping may add.
        """
        foreign = (f.with_block_size(self.full_block_size) for f in self.foreign)
        return self.full_request_pages(num_tokens) * self.full_page_bytes + sum(
            layers.layer_bytes(num_tokens) for layers in foreign
        )

    def longest_dense(self, num_pages: int) -> int:
        """Tokens of the longest request that fits `num_pages` pages without compression."""
        num_pages -= self.moving_pages
        low, high = 0, max(num_pages, 0) * max(self.blocks)
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
        others = self.retrieval_pages(num_tokens) + self.foreign_pages(num_tokens)
        others += self.moving_pages
        room = (num_pages - others) * size
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
    foreign: Sequence[ForeignLayers] = (),
    foreign_block_sizes: Sequence[int] = FOREIGN_BLOCK_SIZES,
    draft_block_sizes: Sequence[int] = DRAFT_BLOCK_SIZES,
) -> MemoryPlan:
    """Choose the page of the block pool, and tokens per page, so that requests cost least.

    Few block tables and short steps of prefix-cache hits go first, where they can be had.

    Args:
        max_model_len: tokens; the cost is that of requests of 1/8 to all of it.
        block_size: stock vLLM's, used if there is only one pool and nothing to match.
        foreign: layers that are not split by heads, with pages of any length.
        foreign_block_sizes: tokens per page that those layers' backends accept.
        draft_block_sizes: the same of a draft's layers.

    Raises:
        ValueError: no retrieval head, and the config does not allow it.
    """
    if heads.retrieval_quota == 0 and not config.allow_no_retrieval_heads:
        raise ValueError("razor: the head profile names no retrieval head; at least one is needed")
    plans = (
        _with_long_drafts(
            MemoryPlan(config, heads, dtype, PoolSizes(*sizes), block_size, layers, least),
            draft_block_sizes,
        )
        for layers in _foreign_choices(foreign, foreign_block_sizes)
        for least in _least_pages(layers)
        for sizes in _pool_sizes(heads, dtype, block_size, layers, least)
    )
    return min(plans, key=lambda plan: _cost(plan, max_model_len))


def _foreign_choices(
    foreign: Sequence[ForeignLayers], block_sizes: Sequence[int]
) -> Iterator[tuple[ForeignLayers, ...]]:
    """The foreign layers with each length that their pages may have."""
    if all(layers.is_state for layers in foreign):
        yield tuple(foreign)
        return
    for size in block_sizes:
        yield tuple(layers.with_block_size(size) for layers in foreign)


def _with_long_drafts(plan: MemoryPlan, block_sizes: Sequence[int]) -> MemoryPlan:
    """The plan with a draft's pages as long as fits, in step with all others."""

    def lengthened(layers: ForeignLayers) -> ForeignLayers:
        if not layers.is_draft:
            return layers
        token_bytes = layers.num_layers * layers.page_bytes // layers.block_size
        steps = math.lcm(*plan.blocks, layers.block_size)
        fitting = [
            size
            for size in block_sizes
            if size * token_bytes <= plan.page_bytes and not (size % steps and steps % size)
        ]
        return layers.with_block_size(max(fitting, default=layers.block_size))

    return replace(plan, foreign=tuple(map(lengthened, plan.foreign)))


def _least_pages(foreign: Sequence[ForeignLayers]) -> list[int]:
    """Bytes of a page that hold so many layers of one spec that another would add no group less."""
    least = {0}
    for layers in foreign:
        for groups in range(1, min(layers.num_layers, 2 * _MAX_TABLES) + 1):
            least.add(-(-layers.num_layers // groups) * layers.page_bytes)
    # The largest layer must fit a page; a draft's must all, since vLLM wants them in one group.
    largest = max((layers.page_bytes * layers.num_together for layers in foreign), default=0)
    return sorted({max(size, largest) for size in least})


def _pool_sizes(
    heads: RankHeads,
    dtype: torch.dtype,
    block_size: int,
    foreign: Sequence[ForeignLayers],
    least: int,
) -> Iterator[tuple[int, int]]:
    """Tokens per page of both pools, whose pages nearly fill one of at least `least` bytes."""
    retrieval, local = heads.retrieval_quota, heads.local_quota
    head_size = heads.profile.head_size
    row = PageLayout(_BLOCK_STEP, head_size, dtype, has_tail=False).row_bytes
    if not (retrieval and local):
        fitting = least // (row * (retrieval or local)) // _BLOCK_STEP * _BLOCK_STEP
        for size in {block_size, *(s for s in (fitting, fitting + _BLOCK_STEP) if foreign)} - {0}:
            yield size, size
        return
    sizes = set(_LOCAL_BLOCK_SIZES)
    if foreign:
        longest = _MAX_STATE_BLOCK_SIZE if any(f.is_state for f in foreign) else max(sizes)
        tail = PageLayout(_BLOCK_STEP, head_size, dtype, has_tail=True).rows - _BLOCK_STEP
        fitting = (least // (row * local) - tail) // _BLOCK_STEP * _BLOCK_STEP
        near = (fitting, fitting + _BLOCK_STEP)
        sizes |= {_BLOCK_STEP} | {min(max(size, _BLOCK_STEP), longest) for size in near}
    for size in sizes:
        page = PageLayout(size, head_size, dtype, has_tail=True).page_bytes(local)
        exact = max(page, least) / (row * retrieval)
        below = max(math.floor(exact / _BLOCK_STEP), 1) * _BLOCK_STEP
        whole = math.floor(exact / size) * size  # hits come in fewer tokens
        for tokens in {below, below + _BLOCK_STEP, *([whole] if foreign and whole else [])}:
            yield tokens, size


def _cost(plan: MemoryPlan, max_model_len: int) -> tuple[bool, bool, float, int, float]:
    lengths = [max(max_model_len // part, 1) for part in (8, 4, 2, 1)]
    mean = sum(plan.request_bytes(n) / n for n in lengths) / len(lengths)
    # Beside states pages are long, and short steps of hits would waste most of them. So would
    # they of a draft's pages.
    has_long = any(layers.is_state or layers.is_draft for layers in plan.foreign)
    drafts = [layers.block_size for layers in plan.foreign if layers.is_draft]
    longest_hit = max(*plan.blocks, *drafts) if has_long else _MAX_HIT_TOKENS
    near = round(math.log(mean) / _NEAR) if has_long else mean
    long_hits = plan.hit_tokens > longest_hit
    return plan.num_tables > _MAX_TABLES, long_hits, near, plan.hit_tokens, mean

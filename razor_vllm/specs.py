"""What the two pools tell vLLM about their pages, and how layers share pages."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self, cast

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from razor_kernels import PageLayout, Window
from razor_vllm.config import RazorConfig
from razor_vllm.foreign import ForeignLayers, grouped
from razor_vllm.plan import MemoryPlan


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec(FullAttentionSpec):
    """Pages of all retrieval heads: vLLM's full attention, cached as the policy allows."""

    razor: RazorConfig
    full_block_size: int
    """Tokens per page of stock vLLM when the plan was made: vLLM's own setting changes later."""
    foreign_block_size: int | None
    """Tokens per page of layers that are not split by heads; None where there are none."""
    draft_block_size: int | None
    """The same of a draft's layers."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec of a group; the group has one layer, so they are the same."""
        assert all(spec == specs[0] for spec in specs), "retrieval pools differ"
        return specs[0]


@dataclass(frozen=True, kw_only=True)
class LocalSpec(SlidingWindowSpec):
    """Pages of all local heads: sinks, a window, and a tail of running sums in each page."""

    razor: RazorConfig
    full_block_size: int
    foreign_block_size: int | None
    draft_block_size: int | None
    """See `RetrievalSpec`."""

    @property
    def window(self) -> Window:
        razor = self.razor
        return Window(razor.sinks, razor.window, razor.window_ratio, self.block_size)

    @property
    def layout(self) -> PageLayout:
        return PageLayout(self.block_size, self.head_size, self.dtype, has_tail=True)

    def get_num_kernel_states(self, kernel_block_size: int) -> int:
        """Rows of a slot in a page, the tail's included."""
        assert kernel_block_size == self.block_size, "local pages are never split"
        return self.layout.rows

    @property
    def num_retained_tokens(self) -> int:
        """0: no entry of a block table is nulled, since sinks and tail page are below the window.

        Asked for by the V2 runner of vLLM 0.33 and later.
        """
        return 0

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """Most pages that one request can hold at a time past its dense part."""
        whole = -(-max_model_len // self.block_size)
        held = self.window.max_held_pages(max_model_len)
        in_flight = -(-max_in_flight_tokens // self.block_size)
        return min(held + in_flight, whole)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one request of the model's length, whose prompt may be dense to its end."""
        max_model_len = vllm_config.model_config.max_model_len
        pages = -(-max_model_len // self.block_size)
        if self.razor.prefill == "windowed":
            in_flight = vllm_config.max_in_flight_tokens
            pages = self.max_admission_blocks_per_request(in_flight, max_model_len)
        return pages * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict) -> bool:
        return all(isinstance(spec, LocalSpec) for spec in kv_cache_specs.values())


def pool_specs(plan: MemoryPlan) -> tuple[RetrievalSpec | None, LocalSpec | None]:
    """Specs of the pools that have slots, with pages of equal bytes."""
    head_size, dtype = plan.profile.head_size, plan.dtype
    foreign_block_size, draft_block_size = (
        max(
            (f.block_size for f in plan.foreign if f.is_draft is draft and not f.is_state),
            default=None,
        )
        for draft in (False, True)
    )
    retrieval = local = None
    if plan.num_retrieval_slots:
        retrieval = RetrievalSpec(
            block_size=plan.blocks.retrieval,
            num_kv_heads=plan.num_retrieval_slots,
            head_size=head_size,
            dtype=dtype,
            razor=plan.config,
            full_block_size=plan.full_block_size,
            foreign_block_size=foreign_block_size,
            draft_block_size=draft_block_size,
        )
    if plan.num_local_slots:
        local = LocalSpec(
            block_size=plan.blocks.local,
            num_kv_heads=plan.num_local_slots,
            head_size=head_size,
            dtype=dtype,
            sliding_window=plan.config.window,
            razor=plan.config,
            full_block_size=plan.full_block_size,
            foreign_block_size=foreign_block_size,
            draft_block_size=draft_block_size,
        )
    page_bytes = plan.page_bytes
    return (
        retrieval and replace(retrieval, page_size_padded=page_bytes),
        local and replace(local, page_size_padded=page_bytes),
    )


def foreign_layers(
    specs: Iterable[KVCacheSpec], vllm_config: VllmConfig
) -> tuple[ForeignLayers, ...]:
    """What the plan knows of layers that are not split by heads.

    Args:
        specs: one a layer.
    """
    found = []
    for spec, count in Counter(specs).items():
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        page_bytes, states, moving = spec.page_size_bytes, 0, 0
        if isinstance(spec, MambaSpec):
            states = 1 + spec.num_speculative_blocks
            moving = spec.max_memory_usage_bytes(vllm_config) // page_bytes - states
        found.append(ForeignLayers(count, page_bytes, spec.block_size, window, states, moving))
    return tuple(found)


def is_pool(spec: KVCacheSpec) -> bool:
    """Whether a spec is that of one of the two pools."""
    return isinstance(spec, RetrievalSpec | LocalSpec)


def needs_zeroed_pages(specs: Iterable[KVCacheSpec]) -> bool:
    """Whether pages of local heads may later be those of a layer that is not split.

    The running sums in them are fp32. Read as bf16 or fp8 they may be NaN, and vLLM's kernels
    multiply what lies past a request's last token with zero, which a NaN survives.
    """
    kinds = list(specs)
    is_foreign = (isinstance(spec, AttentionSpec) and not is_pool(spec) for spec in kinds)
    return any(isinstance(spec, LocalSpec) for spec in kinds) and any(is_foreign)


def kv_cache_groups(
    specs: dict[str, KVCacheSpec], drafts_lag: bool = False
) -> list[KVCacheGroupSpec]:
    """Cache groups, each with a block table: a draft's, one a pool, and few for all other layers.

    A draft's comes first, because vLLM's V1 runner gives the first group's table to draft models,
    in whatever group they are. vLLM's own grouping would merge a sliding layer with the local
    pool where their windows are equal, and cannot have pages that differ.

    Args:
        specs: of all cache layers by name.
        drafts_lag: whether the last block of a prefix is not yet good in a draft's layers, as
            with EAGLE heads; vLLM then leaves it out of hits.
    """
    pools = {name: spec for name, spec in specs.items() if is_pool(spec)}
    drafts: list[KVCacheGroupSpec] = []
    others: list[KVCacheGroupSpec] = []
    first = cast(RetrievalSpec | LocalSpec, next(iter(pools.values())))
    same: dict[KVCacheSpec, list[str]] = {}
    for name, spec in specs.items():
        if name not in pools:
            if isinstance(spec, AttentionSpec):
                is_draft = isinstance(spec, FullAttentionSpec)
                size = first.draft_block_size if is_draft else first.foreign_block_size
                assert size is not None, "a foreign layer that is not planned"
                spec = replace(spec, block_size=size)
            same.setdefault(spec, []).append(name)
    for spec, names in same.items():
        shared = grouped(names, spec.page_size_bytes, first.page_size_bytes)
        # Full attention that is not a pool's is a draft's. Where no group is marked, vLLM takes
        # all for drafts.
        is_draft = isinstance(spec, FullAttentionSpec)
        made = [
            KVCacheGroupSpec(group, spec, is_eagle_group=drafts_lag and is_draft)
            for group in shared
        ]
        (drafts if is_draft else others).extend(made)
    own = [KVCacheGroupSpec([name], spec) for name, spec in pools.items()]
    return [*drafts, *own, *others]

"""What the two pools tell vLLM about their pages."""

from dataclasses import dataclass, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from razor_kernels import PageLayout, Window
from razor_vllm.config import RazorConfig
from razor_vllm.plan import MemoryPlan


@dataclass(frozen=True, kw_only=True)
class RetrievalSpec(FullAttentionSpec):
    """Pages of all retrieval heads: vLLM's full attention, cached as the policy allows."""

    razor: RazorConfig
    full_block_size: int
    """Tokens per page of stock vLLM when the plan was made: vLLM's own setting changes later."""

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
    retrieval = local = None
    if plan.num_retrieval_slots:
        retrieval = RetrievalSpec(
            block_size=plan.blocks.retrieval,
            num_kv_heads=plan.num_retrieval_slots,
            head_size=head_size,
            dtype=dtype,
            razor=plan.config,
            full_block_size=plan.full_block_size,
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
        )
    if retrieval is not None and local is not None:
        retrieval = replace(retrieval, page_size_padded=plan.page_bytes)
        local = replace(local, page_size_padded=plan.page_bytes)
    return retrieval, local

"""Attention over the two pools, as a vLLM attention backend.

    step    vLLM builds one metadata object a pool: write and read plans, on the host
    layer   each pool: write its heads' K and V, then attend; heads scatter back

vLLM hands a layer the metadata of the pool that it shares (see `pools`); the other
pool's metadata and cache are read from the forward context by the pool's name.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from razor_kernels import DENSE_FOREVER, paged
from razor_vllm.pools import LayerPools, attach, attachment_of
from razor_vllm.specs import LocalSpec

step_dense_until: ContextVar[tuple[int, ...]] = ContextVar("razor_dense_until", default=())
"""`dense_until` of each request of the step being prepared, in batch order."""


@dataclass(frozen=True)
class RazorMetadata(AttentionMetadata):
    """One pool's plans of one step."""

    writes: paged.WritePlan
    reads: tuple[paged.Segment, ...]


class RazorMetadataBuilder(AttentionMetadataBuilder[RazorMetadata]):
    """Plans a step for one pool; all layers share the plan."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.block_size = kv_cache_spec.block_size
        self.window = kv_cache_spec.window if isinstance(kv_cache_spec, LocalSpec) else None
        self.compensation = attachment_of(vllm_config).config.compensation

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RazorMetadata:
        """Plan a step. Each request's `dense_until` comes from the model runner."""
        common = common_attn_metadata
        starts = common.query_start_loc_cpu
        query_lens = (starts[1:] - starts[:-1]).tolist()
        seq_lens = common.seq_lens.tolist()
        # Rows beyond the runner's requests are padding, or a dummy run's: no value counts.
        dense_until = list(step_dense_until.get())
        dense_until += [DENSE_FOREVER] * (len(query_lens) - len(dense_until))
        tails: tuple[paged.TailUpdate, ...] = ()
        table = common.block_table_tensor
        if self.window is not None:
            tails = paged.plan_tails(query_lens, seq_lens, table, self.window)
        return RazorMetadata(
            paged.plan_writes(
                common.slot_mapping[: common.num_actual_tokens], self.block_size, tails
            ),
            paged.plan_reads(
                query_lens,
                seq_lens,
                dense_until,
                table,
                self.window,
                self.block_size,
                self.compensation,
            ),
        )


class RazorAttentionImpl(AttentionImpl[RazorMetadata]):
    """Attention of one layer's heads, each in its pool."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.alibi_slopes = alibi_slopes
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.vllm_config = get_current_vllm_config()
        self.pools: tuple[LayerPools, ...] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's hook after loading: the first layer that gets it attaches the pools."""
        attach(self.vllm_config)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: RazorMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write K and V, and attend.

        Args:
            query, output: `[num_tokens, num_heads, head_size]`; output is written to.
            key, value: `[num_tokens, num_kv_heads, head_size]`.
            kv_cache: not used; the pools' are.
            attn_metadata: None while vLLM measures memory: output is zeros then.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("razor: fused output quantization is not covered")
        if attn_metadata is None:
            return output.zero_()
        context = get_forward_context()
        all_metadata: Any = context.attn_metadata
        group = self.num_heads // self.num_kv_heads
        shape = (-1, self.num_kv_heads, group, self.head_size)
        q, out = query.view(shape), output.view(shape)
        for pool in self._pools(layer):
            cache = context.no_compile_layers[pool.name].kv_cache
            cache = cache[:, pool.slots.start : pool.slots.stop]
            metadata = all_metadata[pool.name]
            paged.write(
                key[:, pool.heads], value[:, pool.heads], cache, pool.layout, metadata.writes
            )
            heads_out = torch.zeros_like(q[:, pool.heads])
            paged.attention(
                q[:, pool.heads], cache, pool.layout, metadata.reads, self.scale, heads_out
            )
            out[:, pool.heads] = heads_out
        return output

    def _pools(self, layer: AttentionLayer) -> tuple[LayerPools, ...]:
        """The layer's heads; settled at its first step, when block sizes are."""
        if self.pools is None:
            attached = attachment_of(self.vllm_config)
            plan = attached.plan(self.vllm_config)
            self.pools = attached.layer_pools(plan, cast(Attention, layer).layer_name)
        return self.pools


class RazorAttentionBackend(AttentionBackend):
    """Attention over the two pools, in PyTorch, on any device."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All of a page in one run, a slot of it in one run."""
        return (KVCacheLayout.BLHNC,)

    @staticmethod
    def get_name() -> str:
        """A name that vLLM knows: it looks the backend up by it."""
        return "CPU_ATTN" if current_platform.is_cpu() else "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RazorAttentionImpl]:
        return RazorAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[RazorMetadataBuilder]:
        return RazorMetadataBuilder

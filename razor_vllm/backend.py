"""Attention over the two pools, as a vLLM attention backend of full-attention layers.

    step    vLLM builds one metadata object per pool; the first layer joins them into one step
    layer   writes its heads' K and V into both pools, then computes attention

vLLM gives a layer the metadata of the pool that it shares (see `pools`); the other
pool's metadata and cache are read from the forward context by the pool's name.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
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

from razor_kernels import DENSE_FOREVER
from razor_kernels.forms import Form
from razor_kernels.step import AttentionParams, LayerHeads, PoolTables, Step
from razor_vllm import compat
from razor_vllm.plan import POOLS, RETRIEVAL_POOL
from razor_vllm.policy import step_dense_until
from razor_vllm.pools import Attachment, attach, attachment_of
from razor_vllm.specs import LocalSpec


@dataclass
class RazorMetadata(AttentionMetadata):
    """One pool's part of a step.

    batch: a step with only this pool's tables. step: the step with the tables and pages of both
        pools, once a layer has asked for it.
    """

    batch: Step
    step: Step | None = None

    def join(self, step: Step) -> Step:
        self.step = step
        return step


class RazorMetadataBuilder(AttentionMetadataBuilder[RazorMetadata]):
    """Makes a step's metadata for one pool; all layers share it.

    A CUDA graph may hold a whole decode, drafted tokens included. Grids are fixed, and what
    differs between steps is in buffers that stay: the runner's own, never copies of them.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.is_local = isinstance(kv_cache_spec, LocalSpec)
        attached = attachment_of(vllm_config)
        _check_block_size(kv_cache_spec, attached)
        self.form = attached.form
        # A plan reads the same from both pools, so only the first pool's builder plans.
        context = vllm_config.compilation_config.static_forward_context
        self.plans = not self.is_local or RETRIEVAL_POOL not in context
        # One buffer for all steps: a CUDA graph reads it.
        size = vllm_config.scheduler_config.max_num_seqs
        self.dense_until = torch.full((size,), DENSE_FOREVER, dtype=torch.int32, device=device)
        self.filled: tuple[int, ...] = ()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> RazorMetadata:
        """Metadata of a step. Each request's `dense_until` comes from the model runner."""
        common = common_attn_metadata
        tables = PoolTables(
            _own(common.block_table_tensor, torch.int32, "block_table_tensor"),
            _own(common.slot_mapping, torch.int64, "slot_mapping")[: common.num_actual_tokens],
        )
        batch = Step(
            query_start_loc=_own(common.query_start_loc, torch.int32, "query_start_loc"),
            seq_lens=_own(common.seq_lens, torch.int32, "seq_lens"),
            dense_until=self._dense_until(common.num_reqs),
            max_query_len=common.max_query_len,
            tables=(None, tables) if self.is_local else (tables, None),
        )
        if self.plans:
            self.form.plan(batch)
        return RazorMetadata(batch)

    def _dense_until(self, num_requests: int) -> torch.Tensor:
        values = step_dense_until.get()[:num_requests]
        # Rows beyond the runner's requests are padding or a dummy run's: any value will do.
        if values != self.filled:
            fresh = torch.tensor(values, dtype=torch.int32, pin_memory=self.device.type == "cuda")
            self.dense_until[: len(values)].copy_(fresh, non_blocking=True)
            self.filled = values
        return self.dense_until[:num_requests]


def _own(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The runner's tensor itself: after a conversion, a CUDA graph would always read a copy."""
    assert tensor.dtype == dtype, f"razor: {name} is {tensor.dtype}, expected {dtype}"
    return tensor


def _check_block_size(kv_cache_spec: AttentionSpec, attached: Attachment) -> None:
    """Refuse to serve from pages whose size is not the plan's.

    Raises:
        RuntimeError: names both sizes.
    """
    blocks = attached.plan.blocks
    expected = blocks.local if isinstance(kv_cache_spec, LocalSpec) else blocks.retrieval
    if kv_cache_spec.block_size != expected:
        raise RuntimeError(
            f"razor: expected pages of {expected} tokens for a {type(kv_cache_spec).__name__}, "
            f"found {kv_cache_spec.block_size}"
        )


def step_of(all_metadata: dict[str, RazorMetadata], attached: Attachment) -> Step:
    """The step of both pools with their current pages; made by the first layer that asks."""
    parts = [all_metadata.get(name) for name in POOLS]
    first = next(part for part in parts if part is not None)
    if first.step is not None:
        return first.step
    retrieval, local = (
        None if part is None else part.batch.tables[i] for i, part in enumerate(parts)
    )
    pages = tuple(None if pool is None else pool.pages() for pool in attached.pools)
    return first.join(replace(first.batch, tables=(retrieval, local), pools=(pages[0], pages[1])))


class _Layer(NamedTuple):
    """What is the same in every step; no memory of a pool."""

    attached: Attachment
    form: Form
    heads: LayerHeads
    params: AttentionParams


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
        self.sinks = sinks
        self.vllm_config = get_current_vllm_config()
        self.layer: _Layer | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """vLLM's hook after loading: the first layer that gets it attaches the pools."""
        self.layer = None  # scales may have been loaded anew
        compat.install_worker_patches(
            self.vllm_config.use_v2_model_runner,
            lambda vllm_config: attachment_of(vllm_config).plan.hit_tokens,
        )
        attach(self.vllm_config, RazorAttentionBackend)

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
        """Write K and V, then compute attention.

        Args:
            query, output: `[num_tokens, num_heads, head_size]`; output is written to.
            key, value: `[num_tokens, num_kv_heads, head_size]`.
            kv_cache: not used; the pools' caches are.
            attn_metadata: None while vLLM measures memory; the output is then zeros.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("razor: fused output quantization is not covered")
        if attn_metadata is None:
            return output.zero_()
        fixed = self.layer or self._first_step(layer)
        step = attn_metadata.step
        if step is None:
            all_metadata: Any = get_forward_context().attn_metadata
            step = step_of(all_metadata, fixed.attached)
        form = fixed.form
        form.write(key, value, fixed.heads, step, fixed.params)
        shape = (-1, self.num_kv_heads, self.num_heads // self.num_kv_heads, self.head_size)
        form.attention(query.view(shape), fixed.heads, step, fixed.params, output.view(shape))
        return output

    def _first_step(self, layer: AttentionLayer) -> _Layer:
        """Made at a layer's first step: by then the plan is fixed, and scales are loaded."""
        attached = attachment_of(self.vllm_config)
        name = cast(Attention, layer).layer_name
        slopes = self.alibi_slopes
        params = AttentionParams(
            scale=self.scale,
            soft_cap=self.logits_soft_cap or 0.0,
            alibi_slopes=(
                None
                if slopes is None
                else torch.tensor(slopes, dtype=torch.float32, device=attached.device)
            ),
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            compensation=attached.config.compensation,
            sink_logits=None if self.sinks is None else self.sinks.detach().float().contiguous(),
        )
        heads = attached.layer_heads(name)
        self.layer = _Layer(attached, attached.form, heads, params)
        return self.layer


class RazorAttentionBackend(AttentionBackend):
    """Attention over the two pools."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A page is contiguous, and so is a slot within it."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks (gpt-oss), see `AttentionParams.sink_logits`."""
        return True

    @staticmethod
    def get_name() -> str:
        """A name that vLLM knows: it finds the backend by it."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RazorAttentionImpl]:
        return RazorAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[RazorMetadataBuilder]:
        return RazorMetadataBuilder

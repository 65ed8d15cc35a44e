"""The two cache "layers" that vLLM sees, and their attachment to a loaded model.

vLLM gives memory to layers. All retrieval heads of a rank share one cache layer and
all local heads another. The model's full-attention layers are marked as sharing the
first one's cache, so that vLLM gives them none. A request then has two block tables,
whatever the head map looks like. Layers of other kinds have caches of their own (`foreign`).
"""

import functools
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from razor_kernels.forms import Form, Setting, choose_form
from razor_kernels.step import LayerHeads, PoolPages
from razor_vllm import compat
from razor_vllm.config import config_of
from razor_vllm.foreign import ForeignLayers
from razor_vllm.managers import register_specs
from razor_vllm.partition import rank_heads
from razor_vllm.plan import DRAFT_BLOCK_SIZES, FOREIGN_BLOCK_SIZES, POOLS, MemoryPlan, plan_memory
from razor_vllm.specs import foreign_layers, pool_specs
from razor_vllm.support import check_foreign, check_layers, check_shape


class Pool(nn.Module, AttentionLayerBase):
    """A cache layer: pages of one kind of head, no weights, no forward.

    vLLM sets `kv_cache`, and more than once: on a GPU, graphs are first captured over a cache
    that is thrown away. So pages are read from here in each step and stored nowhere else.

    Args:
        name: in vLLM's forward context.
        retrieval: whether its heads are retrieval heads.
        num_heads: query heads of the model's layers; the same, so that vLLM builds one
            metadata object for all of them.
        backend: that of the model's layers.
    """

    def __init__(
        self,
        name: str,
        retrieval: bool,
        num_heads: int,
        backend: type[AttentionBackend],
        attached: "Attachment",
    ) -> None:
        super().__init__()
        self.layer_name = name
        self.retrieval = retrieval
        self.num_heads = num_heads
        self.attn_type = AttentionType.DECODER
        self.attn_backend = backend
        self.attached = attached
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self.attn_backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        retrieval, local = pool_specs(self.attached.plan)
        return retrieval if self.retrieval else local

    def pages(self) -> PoolPages:
        """The pool's current memory.

        Raises:
            RuntimeError: what vLLM allocated does not fit the plan.
        """
        plan = self.attached.plan
        if self.retrieval:
            layout, slots, window = plan.retrieval_layout, plan.num_retrieval_slots, None
        else:
            layout, slots, window = plan.local_layout, plan.num_local_slots, plan.window
        expected = (slots, layout.rows, 2 * layout.head_dim)
        if self.kv_cache.shape[1:] != expected:
            raise RuntimeError(
                f"razor: {self.layer_name}: expected pages of {expected}, slots by rows by "
                f"numbers, found {tuple(self.kv_cache.shape[1:])}"
            )
        return PoolPages(self.kv_cache, layout, window)


class Attachment:
    """What a worker knows of its pools: the plan, and each layer's heads.

    Args:
        layers: the full-attention layers of this rank.
    """

    def __init__(self, vllm_config: VllmConfig, layers: dict[str, Attention]) -> None:
        config = config_of(vllm_config.additional_config)
        assert config is not None, "the policy was not asked for"
        first = next(iter(layers.values()))
        self.vllm_config = vllm_config
        self.config = config
        self.dtype = stored_dtype(first)
        self.device = torch.device(vllm_config.device_config.device_type)
        self.num_kv_heads, self.head_size = first.num_kv_heads, first.head_size
        self.group = first.num_heads // first.num_kv_heads
        self.heads = rank_heads(
            vllm_config, get_pp_group().rank_in_group, get_tensor_model_parallel_rank()
        )
        names = sorted(layers, key=extract_layer_index)
        check_shape(
            self.heads,
            [extract_layer_index(name) for name in names],
            first.num_kv_heads,
            first.head_size,
        )
        self.layer_index = {name: index for index, name in enumerate(names)}
        quotas = (self.heads.retrieval_quota, self.heads.local_quota)
        pools = [
            Pool(name, index == 0, first.num_heads, first.attn_backend, self) if quota else None
            for index, (name, quota) in enumerate(zip(POOLS, quotas, strict=True))
        ]
        self.pools = (pools[0], pools[1])
        """Pool of the retrieval heads, pool of the local heads; None where there are none."""

    @functools.cached_property
    def plan(self) -> MemoryPlan:
        """The plan, made once, when vLLM first asks what the pools need.

        Not earlier, because vLLM chooses its block size after the model is loaded. And not
        again, because vLLM later changes that size and the model's length, while pages stay.
        """
        foreign, block_sizes, draft_sizes = self._foreign()
        return plan_memory(
            self.config,
            self.heads,
            self.dtype,
            self.vllm_config.model_config.max_model_len,
            self.vllm_config.cache_config.block_size,
            foreign,
            block_sizes,
            draft_sizes,
        )

    def _foreign(self) -> tuple[tuple[ForeignLayers, ...], list[int], list[int]]:
        """The layers that are not split by heads, a draft's included, and the lengths that
        pages of others and of a draft may have."""
        kind: Any = AttentionLayerBase
        specs: dict[str, KVCacheSpec] = {}
        block_sizes, draft_sizes = list(FOREIGN_BLOCK_SIZES), list(DRAFT_BLOCK_SIZES)
        for name, layer in get_layers_from_vllm_config(self.vllm_config, kind).items():
            if name in self.layer_index or isinstance(layer, Pool):
                continue
            spec, backend = layer.get_kv_cache_spec(self.vllm_config), layer.get_attn_backend()
            if isinstance(spec, AttentionSpec):
                spec = backend.customize_spec(spec)
                block_sizes = [size for size in block_sizes if takes_whole(backend, size)]
                if isinstance(spec, FullAttentionSpec):
                    draft_sizes = [size for size in draft_sizes if takes_whole(backend, size)]
            check_foreign(name, layer, spec)
            specs[name] = spec
        layers = foreign_layers(specs.values(), self.vllm_config)
        return layers, block_sizes, draft_sizes

    @functools.cached_property
    def form(self) -> Form:
        """The kernels that serve this model's heads."""
        plan, speculative = self.plan, self.vllm_config.speculative_config
        drafted = speculative.num_speculative_tokens if speculative else 0
        return choose_form(
            Setting(
                device=self.device,
                layouts=(
                    plan.retrieval_layout if plan.num_retrieval_slots else None,
                    plan.local_layout if plan.num_local_slots else None,
                ),
                window=plan.window,
                num_kv_heads=self.num_kv_heads,
                group=self.group,
                dtype=cast(torch.dtype, self.vllm_config.model_config.dtype),
                max_requests=self.vllm_config.scheduler_config.max_num_seqs,
                max_queries=1 + drafted,
            )
        )

    def layer_heads(self, layer_name: str) -> LayerHeads:
        """The pools and slots of a layer's heads."""
        plan, layer = self.plan, self.layer_index[layer_name]
        pool_of, slot_of = ([0] * self.num_kv_heads for _ in range(2))
        for index, slots in enumerate((plan.retrieval_slots(layer), plan.local_slots(layer))):
            for slot, head in enumerate(slots.heads, start=slots.start):
                pool_of[head], slot_of[head] = index, slot
        as_tensor = functools.partial(torch.tensor, dtype=torch.int32, device=self.device)
        return LayerHeads(as_tensor(pool_of), as_tensor(slot_of))


def takes_whole(backend: type[AttentionBackend], block_size: int) -> bool:
    """Whether a backend's kernels read pages of so many tokens without splitting them."""
    sizes = backend.get_supported_kernel_block_sizes()
    return not sizes or any(
        block_size % size.base == 0 if isinstance(size, MultipleOf) else block_size == size
        for size in sizes
    )


def stored_dtype(layer: Attention) -> torch.dtype:
    """Type of the numbers in a layer's cache; vLLM itself treats fp8 as bytes."""
    if layer.kv_cache_dtype in ("fp8", "fp8_e4m3"):
        return torch.float8_e4m3fn
    return layer.kv_cache_torch_dtype


def attach(vllm_config: VllmConfig, backend: type[AttentionBackend]) -> None:
    """Give a loaded model its pools; later calls do nothing.

    Args:
        backend: ours, which vLLM gives to layers with full attention.

    Raises:
        ValueError: the profile is of another model.
        NotImplementedError: a layer of a kind that is not covered.
    """
    context = vllm_config.compilation_config.static_forward_context
    if any(name in context for name in POOLS):
        return
    register_specs()
    layers = {
        name: layer
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items()
        if issubclass(layer.attn_backend, backend)
    }
    check_layers(layers)
    attached = Attachment(vllm_config, layers)
    pools = {pool.layer_name: pool for pool in attached.pools if pool is not None}
    context.update(pools)
    compat.share_cache(layers.values(), next(iter(pools)))


def attachment_of(vllm_config: VllmConfig) -> Attachment:
    """The attachment made by `attach`.

    Raises:
        RuntimeError: `attach` did not run in this process.
    """
    context = vllm_config.compilation_config.static_forward_context
    for name in POOLS:
        if name in context:
            return context[name].attached
    raise RuntimeError(
        "razor: the policy did not attach to the model: expected the cache layers "
        f"{' and '.join(POOLS)}, found neither"
    )

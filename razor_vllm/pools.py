"""The two cache "layers" that vLLM sees, and their attachment to a loaded model.

vLLM gives memory to layers. All retrieval heads of a rank share one cache layer and
all local heads another; the model's own attention layers are told that they share
the first one's cache, so that vLLM gives them none. A request then has two block
tables, whatever the head map looks like.
"""

import functools
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.kv_cache_interface import KVCacheSpec

from razor_kernels import Window
from razor_kernels.forms import Form, Setting, choose_form
from razor_kernels.step import LayerHeads, PoolPages
from razor_vllm import compat
from razor_vllm.config import config_of
from razor_vllm.partition import RankHeads, partition, pipeline_stages
from razor_vllm.plan import LOCAL_POOL, RETRIEVAL_POOL, MemoryPlan, plan_memory
from razor_vllm.profile import locate_profile, read_profile
from razor_vllm.specs import pool_specs, register_specs
from razor_vllm.support import check_layers


class Pool(nn.Module, AttentionLayerBase):
    """A cache layer: pages of one kind of head, no weights, no forward.

    Args:
        name: in vLLM's forward context.
        retrieval: whether its heads are retrieval heads.
        num_heads: query heads of the model's layers; equal, so that vLLM builds one
            metadata object for them all.
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
        retrieval, local = pool_specs(self.attached.plan(vllm_config))
        return retrieval if self.retrieval else local


def rank_heads(vllm_config: VllmConfig, stage: int, tp_rank: int) -> RankHeads:
    """Heads of one rank of an engine.

    Args:
        stage: pipeline stage. tp_rank: tensor-parallel rank within it.

    Raises:
        ValueError: the profile is unreadable or of another model, or does not divide.
    """
    config, model = config_of(vllm_config.additional_config), vllm_config.model_config
    assert config is not None, "the policy was not asked for"
    profile = read_profile(locate_profile(config.head_profile, model.model))
    num_layers = model.get_total_num_hidden_layers()
    profile.check_model(num_layers, model.get_total_num_kv_heads(), model.get_head_size())
    parallel = vllm_config.parallel_config
    stages = pipeline_stages(num_layers, parallel.pipeline_parallel_size)
    ranks = partition(profile, parallel.tensor_parallel_size, stages)
    return ranks[stage * parallel.tensor_parallel_size + tp_rank]


class Attachment:
    """What a worker knows of its pools: the plan, and each layer's heads.

    Args:
        layers: the attention layers of this rank.
    """

    def __init__(self, vllm_config: VllmConfig, layers: dict[str, Attention]) -> None:
        config = config_of(vllm_config.additional_config)
        assert config is not None, "the policy was not asked for"
        first = next(iter(layers.values()))
        self.config = config
        self.dtype = stored_dtype(first)
        self.device = torch.device(vllm_config.device_config.device_type)
        self.num_kv_heads, self.head_size = first.num_kv_heads, first.head_size
        self.group = first.num_heads // first.num_kv_heads
        self._form: Form | None = None
        self.heads = rank_heads(
            vllm_config, get_pp_group().rank_in_group, get_tensor_model_parallel_rank()
        )
        found = (len(layers), first.num_kv_heads, first.head_size)
        self.heads.profile.check_model(*found)
        self.layer_index = {
            name: index for index, name in enumerate(sorted(layers, key=extract_layer_index))
        }

    def plan(self, vllm_config: VllmConfig) -> MemoryPlan:
        """The plan; vLLM settles its block size only after the model is loaded."""
        return plan_memory(
            self.config,
            self.heads,
            self.dtype,
            vllm_config.model_config.max_model_len,
            vllm_config.cache_config.block_size,
        )

    def form(self, vllm_config: VllmConfig) -> Form:
        """The kernels that serve this model's heads; made at the first call."""
        if self._form is None:
            self._form = choose_form(self._setting(vllm_config))
        return self._form

    def _setting(self, vllm_config: VllmConfig) -> Setting:
        plan, speculative = self.plan(vllm_config), vllm_config.speculative_config
        drafted = speculative.num_speculative_tokens if speculative else 0
        return Setting(
            device=self.device,
            layouts=(
                plan.retrieval_layout if plan.num_retrieval_slots else None,
                plan.local_layout if plan.num_local_slots else None,
            ),
            window=self._window(plan),
            num_kv_heads=self.num_kv_heads,
            group=self.group,
            dtype=cast(torch.dtype, vllm_config.model_config.dtype),
            max_requests=vllm_config.scheduler_config.max_num_seqs,
            max_queries=1 + drafted,
        )

    def _window(self, plan: MemoryPlan) -> Window:
        config = plan.config
        return Window(config.sinks, config.window, config.window_ratio, plan.blocks.local)

    def layer_heads(self, vllm_config: VllmConfig, layer_name: str) -> LayerHeads:
        """Where a layer's heads live; vLLM has allocated the pools' pages by now."""
        plan, layer = self.plan(vllm_config), self.layer_index[layer_name]
        context = vllm_config.compilation_config.static_forward_context
        both = (
            (RETRIEVAL_POOL, plan.retrieval_layout, None, plan.retrieval_slots(layer)),
            (LOCAL_POOL, plan.local_layout, self._window(plan), plan.local_slots(layer)),
        )
        pools: list[PoolPages | None] = []
        pool_of, slot_of = ([0] * self.num_kv_heads for _ in range(2))
        for index, (name, layout, seen, slots) in enumerate(both):
            cache = context[name].kv_cache if name in context else None
            pools.append(cache if cache is None else PoolPages(cache, layout, seen))
            for slot, head in enumerate(slots.heads, start=slots.start):
                pool_of[head], slot_of[head] = index, slot
        as_tensor = functools.partial(torch.tensor, dtype=torch.int32, device=self.device)
        return LayerHeads((pools[0], pools[1]), as_tensor(pool_of), as_tensor(slot_of))


def stored_dtype(layer: Attention) -> torch.dtype:
    """Type of the numbers in a layer's cache; vLLM hands fp8 about as bytes."""
    if layer.kv_cache_dtype in ("fp8", "fp8_e4m3"):
        return torch.float8_e4m3fn
    return layer.kv_cache_torch_dtype


def attach(vllm_config: VllmConfig) -> None:
    """Give a loaded model its pools; the second call and later ones do nothing.

    Raises:
        ValueError: the profile is missing, unreadable or of another model.
        NotImplementedError: a layer of a kind that is not covered.
    """
    context = vllm_config.compilation_config.static_forward_context
    if RETRIEVAL_POOL in context or LOCAL_POOL in context:
        return
    compat.install_worker_patches(vllm_config.use_v2_model_runner)
    register_specs()
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    check_layers(vllm_config, layers)
    attached = Attachment(vllm_config, layers)
    plan = attached.plan(vllm_config)
    first = next(iter(layers.values()))
    names = []
    for name, retrieval, num_slots in (
        (RETRIEVAL_POOL, True, plan.num_retrieval_slots),
        (LOCAL_POOL, False, plan.num_local_slots),
    ):
        if num_slots:
            pool = Pool(name, retrieval, first.num_heads, first.attn_backend, attached)
            context[name] = pool
            names.append(name)
    for layer in layers.values():
        layer.kv_sharing_target_layer_name = names[0]


def attachment_of(vllm_config: VllmConfig) -> Attachment:
    """The attachment made by `attach`.

    Raises:
        RuntimeError: `attach` did not run in this process.
    """
    context = vllm_config.compilation_config.static_forward_context
    for name in (RETRIEVAL_POOL, LOCAL_POOL):
        if name in context:
            return context[name].attached
    raise RuntimeError(
        "razor: the policy did not attach to the model: expected the cache layers "
        f"{RETRIEVAL_POOL} and {LOCAL_POOL}, found neither"
    )

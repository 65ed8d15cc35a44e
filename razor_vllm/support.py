"""What the policy covers, and the refusal of what it does not."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import RankHeads

COVERED = (
    "decoder models with full-attention layers (rotary embeddings or ALiBi; bf16, fp16, fp32 or "
    "fp8 (e4m3) KV cache), beside which others may have a sliding window or a Mamba state"
)
LAYOUT = KVCacheLayout.BLHNC
"""Of all caches of an engine under the policy: pages lie one after the other."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3")
_FOREIGN_SPECS = (SlidingWindowSpec, FullAttentionSpec, MambaSpec)
_DRAFTS = ("ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp")


def refuse(found: str) -> NotImplementedError:
    """The error that says what was found, and what is covered."""
    return NotImplementedError(
        f"razor: {found} is not covered by --kv-policy razor. Covered are {COVERED}. "
        "Serve this with --kv-policy full."
    )


def check_engine(vllm_config: VllmConfig) -> None:
    """Refuse engine features that are not covered, before a model is loaded.

    Raises:
        NotImplementedError: naming what was found and what is covered.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel = vllm_config.parallel_config
    if model.runner_type != "generate":
        raise refuse(f"a {model.runner_type} model")
    if model.use_mla:
        raise refuse("multi-head latent attention (MLA)")
    if model.is_attention_free:
        raise refuse("a model without attention")
    if model.is_encoder_decoder:
        raise refuse("an encoder-decoder model")
    if cache.cache_dtype not in _CACHE_DTYPES:
        raise refuse(f"a KV cache of {cache.cache_dtype}")
    for name, size in (
        ("decode context parallelism", parallel.decode_context_parallel_size),
        ("prefill context parallelism", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise refuse(f"{name} of {size}")
    if parallel.enable_dbo:
        raise refuse("dual-batch overlap (--enable-dbo)")
    if model.is_mm_prefix_lm or vllm_config.attention_config.use_non_causal:
        raise refuse("attention that is not causal")
    if cache.kv_sharing_fast_prefill:
        raise refuse("--kv-sharing-fast-prefill")
    if vllm_config.kv_transfer_config is not None:
        raise refuse("a KV connector")
    if cache.mamba_cache_mode == "all":
        raise refuse("--mamba-cache-mode all")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTS:
        raise refuse(f"speculative decoding by {speculative.method}")
    draft = speculative and speculative.draft_model_config
    if draft and draft.hf_config.model_type == "gemma4_mtp":
        raise refuse("an MTP model that shares the model's K and V (gemma4_mtp)")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise refuse("--disable-hybrid-kv-cache-manager")


def check_profile(vllm_config: VllmConfig, profile: HeadProfile) -> None:
    """Refuse a profile of another model, as far as the model's configuration tells.

    Raises:
        ValueError: naming what differs.
        NotImplementedError: no layer has full attention.
    """
    model = vllm_config.model_config
    num_layers = model.get_total_num_hidden_layers()
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    if len(kinds) == num_layers:
        full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
        if not full:
            raise refuse(f"a model without full attention (layers: {', '.join(set(kinds))})")
    else:
        full = list(profile.full_layers)
    # A hybrid's layers may differ in heads: those with full attention are seen once loaded.
    heads = (profile.num_kv_heads, profile.head_size)
    if len(full) == num_layers:
        heads = (model.get_total_num_kv_heads(), model.get_head_size())
    profile.check_model(num_layers, *heads, full)
    check_stages(profile, vllm_config.parallel_config.pipeline_parallel_size)


def check_stages(profile: HeadProfile, pp_size: int) -> None:
    """Refuse pipeline stages of a hybrid.

    Raises:
        NotImplementedError: saying why.
    """
    if profile.other_layers and pp_size > 1:
        raise refuse(
            "pipeline parallelism of a model with sliding windows or Mamba states, whose stages "
            "would need cache groups that differ,"
        )


def check_backend(vllm_config: VllmConfig, profile: HeadProfile) -> None:
    """Refuse a wish for an attention backend that cannot be granted.

    Raises:
        ValueError: there is no layer for it, or it cannot read pages as they lie here.
    """
    attention, own = vllm_config.attention_config, AttentionBackendEnum.CUSTOM
    full = attention.backend_per_kind.get("full_attention", own)
    other = attention.backend if full is own else full
    if other is None or other is own:
        return
    if full is other or not profile.other_layers:
        raise ValueError(
            f"razor: --attention-backend {other.name} and --kv-policy razor exclude each other: "
            "the policy brings its own for full attention"
        )
    try:
        backend = other.get_class()
    except ImportError:
        return  # vLLM's own error follows
    if not _takes_layout(backend):
        raise ValueError(f"razor: --attention-backend {other.name} {_WRONG_LAYOUT}")


def _takes_layout(backend: type[AttentionBackend]) -> bool:
    layouts = backend.supported_kv_cache_layouts()
    return layouts is None or LAYOUT in layouts


_WRONG_LAYOUT = (
    f"cannot read pages that lie one after the other (layout {LAYOUT.name}), as --kv-policy razor "
    "needs them; choose another with --attention-backend"
)


def check_shape(heads: RankHeads, layers: Sequence[int], num_kv_heads: int, head_size: int) -> None:
    """Refuse a profile whose full-attention layers are not those of the loaded model.

    Args:
        layers: with full attention, on this rank. num_kv_heads, head_size: of each.

    Raises:
        ValueError: naming what differs.
    """
    if heads.layers != tuple(layers):
        raise ValueError(
            "razor: the head profile's full-attention layers on this rank are "
            f"{', '.join(map(str, heads.layers))}; the model's are {', '.join(map(str, layers))}"
        )
    found, expected = heads.profile, (num_kv_heads, head_size)
    if (found.num_kv_heads, found.head_size) != expected:
        raise ValueError(
            f"razor: the head profile is for full-attention layers of {found.num_kv_heads} KV "
            f"heads (on one rank) and head size {found.head_size}; this model's have "
            f"{num_kv_heads} and {head_size}"
        )


def check_foreign(name: str, layer: AttentionLayerBase, spec: KVCacheSpec | None) -> None:
    """Refuse a layer that would share the pools' memory and cannot.

    Raises:
        NotImplementedError: naming the layer, what was found and what is covered.
        ValueError: its backend cannot read pages as they lie here.
    """
    if not isinstance(layer, Attention | MambaBase):
        raise refuse(f"layer {name}, a {type(layer).__name__},")
    if getattr(layer, "kv_sharing_target_layer_name", None) is not None:
        raise refuse(f"layer {name}, which shares another layer's KV cache,")
    if type(spec) not in _FOREIGN_SPECS:
        raise refuse(f"layer {name} with a {type(spec).__name__}")
    if name.startswith("draft_model.") and type(spec) is not FullAttentionSpec:
        # It would come in a later group, and write by the first group's block table.
        raise refuse(f"layer {name} of a draft model with a {type(spec).__name__}")
    backend = layer.get_attn_backend()
    if isinstance(layer, Attention) and not _takes_layout(backend):
        raise ValueError(f"razor: layer {name}: {backend.get_name()} {_WRONG_LAYOUT}")


def check_layers(layers: Mapping[str, Attention]) -> None:
    """Refuse loaded layers with full attention that are not covered.

    Raises:
        NotImplementedError: naming the layer, what was found and what is covered.
    """
    assert layers, "the policy attaches with the first layer that has full attention"
    for name, layer in layers.items():
        if type(layer) is not Attention:
            raise refuse(f"layer {name}, a {type(layer).__name__},")
        if layer.attn_type != AttentionType.DECODER:
            raise refuse(f"layer {name} with {layer.attn_type} attention")
        if layer.kv_sharing_target_layer_name is not None:
            raise refuse(f"layer {name}, which shares another layer's KV cache,")
        if layer.kv_cache_torch_dtype not in _DTYPES:
            raise refuse(f"layer {name} with a KV cache of {layer.kv_cache_torch_dtype}")
        scales: tuple[Any, ...] = (layer._k_scale, layer._v_scale)
        if any(scale.numel() > 1 for scale in scales):
            raise refuse(f"layer {name} with a scale of the KV cache for each head")
    # A page holds heads of all layers.
    for field in ("num_heads", "num_kv_heads", "head_size", "head_size_v", "kv_cache_dtype"):
        if len({getattr(layer, field) for layer in layers.values()}) > 1:
            raise refuse(f"a model whose layers differ in {field}")
    first = next(iter(layers.values()))
    if first.head_size != first.head_size_v:
        raise refuse(f"keys of {first.head_size} and values of {first.head_size_v}")

"""What the policy covers, and the refusal of what it does not."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionType

COVERED = (
    "decoder models whose layers are all full attention with rotary embeddings or ALiBi, "
    "bf16, fp16, fp32 or fp8 (e4m3) KV cache"
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
_CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3")


def _refuse(found: str) -> NotImplementedError:
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
        raise _refuse(f"a {model.runner_type} model")
    if model.use_mla:
        raise _refuse("multi-head latent attention (MLA)")
    if model.is_hybrid or model.is_attention_free:
        raise _refuse("a Mamba or other hybrid model")
    if model.is_encoder_decoder:
        raise _refuse("an encoder-decoder model")
    if cache.cache_dtype not in _CACHE_DTYPES:
        raise _refuse(f"a KV cache of {cache.cache_dtype}")
    for name, size in (
        ("decode context parallelism", parallel.decode_context_parallel_size),
        ("prefill context parallelism", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            raise _refuse(f"{name} of {size}")
    if parallel.enable_dbo:
        raise _refuse("dual-batch overlap (--enable-dbo)")
    if model.is_mm_prefix_lm or vllm_config.attention_config.use_non_causal:
        raise _refuse("attention that is not causal")
    if cache.kv_sharing_fast_prefill:
        raise _refuse("--kv-sharing-fast-prefill")
    if vllm_config.kv_transfer_config is not None:
        raise _refuse("a KV connector")
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "suffix"):
        raise _refuse(f"speculative decoding by {speculative.method}")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise _refuse("--disable-hybrid-kv-cache-manager")


def check_layers(vllm_config: VllmConfig, layers: Mapping[str, Attention]) -> None:
    """Refuse loaded layers that are not covered.

    Raises:
        NotImplementedError: naming the layer, what was found and what is covered.
    """
    context = vllm_config.compilation_config.static_forward_context
    for name, layer in context.items():
        if isinstance(layer, AttentionLayerBase) and not isinstance(layer, Attention):
            raise _refuse(f"layer {name}, a {type(layer).__name__},")
    if not layers:
        raise _refuse("a model without attention layers")
    for name, layer in layers.items():
        if type(layer) is not Attention:
            raise _refuse(f"layer {name}, a {type(layer).__name__},")
        if layer.attn_type != AttentionType.DECODER:
            raise _refuse(f"layer {name} with {layer.attn_type} attention")
        if layer.sliding_window is not None:
            raise _refuse(f"layer {name} with a sliding window of {layer.sliding_window}")
        if layer.kv_sharing_target_layer_name is not None:
            raise _refuse(f"layer {name}, which shares another layer's KV cache,")
        if layer.kv_cache_torch_dtype not in _DTYPES:
            raise _refuse(f"layer {name} with a KV cache of {layer.kv_cache_torch_dtype}")
        scales: tuple[Any, ...] = (layer._k_scale, layer._v_scale)
        if any(scale.numel() > 1 for scale in scales):
            raise _refuse(f"layer {name} with a scale of the KV cache for each head")
    # A page holds heads of all layers.
    for field in ("num_heads", "num_kv_heads", "head_size", "head_size_v", "kv_cache_dtype"):
        if len({getattr(layer, field) for layer in layers.values()}) > 1:
            raise _refuse(f"a model whose layers differ in {field}")
    first = next(iter(layers.values()))
    if first.head_size != first.head_size_v:
        raise _refuse(f"keys of {first.head_size} and values of {first.head_size_v}")

"""What a model's layers without full attention hold, from its configuration alone.

An engine asks the loaded layers instead (`pools`); this is for `razor plan`, which loads nothing.
"""

import math
from collections import Counter

import torch
from transformers import PreTrainedConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator

from razor_vllm.foreign import ForeignLayers
from razor_vllm.heads.shapes import FULL, heads_of, layer_kinds

_BLOCK_SIZE = 16
_STATES, _MOVING = 1, 1
"""Of a request and layer in vLLM's cache mode "align", where prefixes are cached."""


def other_layers(
    config: PreTrainedConfig, tp_size: int, dtype: torch.dtype
) -> tuple[ForeignLayers, ...]:
    """Layers without full attention on one rank.

    Args:
        config: of the model's text part. tp_size: tensor-parallel ranks. dtype: of stored K and V
            and of states.

    Raises:
        NotImplementedError: a kind of layer that cannot be counted.
    """
    found = Counter(
        _layer(config, layer, kind, tp_size, dtype)
        for layer, kind in enumerate(layer_kinds(config))
        if kind != FULL
    )
    return tuple(
        ForeignLayers(count, page_bytes, _BLOCK_SIZE, window, states, moving)
        for (page_bytes, window, states, moving), count in found.items()
    )


def _layer(
    config: PreTrainedConfig, layer: int, kind: str, tp_size: int, dtype: torch.dtype
) -> tuple[int, int | None, int, int]:
    """Bytes of a layer's page, tokens of its window, `num_states` and `num_moving`."""
    if kind == "sliding_attention":
        _, num_kv_heads, head_size = heads_of(config, layer)
        row = 2 * max(num_kv_heads // tp_size, 1) * head_size * dtype.itemsize
        return row * _BLOCK_SIZE, config.sliding_window, 0, 0
    if kind == "linear_attention" and hasattr(config, "linear_num_value_heads"):
        shapes = MambaStateShapeCalculator.gated_delta_net_state_shape(
            tp_size,
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            config.linear_conv_kernel_dim,
        )
        return sum(math.prod(shape) for shape in shapes) * dtype.itemsize, None, _STATES, _MOVING
    raise NotImplementedError(
        f"layer {layer} of kind {kind} cannot be counted; sliding windows and Gated DeltaNet can"
    )

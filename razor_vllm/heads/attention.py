"""Causal attention for calibration: what is covered, and forms whose memory is linear.

transformers calls an attention function of ours for each layer. The forms here never hold a
matrix of queries by keys, nor does their backward pass.

    queries of a block of `window` tokens     [i * W, (i + 1) * W)
    keys of a window                          [(i - 1) * W, (i + 1) * W), and the sinks

A learned sink is a logit of a query head that adds weight and no value. It becomes one more
token before the first, which every window sees.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from razor_kernels.scores import soft_capped
from razor_vllm.heads import alibi

COVERED = "decoder models with rotary embeddings, and ALiBi models of " + ", ".join(alibi.MODELS)
_REFUSED = {
    "position_bias": "a position bias",
    "indices": "an index of keys",
    "block_indices": "an index of keys",
}
"""Arguments of transformers' attention functions that change the softmax."""
_FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""PyTorch's third form, MATH, would form the matrix."""
_SINK_DIMS = 8
"""Dimensions that a learned sink adds to heads: fused forms on a GPU want multiples of 8."""


def refuse(found: str) -> NotImplementedError:
    """The error for a model that calibration would misread."""
    return NotImplementedError(f"razor calibrate: {found} is not covered; covered are {COVERED}")


def check_attention(
    module: nn.Module,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse attention whose weights are not the softmax of causal scores.

    Args:
        module: of the layer. key, value, attention_mask, kwargs: as transformers passes them to
            its attention functions.

    Raises:
        NotImplementedError: naming what was found.
    """
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise refuse("attention that is not causal")
    if attention_mask is not None:
        raise refuse("attention with a mask of the model's own")
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise refuse(f"attention with {what}")
    if key.shape[-1] != value.shape[-1]:
        raise refuse(f"attention with keys of {key.shape[-1]} and values of {value.shape[-1]}")


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    tile: int = 256,
    learned_sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention with memory linear in the sequence, backward too.

    Args:
        query: `[1, num_heads, seq_len, head_dim]`; key, value: with KV heads.
        soft_cap: of logits. window: latest tokens that a query sees, itself included.
        sinks: first tokens that a query sees whatever the window.
        tile: queries at a time, where PyTorch has no fused form (a soft cap).
        learned_sinks: a logit of each query head, `[num_heads]`; not beside a soft cap.

    Returns:
        `[1, num_heads, seq_len, head_dim]`.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    if learned_sinks is not None:
        assert soft_cap is None, "no model has learned sinks and a soft cap"
        longer = _with_sink_token(query, key, value, learned_sinks / scale)
        out = causal_attention(*longer, scale, window=window, sinks=sinks + 1)
        return out[:, :, 1:, : value.shape[-1]]
    if window is not None and window >= query.shape[2]:
        window = None
    if soft_cap is not None:
        return _capped(query, key, value, scale, soft_cap, window, sinks, tile)
    if window is not None:
        return _windowed(query, key, value, scale, window, sinks)
    with sdpa_kernel(_FUSED):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def _with_sink_token(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, product: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One more token, whose key has the same product with every query, and whose value is 0.

    The heads get more dimensions, of which the first holds that product: 1 in queries, `product`
    in the new key, 0 in all others.

    Args:
        product: of each head, `[num_heads]`.
    """
    head_dim = query.shape[-1]
    query, key, value = (F.pad(x, (0, _SINK_DIMS, 1, 0)) for x in (query, key, value))
    column = torch.zeros_like(query[0, 0])
    column[:, head_dim] = 1
    sink = torch.zeros_like(key[0])
    sink[:, 0, head_dim] = 1
    return query + column, key + sink * product.to(key.dtype)[:, None, None], value


def _windowed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """Blocks of `window` queries, each over two blocks of keys and the sinks, as one batch."""
    seq_len, head_dim = query.shape[2:]
    blocks = -(-seq_len // window)
    spare = blocks * window - seq_len
    queries = F.pad(query, (0, 0, 0, spare)).unflatten(2, (blocks, window))
    queries = queries.squeeze(0).transpose(0, 1)  # [blocks, num_heads, window, head_dim]

    def spans(rows: torch.Tensor) -> torch.Tensor:
        """`[blocks, num_heads, sinks + 2 * window, head_dim]`."""
        padded = F.pad(rows, (0, 0, window, spare)).unfold(2, 2 * window, window)
        band = padded.squeeze(0).permute(1, 0, 3, 2)
        first = rows[:, :, :sinks].expand(blocks, -1, -1, -1)
        return torch.cat([first, band], 2)

    at = torch.arange(blocks * window, device=query.device).view(blocks, window, 1)
    band = torch.arange(-window, window, device=query.device) + at[:, :1]
    seen = (band >= 0) & (band <= at) & (band > at - window)
    first = torch.arange(min(sinks, seq_len), device=query.device) <= at - window
    mask = torch.cat([first, seen], 2).unsqueeze(1)  # [blocks, 1, window, sinks + 2 * window]
    with sdpa_kernel(_FUSED):
        out = F.scaled_dot_product_attention(
            queries, spans(key), spans(value), attn_mask=mask, scale=scale
        )
    return out.transpose(0, 1).reshape(1, -1, blocks * window, head_dim)[:, :, :seq_len]


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    soft_cap: float,
    window: int | None,
    sinks: int,
    tile: int,
) -> torch.Tensor:
    """Tiles of queries; each is computed again in the backward pass."""

    def attend(start: int) -> torch.Tensor:
        end = min(start + tile, query.shape[2])
        rows = torch.arange(start, end, device=query.device)[:, None]
        begin = max(0, start - window + 1) if window is not None and not sinks else 0
        cols = torch.arange(begin, end, device=query.device)
        seen = cols <= rows
        if window is not None:
            seen &= (cols > rows - window) | (cols < sinks)
        keys, values = key[:, :, begin:end].float(), value[:, :, begin:end]
        logits = query[:, :, start:end].float() @ keys.transpose(2, 3) * scale
        weights = soft_capped(logits, soft_cap).masked_fill(~seen, -torch.inf).softmax(-1)
        return weights.to(value.dtype) @ values

    starts = range(0, query.shape[2], tile)
    return torch.cat([checkpoint(attend, at, use_reentrant=False) for at in starts], 2)

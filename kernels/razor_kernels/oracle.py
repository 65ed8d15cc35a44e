"""The formula in fp64 over unpaged tensors: every other form is tested against it."""

from typing import NamedTuple

import torch

from razor_kernels.window import Window


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_retrieval: torch.Tensor,
    window: Window,
    scale: float,
    dense_until: int = 0,
    compensation: bool = True,
    soft_cap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """RazorAttention of one sequence (arXiv 2407.15891, eq. 4 and 5).

    A retrieval head is causal softmax attention. A local head's query at
    t >= dense_until is, over the tokens n it sees and the N tokens it dropped,

        out = (N e^{q.k^} v^ + sum_n e^{q.k_n} v_n) / (N e^{q.k^} + sum_n e^{q.k_n})
        k^ = mean of the dropped k, v^ = mean of the dropped v, q already scaled

    A soft-cap and ALiBi change the logits q.k as in `step`; a slot's position is the mean
    position of the dropped tokens. A learned sink adds e^s to the denominator.

    Args:
        query: `[num_queries, num_heads, head_dim]`, the last `num_queries` positions.
        key: `[seq_len, num_kv_heads, head_dim]`, after the rotary embedding.
        value: `[seq_len, num_kv_heads, head_dim]`.
        is_retrieval: bool `[num_kv_heads]`.
        window: of the local heads.
        scale: factor on q.k.
        dense_until: local heads treat queries before this position as retrieval heads do.
        compensation: without it the dropped tokens leave no trace.
        soft_cap: logits become `soft_cap * tanh(logit / soft_cap)`; 0 for none.
        alibi_slopes: `[num_heads]`; a logit grows by slope * (key's - query's position).
        sink_logits: `[num_heads]`, s of each head's learned sink.

    Returns:
        fp64 `[num_queries, num_heads, head_dim]`.
    """
    num_queries = query.shape[0]
    seq_len, num_kv_heads, head_dim = key.shape
    q = query.double().view(num_queries, num_kv_heads, -1, head_dim) * scale
    k, v = key.double(), value.double()
    group = q.shape[2]
    slopes = torch.zeros(num_kv_heads, group, dtype=torch.float64)
    if alibi_slopes is not None:
        slopes = alibi_slopes.double().view(num_kv_heads, group)
    sinks = torch.full((num_kv_heads, group, 1), -torch.inf, dtype=torch.float64)
    if sink_logits is not None:
        sinks = sink_logits.double().view(num_kv_heads, group, 1)
    out = torch.empty_like(q)
    for row in range(num_queries):
        t = seq_len - num_queries + row
        for local in (False, True):
            heads = (is_retrieval != local).nonzero().squeeze(1)
            seen = _Seen(
                k[: t + 1, heads],
                v[: t + 1, heads],
                torch.ones(t + 1, dtype=torch.float64),
                torch.arange(t + 1, dtype=torch.float64),
            )
            if local and t >= dense_until:
                seen = _compress(seen, t, window, compensation)
            logits = torch.einsum("hgd,nhd->hgn", q[row, heads], seen.k)
            if soft_cap > 0:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            logits = logits + slopes[heads].unsqueeze(-1) * (seen.positions - t)
            logits = logits + seen.weights.log()
            weights = torch.cat([logits, sinks[heads]], -1).softmax(-1)[..., :-1]
            out[row, heads] = torch.einsum("hgn,nhd->hgd", weights, seen.v)
    return out.view(query.shape)


class _Seen(NamedTuple):
    """What a query sees: k, v `[n, heads, head_dim]`; weights, positions `[n]`."""

    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor


def _compress(whole: _Seen, t: int, window: Window, compensation: bool) -> _Seen:
    """What a local head's query at t sees of all tokens up to it."""
    start = window.first_window_page(t // window.block_size) * window.block_size
    dropped = slice(window.sinks, max(start, window.sinks))
    kept = torch.ones(t + 1, dtype=torch.bool)
    kept[dropped] = False
    seen = _Seen(*(part[kept] for part in whole))
    num_dropped = len(whole.positions[dropped])
    if num_dropped == 0 or not compensation:
        return seen
    k, v, _, positions = (part[dropped].mean(0, keepdim=True) for part in whole)
    slot = _Seen(k, v, torch.tensor([float(num_dropped)], dtype=torch.float64), positions)
    return _Seen(*(torch.cat(parts) for parts in zip(seen, slot, strict=True)))

"""The formula in fp64 over unpaged tensors: what every other form is held against."""

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
) -> torch.Tensor:
    """RazorAttention of one sequence (arXiv 2407.15891, eq. 4 and 5).

    A retrieval head is causal softmax attention. A local head's query at
    t >= dense_until is, over the tokens n it sees and the N tokens it dropped,

        out = (N e^{q.k^} v^ + sum_n e^{q.k_n} v_n) / (N e^{q.k^} + sum_n e^{q.k_n})
        k^ = mean of the dropped k, v^ = mean of the dropped v, q already scaled

    Args:
        query: `[num_queries, num_heads, head_dim]`, the last `num_queries` positions.
        key: `[seq_len, num_kv_heads, head_dim]`, after the rotary embedding.
        value: `[seq_len, num_kv_heads, head_dim]`.
        is_retrieval: bool `[num_kv_heads]`.
        window: of the local heads.
        scale: factor on q.k.
        dense_until: local heads treat queries before this position as retrieval heads do.
        compensation: without it the dropped tokens leave no trace.

    Returns:
        fp64 `[num_queries, num_heads, head_dim]`.
    """
    num_queries = query.shape[0]
    seq_len, num_kv_heads, head_dim = key.shape
    q = query.double().view(num_queries, num_kv_heads, -1, head_dim) * scale
    k, v = key.double(), value.double()
    out = torch.empty_like(q)
    for row in range(num_queries):
        t = seq_len - num_queries + row
        for local in (False, True):
            heads = (is_retrieval != local).nonzero().squeeze(1)
            seen_k, seen_v = k[: t + 1, heads], v[: t + 1, heads]
            weights = torch.ones(t + 1, dtype=torch.float64)
            if local and t >= dense_until:
                seen_k, seen_v, weights = _compress(seen_k, seen_v, t, window, compensation)
            logits = torch.einsum("hgd,nhd->hgn", q[row, heads], seen_k) + weights.log()
            out[row, heads] = torch.einsum("hgn,nhd->hgd", logits.softmax(-1), seen_v)
    return out.view(query.shape)


def _compress(
    k: torch.Tensor, v: torch.Tensor, t: int, window: Window, compensation: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values `[n, heads, head_dim]` and weights `[n]` that a query at t sees."""
    start = window.first_window_page(t // window.block_size) * window.block_size
    dropped = slice(window.sinks, max(start, window.sinks))
    num_dropped = k[dropped].shape[0]
    seen = torch.ones(t + 1, dtype=torch.bool)
    seen[dropped] = False
    weights = torch.ones(int(seen.sum()), dtype=torch.float64)
    if num_dropped == 0 or not compensation:
        return k[seen], v[seen], weights
    slot = torch.tensor([float(num_dropped)], dtype=torch.float64)
    return (
        torch.cat([k[seen], k[dropped].mean(0, keepdim=True)]),
        torch.cat([v[seen], v[dropped].mean(0, keepdim=True)]),
        torch.cat([weights, slot]),
    )

"""Echo and induction scores of attention heads, without an attention matrix.

The probe is `[bos] + R * 4`, R random tokens (RazorAttention, arXiv 2407.15891, sec. 3.2).
With A a head's softmax row and i a query position in the 2nd to 4th copy of R,

    echo(i)      = sum over m of A[i, i - m * |R|]          earlier copies of the same token
    induction(i) = sum over m of A[i, i - m * |R| + 1]      the token after each of those

and a head's score is the mean over i. What is needed of a row is its log-sum-exp and a
few of its logits, so memory is linear in the sequence.
"""

from typing import NamedTuple

import torch

COPIES = 4


class HeadScores(NamedTuple):
    """Scores of each query head, in [0, 1].

    echo, induction: fp32 `[num_heads]`.
    """

    echo: torch.Tensor
    induction: torch.Tensor


def row_lse(query: torch.Tensor, key: torch.Tensor, scale: float, tile: int = 512) -> torch.Tensor:
    """Log-sum-exp of each row of causal attention logits.

    Args:
        query: `[num_heads, seq_len, head_dim]`.
        key: `[num_kv_heads, seq_len, head_dim]`.
        tile: queries, and keys, of a tile of logits; `num_heads * tile**2` of them
            exist at a time.

    Returns:
        fp32 `[num_heads, seq_len]`.
    """
    num_heads, seq_len, _ = query.shape
    key = key.repeat_interleave(num_heads // key.shape[0], dim=0).float()
    out = torch.empty(num_heads, seq_len, device=query.device)
    later = torch.ones(tile, tile, dtype=torch.bool, device=query.device).triu(1)
    for start in range(0, seq_len, tile):
        q = query[:, start : start + tile].float() * scale
        length = q.shape[1]
        logits = q @ key[:, start : start + length].transpose(1, 2)
        lse = logits.masked_fill(later[:length, :length], -torch.inf).logsumexp(-1)
        for other in range(0, start, tile):
            logits = q @ key[:, other : other + tile].transpose(1, 2)
            lse = torch.logaddexp(lse, logits.logsumexp(-1))
        out[:, start : start + length] = lse
    return out


def repeat_scores(query: torch.Tensor, key: torch.Tensor, scale: float, period: int) -> HeadScores:
    """Scores of one layer's heads on the probe.

    Args:
        query: `[num_heads, 1 + 4 * period, head_dim]`, after the rotary embedding.
        key: `[num_kv_heads, 1 + 4 * period, head_dim]`, after the rotary embedding.
        scale: factor on q.k.
        period: |R|, at least 2.

    Raises:
        ValueError: the sequence is not four copies and a first token.
    """
    num_heads, seq_len, _ = query.shape
    if period < 2 or seq_len != 1 + COPIES * period:
        raise ValueError(
            f"a probe of period {period} has {1 + COPIES * period} tokens, not {seq_len}"
        )
    lse = row_lse(query, key, scale)
    key = key.repeat_interleave(num_heads // key.shape[0], dim=0)
    mass = torch.zeros(2, num_heads, device=query.device)
    for back in range(1, COPIES):
        first = 1 + back * period
        rows = query[:, first:].float() * scale
        for after in (0, 1):
            begin = first - back * period + after
            keys = key[:, begin : begin + rows.shape[1]].float()
            logits = (rows * keys).sum(-1)
            mass[after] += (logits - lse[:, first:]).exp().sum(-1)
    echo, induction = mass / ((COPIES - 1) * period)
    return HeadScores(echo, induction)

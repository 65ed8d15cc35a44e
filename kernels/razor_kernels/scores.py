"""Echo and induction scores of attention heads, without an attention matrix.

The probe is `[bos] + R * 4`, R random tokens (RazorAttention, arXiv 2407.15891, sec. 3.2).
With A a head's softmax row and i a query position in the 2nd to 4th copy of R,

    echo(i)      = sum over m of A[i, i - m * |R|]          earlier copies of the same token
    induction(i) = sum over m of A[i, i - m * |R| + 1]      the token after each of those

and a head's score is the mean over i. Only the log-sum-exp and a few logits of each row
are needed, so memory is linear in the sequence.
"""

from typing import NamedTuple

import torch

COPIES = 4
KERNEL_HEAD_DIM = 256
"""Largest head size for which the Triton kernel fits registers and shared memory."""


class HeadScores(NamedTuple):
    """Scores of each query head, in [0, 1].

    echo, induction: fp32 `[num_heads]`.
    """

    echo: torch.Tensor
    induction: torch.Tensor


def soft_capped(logits: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """`soft_cap * tanh(logits / soft_cap)`, or the logits unchanged without a cap."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def row_lse(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
    tile: int = 256,
) -> torch.Tensor:
    """Log-sum-exp of each row of causal attention logits.

    Args:
        query: `[num_heads, seq_len, head_dim]`.
        key: `[num_kv_heads, seq_len, head_dim]`.
        soft_cap: of logits, after `scale`.
        tile: queries, and keys, of a tile; `num_heads * tile**2` logits exist at a time.
            256 took 1.04 s of an EPYC core for 8 heads of 10,001 tokens and 32
            dimensions, 512 took 1.75 s.

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
        logits = soft_capped(q @ key[:, start : start + length].transpose(1, 2), soft_cap)
        lse = logits.masked_fill(later[:length, :length], -torch.inf).logsumexp(-1)
        for other in range(0, start, tile):
            logits = soft_capped(q @ key[:, other : other + tile].transpose(1, 2), soft_cap)
            lse = torch.logaddexp(lse, logits.logsumexp(-1))
        out[:, start : start + length] = lse
    return out


def repeat_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    period: int,
    soft_cap: float | None = None,
    learned_sinks: torch.Tensor | None = None,
) -> HeadScores:
    """Scores of one layer's heads on the probe.

    By the Triton kernel on CUDA, if the head size fits it and there are no learned sinks;
    otherwise the same in PyTorch.

    Args:
        query: `[num_heads, 1 + 4 * period, head_dim]`, after the rotary embedding.
        key: `[num_kv_heads, 1 + 4 * period, head_dim]`, after the rotary embedding.
        scale: factor on q.k.
        period: |R|, at least 2.
        soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` (Gemma 2).
        learned_sinks: one more logit of each row, `[num_heads]` (gpt-oss).

    Raises:
        ValueError: the sequence is not four copies and a first token.
    """
    seq_len = query.shape[1]
    if period < 2 or seq_len != 1 + COPIES * period:
        raise ValueError(
            f"a probe of period {period} has {1 + COPIES * period} tokens, not {seq_len}"
        )
    if query.is_cuda and query.shape[-1] <= KERNEL_HEAD_DIM and learned_sinks is None:
        # Imported here: a machine without a GPU may lack Triton.
        from razor_kernels.scores_triton import repeat_mass

        mass = repeat_mass(query, key, scale, period, COPIES, soft_cap)
    else:
        mass = _repeat_mass(query, key, scale, period, soft_cap, learned_sinks)
    echo, induction = mass / ((COPIES - 1) * period)
    return HeadScores(echo, induction)


def _repeat_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    period: int,
    soft_cap: float | None,
    learned_sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Echo and induction mass of each head, summed over rows: fp32 `[2, num_heads]`."""
    num_heads = query.shape[0]
    lse = row_lse(query, key, scale, soft_cap)
    if learned_sinks is not None:
        lse = torch.logaddexp(lse, learned_sinks.float()[:, None])
    key = key.repeat_interleave(num_heads // key.shape[0], dim=0)
    mass = torch.zeros(2, num_heads, device=query.device)
    for back in range(1, COPIES):
        first = 1 + back * period
        rows = query[:, first:].float() * scale
        for after in (0, 1):
            begin = first - back * period + after
            keys = key[:, begin : begin + rows.shape[1]].float()
            logits = soft_capped((rows * keys).sum(-1), soft_cap)
            mass[after] += (logits - lse[:, first:]).exp().sum(-1)
    return mass

"""Echo and induction mass of attention rows on the probe, in one pass over the keys.

For query row i of the 2nd to 4th copy, with x(i, j) the logit of key j in log2,

    lse(i)       = log2 sum over j <= i of 2^x(i, j)
    echo(i)      = sum over m = 1 .. 3 of 2^(x(i, i - m * period) - lse(i))
    induction(i) = sum over m = 1 .. 3 of 2^(x(i, i - m * period + 1) - lse(i))

where copies before the first are left out. A program holds a tile of rows of one query
head. It streams the keys of its KV head past the tile as flash attention does, without
values, and then reads the two keys of each earlier copy that the sums need.
`scores.repeat_scores` computes the same in PyTorch, and calls this kernel on CUDA.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit
def _log2_logits(qk, inner, outer, HAS_SOFT_CAP: tl.constexpr):
    """`cap * tanh(scale * qk / cap)`, or `scale * qk`, in log2.

    inner, outer: `scale / cap` and `cap * log2(e)` with a cap, else `scale * log2(e)` and 1.
    """
    if HAS_SOFT_CAP:
        return outer * (2.0 * tl.sigmoid(2.0 * inner * qk) - 1.0)
    return inner * qk


@triton.jit
def _stream_keys(
    q,  # [BLOCK_M, BLOCK_D]
    m_i,  # [BLOCK_M]
    l_i,  # [BLOCK_M]
    rows,  # [BLOCK_M]
    begin,
    end,
    seq_len,
    key_ptr,
    stride_key_row,
    stride_key_dim,
    inner,
    outer,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    CAUSAL_EDGE: tl.constexpr,
):
    """Running maximum and sum over keys `begin .. end`; with CAUSAL_EDGE, of those j <= i."""
    dims = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        offsets = dims[:, None] * stride_key_dim + cols[None, :].to(tl.int64) * stride_key_row
        mask = (dims[:, None] < HEAD_DIM) & (cols[None, :] < seq_len)
        k = tl.load(key_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_N]
        # tf32x3: fp32 on tensor cores to about fp32's precision; bf16 and fp16 are not touched.
        qk = tl.dot(q, k, input_precision="tf32x3")  # [BLOCK_M, BLOCK_N]
        qk = _log2_logits(qk, inner, outer, HAS_SOFT_CAP)
        if CAUSAL_EDGE:
            qk = tl.where(cols[None, :] <= rows[:, None], qk, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))  # [BLOCK_M]
        l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(qk - m_new[:, None]), 1)
        m_i = m_new
    return m_i, l_i


@triton.jit
def _weight_at(
    query_ptr,
    key_ptr,
    lse,  # [BLOCK_M]
    rows,  # [BLOCK_M]
    cols,  # [BLOCK_M]
    seen,  # [BLOCK_M]
    stride_query_row,
    stride_query_dim,
    stride_key_row,
    stride_key_dim,
    inner,
    outer,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """Attention weight of query `rows[n]` on key `cols[n]`; 0 where not `seen`."""
    PART: tl.constexpr = 32  # dimensions at a time: whole rows of both would spill
    qk = tl.zeros([BLOCK_M], tl.float32)
    query_ptr += rows[:, None].to(tl.int64) * stride_query_row  # [BLOCK_M, 1]
    key_ptr += cols[:, None].to(tl.int64) * stride_key_row  # [BLOCK_M, 1]
    for begin in range(0, BLOCK_D, PART):
        dims = begin + tl.arange(0, PART)[None, :]  # [1, PART]
        mask = seen[:, None] & (dims < HEAD_DIM)  # [BLOCK_M, PART]
        q = tl.load(query_ptr + dims * stride_query_dim, mask=mask, other=0.0)  # [BLOCK_M, PART]
        k = tl.load(key_ptr + dims * stride_key_dim, mask=mask, other=0.0)  # [BLOCK_M, PART]
        qk += tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)  # [BLOCK_M]
    weight = tl.exp2(_log2_logits(qk, inner, outer, HAS_SOFT_CAP) - lse)  # [BLOCK_M]
    return tl.where(seen, weight, 0.0)


@triton.jit
def _repeat_mass_kernel(
    query_ptr,
    key_ptr,
    mass_ptr,
    stride_query_head,
    stride_query_row,
    stride_query_dim,
    stride_key_head,
    stride_key_row,
    stride_key_dim,
    stride_mass_kind,
    stride_mass_head,
    seq_len,
    period,
    inner,
    outer,
    GROUP: tl.constexpr,
    COPIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """echo(i) and induction(i) of the module's docstring, for a tile of rows of a head.

    rows         [first, first + BLOCK_M)     queries
    keys         [0, edge)                    before every row: no mask
    keys         [edge, first + BLOCK_M)      the causal edge
    """
    # The longest rows first, so that the last programs to start are short.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    first = 1 + period + tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    dims = tl.arange(0, BLOCK_D)
    key_ptr += head // GROUP * stride_key_head
    query_ptr += head * stride_query_head
    offsets = rows[:, None].to(tl.int64) * stride_query_row + dims[None, :] * stride_query_dim
    mask = (rows[:, None] < seq_len) & (dims[None, :] < HEAD_DIM)  # [BLOCK_M, BLOCK_D]
    q = tl.load(query_ptr + offsets, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    edge = first // BLOCK_N * BLOCK_N
    end = tl.minimum(first + BLOCK_M, seq_len)
    m_i, l_i = _stream_keys(
        q, m_i, l_i, rows, 0, edge, seq_len, key_ptr, stride_key_row, stride_key_dim,
        inner, outer, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_SOFT_CAP, False,
    )  # fmt: skip
    m_i, l_i = _stream_keys(
        q, m_i, l_i, rows, edge, end, seq_len, key_ptr, stride_key_row, stride_key_dim,
        inner, outer, HEAD_DIM, BLOCK_D, BLOCK_N, HAS_SOFT_CAP, True,
    )  # fmt: skip
    lse = m_i + tl.log2(l_i)  # [BLOCK_M]

    echo = tl.zeros([BLOCK_M], tl.float32)
    induction = tl.zeros([BLOCK_M], tl.float32)
    for back in tl.static_range(1, COPIES):
        seen = (rows < seq_len) & (rows > back * period)  # [BLOCK_M]
        cols = rows - back * period  # [BLOCK_M]
        echo += _weight_at(
            query_ptr, key_ptr, lse, rows, cols, seen, stride_query_row, stride_query_dim,
            stride_key_row, stride_key_dim, inner, outer, HEAD_DIM, BLOCK_D, BLOCK_M, HAS_SOFT_CAP,
        )  # fmt: skip
        induction += _weight_at(
            query_ptr, key_ptr, lse, rows, cols + 1, seen, stride_query_row, stride_query_dim,
            stride_key_row, stride_key_dim, inner, outer, HEAD_DIM, BLOCK_D, BLOCK_M, HAS_SOFT_CAP,
        )  # fmt: skip
    out = mass_ptr + head * stride_mass_head + (rows - period - 1)
    tl.store(out, echo, mask=rows < seq_len)
    tl.store(out + stride_mass_kind, induction, mask=rows < seq_len)


class Tiles(NamedTuple):
    """Launch shape: rows and keys of a tile, warps, stages of the key loads."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles(dtype: torch.dtype, head_dim: int) -> Tiles:
    """Tiles that compile without register spills for sm_80, sm_90 and sm_100.

    Not tuned: no GPU has timed them. fp32 keeps three copies of its operands in registers
    (tf32x3), so its tiles are small.
    """
    if dtype != torch.float32:
        return Tiles(128, 64, 8, 2)
    return Tiles(64, 32, 4, 2) if head_dim <= 64 else Tiles(16, 32, 4, 1)


def repeat_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    period: int,
    copies: int,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Echo and induction mass of each query head, summed over rows of the 2nd copy onward.

    Args:
        query: `[num_heads, 1 + copies * period, head_dim]`, bf16, fp16 or fp32, any strides.
        key: `[num_kv_heads, 1 + copies * period, head_dim]`, of the same type.
        scale: factor on q.k. soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`.

    Returns:
        fp32 `[2, num_heads]`: echo, induction.
    """
    num_heads, seq_len, head_dim = query.shape
    num_rows = (copies - 1) * period
    mass = torch.empty(2, num_heads, num_rows, dtype=torch.float32, device=query.device)
    log2e = math.log2(math.e)
    inner, outer = (scale / soft_cap, soft_cap * log2e) if soft_cap else (scale * log2e, 1.0)
    block_m, block_n, num_warps, num_stages = tiles(query.dtype, head_dim)
    _repeat_mass_kernel[(triton.cdiv(num_rows, block_m), num_heads)](
        query,
        key,
        mass,
        *query.stride(),
        *key.stride(),
        *mass.stride()[:2],
        seq_len,
        period,
        inner,
        outer,
        GROUP=num_heads // key.shape[0],
        COPIES=copies,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        HAS_SOFT_CAP=soft_cap is not None,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return mass.sum(-1)

"""What the Triton kernels share: a tile of keys, its logits, the online softmax.

The keys that a query reads are a list with one gap in it, where tokens were dropped:

    index i of the list     position
    [0, num_sinks)          i
    [num_sinks, length)     i + gap

so a kernel walks `cdiv(length, BLOCK_N)` tiles and never touches the gap. Logits are fp32
in log2 throughout; m_i is a row's greatest logit, l_i its sum of 2^(logit - m_i).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from razor_kernels.window import _RATIO_SCALE as _WINDOW_RATIO_SCALE

LOG2E = tl.constexpr(1.4426950408889634)
RATIO_SCALE = tl.constexpr(_WINDOW_RATIO_SCALE)
E4M3_MAX = tl.constexpr(448.0)


class Pool(NamedTuple):
    """One pool as the kernels take it: `step.PoolPages` and its `step.PoolTables`.

    Strides count elements. An fp8 cache is passed as uint8 where the device cannot convert
    it (before sm_89). A plan needs no pointers. SINKS, WINDOW and RATIO (millionths) are
    those of a `window.Window`, 0 where not LOCAL.
    """

    cache_ptr: torch.Tensor | None
    stride_cache_page: int
    stride_cache_slot: int
    block_table_ptr: torch.Tensor | None
    stride_block_table: int
    slot_mapping_ptr: torch.Tensor | None
    HEAD_DIM: tl.constexpr
    BLOCK_SIZE: tl.constexpr
    LOCAL: tl.constexpr
    SINKS: tl.constexpr
    WINDOW: tl.constexpr
    RATIO: tl.constexpr


class Batch(NamedTuple):
    """The step's requests as the kernels take them, see `step.Step`."""

    query_start_loc_ptr: torch.Tensor
    seq_lens_ptr: torch.Tensor
    dense_until_ptr: torch.Tensor


class Heads(NamedTuple):
    """One layer's KV heads as the kernels take them, see `step.LayerHeads`."""

    pool_of_ptr: torch.Tensor
    slot_of_ptr: torch.Tensor


class LogitParams(NamedTuple):
    """How logits are made from q.k, see `step.AttentionParams`.

    scale: times the cache's k_scale. PRECISION: of a dot in fp32, "ieee" or "tf32".
    """

    scale: float
    slopes_ptr: torch.Tensor | None
    sinks_ptr: torch.Tensor | None
    SOFT_CAP: tl.constexpr
    PRECISION: tl.constexpr


@triton.jit
def first_window_page(pool, page):
    """`Window.first_window_page`: first page past the gap that queries in `page` read."""
    if pool.RATIO > 0:
        last = (page + 1).to(tl.int64) * pool.BLOCK_SIZE - 1  # times RATIO it overflows int32
        tokens = tl.maximum(tl.cdiv(last * pool.RATIO, RATIO_SCALE), pool.WINDOW)
        pages = tl.cdiv(tokens, pool.BLOCK_SIZE).to(tl.int32)
    else:
        pages = (pool.WINDOW + pool.BLOCK_SIZE - 1) // pool.BLOCK_SIZE
    return tl.maximum(page - pages, 0)


@triton.jit
def keys_of(pool, first, last, dense_until):
    """The list of keys that a head's queries at positions [first, last] read.

    Returns `num_sinks, gap, length` as the module's docstring defines them.
    """
    if pool.LOCAL:
        start = first_window_page(pool, first // pool.BLOCK_SIZE) * pool.BLOCK_SIZE
        num_sinks = tl.minimum(start, pool.SINKS)
        gap = tl.where(first < dense_until, 0, start - num_sinks)
    else:
        num_sinks = first * 0
        gap = first * 0
    return num_sinks, gap, last + 1 - gap


@triton.jit
def to_float(stored):
    """Values of loaded cache elements; uint8 is e4m3, whose values fp16 holds exactly.

    e4m3's bits, shifted into an fp16, give a value 2^8 too small (exponent biases 7 and 15).
    """
    if stored.dtype == tl.uint8:
        bits = stored.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True) * 256.0
    else:
        return stored


@triton.jit
def to_stored(x, scale, dtype: tl.constexpr):
    """x (fp32) / scale as cache elements, to nearest; fp8 saturates; uint8 is e4m3."""
    if dtype == tl.uint8:
        x = tl.clamp(x / scale, -E4M3_MAX, E4M3_MAX)
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        odd = (magnitude >> 20) & 1
        normal = ((magnitude + 0x7FFFF + odd) >> 20) - (120 << 3)
        # Below 2^-6 values are 2^-9 apart: adding 1.5 * 2^23 rounds to whole steps of that.
        steps = tl.abs(x) * 512.0 + 12582912.0
        subnormal = steps.to(tl.uint32, bitcast=True) - 0x4B400000
        code = tl.where(magnitude < 0x3C800000, subnormal, normal)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    elif dtype == tl.float8e4nv:
        return tl.clamp(x / scale, -E4M3_MAX, E4M3_MAX).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def load_kv(pool, request, slot, positions, valid, dtype: tl.constexpr, BLOCK_D: tl.constexpr):
    """K and V `[BLOCK_N, BLOCK_D]` of one slot; rows that are not valid are not read.

    request, slot: int64. positions, valid: `[BLOCK_N]`.
    """
    dims = tl.arange(0, BLOCK_D)
    table_ptr = pool.block_table_ptr + request * pool.stride_block_table
    # [BLOCK_N]
    pages = tl.load(table_ptr + positions // pool.BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    offsets = positions % pool.BLOCK_SIZE * (2 * pool.HEAD_DIM)  # [BLOCK_N]
    slot_ptr = pool.cache_ptr + slot * pool.stride_cache_slot
    # [BLOCK_N, BLOCK_D]
    k_ptr = slot_ptr + (pages * pool.stride_cache_page + offsets)[:, None] + dims[None, :]
    mask = valid[:, None]  # [BLOCK_N, 1]
    if BLOCK_D != pool.HEAD_DIM:
        mask = mask & (dims < pool.HEAD_DIM)[None, :]  # [BLOCK_N, BLOCK_D]
    k = to_float(tl.load(k_ptr, mask=mask, other=0.0)).to(dtype)  # [BLOCK_N, BLOCK_D]
    v = to_float(tl.load(k_ptr + pool.HEAD_DIM, mask=mask, other=0.0)).to(dtype)
    return k, v


@triton.jit
def load_slots(pool, request, slot, pages, valid, BLOCK_D: tl.constexpr):
    """Compensation slots k^, v^ and N of queries in `pages`. pages, valid: `[NUM_SLOTS]`.

    k^ and v^ `[NUM_SLOTS, BLOCK_D]` are fp32, in stored units: S(first window page - 1) / N.
    N `[NUM_SLOTS]` is 0 where no token was dropped, or `valid` is not set.
    """
    first = first_window_page(pool, pages)  # [NUM_SLOTS]
    dropped = tl.where(valid, tl.maximum(first * pool.BLOCK_SIZE - pool.SINKS, 0), 0)  # [NUM_SLOTS]
    table_ptr = pool.block_table_ptr + request * pool.stride_block_table
    page = tl.load(table_ptr + first - 1, mask=dropped > 0, other=0).to(tl.int64)  # [NUM_SLOTS]
    dims = tl.arange(0, BLOCK_D)
    sums_ptr = tail_ptr(pool, page, slot)[:, None] + dims[None, :]  # [NUM_SLOTS, BLOCK_D]
    mask = (dropped > 0)[:, None] & (dims < pool.HEAD_DIM)[None, :]  # [NUM_SLOTS, BLOCK_D]
    count = tl.maximum(dropped, 1).to(tl.float32)[:, None]  # [NUM_SLOTS, 1]
    k = tl.load(sums_ptr, mask=mask, other=0.0) / count  # [NUM_SLOTS, BLOCK_D]
    v = tl.load(sums_ptr + pool.HEAD_DIM, mask=mask, other=0.0) / count  # [NUM_SLOTS, BLOCK_D]
    return k, v, dropped


@triton.jit
def tail_ptr(pool, page, slot):
    """fp32 pointer to the running sum of K of `page` (int64); that of V follows HEAD_DIM later."""
    PER_FLOAT: tl.constexpr = 32 // pool.cache_ptr.dtype.element_ty.primitive_bitwidth
    start = page * pool.stride_cache_page + slot * pool.stride_cache_slot
    start += pool.BLOCK_SIZE * 2 * pool.HEAD_DIM
    return pool.cache_ptr.to(tl.pointer_type(tl.float32)) + start // PER_FLOAT


@triton.jit
def to_log2(logit_params, qk, distance, slopes):
    """Logits in log2 from products q.k, see `step`.

    distance: key position - query position, fp32. slopes: one per row, read only with ALiBi.
    """
    if logit_params.SOFT_CAP > 0:
        # tanh(x) = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|), never overflows
        x = qk * (logit_params.scale / logit_params.SOFT_CAP)
        e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        tanh = (1.0 - e) / (1.0 + e)
        result = tl.where(x < 0, -tanh, tanh) * (logit_params.SOFT_CAP * LOG2E)
    else:
        result = qk * (logit_params.scale * LOG2E)
    if logit_params.slopes_ptr is not None:
        result += slopes * distance * LOG2E
    return result


@triton.jit
def load_slopes(logit_params, heads):
    """ALiBi slopes of query heads, or zeros that nothing reads."""
    if logit_params.slopes_ptr is not None:
        return tl.load(logit_params.slopes_ptr + heads)
    else:
        return heads.to(tl.float32) * 0


@triton.jit
def begin_rows(logit_params, heads):
    """m_i and l_i of rows that have read no key yet, for their query heads.

    A learned sink is a logit of weight 1 whose value is zero: it comes first, once a row.
    """
    if logit_params.sinks_ptr is not None:
        m_i = tl.load(logit_params.sinks_ptr + heads) * LOG2E
        return m_i, m_i * 0 + 1
    else:
        zeros = heads.to(tl.float32) * 0
        return zeros - float("inf"), zeros


@triton.jit
def accumulate(acc, m_i, l_i, logits, v, PRECISION: tl.constexpr):
    """Add `[M, N]` logits and `[N, D]` values to the online softmax `[M, D], [M], [M]`."""
    m_new = tl.maximum(m_i, tl.max(logits, 1))  # [M]
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that sees nothing yet
    p = tl.exp2(logits - m_safe[:, None])  # [M, N]
    alpha = tl.exp2(m_i - m_safe)  # [M]
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # [M, D]
    return acc, m_new, l_i * alpha + tl.sum(p, 1)

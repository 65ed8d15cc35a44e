"""Decode: few queries a request, their keys split over the whole device.

A unit of work is one KV head of one request over `span` tiles of its keys. A step's plan
chooses the span so that there are enough units to fill the device, but no more than the
buffers hold, and lists them. The units of one layer are

    [0, R * r)               item u // r of the R items of retrieval heads, r-th head u % r
    [R * r, R * r + L * l)   the same for the L items of local heads

with r and l the numbers of retrieval and local heads of the layer. r differs from layer to
layer, and the best span with it, so a plan holds one list for each r in [0, num_kv_heads].

    _plan_kernel     once a step: spans, items, where each request's items begin
    _decode_kernel   a unit: partial output and lse of every query row
    _merge_kernel    a query head: its units' partial results, and the compensation slot

Grids and buffers depend only on the number of requests, so CUDA graphs can hold all three.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from razor_kernels.triton_tile import (
    Batch,
    Heads,
    LogitParams,
    Pool,
    accumulate,
    begin_rows,
    first_window_page,
    keys_of,
    load_kv,
    load_slopes,
    load_slots,
    to_log2,
)

WAVE = 2
"""Units per SM, as long as their spans do not exceed MAX_SPAN. Each unit has 2 tiles of 16 to
32 KiB in flight. 2 x 32 KiB per SM cover the 3.35 TB/s x 700 ns / 132 SMs = 18 KiB of an H100
and the 8 TB/s x 800 ns / 148 SMs = 43 KiB of a B200. Derived, not measured."""

MAX_SPAN = 16
"""Tiles per unit when there is more than one wave. 1,024 tokens of bf16 and head_dim 128 are
512 KiB. An SM reads them in 20 us at its share of an H100's bandwidth; 2 KiB of partial
results and a launch are small beside that. Derived, not measured."""

MAX_UNITS = 16
"""Most units per SM; more would only add partial results to merge. Derived, not measured."""

_MERGE_ROWS = 32
"""Partial results that a merging program reads at once: 32 x 128 fp32 take 32 registers of
each of 128 threads. Derived, not measured."""


class Plan(NamedTuple):
    """A step's units, for every number of retrieval heads n in [0, num_kv_heads].

    spans: int32 `[n]`, tiles per unit.
    items: int32 `[n, 2, max_items]`, request of each item, by kind of head; an item is a
        unit without its head.
    first_item: int32 `[n, 2, max_requests + 1]`, where each request's items begin. The
        last entry, and the entry after the last request's, hold the number of items.
    """

    spans_ptr: torch.Tensor
    items_ptr: torch.Tensor
    first_item_ptr: torch.Tensor
    MAX_ITEMS: tl.constexpr
    MAX_REQUESTS: tl.constexpr
    NUM_KV_HEADS: tl.constexpr
    BLOCK_H: tl.constexpr
    BLOCK_N: tl.constexpr
    MAX_QUERIES: tl.constexpr


class Partials(NamedTuple):
    """Results of units: fp32 `[max_units, rows, head_dim]`, lse in log2 `[max_units, rows]`.

    Row q * group + g is the g-th head of the group at the request's q-th query.
    """

    out_ptr: torch.Tensor
    lse_ptr: torch.Tensor


class Queries(NamedTuple):
    """Queries or outputs `[num_tokens, num_kv_heads, GROUP, head_dim]` of one layer."""

    ptr: torch.Tensor
    stride_token: int
    stride_head: int
    stride_group: int
    GROUP: tl.constexpr

    @classmethod
    def of(cls, x: torch.Tensor) -> "Queries":
        return cls(x, x.stride(0), x.stride(1), x.stride(2), tl.constexpr(x.shape[2]))


@triton.jit
def _load_pools(heads, plan):
    """Indices of KV heads, padded to a power of two, and the pool of each, 2 for padding."""
    index = tl.arange(0, plan.BLOCK_H)
    return index, tl.load(heads.pool_of_ptr + index, mask=index < plan.NUM_KV_HEADS, other=2)


@triton.jit
def _find_head(heads, plan, rank, KIND: tl.constexpr):
    """The rank-th KV head of a kind."""
    index, pools = _load_pools(heads, plan)  # [BLOCK_H]
    ranks = tl.cumsum((pools == KIND).to(tl.int32), 0) - 1  # [BLOCK_H]
    return tl.sum(tl.where((pools == KIND) & (ranks == rank), index, 0), 0).to(tl.int64)


@triton.jit
def _num_tiles(pool, plan, start, stop, dense_until):
    """Tiles that a request with queries at [start, stop) reads; 0 where it is not a decode."""
    _, _, length = keys_of(pool, start, stop - 1, dense_until)  # [BLOCK_R]
    is_decode = (stop > start) & (stop - start <= plan.MAX_QUERIES)  # [BLOCK_R]
    return tl.where(is_decode, tl.cdiv(length, plan.BLOCK_N), 0)


@triton.jit
def _list_items(plan, tiles, span, requests, request, num_requests, n, KIND: tl.constexpr):
    """List items of one request and kind: `cdiv(tiles, span)`, after those of earlier requests."""
    count = tl.cdiv(tiles, span)  # [BLOCK_R]
    own = tl.sum(tl.where(requests == request, count, 0), 0)
    first = tl.sum(tl.where(requests < request, count, 0), 0)
    first_item_ptr = plan.first_item_ptr + (n * 2 + KIND) * (plan.MAX_REQUESTS + 1)
    tl.store(first_item_ptr + request, first)
    if request == num_requests - 1:
        tl.store(first_item_ptr + num_requests, first + own)
        tl.store(first_item_ptr + plan.MAX_REQUESTS, first + own)
    items_ptr = plan.items_ptr + (n * 2 + KIND) * plan.MAX_ITEMS + first
    for start in range(0, own, 128):
        index = start + tl.arange(0, 128)  # [128]
        tl.store(items_ptr + index, tl.zeros_like(index) + request, mask=index < own)


@triton.jit(do_not_specialize=["num_requests", "max_units", "wave"])
def _plan_kernel(
    retrieval,
    local,
    batch,
    plan,
    num_requests,
    max_units,
    wave,
    MAX_SPAN: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Plan of request program_id(1) in layers with program_id(0) retrieval heads.

    span = max(ceil(tiles / max_units), min(ceil(tiles / wave), MAX_SPAN)), with the tiles of
    all requests and heads. Up to `wave` units of at most MAX_SPAN tiles, then more units of
    MAX_SPAN tiles, then `max_units` longer ones.
    """
    n, request = tl.program_id(0), tl.program_id(1)
    requests = tl.arange(0, BLOCK_R)
    mask = requests < num_requests
    stop = tl.load(batch.seq_lens_ptr + requests, mask=mask, other=0)  # [BLOCK_R]
    begin = tl.load(batch.query_start_loc_ptr + requests, mask=mask, other=0)  # [BLOCK_R]
    end = tl.load(batch.query_start_loc_ptr + requests + 1, mask=mask, other=0)  # [BLOCK_R]
    until = tl.load(batch.dense_until_ptr + requests, mask=mask, other=0)  # [BLOCK_R]
    start = stop - (end - begin)  # [BLOCK_R]
    if retrieval is not None:
        retrieval_tiles = _num_tiles(retrieval, plan, start, stop, until)
    else:
        retrieval_tiles = tl.zeros_like(stop)
    if local is not None:
        local_tiles = _num_tiles(local, plan, start, stop, until)
    else:
        local_tiles = tl.zeros_like(stop)
    retrieval_tiles = tl.where(n > 0, retrieval_tiles, 0)  # [BLOCK_R]
    local_tiles = tl.where(n < plan.NUM_KV_HEADS, local_tiles, 0)  # [BLOCK_R]

    tiles = tl.sum(retrieval_tiles.to(tl.int64), 0) * n
    tiles += tl.sum(local_tiles.to(tl.int64), 0) * (plan.NUM_KV_HEADS - n)
    span = tl.maximum(tl.cdiv(tiles, max_units), tl.minimum(tl.cdiv(tiles, wave), MAX_SPAN))
    span = tl.maximum(span, 1).to(tl.int32)
    tl.store(plan.spans_ptr + n, span)
    _list_items(plan, retrieval_tiles, span, requests, request, num_requests, n, 0)
    _list_items(plan, local_tiles, span, requests, request, num_requests, n, 1)


@triton.jit
def _attend(
    pool,
    plan,
    batch,
    heads,
    query,
    partials,
    logit_params,
    unit,
    item,
    rank,
    n,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One unit: softmax over its tiles for all query rows of its KV head."""
    GROUP: tl.constexpr = query.GROUP
    head = _find_head(heads, plan, rank, KIND)
    slot = tl.load(heads.slot_of_ptr + head).to(tl.int64)
    table = n * 2 + KIND
    request = tl.load(plan.items_ptr + table * plan.MAX_ITEMS + item).to(tl.int64)
    first_item_ptr = plan.first_item_ptr + table * (plan.MAX_REQUESTS + 1)
    span = tl.load(plan.spans_ptr + n)
    first_tile = (item - tl.load(first_item_ptr + request)) * span

    first_token = tl.load(batch.query_start_loc_ptr + request)
    query_len = tl.load(batch.query_start_loc_ptr + request + 1) - first_token
    stop = tl.load(batch.seq_lens_ptr + request)
    until = tl.load(batch.dense_until_ptr + request)
    start = stop - query_len
    num_sinks, gap, length = keys_of(pool, start, stop - 1, until)

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    used = rows < query_len * GROUP  # [BLOCK_M]
    position = tl.minimum(start + rows // GROUP, stop - 1)  # [BLOCK_M]
    token = (first_token + rows // GROUP).to(tl.int64)  # [BLOCK_M]
    q_ptr = query.ptr + head * query.stride_head
    q_ptr += (token * query.stride_token + rows % GROUP * query.stride_group)[:, None]
    in_dims = (dims < pool.HEAD_DIM)[None, :]  # [1, BLOCK_D]
    # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + dims[None, :], mask=used[:, None] & in_dims, other=0.0)
    # [BLOCK_M, 1]
    slopes = load_slopes(logit_params, (head * GROUP + rows % GROUP).to(tl.int32))[:, None]
    if pool.LOCAL and plan.MAX_QUERIES > 1:
        window_start = first_window_page(pool, position // pool.BLOCK_SIZE) * pool.BLOCK_SIZE
        window_start = tl.where(position < until, 0, window_start)[:, None]  # [BLOCK_M, 1]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    end_tile = tl.minimum(first_tile + span, tl.cdiv(length, plan.BLOCK_N))
    for tile in range(first_tile, end_tile):
        listed = tile * plan.BLOCK_N + tl.arange(0, plan.BLOCK_N)  # [BLOCK_N]
        key_position = listed + tl.where(listed < num_sinks, 0, gap)  # [BLOCK_N]
        # [BLOCK_N, BLOCK_D]
        k, v = load_kv(pool, request, slot, key_position, listed < length, q.dtype, BLOCK_D)
        qk = tl.dot(q, tl.trans(k), input_precision=logit_params.PRECISION)  # [BLOCK_M, BLOCK_N]
        distance = (key_position[None, :] - position[:, None]).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        qk = to_log2(logit_params, qk, distance, slopes)
        seen = (listed < length)[None, :]  # [1, BLOCK_N]
        if plan.MAX_QUERIES > 1:
            seen = key_position[None, :] <= position[:, None]  # [BLOCK_M, BLOCK_N]
            if pool.LOCAL:
                of_window = key_position[None, :] >= window_start
                seen = seen & (of_window | (key_position < pool.SINKS)[None, :])
        qk = tl.where(seen, qk, float("-inf"))
        acc, m_i, l_i = accumulate(acc, m_i, l_i, qk, v, logit_params.PRECISION)

    # A row that saw nothing has lse -inf, and no weight.
    out = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]  # [BLOCK_M, BLOCK_D]
    lse = tl.where(l_i > 0, m_i + tl.log2(l_i), float("-inf"))  # [BLOCK_M]
    row = unit * (plan.MAX_QUERIES * GROUP) + rows  # [BLOCK_M]
    out_ptr = partials.out_ptr + row[:, None] * pool.HEAD_DIM + dims[None, :]
    tl.store(out_ptr, out, mask=used[:, None] & in_dims)
    tl.store(partials.lse_ptr + row, lse, mask=used)


@triton.jit
def _decode_kernel(
    query,
    retrieval,
    local,
    heads,
    batch,
    plan,
    partials,
    logit_params,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of unit program_id(0); nothing to do if the plan has fewer units."""
    unit = tl.program_id(0)
    _, pools = _load_pools(heads, plan)  # [BLOCK_H]
    n = tl.sum((pools == 0).to(tl.int32), 0)
    num_local = plan.NUM_KV_HEADS - n
    totals_ptr = plan.first_item_ptr + n * 2 * (plan.MAX_REQUESTS + 1) + plan.MAX_REQUESTS
    num_retrieval_units = tl.load(totals_ptr) * n
    num_local_units = tl.load(totals_ptr + plan.MAX_REQUESTS + 1) * num_local
    row = unit.to(tl.int64)
    if unit < num_retrieval_units:
        if retrieval is not None:
            item, rank = unit // n, unit % n
            _attend(
                retrieval, plan, batch, heads, query, partials, logit_params,
                row, item, rank, n, 0, BLOCK_M, BLOCK_D,
            )  # fmt: skip
    elif unit < num_retrieval_units + num_local_units:  # noqa: SIM102 - the inner is static
        if local is not None:
            unit -= num_retrieval_units
            item, rank = unit // num_local, unit % num_local
            _attend(
                local, plan, batch, heads, query, partials, logit_params,
                row, item, rank, n, 1, BLOCK_M, BLOCK_D,
            )  # fmt: skip


@triton.jit
def _join(acc, m_i, l_i, lse, values):
    """Add `[N, D]` values with `[N]` weights 2^lse to the running output `acc, m_i, l_i`."""
    m_new = tl.maximum(m_i, tl.max(lse, 0))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(lse - m_safe)  # [N]
    alpha = tl.exp2(m_i - m_safe)
    return acc * alpha + tl.sum(p[:, None] * values, 0), m_new, l_i * alpha + tl.sum(p, 0)


@triton.jit
def _slot_term(pool, logit_params, request, slot, head, q, position, GROUP, BLOCK_D: tl.constexpr):
    """Logit in log2 `[1]` and value `[1, BLOCK_D]` of the compensation slot of one query."""
    page = position // pool.BLOCK_SIZE + tl.arange(0, 1)  # [1]
    k, v, dropped = load_slots(pool, request, slot, page, page >= 0, BLOCK_D)  # k, v: [1, BLOCK_D]
    qk = tl.sum(q[None, :] * k, 1)  # [1]
    # The dropped positions are [SINKS, SINKS + N).
    mean = pool.SINKS + (dropped - 1).to(tl.float32) * 0.5  # [1]
    logit = to_log2(logit_params, qk, mean - position, load_slopes(logit_params, head))
    logit += tl.log2(tl.maximum(dropped, 1).to(tl.float32))
    return tl.where(dropped > 0, logit, float("-inf")), v


@triton.jit
def _merge_kernel(
    query,
    out,
    local,
    heads,
    batch,
    plan,
    partials,
    logit_params,
    v_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COMPENSATION: tl.constexpr,
):
    """Row program_id(2) of KV head program_id(1) of request program_id(0).

    out = v_scale * (sum of 2^lse_u out_u + 2^logit v^) / (sum of 2^lse_u + 2^logit + 2^sink)
    """
    GROUP: tl.constexpr = query.GROUP
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.program_id(2)
    first_token = tl.load(batch.query_start_loc_ptr + request)
    query_len = tl.load(batch.query_start_loc_ptr + request + 1) - first_token
    if (row < query_len * GROUP) & (query_len <= plan.MAX_QUERIES):
        index, pools = _load_pools(heads, plan)  # [BLOCK_H]
        kind = tl.load(heads.pool_of_ptr + head)
        rank = tl.sum(((pools == kind) & (index < head)).to(tl.int32), 0)
        n = tl.sum((pools == 0).to(tl.int32), 0)
        num_heads = tl.where(kind == 0, n, plan.NUM_KV_HEADS - n)
        first_item_ptr = plan.first_item_ptr + n * 2 * (plan.MAX_REQUESTS + 1)
        num_retrieval_units = tl.load(first_item_ptr + plan.MAX_REQUESTS) * n
        first_item_ptr += kind * (plan.MAX_REQUESTS + 1) + request
        first, end = tl.load(first_item_ptr), tl.load(first_item_ptr + 1)
        first_unit = tl.where(kind == 0, 0, num_retrieval_units) + rank

        dims = tl.arange(0, BLOCK_D)
        in_dims = dims < HEAD_DIM
        acc = tl.zeros([BLOCK_D], tl.float32)
        group = row % GROUP
        query_head = (head * GROUP + group).to(tl.int32)
        m_i, l_i = begin_rows(logit_params, query_head)
        for start in range(first, end, BLOCK_N):
            item = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
            unit = (first_unit + item * num_heads).to(tl.int64)  # [BLOCK_N]
            place = unit * (plan.MAX_QUERIES * GROUP) + row  # [BLOCK_N]
            # [BLOCK_N]
            lse = tl.load(partials.lse_ptr + place, mask=item < end, other=float("-inf"))
            out_ptr = partials.out_ptr + place[:, None] * HEAD_DIM + dims[None, :]
            mask = (item < end)[:, None] & in_dims[None, :]  # [BLOCK_N, BLOCK_D]
            values = tl.load(out_ptr, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
            acc, m_i, l_i = _join(acc, m_i, l_i, lse, values)  # acc: [BLOCK_D]

        token = (first_token + row // GROUP).to(tl.int64)
        if COMPENSATION and local is not None:
            position = tl.load(batch.seq_lens_ptr + request) - query_len + row // GROUP
            until = tl.load(batch.dense_until_ptr + request)
            if (kind == 1) & (position >= until):
                q_ptr = query.ptr + token * query.stride_token + head * query.stride_head
                q = tl.load(q_ptr + group * query.stride_group + dims, mask=in_dims, other=0.0)
                slot = tl.load(heads.slot_of_ptr + head).to(tl.int64)
                q = q.to(tl.float32)
                logit, v = _slot_term(
                    local, logit_params, request, slot, query_head, q, position, GROUP, BLOCK_D
                )
                acc, m_i, l_i = _join(acc, m_i, l_i, logit, v)

        out_ptr = out.ptr + token * out.stride_token + head * out.stride_head
        result = (acc / l_i * v_scale).to(out.ptr.dtype.element_ty)  # [BLOCK_D]
        tl.store(out_ptr + group * out.stride_group + dims, result, mask=in_dims)


def plan(
    retrieval: Pool | None,
    local: Pool | None,
    batch: Batch,
    plan: Plan,
    max_units: int,
    num_sms: int,
) -> None:
    """Write a step's plan. max_units: of a layer, on top of one per request and head."""
    num_requests = batch.seq_lens_ptr.shape[0]
    _plan_kernel[(plan.NUM_KV_HEADS.value + 1, num_requests)](
        retrieval,
        local,
        batch,
        plan,
        num_requests,
        max_units,
        WAVE * num_sms,
        MAX_SPAN=MAX_SPAN,
        BLOCK_R=triton.next_power_of_2(plan.MAX_REQUESTS.value),
        num_warps=4,
    )


def decode(
    query: Queries,
    out: Queries,
    retrieval: Pool | None,
    local: Pool | None,
    heads: Heads,
    batch: Batch,
    plan: Plan,
    partials: Partials,
    logit_params: LogitParams,
    v_scale: float,
    compensation: bool,
    max_units: int,
    num_warps: int,
    num_stages: int,
) -> None:
    """Attention of the requests that have at most `plan.MAX_QUERIES` queries.

    max_units: as in `plan`, or larger: a CUDA graph may be captured for more requests.
    """
    num_requests = batch.seq_lens_ptr.shape[0]
    num_kv_heads, head_dim = plan.NUM_KV_HEADS.value, query.ptr.shape[-1]
    block_d = triton.next_power_of_2(head_dim)
    rows = plan.MAX_QUERIES.value * query.GROUP.value
    _decode_kernel[(max_units + num_requests * num_kv_heads,)](
        query,
        retrieval,
        local,
        heads,
        batch,
        plan,
        partials,
        logit_params,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    _merge_kernel[(num_requests, num_kv_heads, rows)](
        query,
        out,
        local,
        heads,
        batch,
        plan,
        partials,
        logit_params,
        v_scale,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_N=_MERGE_ROWS,
        COMPENSATION=compensation,
        num_warps=4,
    )

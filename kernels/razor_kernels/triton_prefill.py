"""Prefill: many queries a request, in blocks, over the pages that they see.

A block is BLOCK_Q queries of one request, times the group: BLOCK_M rows that share each load
of K and V. Its keys are a list with a gap, see `triton_tile`. The tiles of the list are

    tiles          read by
    before low     some queries: sinks, and what only the first queries' windows hold
    [low, high)    all queries, without a mask
    from high on   some: the block's own diagonal

Each page of a block's queries has its own compensation slot. The slots are one more tile,
which comes first.
"""

import triton
import triton.language as tl

from razor_kernels.triton_decode import Queries
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


@triton.jit
def _find_request(query_start_loc_ptr, block, num_requests, BLOCK_Q: tl.constexpr):
    """The request that a block belongs to, and the block's index within it.

    Blocks of request r begin at `query_start_loc[r] // BLOCK_Q + r`. That leaves each request
    at least as many as it needs, so its last one may be empty.
    """
    low, high = block * 0, block * 0 + num_requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    return low, block - tl.load(query_start_loc_ptr + low) // BLOCK_Q - low


@triton.jit
def _attend_tiles(
    acc,  # [BLOCK_M, BLOCK_D]
    m_i,  # [BLOCK_M]
    l_i,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
    pool,
    logit_params,
    request,
    slot,
    position,  # [BLOCK_M]
    window_start,  # [BLOCK_M]
    slopes,  # [BLOCK_M]
    keys,  # num_sinks, gap, length
    first,
    last,
    skip_from,
    skip_to,
    MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add tiles [first, last) except [skip_from, skip_to) to the softmax of a block's rows."""
    num_sinks, gap, length = keys
    for index in range(first, last - (skip_to - skip_from)):
        tile = index + tl.where(index < skip_from, 0, skip_to - skip_from)
        listed = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        key_position = listed + tl.where(listed < num_sinks, 0, gap)  # [BLOCK_N]
        # [BLOCK_N, BLOCK_D]
        k, v = load_kv(pool, request, slot, key_position, listed < length, q.dtype, BLOCK_D)
        qk = tl.dot(q, tl.trans(k), input_precision=logit_params.PRECISION)  # [BLOCK_M, BLOCK_N]
        distance = (key_position[None, :] - position[:, None]).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        qk = to_log2(logit_params, qk, distance, slopes[:, None])
        if MASK:
            seen = key_position[None, :] <= position[:, None]  # [BLOCK_M, BLOCK_N]
            if pool.LOCAL:
                of_window = key_position[None, :] >= window_start[:, None]  # [BLOCK_M, BLOCK_N]
                seen = seen & (of_window | (key_position < pool.SINKS)[None, :])
            qk = tl.where(seen, qk, float("-inf"))
        acc, m_i, l_i = accumulate(acc, m_i, l_i, qk, v, logit_params.PRECISION)
    return acc, m_i, l_i


@triton.jit
def _attend_slots(
    acc,  # [BLOCK_M, BLOCK_D]
    m_i,  # [BLOCK_M]
    l_i,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
    pool,
    logit_params,
    request,
    slot,
    position,  # [BLOCK_M]
    slopes,  # [BLOCK_M]
    first,
    last,
    until,
    NUM_SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the compensation slot of each row's page, for rows at or beyond `until`."""
    pages = first // pool.BLOCK_SIZE + tl.arange(0, NUM_SLOTS)  # [NUM_SLOTS]
    valid = pages <= last // pool.BLOCK_SIZE  # [NUM_SLOTS]
    # k, v: [NUM_SLOTS, BLOCK_D]; dropped: [NUM_SLOTS]
    k, v, dropped = load_slots(pool, request, slot, pages, valid, BLOCK_D)
    # [BLOCK_M, NUM_SLOTS]
    qk = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=logit_params.PRECISION)
    mean = pool.SINKS + (dropped - 1).to(tl.float32) * 0.5  # [NUM_SLOTS]
    qk = to_log2(logit_params, qk, mean[None, :] - position[:, None], slopes[:, None])
    qk += tl.log2(tl.maximum(dropped, 1).to(tl.float32))[None, :]
    own = (position // pool.BLOCK_SIZE)[:, None] == pages[None, :]  # [BLOCK_M, NUM_SLOTS]
    own = own & (dropped > 0)[None, :] & (position >= until)[:, None]
    qk = tl.where(own, qk, float("-inf"))
    return accumulate(acc, m_i, l_i, qk, v.to(q.dtype), logit_params.PRECISION)


@triton.jit
def _attend_block(
    pool,
    slot,
    head,
    query,
    out,
    batch,
    logit_params,
    v_scale,
    request,
    first,
    first_token,
    num_queries,
    until,
    NUM_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of one KV head for the queries at [first, first + num_queries).

    first_token: row of the first of them in `query` and `out`.
    """
    GROUP: tl.constexpr = query.GROUP
    last = first + num_queries - 1
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    position = tl.minimum(first + rows // GROUP, last)  # [BLOCK_M]
    token = (first_token + rows // GROUP).to(tl.int64)  # [BLOCK_M]
    mask = (rows < num_queries * GROUP)[:, None] & (dims < pool.HEAD_DIM)[None, :]
    q_ptr = query.ptr + head * query.stride_head
    q_ptr += (token * query.stride_token + rows % GROUP * query.stride_group)[:, None]
    q = tl.load(q_ptr + dims[None, :], mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    query_heads = (head * GROUP + rows % GROUP).to(tl.int32)  # [BLOCK_M]
    slopes = load_slopes(logit_params, query_heads)  # [BLOCK_M]

    num_sinks, gap, length = keys_of(pool, first, last, until)
    num_tiles = tl.cdiv(length, BLOCK_N)
    low = num_tiles * 0
    window_start = position
    if pool.LOCAL:
        window_start = first_window_page(pool, position // pool.BLOCK_SIZE) * pool.BLOCK_SIZE
        window_start = tl.where(position < until, 0, window_start)  # [BLOCK_M]
        # Where the last query's window begins in the list; at the gap, all read the whole list.
        start = tl.max(window_start, 0) - gap
        low = tl.where(start <= num_sinks, 0, tl.cdiv(start, BLOCK_N))
    high = tl.maximum((first + 1 - gap) // BLOCK_N, low)

    keys = num_sinks, gap, length
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i, l_i = begin_rows(logit_params, query_heads)  # [BLOCK_M]
    if pool.LOCAL and NUM_SLOTS > 0:  # noqa: SIM102 - the outer is static
        # The slots come first: after the tiles, q would stay in registers throughout.
        if last >= until:
            acc, m_i, l_i = _attend_slots(
                acc, m_i, l_i, q, pool, logit_params, request, slot, position, slopes, first, last,
                until, NUM_SLOTS, BLOCK_D,
            )  # fmt: skip
    acc, m_i, l_i = _attend_tiles(
        acc, m_i, l_i, q, pool, logit_params, request, slot, position, window_start, slopes, keys,
        low, high, high, high, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m_i, l_i = _attend_tiles(
        acc, m_i, l_i, q, pool, logit_params, request, slot, position, window_start, slopes, keys,
        0, num_tiles, low, high, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    out_ptr = out.ptr + head * out.stride_head
    out_ptr += (token * out.stride_token + rows % GROUP * out.stride_group)[:, None]  # [BLOCK_M, 1]
    result = (acc / l_i[:, None] * v_scale).to(out.ptr.dtype.element_ty)  # [BLOCK_M, BLOCK_D]
    tl.store(out_ptr + dims[None, :], result, mask=mask)


@triton.jit(do_not_specialize=["num_requests", "min_queries"])
def _prefill_kernel(
    query,
    out,
    retrieval,
    local,
    heads,
    batch,
    logit_params,
    v_scale,
    num_requests,
    min_queries,
    NUM_SLOTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """KV head program_id(1) of a block of queries; the longest blocks, the last, come first."""
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    request, local_block = _find_request(batch.query_start_loc_ptr, block, num_requests, BLOCK_Q)
    request = request.to(tl.int64)
    first_token = tl.load(batch.query_start_loc_ptr + request)
    query_len = tl.load(batch.query_start_loc_ptr + request + 1) - first_token
    offset = local_block * BLOCK_Q
    if (offset < query_len) & (query_len >= min_queries):
        first = tl.load(batch.seq_lens_ptr + request) - query_len + offset
        until = tl.load(batch.dense_until_ptr + request)
        num_queries = tl.minimum(query_len - offset, BLOCK_Q)
        first_token += offset
        slot = tl.load(heads.slot_of_ptr + head).to(tl.int64)
        if tl.load(heads.pool_of_ptr + head) == 0:
            if retrieval is not None:
                _attend_block(
                    retrieval, slot, head, query, out, batch, logit_params, v_scale, request, first,
                    first_token, num_queries, until, NUM_SLOTS, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
        else:
            if local is not None:
                _attend_block(
                    local, slot, head, query, out, batch, logit_params, v_scale, request, first,
                    first_token, num_queries, until, NUM_SLOTS, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip


def prefill(
    query: Queries,
    out: Queries,
    retrieval: Pool | None,
    local: Pool | None,
    heads: Heads,
    batch: Batch,
    logit_params: LogitParams,
    v_scale: float,
    compensation: bool,
    min_queries: int,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
) -> None:
    """Attention of the requests that have at least `min_queries` queries."""
    num_tokens, num_kv_heads, group, head_dim = query.ptr.shape
    num_requests = batch.seq_lens_ptr.shape[0]
    block_q = block_m // group
    num_slots = 0
    if local is not None and compensation:
        # A block may begin and end within a page; a dot takes at least 16 keys.
        pages = (block_q + local.BLOCK_SIZE.value - 2) // local.BLOCK_SIZE.value + 1
        num_slots = max(16, triton.next_power_of_2(pages))
    _prefill_kernel[(num_tokens // block_q + num_requests, num_kv_heads)](
        query,
        out,
        retrieval,
        local,
        heads,
        batch,
        logit_params,
        v_scale,
        num_requests,
        min_queries,
        NUM_SLOTS=num_slots,
        BLOCK_Q=block_q,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=num_warps,
        num_stages=num_stages,
    )

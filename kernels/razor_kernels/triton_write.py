"""The write: a step's K and V into pages, and the tails' running sums, in one launch.

No program waits for another: programs that sum read the step's own tokens from `key` and
`value`, and from the cache only what earlier steps wrote.

    programs                          write
    requests x slices of head_dim     tails of the pages that the request's tokens fill
    tokens / BLOCK_T                  rows of BLOCK_T tokens
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from razor_kernels.triton_tile import Batch, Heads, Pool, tail_ptr, to_float, to_stored

_TILE = 4096
"""Elements of K, and as many of V, that a program sums at once: 32 fp32 registers each for
128 threads. Half as many of fp32, and of fp8 that is converted with integers: a full tile of
that spills 8 bytes (sm_80). Derived, not measured."""

_FEW_TOKENS = 16
"""Up to this many tokens a request touches one page or two, and a program takes the widest
slice of head_dim; above, the narrowest, so that many programs share a long prompt. Derived."""


class Tokens(NamedTuple):
    """The step's K or V of one layer: its rows, and the scale they are divided by when stored."""

    ptr: torch.Tensor
    stride_token: int
    stride_head: int
    scale: float

    @classmethod
    def of(cls, x: torch.Tensor, scale: float) -> "Tokens":
        return cls(x, x.stride(0), x.stride(1), scale)


@triton.jit
def _store_rows(pool, slot, head, key, value, tokens, num_tokens, BLOCK_D: tl.constexpr):
    """cache[page, slot, offset] = key / scale, value / scale where slot_mapping >= 0."""
    dims = tl.arange(0, BLOCK_D)
    place = tl.load(pool.slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)  # [BLOCK_T]
    place = place.to(tl.int64)  # [BLOCK_T]
    mask = (place >= 0)[:, None] & (dims < pool.HEAD_DIM)[None, :]  # [BLOCK_T, BLOCK_D]
    k_ptr = key.ptr + head * key.stride_head
    v_ptr = value.ptr + head * value.stride_head
    # [BLOCK_T, BLOCK_D]
    k = tl.load(k_ptr + tokens[:, None] * key.stride_token + dims[None, :], mask=mask)
    v = tl.load(v_ptr + tokens[:, None] * value.stride_token + dims[None, :], mask=mask)
    page, offset = place // pool.BLOCK_SIZE, place % pool.BLOCK_SIZE  # [BLOCK_T]
    rows = page * pool.stride_cache_page + offset * (2 * pool.HEAD_DIM)  # [BLOCK_T]
    # [BLOCK_T, BLOCK_D]
    rows_ptr = pool.cache_ptr + slot * pool.stride_cache_slot + rows[:, None] + dims[None, :]
    dtype: tl.constexpr = pool.cache_ptr.dtype.element_ty
    tl.store(rows_ptr, to_stored(k.to(tl.float32), key.scale, dtype), mask=mask)
    tl.store(rows_ptr + pool.HEAD_DIM, to_stored(v.to(tl.float32), value.scale, dtype), mask=mask)


@triton.jit
def _page_sums(new_ptr, old_ptr, new_mask, old_mask, scale):
    """Sums over rows `[PAGES, BLOCK_S]`, in stored units, of `[PAGES, ROWS, BLOCK_S]`.

    new: the step's own tokens, rounded here as they are stored. old: rows of the cache.
    """
    dtype: tl.constexpr = old_ptr.dtype.element_ty
    new = tl.load(new_ptr, mask=new_mask, other=0.0).to(tl.float32)  # [PAGES, ROWS, BLOCK_S]
    old = tl.load(old_ptr, mask=old_mask, other=0.0)  # [PAGES, ROWS, BLOCK_S]
    new = to_float(to_stored(new, scale, dtype)).to(tl.float32)
    return tl.sum(tl.where(new_mask, new, to_float(old).to(tl.float32)), 1)


@triton.jit
def _last_row(x, NUM_ROWS: tl.constexpr):
    return tl.sum(tl.where((tl.arange(0, NUM_ROWS) == NUM_ROWS - 1)[:, None], x, 0.0), 0)


@triton.jit
def _store_tails(
    pool,
    batch,
    slot,
    head,
    key,
    value,
    request,
    dims,  # [BLOCK_S]
    PAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """S(p) = S(p-1) + sum of p's tokens past the sinks, for each page p that is now full.

    A page that is not full yet gets its sums when it is; nothing reads them before that.
    """
    first_token = tl.load(batch.query_start_loc_ptr + request)
    query_len = tl.load(batch.query_start_loc_ptr + request + 1) - first_token
    stop = tl.load(batch.seq_lens_ptr + request)
    start = stop - query_len
    first_page = start // pool.BLOCK_SIZE
    end_page = tl.where(query_len > 0, stop // pool.BLOCK_SIZE, first_page)
    table_ptr = pool.block_table_ptr + request * pool.stride_block_table

    in_dims = dims < pool.HEAD_DIM  # [BLOCK_S]
    has_previous = (end_page > first_page) & (first_page > 0)
    previous = tl.load(table_ptr + first_page - 1, mask=has_previous, other=0).to(tl.int64)
    previous_ptr = tail_ptr(pool, previous, slot) + dims  # [BLOCK_S]
    k_carry = tl.load(previous_ptr, mask=in_dims & has_previous, other=0.0)  # [BLOCK_S]
    v_carry = tl.load(previous_ptr + pool.HEAD_DIM, mask=in_dims & has_previous, other=0.0)

    rows = tl.arange(0, ROWS)
    k_ptr = key.ptr + head * key.stride_head + dims[None, None, :]  # [1, 1, BLOCK_S]
    v_ptr = value.ptr + head * value.stride_head + dims[None, None, :]  # [1, 1, BLOCK_S]
    slot_ptr = pool.cache_ptr + slot * pool.stride_cache_slot + dims[None, None, :]
    for tile in range(first_page, end_page, PAGES):
        index = tile + tl.arange(0, PAGES)  # [PAGES]
        page = tl.load(table_ptr + index, mask=index < end_page, other=0).to(tl.int64)  # [PAGES]
        position = index[:, None] * pool.BLOCK_SIZE + rows[None, :]  # [PAGES, ROWS]
        # [PAGES, ROWS]
        counted = (position >= pool.SINKS) & (position < stop) & (rows < pool.BLOCK_SIZE)[None, :]
        # [PAGES, ROWS, BLOCK_S]
        new = (counted & (position >= start))[:, :, None] & in_dims[None, None, :]
        old = (counted & (position < start))[:, :, None] & in_dims[None, None, :]

        token = (first_token + position - start).to(tl.int64)[:, :, None]  # [PAGES, ROWS, 1]
        row = (page * pool.stride_cache_page)[:, None] + rows[None, :] * (2 * pool.HEAD_DIM)
        row_ptr = slot_ptr + row[:, :, None]  # [PAGES, ROWS, BLOCK_S]
        k_sums = _page_sums(k_ptr + token * key.stride_token, row_ptr, new, old, key.scale)
        row_ptr += pool.HEAD_DIM
        v_sums = _page_sums(v_ptr + token * value.stride_token, row_ptr, new, old, value.scale)
        k_sums = tl.cumsum(k_sums, 0) + k_carry[None, :]  # [PAGES, BLOCK_S]
        v_sums = tl.cumsum(v_sums, 0) + v_carry[None, :]  # [PAGES, BLOCK_S]

        sums_ptr = tail_ptr(pool, page, slot)[:, None] + dims[None, :]  # [PAGES, BLOCK_S]
        mask = (index < end_page)[:, None] & in_dims[None, :]  # [PAGES, BLOCK_S]
        tl.store(sums_ptr, k_sums, mask=mask)
        tl.store(sums_ptr + pool.HEAD_DIM, v_sums, mask=mask)
        k_carry, v_carry = _last_row(k_sums, PAGES), _last_row(v_sums, PAGES)  # [BLOCK_S]


@triton.jit(do_not_specialize=["num_requests"])
def _write_kernel(
    key,
    value,
    retrieval,
    local,
    heads,
    batch,
    num_requests,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_SLICES: tl.constexpr,
    PAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows and tails of KV head program_id(1); for axis 0 see the module's docstring."""
    program, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    is_retrieval = tl.load(heads.pool_of_ptr + head) == 0
    slot = tl.load(heads.slot_of_ptr + head).to(tl.int64)
    num_tail_programs = num_requests * NUM_SLICES
    tokens = (program - num_tail_programs) * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
    num_tokens = tl.load(batch.query_start_loc_ptr + num_requests)
    if (program >= num_tail_programs) & is_retrieval:
        if retrieval is not None:
            _store_rows(retrieval, slot, head, key, value, tokens, num_tokens, BLOCK_D)
    elif program >= num_tail_programs:
        if local is not None:
            _store_rows(local, slot, head, key, value, tokens, num_tokens, BLOCK_D)
    elif not is_retrieval:  # noqa: SIM102 - the inner is static
        if local is not None:
            request = program // NUM_SLICES
            dims = (program % NUM_SLICES).to(tl.int32) * BLOCK_S + tl.arange(0, BLOCK_S)
            _store_tails(local, batch, slot, head, key, value, request, dims, PAGES, ROWS)


def write(
    key: Tokens,
    value: Tokens,
    retrieval: Pool | None,
    local: Pool | None,
    heads: Heads,
    batch: Batch,
    max_query_len: int,
) -> None:
    """Launch the write of one layer; the contract is `step`'s."""
    num_tokens, num_kv_heads, head_dim = key.ptr.shape
    num_requests = batch.seq_lens_ptr.shape[0]
    block_d = triton.next_power_of_2(head_dim)
    rows = triton.next_power_of_2(local.BLOCK_SIZE.value) if local else 16
    cache = local.cache_ptr if local else None
    # Conversion, wide elements and lanes beyond the head take registers.
    narrow = cache is not None and cache.dtype in (torch.uint8, torch.float32)
    halved = narrow or block_d != head_dim
    tile = _TILE // 2 if halved else _TILE
    widest = min(block_d, max(16, tile // rows))
    block_s = widest if max_query_len <= _FEW_TOKENS else 16
    num_slices = triton.cdiv(head_dim, block_s) if local else 0
    block_t = max(16, min(64, _TILE // block_d // 2))
    grid = (num_requests * num_slices + triton.cdiv(num_tokens, block_t), num_kv_heads)
    _write_kernel[grid](
        key,
        value,
        retrieval,
        local,
        heads,
        batch,
        num_requests,
        BLOCK_D=block_d,
        BLOCK_T=block_t,
        BLOCK_S=block_s,
        NUM_SLICES=num_slices,
        PAGES=max(1, tile // (rows * block_s)),
        ROWS=rows,
        num_warps=4,
    )

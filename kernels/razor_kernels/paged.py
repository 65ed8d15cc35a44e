"""The PyTorch form: vectorised, and runs wherever PyTorch runs.

A step is planned on the host once per pool (`plan_writes`, `plan_reads`), and the plan
serves every layer. A layer then gathers pages and calls scaled-dot-product attention once
per segment. A segment is a run of one request's queries under one rule:

    rule         pages read                                extra keys
    dense        0 .. page of the last query               none
    compressed   sinks; window of the first query onward   one slot per page of queries
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from razor_kernels.layout import PageLayout
from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step
from razor_kernels.window import DENSE_FOREVER, Window

_MAX_QUERIES = 512
"""Queries of a segment that needs a mask: bounds the mask and the masked keys it reads."""


@dataclass(frozen=True)
class TailUpdate:
    """Consecutive pages of one request whose sums a step rebuilds.

    pages: int64 `[n]` page ids; previous: page id before the first, or None.
    counted: fp32 `[n, 1, block_size, 1]`, 1 where a token is written and is not a sink.
    """

    pages: torch.Tensor
    previous: int | None
    counted: torch.Tensor


@dataclass(frozen=True)
class WritePlan:
    """Where a step's tokens go in one pool.

    rows: int64 `[n]` token rows that are written (padding is left out), or None for all.
    pages, offsets: int64 `[n]`.
    """

    rows: torch.Tensor | None
    pages: torch.Tensor
    offsets: torch.Tensor
    tails: tuple[TailUpdate, ...]


@dataclass(frozen=True)
class Segment:
    """A run of one request's queries under one rule (see the module's docstring).

    start, stop: token rows. pages: int64 `[n]`; num_keys: keys of them that are read.
    bias: fp32 or bool `[stop - start, num_keys + num_slots]`, or None.
    causal: queries are the last rows of the keys, and bias is None.
    first: position of the first query. positions: fp32 `[num_keys + num_slots]` of the keys.
    slots: int64 `[num_slots]` pages whose tails are compensation slots.
    dropped: fp32 `[1, num_slots, 1]`, N of each slot.
    """

    start: int
    stop: int
    pages: torch.Tensor
    num_keys: int
    bias: torch.Tensor | None
    causal: bool
    first: int
    positions: torch.Tensor
    slots: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


def plan_writes(
    slot_mapping: torch.Tensor,
    block_size: int,
    tails: tuple[TailUpdate, ...] = (),
) -> WritePlan:
    """Plan of one pool's writes.

    Args:
        slot_mapping: integer `[num_tokens]`, page * block_size + offset, -1 for padding.
    """
    slots = slot_mapping.long()
    rows = None
    if bool((slots < 0).any()):
        rows = (slots >= 0).nonzero().squeeze(1)
        slots = slots[rows]
    return WritePlan(rows, slots // block_size, slots % block_size, tails)


def plan_tails(
    query_lens: list[int],
    seq_lens: list[int],
    block_table: torch.Tensor,
    window: Window,
) -> tuple[TailUpdate, ...]:
    """Pages whose running sums a step must rebuild: those it writes to."""
    size = window.block_size
    updates = []
    for request, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        if query_len == 0:
            continue
        first, last = (seq_len - query_len) // size, (seq_len - 1) // size
        positions = torch.arange(first * size, (last + 1) * size)
        counted = (positions >= window.sinks) & (positions < seq_len)
        table = block_table[request]
        updates.append(
            TailUpdate(
                pages=table[first : last + 1].long(),
                previous=int(table[first - 1]) if first > 0 else None,
                counted=counted.view(-1, 1, size, 1).to(table.device).float(),
            )
        )
    return tuple(updates)


def plan_reads(
    query_lens: list[int],
    seq_lens: list[int],
    dense_until: list[int],
    block_table: torch.Tensor,
    window: Window | None,
    block_size: int,
    compensation: bool = True,
) -> tuple[Segment, ...]:
    """Segments of a step.

    Args:
        query_lens, seq_lens, dense_until: one int per request; rows are consecutive.
        block_table: integer `[num_requests, max_pages]`.
        window: of local heads; None plans retrieval heads, which are dense.
    """
    segments: list[Segment] = []
    row = 0
    for request, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        start = seq_len - query_len
        until = DENSE_FOREVER if window is None else dense_until[request]
        split = min(max(until, start), seq_len)
        table = block_table[request]
        # A prompt's first chunk needs no mask, and is one segment.
        step = max(split, 1) if start == 0 else _MAX_QUERIES
        for begin in range(start, split, step):
            end = min(begin + step, split)
            segments.append(_dense(row + begin - start, begin, end, table, block_size))
        for begin in range(split, seq_len, _MAX_QUERIES):
            assert window is not None
            end = min(begin + _MAX_QUERIES, seq_len)
            first = row + begin - start
            segments.append(_compressed(first, begin, end, table, window, compensation))
        row += query_len
    return tuple(segments)


def _dense(row: int, start: int, stop: int, table: torch.Tensor, block_size: int) -> Segment:
    """Causal attention of the queries at [start, stop) over keys [0, stop)."""
    num_queries = stop - start
    bias = None
    if num_queries > 1 and start > 0:
        key = torch.arange(stop, device=table.device)
        bias = key <= torch.arange(start, stop, device=table.device).unsqueeze(1)
    pages = table[: -(-stop // block_size)].long()
    causal = num_queries > 1 and start == 0
    positions = torch.arange(stop, device=table.device).float()
    return Segment(row, row + num_queries, pages, stop, bias, causal, start, positions)


def _compressed(
    row: int,
    start: int,
    stop: int,
    table: torch.Tensor,
    window: Window,
    compensation: bool,
) -> Segment:
    """Queries at [start, stop) of a local head: sinks, window, compensation slots."""
    size, device = window.block_size, table.device
    first_page, last_page = start // size, (stop - 1) // size
    low = window.first_window_page(first_page)
    index = torch.cat(
        [
            torch.arange(min(window.sink_pages, low), device=device),
            torch.arange(low, last_page + 1, device=device),
        ]
    )
    key = (index.unsqueeze(1) * size + torch.arange(size, device=device)).flatten()
    query = torch.arange(start, stop, device=device).unsqueeze(1)
    window_start = window.first_window_page(query // size) * size
    seen = (key <= query) & ((key < window.sinks) | (key >= window_start))
    bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -math.inf)
    pages = table[index].long()
    query_pages = torch.arange(first_page, last_page + 1, device=device)
    dropped = window.num_dropped(query_pages)
    positions = key.float()
    if not compensation or not bool((dropped > 0).any()):
        return Segment(row, row + stop - start, pages, len(key), bias, False, start, positions)
    query_pages, dropped = query_pages[dropped > 0], dropped[dropped > 0].float()
    own = query // size == query_pages
    slot_bias = torch.where(own, dropped.log(), torch.tensor(-math.inf, device=device))
    middle = window.sinks + (dropped - 1) / 2
    return Segment(
        start=row,
        stop=row + stop - start,
        pages=pages,
        num_keys=len(key),
        bias=torch.cat([bias, slot_bias], dim=1),
        causal=False,
        first=start,
        positions=torch.cat([positions, middle]),
        slots=table[window.first_window_page(query_pages) - 1].long(),
        dropped=dropped.view(1, -1, 1),
    )


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    layout: PageLayout,
    plan: WritePlan,
    params: AttentionParams,
) -> None:
    """Write a step's keys and values, then the running sums of the touched pages.

    Args:
        key, value: `[num_tokens, num_slots, head_dim]`, after the rotary embedding.
        cache: `[num_pages, num_slots, rows, 2 * head_dim]`; written to.
    """
    stored = [
        _stored(key, layout.dtype, params.k_scale),
        _stored(value, layout.dtype, params.v_scale),
    ]
    tokens = torch.cat([_bits(x) for x in stored], dim=-1)
    if plan.rows is not None:
        tokens = tokens[plan.rows]
    _bits(cache)[plan.pages, :, plan.offsets] = tokens[: len(plan.pages)]
    for update in plan.tails:
        _write_tails(cache, layout, update)


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    if dtype == torch.float8_e4m3fn:
        limit = torch.finfo(dtype).max
        x = (x.float() / scale).clamp(-limit, limit)
    return x.to(dtype)


def _bits(x: torch.Tensor) -> torch.Tensor:
    """The same memory in a type that PyTorch can index: it cannot index every fp8."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _write_tails(cache: torch.Tensor, layout: PageLayout, update: TailUpdate) -> None:
    """S(p) = S(p-1) + sum of the counted tokens of p, for consecutive pages p."""
    tails = layout.tails(cache)
    tokens = _bits(layout.tokens(cache))[update.pages]
    tokens = tokens.view(layout.dtype).float()  # [n, num_slots, block, 2D]
    # Unwritten rows may hold anything, NaN included.
    tokens = torch.where(update.counted > 0, tokens, 0.0)
    sums = tokens.sum(dim=2)  # [n, num_slots, 2D]
    if update.previous is not None:
        sums[0] += tails[update.previous]
    tails[update.pages] = sums.cumsum(dim=0)


def attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    layout: PageLayout,
    segments: tuple[Segment, ...],
    params: AttentionParams,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Attention of one layer's heads of one pool (the formula of `oracle.attention`).

    Args:
        query: `[num_tokens, num_slots, group, head_dim]`.
        cache: `[num_pages, num_slots, rows, 2 * head_dim]`.
        slopes: of ALiBi, fp32 `[num_slots, group]`, or None.
        sinks: logits of learned sinks, fp32 `[num_slots, group]`, or None.
        out: like query; rows of the segments are written to, others left alone.
    """
    scale = params.scale * params.k_scale
    # A quantized cache's outputs are scaled before they are rounded, once.
    dtype = query.dtype if params.v_scale == 1.0 else torch.float32
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        k, v = _gather(cache, layout, segment, dtype)
        q = query[rows].permute(1, 2, 0, 3).to(dtype)  # [num_slots, group, T, D]
        if params.soft_cap > 0 or slopes is not None or sinks is not None:
            result = _attend_by_logits(q, k, v, segment, params, slopes, sinks)
        elif q.shape[2] == 1:
            # One query: the group becomes the query dimension, and K and V are read once.
            result = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=segment.bias, scale=scale
            ).transpose(1, 2)
        else:
            shape = (*q.shape[:2], *k.shape[2:])
            result = F.scaled_dot_product_attention(
                q,
                k.expand(shape),
                v.expand(shape),
                attn_mask=segment.bias,
                is_causal=segment.causal,
                scale=scale,
            )
        out[rows] = (result * params.v_scale).permute(2, 0, 1, 3)


def _attend_by_logits(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment: Segment,
    params: AttentionParams,
    slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention with a soft-cap, ALiBi or sinks: in fp32, with the whole matrix of logits."""
    logits = (q.float() * (params.scale * params.k_scale)) @ k.float().transpose(-1, -2)
    if params.soft_cap > 0:
        logits = params.soft_cap * torch.tanh(logits / params.soft_cap)
    query = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + segment.first
    distance = segment.positions - query
    if slopes is not None:
        logits = logits + slopes[:, :, None, None] * distance
    if segment.causal:
        logits = logits.masked_fill(distance > 0, -math.inf)
    elif segment.bias is not None and segment.bias.dtype == torch.bool:
        logits = logits.masked_fill(~segment.bias, -math.inf)
    elif segment.bias is not None:
        logits = logits + segment.bias
    if sinks is not None:
        column = sinks[:, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1)[..., : k.shape[-2]]
    return (weights @ v.float()).to(q.dtype)


def _gather(
    cache: torch.Tensor, layout: PageLayout, segment: Segment, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a segment in stored units, each `[num_slots, 1, keys + slots, head_dim]`."""
    tokens = _bits(layout.tokens(cache)).index_select(0, segment.pages)
    tokens = tokens.transpose(0, 1).flatten(1, 2)[:, : segment.num_keys]
    tokens = tokens.contiguous().view(layout.dtype).to(dtype)
    if segment.bias is not None and segment.bias.dtype != torch.bool:
        # Rows of the last page that nothing was written to: weight 0, but 0 * NaN = NaN.
        seen = (segment.bias[:, : segment.num_keys] > -math.inf).any(0)
        tokens = torch.where(seen.view(1, -1, 1), tokens, 0)
    if segment.slots is not None and segment.dropped is not None:
        sums = layout.tails(cache).index_select(0, segment.slots).transpose(0, 1)
        tokens = torch.cat([tokens, (sums / segment.dropped).to(dtype)], dim=1)
    k, v = tokens.unsqueeze(1).split(layout.head_dim, dim=-1)
    return k, v


class _PoolPlan(NamedTuple):
    writes: WritePlan
    reads: tuple[Segment, ...]


class _PoolHeads(NamedTuple):
    """One layer's heads in one pool: KV heads in order of slot, and their slots."""

    heads: torch.Tensor
    slots: slice


class PagedForm:
    """Write and attention in PyTorch, on any device (the contract is `step`'s).

    The slots of a layer in a pool must be consecutive.
    """

    def __init__(self) -> None:
        self._step: Step | None = None
        self._plans: tuple[_PoolPlan | None, ...] = ()
        # By id; the object is held too, so that its id is not used again.
        self._layers: dict[int, tuple[LayerHeads, tuple[_PoolHeads | None, ...]]] = {}

    def plan(self, step: Step) -> None:
        """Nothing: the first layer of a step prepares it."""

    def write(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
    ) -> None:
        """Write K and V into the pages, then the running sums of the pages written to."""
        for pool, plan, own in self._pools(heads, step, params):
            cache = pool.cache[:, own.slots]
            write(key[:, own.heads], value[:, own.heads], cache, pool.layout, plan.writes, params)

    def attention(
        self,
        query: torch.Tensor,
        heads: LayerHeads,
        step: Step,
        params: AttentionParams,
        out: torch.Tensor,
    ) -> None:
        """Attention of every query head over its KV head's pages."""
        for pool, plan, own in self._pools(heads, step, params):
            slopes, sinks = (
                None if x is None else x.view(query.shape[1:3])[own.heads]
                for x in (params.alibi_slopes, params.sink_logits)
            )
            q = query[:, own.heads]
            result = torch.zeros_like(q)
            cache = pool.cache[:, own.slots]
            attention(q, cache, pool.layout, plan.reads, params, slopes, sinks, result)
            num_rows = sum(segment.stop - segment.start for segment in plan.reads)
            out[:num_rows, own.heads] = result[:num_rows]

    def _pools(
        self, heads: LayerHeads, step: Step, params: AttentionParams
    ) -> list[tuple[PoolPages, _PoolPlan, _PoolHeads]]:
        if self._step is not step:
            self._plans = tuple(
                _plan(step, pool, tables, params.compensation) if pool and tables else None
                for pool, tables in zip(step.pools, step.tables, strict=True)
            )
            self._step = step
        if id(heads) not in self._layers:
            self._layers[id(heads)] = (heads, tuple(_pool_heads(heads, i) for i in range(2)))
        own = self._layers[id(heads)][1]
        found = zip(step.pools, self._plans, own, strict=True)
        return [(p, plan, mine) for p, plan, mine in found if p and plan and mine]


def _plan(step: Step, pool: PoolPages, tables: PoolTables, compensation: bool) -> _PoolPlan:
    starts = step.query_start_loc
    query_lens, seq_lens = (starts[1:] - starts[:-1]).tolist(), step.seq_lens.tolist()
    table = tables.block_table
    tails: tuple[TailUpdate, ...] = ()
    if pool.window is not None:
        tails = plan_tails(query_lens, seq_lens, table, pool.window)
    size = pool.layout.block_size
    mapping = tables.slot_mapping[: int(starts[-1])]
    until = step.dense_until.tolist()
    reads = plan_reads(query_lens, seq_lens, until, table, pool.window, size, compensation)
    return _PoolPlan(plan_writes(mapping, size, tails), reads)


def _pool_heads(heads: LayerHeads, pool: int) -> _PoolHeads | None:
    own = (heads.pool_of == pool).nonzero().squeeze(1)
    if not len(own):
        return None
    own = own[heads.slot_of[own].argsort()]
    first = int(heads.slot_of[own[0]])
    slots = slice(first, first + len(own))
    assert heads.slot_of[own].tolist() == list(range(slots.start, slots.stop)), "slots have gaps"
    return _PoolHeads(own, slots)

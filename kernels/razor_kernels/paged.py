"""The formula over pages, in vectorised PyTorch: runs wherever PyTorch runs.

A step is planned once on the host (`plan_writes`, `plan_reads`) and the plan serves
every layer; a layer then gathers, and calls scaled-dot-product attention, once a
segment. A segment is a run of one request's queries under one rule:

    rule         pages read                                extra keys
    dense        0 .. page of the last query               none
    compressed   sinks; window of the first query onward   one slot a query page
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from razor_kernels.layout import PageLayout
from razor_kernels.window import DENSE_FOREVER, Window

_MAX_QUERIES = 512
"""Queries of a segment that needs a mask: bounds the mask, and what a window reads in vain."""


@dataclass(frozen=True)
class TailUpdate:
    """Consecutive pages of one request whose sums a step rebuilds.

    pages: int64 `[n]` page ids; previous: page id before the first, or None.
    counted: fp32 `[n, 1, block_size, 1]`, 1 where a token is written and no sink.
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
    """A run of one request's queries under one rule.

    start, stop: token rows. pages: int64 `[n]`; num_keys: keys of them that are read.
    bias: fp32 or bool `[stop - start, num_keys + num_slots]`, or None.
    causal: queries are the last rows of the keys, and bias is None.
    slots: int64 `[num_slots]` pages whose tails are compensation slots.
    dropped: fp32 `[1, num_slots, 1]`, N of each slot.
    """

    start: int
    stop: int
    pages: torch.Tensor
    num_keys: int
    bias: torch.Tensor | None
    causal: bool
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
        query_lens, seq_lens, dense_until: one int a request; rows follow one another.
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
    return Segment(row, row + num_queries, pages, stop, bias, causal)


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
    if not compensation or not bool((dropped > 0).any()):
        return Segment(row, row + stop - start, pages, len(key), bias, False)
    query_pages, dropped = query_pages[dropped > 0], dropped[dropped > 0].float()
    own = query // size == query_pages
    slot_bias = torch.where(own, dropped.log(), torch.tensor(-math.inf, device=device))
    return Segment(
        start=row,
        stop=row + stop - start,
        pages=pages,
        num_keys=len(key),
        bias=torch.cat([bias, slot_bias], dim=1),
        causal=False,
        slots=table[window.first_window_page(query_pages) - 1].long(),
        dropped=dropped.view(1, -1, 1),
    )


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    cache: torch.Tensor,
    layout: PageLayout,
    plan: WritePlan,
) -> None:
    """Write a step's keys and values, then the running sums of the touched pages.

    Args:
        key, value: `[num_tokens, num_slots, head_dim]`, after the rotary embedding.
        cache: `[num_pages, num_slots, rows, 2 * head_dim]`; written to.
    """
    tokens = torch.cat([key, value], dim=-1).to(cache.dtype)
    if plan.rows is not None:
        tokens = tokens[plan.rows]
    cache[plan.pages, :, plan.offsets] = tokens[: len(plan.pages)]
    for update in plan.tails:
        _write_tails(cache, layout, update)


def _write_tails(cache: torch.Tensor, layout: PageLayout, update: TailUpdate) -> None:
    """S(p) = S(p-1) + sum of the counted tokens of p, for consecutive pages p."""
    tails = layout.tails(cache)
    tokens = layout.tokens(cache)[update.pages].float()  # [n, num_slots, block, 2D]
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
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of one layer's heads of one pool (the formula of `oracle.attention`).

    Args:
        query: `[num_tokens, num_slots, group, head_dim]`.
        cache: `[num_pages, num_slots, rows, 2 * head_dim]`.
        out: like query; rows of the segments are written to, others left alone.
    """
    for segment in segments:
        rows = slice(segment.start, segment.stop)
        k, v = _gather(cache, layout, segment, query.dtype)
        q = query[rows].permute(1, 2, 0, 3)  # [num_slots, group, T, D]
        if q.shape[2] == 1:
            # One query: the group takes its place, and K and V are read once.
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
        out[rows] = result.permute(2, 0, 1, 3)


def _gather(
    cache: torch.Tensor, layout: PageLayout, segment: Segment, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a segment, each `[num_slots, 1, keys + slots, head_dim]`."""
    tokens = layout.tokens(cache).index_select(0, segment.pages)
    tokens = tokens.transpose(0, 1).flatten(1, 2)[:, : segment.num_keys]
    if segment.bias is not None and segment.bias.dtype != torch.bool:
        # Rows of the last page that nothing was written to: weight 0, but 0 * NaN = NaN.
        seen = (segment.bias[:, : segment.num_keys] > -math.inf).any(0)
        tokens = torch.where(seen.view(1, -1, 1), tokens, 0)
    tokens = tokens.to(dtype)
    if segment.slots is not None and segment.dropped is not None:
        sums = layout.tails(cache).index_select(0, segment.slots).transpose(0, 1)
        tokens = torch.cat([tokens, (sums / segment.dropped).to(dtype)], dim=1)
    k, v = tokens.unsqueeze(1).split(layout.head_dim, dim=-1)
    return k, v

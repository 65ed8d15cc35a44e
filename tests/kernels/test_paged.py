"""Attention over pages against the oracle."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from razor_kernels import DENSE_FOREVER, PageLayout, Window, oracle, paged

HEAD_DIM = 32
NUM_KV_HEADS = 4


class Request(NamedTuple):
    """chunks: query lengths, one a step; they sum to the sequence's length."""

    chunks: tuple[int, ...]
    dense_until: int


class Pages:
    """One pool of shuffled pages that start as NaN, and a batch's block table in it."""

    def __init__(self, layout: PageLayout, num_slots: int, lengths: list[int]) -> None:
        self.layout = layout
        counts = [-(-n // layout.block_size) for n in lengths]
        total = sum(counts) + 3
        # One slot more than asked for: pages are strided views of a wider pool.
        shape = (total, num_slots + 1, layout.rows, 2 * layout.head_dim)
        self.cache = torch.full(shape, torch.nan, dtype=layout.dtype)[:, 1:]
        ids = torch.randperm(total - 1) + 1
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, count in enumerate(counts):
            self.table[row, :count] = ids[sum(counts[:row]) :][:count]

    def slot_mapping(self, request: int, start: int, stop: int) -> torch.Tensor:
        size = self.layout.block_size
        positions = torch.arange(start, stop)
        return self.table[request, positions // size].long() * size + positions % size


def run(
    requests: list[Request],
    tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    layout: PageLayout,
    window: Window | None,
    compensation: bool = True,
) -> list[torch.Tensor]:
    """Feed the requests' chunks step by step; return each one's outputs."""
    lengths = [sum(request.chunks) for request in requests]
    num_slots = tensors[0][1].shape[1]
    pages = Pages(layout, num_slots, lengths)
    outputs = [torch.full_like(q, torch.nan) for q, _, _ in tensors]
    done = [0] * len(requests)
    for step in range(max(len(request.chunks) for request in requests)):
        batch = [i for i, request in enumerate(requests) if step < len(request.chunks)]
        query_lens = [requests[i].chunks[step] for i in batch]
        seq_lens = [done[i] + n for i, n in zip(batch, query_lens, strict=True)]
        spans = [(i, done[i], end) for i, end in zip(batch, seq_lens, strict=True)]
        mapping = torch.cat([pages.slot_mapping(*span) for span in spans])
        q, k, v = (
            torch.cat([tensors[i][part][start:end] for i, start, end in spans]) for part in range(3)
        )
        table = pages.table[batch]
        tails = ()
        if window is not None:
            tails = paged.plan_tails(query_lens, seq_lens, table, window)
        writes = paged.plan_writes(mapping, layout.block_size, tails)
        paged.write(k, v, pages.cache, layout, writes)
        reads = paged.plan_reads(
            query_lens,
            seq_lens,
            [requests[i].dense_until for i in batch],
            table,
            window,
            layout.block_size,
            compensation,
        )
        out = torch.full_like(q, torch.nan)
        scale = layout.head_dim**-0.5
        paged.attention(q, pages.cache, layout, reads, scale, out)
        row = 0
        for i, start, end in spans:
            outputs[i][start:end] = out[row : row + end - start]
            done[i] = end
            row += end - start
    return outputs


def draw(length: int, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random q, k and v; keys share a direction, so that means of keys matter."""
    shift = torch.randn(NUM_KV_HEADS, 1, HEAD_DIM)
    q = torch.randn(length, NUM_KV_HEADS, group, HEAD_DIM) + shift
    k = torch.randn(length, NUM_KV_HEADS, HEAD_DIM) + shift.squeeze(1)
    v = torch.randn(length, NUM_KV_HEADS, HEAD_DIM) + 1.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def expected(
    tensors: tuple[torch.Tensor, ...],
    window: Window | None,
    dense_until: int,
    compensation: bool,
) -> torch.Tensor:
    q, k, v = tensors
    is_retrieval = torch.full((NUM_KV_HEADS,), window is None)
    result = oracle.attention(
        q.flatten(1, 2),
        k,
        v,
        is_retrieval,
        window or Window(0, 0, 0.0, 16),
        HEAD_DIM**-0.5,
        dense_until,
        compensation,
    )
    return result.view(q.shape)


def pytorch_error(tensors: tuple[torch.Tensor, ...]) -> float:
    """PyTorch's own error at this precision, on dense causal attention."""
    q, k, v = tensors
    group = q.shape[2]

    def dense(dtype: torch.dtype) -> torch.Tensor:
        heads = q.to(dtype).permute(1, 2, 0, 3)
        keys, values = (
            x.to(dtype).permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v)
        )
        return F.scaled_dot_product_attention(
            heads, keys, values, is_causal=True, scale=HEAD_DIM**-0.5
        )

    return float((dense(q.dtype).double() - dense(torch.float64)).abs().max())


ROWS = [
    # name, requests, sinks, window, ratio
    ("one token", [Request((1,), 0)], 4, 32, 0.0),
    ("shorter than the sinks", [Request((3,), 0)], 4, 0, 0.0),
    ("no drop", [Request((63,), 0)], 4, 64, 0.0),
    ("on a page edge", [Request((96, 32, 1), 0)], 4, 32, 0.0),
    ("windowed, odd chunks", [Request((63, 111, 1, 1, 40), 0)], 4, 50, 0.0),
    ("no sinks, no window", [Request((111, 1), 0)], 0, 0, 0.0),
    ("sinks over pages", [Request((200, 1), 0)], 40, 33, 0.0),
    ("exact, then decode", [Request((150, 50, 1, 1, 1), 200)], 4, 40, 0.0),
    ("exact ends in a chunk", [Request((130, 60), 150)], 4, 40, 0.0),
    ("never compressed", [Request((130, 60, 1), DENSE_FOREVER)], 4, 40, 0.0),
    ("ratio", [Request((300, 100, 1), 0)], 4, 32, 0.2),
    ("ratio of one", [Request((300, 1), 0)], 4, 0, 1.0),
    (
        "mixed batch",
        [
            Request((1, 1, 1), 0),
            Request((111, 40, 1), 120),
            Request((63,), DENSE_FOREVER),
            Request((7, 200, 1), 0),
        ],
        4,
        40,
        0.0,
    ),
    ("a thousand", [Request((512, 487, 1), 900)], 4, 100, 0.0),
    ("many tiles, windowed", [Request((100, 1300, 1), 0)], 4, 100, 0.0),
    ("many tiles, exact", [Request((100, 1300, 1), 1350)], 4, 100, 0.0),
]


@pytest.mark.parametrize("compensation", [True, False], ids=["slot", "no-slot"])
@pytest.mark.parametrize(
    ("dtype", "block_size", "group"),
    [
        (torch.float32, 32, 2),
        (torch.float32, 48, 1),
        (torch.bfloat16, 32, 4),
        (torch.float16, 16, 7),
    ],
    ids=str,
)
@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_local_heads_equal_the_oracle(row, dtype, block_size, group, compensation) -> None:
    """Invariant 2: pages, chunks and batches change nothing but rounding."""
    torch.manual_seed(0)
    _, requests, sinks, tokens, ratio = row
    window = Window(sinks, tokens, ratio, block_size)
    layout = PageLayout(block_size, HEAD_DIM, dtype, has_tail=True)
    tensors = [draw(sum(r.chunks), group, dtype) for r in requests]
    outputs = run(requests, tensors, layout, window, compensation)
    for request, qkv, out in zip(requests, tensors, outputs, strict=True):
        want = expected(qkv, window, request.dense_until, compensation)
        error = (out.double() - want).abs().max()
        assert error <= 2 * max(pytorch_error(qkv), torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_retrieval_heads_are_dense(row, dtype) -> None:
    """Retrieval heads see everything, whatever `dense_until` says."""
    torch.manual_seed(1)
    requests = row[1]
    layout = PageLayout(80, HEAD_DIM, dtype, has_tail=False)
    tensors = [draw(sum(r.chunks), 2, dtype) for r in requests]
    for qkv, out in zip(tensors, run(requests, tensors, layout, None), strict=True):
        error = (out.double() - expected(qkv, None, 0, True)).abs().max()
        assert error <= 2 * max(pytorch_error(qkv), torch.finfo(dtype).eps)


def test_a_slot_changes_the_output() -> None:
    """The compensation slot is really in the sum: without it the output differs."""
    torch.manual_seed(2)
    layout = PageLayout(32, HEAD_DIM, torch.float32, has_tail=True)
    window = Window(4, 32, 0.0, 32)
    requests, tensors = [Request((200,), 0)], [draw(200, 2, torch.float32)]
    with_slot, without = (run(requests, tensors, layout, window, c)[0] for c in (True, False))
    assert (with_slot[:64] - without[:64]).abs().max() == 0
    assert (with_slot[150:] - without[150:]).abs().max() > 0.1


def test_tails_are_running_sums_past_the_sinks() -> None:
    """S(p) is the sum of k and v from the end of the sinks to the end of page p."""
    torch.manual_seed(3)
    layout = PageLayout(16, HEAD_DIM, torch.bfloat16, has_tail=True)
    window = Window(5, 16, 0.0, 16)
    pages = Pages(layout, NUM_KV_HEADS, [70])
    _, k, v = draw(70, 1, torch.bfloat16)
    for start, stop in ((0, 20), (20, 21), (21, 70)):
        tails = paged.plan_tails([stop - start], [stop], pages.table, window)
        mapping = pages.slot_mapping(0, start, stop)
        writes = paged.plan_writes(mapping, 16, tails)
        paged.write(k[start:stop], v[start:stop], pages.cache, layout, writes)
    rows = torch.cat([k, v], dim=-1).float()
    rows[:5] = 0
    want = torch.stack([rows[: 16 * (p + 1)].sum(0) for p in range(5)])
    got = layout.tails(pages.cache)[pages.table[0, :5].long()]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_padding_rows_are_not_written() -> None:
    """A slot of -1 (CUDA-graph padding) leaves every page as it was."""
    layout = PageLayout(16, HEAD_DIM, torch.float32, has_tail=False)
    cache = torch.zeros(4, 2, layout.rows, 2 * HEAD_DIM)
    writes = paged.plan_writes(torch.tensor([17, -1]), 16)
    ones = torch.ones(2, 2, HEAD_DIM)
    paged.write(ones, ones, cache, layout, writes)
    assert cache.sum() == 2 * 2 * HEAD_DIM
    assert cache[1, :, 1].min() == 1


@pytest.mark.parametrize(
    ("dtype", "rows"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float8_e4m3fn, 4)]
)
def test_tail_takes_whole_rows(dtype: torch.dtype, rows: int) -> None:
    """A tail is 2 * head_dim fp32 numbers, in rows of 2 * head_dim stored ones."""
    layout = PageLayout(32, 64, dtype, has_tail=True)
    assert layout.tail_rows == rows
    assert layout.tails(torch.zeros(2, 3, layout.rows, 128, dtype=dtype)).shape == (2, 3, 128)

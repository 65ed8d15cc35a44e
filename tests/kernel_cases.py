"""Batches that every form of the kernels must answer as the oracle does.

A case is fed step by step, chunk by chunk, through a form (the contract is
`razor_kernels.step`'s) into shuffled pages that start as NaN; half the KV heads retrieve,
half are local. Rows of padding and a request of no tokens stand at the end of each batch.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from razor_kernels import DENSE_FOREVER, PageLayout, Window, oracle
from razor_kernels.step import AttentionParams, LayerHeads, PoolPages, PoolTables, Step

NUM_KV_HEADS = 4
PADDING = 3


class Request(NamedTuple):
    """chunks: query lengths, one a step; they sum to the sequence's length."""

    chunks: tuple[int, ...]
    dense_until: int


class Case(NamedTuple):
    """A batch, and the window of its local heads."""

    name: str
    requests: tuple[Request, ...]
    sinks: int = 4
    window: int = 40
    ratio: float = 0.0


class Shape(NamedTuple):
    """Of heads and pages. stored: dtype of the cache, where it is not the queries'.

    head_major: whether q, k and v lie head by head in memory, so that their rows are strided.
    """

    dtype: torch.dtype
    group: int
    head_dim: int = 32
    retrieval_block: int = 80
    local_block: int = 32
    stored: torch.dtype | None = None
    soft_cap: float = 0.0
    alibi: bool = False
    head_major: bool = False
    learned_sinks: bool = False

    @property
    def name(self) -> str:
        parts = [str(self.dtype)[6:], f"group{self.group}", f"dim{self.head_dim}"]
        parts.append(f"pages{self.retrieval_block}-{self.local_block}")
        parts += [str(self.stored)[6:]] if self.stored else []
        parts += ["cap"] if self.soft_cap else []
        parts += ["alibi"] * self.alibi + ["heads-first"] * self.head_major
        return "-".join(parts + ["learned-sinks"] * self.learned_sinks)


CASES = (
    Case("one token", (Request((1,), 0),), window=32),
    Case("shorter than the sinks", (Request((3,), 0),), window=0),
    Case("no drop", (Request((63,), 0),), window=64),
    Case("on a page edge", (Request((96, 32, 1), 0),), window=32),
    Case("windowed, odd chunks", (Request((63, 111, 1, 1, 40), 0),), window=50),
    Case("no sinks, no window", (Request((111, 1), 0),), sinks=0, window=0),
    Case("sinks over pages", (Request((200, 1), 0),), sinks=40, window=33),
    Case("exact, then decode", (Request((150, 50, 1, 1, 1), 200),)),
    Case("exact ends in a chunk", (Request((130, 60), 150),)),
    Case("never compressed", (Request((130, 60, 1), DENSE_FOREVER),)),
    Case("ratio", (Request((300, 100, 1), 0),), window=32, ratio=0.2),
    Case("ratio of one", (Request((300, 1), 0),), window=0, ratio=1.0),
    Case(
        "mixed batch",
        (
            Request((1, 1, 1), 0),
            Request((111, 40, 1), 120),
            Request((63,), DENSE_FOREVER),
            Request((7, 200, 1), 0),
        ),
    ),
    Case("a thousand", (Request((512, 487, 1), 900),), window=100),
    Case("many tiles, windowed", (Request((100, 1300, 1), 0),), window=100),
    Case("many tiles, exact", (Request((100, 1300, 1), 1350),), window=100),
)

SHAPES = (
    Shape(torch.float32, 2),
    Shape(torch.float32, 1, 64, 96, 48),
    Shape(torch.bfloat16, 4, 128, 112, 32),
    Shape(torch.float16, 7, 80, 16, 16),
    Shape(torch.bfloat16, 8, 256),
    Shape(torch.float32, 16, 96),
    Shape(torch.bfloat16, 4, 64, stored=torch.float8_e4m3fn),
    Shape(torch.float32, 3, 64, soft_cap=2.0),
    Shape(torch.bfloat16, 2, 64, alibi=True),
    # A query head a KV head: write and attention see heads of one shape and two dtypes.
    Shape(torch.bfloat16, 1, 64, stored=torch.float8_e4m3fn),
    Shape(torch.float32, 4, 64, head_major=True),
    Shape(torch.bfloat16, 8, 512),
    Shape(torch.float32, 1, 512),
)

SINK_SHAPES = tuple(shape._replace(learned_sinks=True) for shape in SHAPES)


class Pages:
    """One pool of shuffled pages that start as NaN, and a batch's block table in it."""

    def __init__(self, layout: PageLayout, num_slots: int, lengths: list[int]) -> None:
        self.layout = layout
        counts = [-(-n // layout.block_size) for n in lengths]
        total = sum(counts) + 3
        # One slot more than asked for: pages are strided views of a wider pool.
        shape = (total, num_slots + 1, layout.rows, 2 * layout.head_dim)
        self.cache = torch.full(shape, torch.nan).to(layout.dtype)[:, 1:]
        ids = torch.randperm(total - 1) + 1
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, count in enumerate(counts):
            self.table[row, :count] = ids[sum(counts[:row]) :][:count]

    def slot_mapping(self, request: int, start: int, stop: int) -> torch.Tensor:
        size = self.layout.block_size
        positions = torch.arange(start, stop)
        return self.table[request, positions // size].long() * size + positions % size


class Tensors(NamedTuple):
    """One request's q `[length, kv heads, group, head_dim]`, k and v `[length, kv heads, ..]`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def draw(length: int, shape: Shape) -> Tensors:
    """Random tensors; keys share a direction, so that means of keys matter."""
    shift = torch.randn(NUM_KV_HEADS, 1, shape.head_dim)
    # Logits of one spread, whatever the head's width.
    shift *= (32 / shape.head_dim) ** 0.25
    q = torch.randn(length, NUM_KV_HEADS, shape.group, shape.head_dim) + shift
    k = torch.randn(length, NUM_KV_HEADS, shape.head_dim) + shift.squeeze(1)
    v = torch.randn(length, NUM_KV_HEADS, shape.head_dim) + 1.0
    return Tensors(q.to(shape.dtype), k.to(shape.dtype), v.to(shape.dtype))


def params_of(shape: Shape, compensation: bool = True) -> AttentionParams:
    """Scales of a quantized cache are no powers of two: they must be reckoned with."""
    quantized = shape.stored is not None
    num_heads = NUM_KV_HEADS * shape.group
    slopes = torch.linspace(0.02, 0.3, num_heads) if shape.alibi else None
    # From next to no weight to nearly all of it.
    sinks = torch.linspace(-4.0, 9.0, num_heads) if shape.learned_sinks else None
    return AttentionParams(
        scale=shape.head_dim**-0.5,
        soft_cap=shape.soft_cap,
        alibi_slopes=slopes,
        k_scale=0.013 if quantized else 1.0,
        v_scale=0.017 if quantized else 1.0,
        compensation=compensation,
        sink_logits=sinks,
    )


class Feed:
    """A case's pages, heads and tensors; `run` gives the outputs of each request."""

    def __init__(self, case: Case, shape: Shape) -> None:
        stored = shape.stored or shape.dtype
        self.case, self.shape = case, shape
        self.lengths = [sum(request.chunks) for request in case.requests]
        self.window = Window(case.sinks, case.window, case.ratio, shape.local_block)
        layouts = (
            PageLayout(shape.retrieval_block, shape.head_dim, stored, has_tail=False),
            PageLayout(shape.local_block, shape.head_dim, stored, has_tail=True),
        )
        self.pages = [Pages(layout, NUM_KV_HEADS // 2 + 1, self.lengths) for layout in layouts]
        self.pools = (
            PoolPages(self.pages[0].cache, self.pages[0].layout, None),
            PoolPages(self.pages[1].cache, self.pages[1].layout, self.window),
        )
        # A layer's slots do not begin at 0 in both pools.
        slots = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
        self.heads = LayerHeads(torch.tensor([0, 1, 0, 1], dtype=torch.int32), slots)
        self.is_retrieval = torch.tensor([True, False, True, False])
        self.tensors = [draw(n, shape) for n in self.lengths]

    def spans(self, number: int) -> list[tuple[int, int, int]]:
        """(request, start, stop) of the queries of a step."""
        found = []
        for index, request in enumerate(self.case.requests):
            if number < len(request.chunks):
                start = sum(request.chunks[:number])
                found.append((index, start, start + request.chunks[number]))
        return found

    def step(self, spans: list[tuple[int, int, int]]) -> Step:
        lens = [stop - start for _, start, stop in spans]
        starts = torch.tensor([0, *lens, 0]).cumsum(0)
        padding = torch.full((PADDING,), -1)
        tables = []
        for pages in self.pages:
            mapping = [pages.slot_mapping(*span) for span in spans]
            # A padded request's table may name any page.
            rows = pages.table[[*(index for index, _, _ in spans), 0]]
            tables.append(PoolTables(rows, torch.cat([*mapping, padding])))
        until = [self.case.requests[index].dense_until for index, _, _ in spans]
        return Step(
            query_start_loc=starts.int(),
            seq_lens=torch.tensor([*(stop for _, _, stop in spans), 0], dtype=torch.int32),
            dense_until=torch.tensor([*until, 0], dtype=torch.int32),
            max_query_len=max(lens),
            tables=(tables[0], tables[1]),
            pools=self.pools,
        )

    def run(self, form, params: AttentionParams) -> list[torch.Tensor]:
        """Outputs of each request, `[length, kv heads, group, head_dim]`."""
        outputs = [torch.full_like(request.q, torch.nan) for request in self.tensors]
        for number in range(max(len(request.chunks) for request in self.case.requests)):
            spans = self.spans(number)
            step = self.step(spans)
            q, k, v = (self._rows(spans, part) for part in range(3))
            form.plan(step)
            form.write(k, v, self.heads, step, params)
            out = torch.full(q.shape, torch.nan, dtype=q.dtype)
            form.attention(q, self.heads, step, params, out)
            assert out[-PADDING:].isnan().all(), "padding was written to"
            row = 0
            for index, start, stop in spans:
                outputs[index][start:stop] = out[row : row + stop - start]
                row += stop - start
        return outputs

    def _rows(self, spans: list[tuple[int, int, int]], part: int) -> torch.Tensor:
        """A step's q, k or v with padding, as rows of a wider tensor (as in a fused QKV).

        Or head by head, where the shape says so.
        """
        rows = [self.tensors[index][part][start:stop] for index, start, stop in spans]
        wide = torch.cat([*rows, torch.full((PADDING, *rows[0].shape[1:]), torch.nan)])
        if self.shape.head_major:
            return wide.to(rows[0].dtype).transpose(0, 1).contiguous().transpose(0, 1)
        flat = wide.to(rows[0].dtype).flatten(1)
        return torch.cat([flat, flat], dim=1)[:, : flat.shape[1]].unflatten(1, wide.shape[1:])

    def expected(self, request: int, params: AttentionParams) -> torch.Tensor:
        """The oracle's outputs of a request, of the K and V that the cache holds."""
        q, k, v = self.tensors[request]
        return oracle.attention(
            q.flatten(1, 2),
            stored(k, self.shape, params.k_scale),
            stored(v, self.shape, params.v_scale),
            self.is_retrieval,
            self.window,
            params.scale,
            self.case.requests[request].dense_until,
            params.compensation,
            params.soft_cap,
            params.alibi_slopes,
            params.sink_logits,
        ).view(q.shape)


def stored(x: torch.Tensor, shape: Shape, scale: float) -> torch.Tensor:
    """K or V as the cache holds it, in fp64."""
    if shape.stored is None:
        return x.double()
    limit = torch.finfo(shape.stored).max
    return (x.float() / scale).clamp(-limit, limit).to(shape.stored).double() * scale


def pytorch_error(tensors: Tensors, scale: float) -> float:
    """PyTorch's own error at this precision, on dense causal attention."""
    q, k, v = tensors
    group = q.shape[2]

    def dense(dtype: torch.dtype) -> torch.Tensor:
        heads = q.to(dtype).permute(1, 2, 0, 3)
        keys, values = (
            x.to(dtype).permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v)
        )
        return F.scaled_dot_product_attention(heads, keys, values, is_causal=True, scale=scale)

    return float((dense(q.dtype).double() - dense(torch.float64)).abs().max())


@functools.cache
def reference(case: Case, shape: Shape, compensation: bool) -> tuple[list[torch.Tensor], float]:
    """The oracle's outputs of a case's requests, and the error allowed: it takes its time."""
    torch.manual_seed(0)
    feed, params = Feed(case, shape), params_of(shape, compensation)
    # A few tokens alone would say little of PyTorch's error.
    judged = [*feed.tensors, draw(200, shape)]
    own = max(pytorch_error(tensors, params.scale) for tensors in judged)
    allowed = 2 * max(own, torch.finfo(shape.dtype).eps)
    return [feed.expected(index, params) for index in range(len(case.requests))], allowed


def check(form, case: Case, shape: Shape, compensation: bool = True) -> None:
    """A form's outputs are the oracle's, to twice PyTorch's own error at that precision."""
    torch.manual_seed(0)
    outputs = Feed(case, shape).run(form, params_of(shape, compensation))
    expected, allowed = reference(case, shape, compensation)
    for index, (out, want) in enumerate(zip(outputs, expected, strict=True)):
        error = (out.double() - want).abs().max()
        assert error <= allowed, f"request {index}: error {error:.3g}, allowed {allowed:.3g}"


class Far:
    """One request of 128k tokens whose pages are a few physical ones, over and over."""

    def __init__(self, length: int = 131_072, learned_sinks: bool = False) -> None:
        torch.manual_seed(5)
        # A sink beside so many tokens: its share of the weight is from 0.1 % to 95 %.
        self.sinks = torch.linspace(5.0, 15.0, 8) if learned_sinks else None
        self.length, self.size, head_dim = length, 32, 64
        layout = PageLayout(self.size, head_dim, torch.float32, has_tail=True)
        cache = torch.randn(5, 2, layout.rows, 2 * head_dim)
        self.window = Window(4, 1000, 0.0, self.size)
        count = length // self.size
        self.table = (torch.arange(count) % 5).int()[None]
        pools = (PoolPages(cache, layout, None), PoolPages(cache, layout, self.window))
        one_each = torch.tensor([0, 1], dtype=torch.int32)
        self.heads = LayerHeads(one_each, one_each)
        nowhere = PoolTables(self.table, torch.tensor([-1]))
        self.step = Step(
            query_start_loc=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([length], dtype=torch.int32),
            dense_until=torch.tensor([0], dtype=torch.int32),
            max_query_len=1,
            tables=(nowhere, nowhere),
            pools=pools,
        )
        self.query = torch.randn(1, 2, 4, head_dim)
        self.cache, self.layout = cache, layout

    def run(self, form) -> torch.Tensor:
        out = torch.full_like(self.query, torch.nan)
        form.plan(self.step)
        params = AttentionParams(64**-0.5, sink_logits=self.sinks)
        form.attention(self.query, self.heads, self.step, params, out)
        return out

    def expected(self) -> torch.Tensor:
        """Both heads over whole tensors, in fp64."""
        pages = self.cache[self.table[0].long()].double()
        rows = pages[:, :, : self.size].transpose(0, 1).flatten(1, 2)  # [2, length, 2D]
        k, v = rows.split(64, dim=-1)
        q = self.query[0].double() * 64**-0.5
        logits = torch.einsum("hgd,hnd->hgn", q, k)
        start = self.window.first_window_page((self.length - 1) // self.size) * self.size
        tail = self.layout.tails(self.cache)[self.table[0, start // self.size - 1], 1].double()
        num_dropped = start - self.window.sinks
        slot_k, slot_v = (tail / num_dropped).split(64)
        seen = torch.cat([logits[1, :, :4], logits[1, :, start:]], dim=-1)
        seen = torch.cat([seen, (q[1] @ slot_k)[:, None] + torch.tensor(num_dropped).log()], -1)
        seen_v = torch.cat([v[1, :4], v[1, start:], slot_v[None]])
        return torch.stack([self._softmax(logits[0], 0) @ v[0], self._softmax(seen, 1) @ seen_v])[
            None
        ]

    def _softmax(self, logits: torch.Tensor, head: int) -> torch.Tensor:
        if self.sinks is None:
            return logits.softmax(-1)
        sinks = self.sinks.double().view(2, 4, 1)[head]
        return torch.cat([logits, sinks], -1).softmax(-1)[:, :-1]

"""The Triton form as tests make it, and the checks that run in an interpreted process."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from kernel_cases import NUM_KV_HEADS, Case, Far, Feed, Request, Shape, check, params_of, reference

from razor_kernels.step import PoolTables, Step
from razor_kernels.triton_form import Device, TritonForm

FEW_SMS = 4
"""Of the interpreted device: enough to cut a sequence, few enough to walk them all."""

MAX_REQUESTS = 8


class Variant(NamedTuple):
    """How a form is made. max_queries: of a decode. capability: of the device."""

    max_queries: int = 1
    capability: int = 100

    @property
    def name(self) -> str:
        return f"decodes{self.max_queries}-sm{self.capability}"


def make_form(feed: Feed, variant: Variant, num_sms: int = FEW_SMS) -> TritonForm:
    """A form for a feed's pools and heads."""
    return TritonForm(
        torch.device("cpu"),
        (feed.pages[0].layout, feed.pages[1].layout),
        feed.window,
        NUM_KV_HEADS,
        feed.shape.group,
        max_requests=MAX_REQUESTS,
        dtype=feed.shape.dtype,
        max_queries=variant.max_queries,
        traits=Device(num_sms, variant.capability),
    )


def check_variant(case: Case, shape: Shape, variant: Variant, compensation: bool) -> None:
    """The form's outputs are the oracle's; what a failure says is raised here."""
    torch.set_num_threads(1)
    check(make_form(Feed(case, shape), variant), case, shape, compensation)


class GraphFeed(Feed):
    """Steps of as many requests as a CUDA graph was made for; those too many have no tokens."""

    def step(self, spans: list[tuple[int, int, int]]) -> Step:
        step = super().step(spans)
        more = MAX_REQUESTS - len(step.seq_lens)
        retrieval, local = (
            PoolTables(F.pad(tables.block_table, (0, 0, 0, more)), tables.slot_mapping)
            for tables in step.tables
        )
        ends = step.query_start_loc[-1:].expand(more)
        return replace(
            step,
            query_start_loc=torch.cat([step.query_start_loc, ends]),
            seq_lens=F.pad(step.seq_lens, (0, more)),
            dense_until=F.pad(step.dense_until, (0, more)),
            tables=(retrieval, local),
        )


def check_graph(case: Case, shape: Shape, variant: Variant) -> None:
    """As `check_variant`, in steps padded to `MAX_REQUESTS`."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    feed = GraphFeed(case, shape)
    outputs = feed.run(make_form(feed, variant), params_of(shape))
    expected, allowed = reference(case, shape, True)
    for out, want in zip(outputs, expected, strict=True):
        error = (out.double() - want).abs().max()
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def check_tails(shape: Shape, variant: Variant) -> None:
    """S(p) of a full page is the sum of what is stored from the sinks' end to the page's end."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    feed = Feed(Case("", (Request((20, 1, 49, 90), 0),), sinks=5), shape)
    feed.run(make_form(feed, variant), params_of(shape))
    pages, size = feed.pages[1], shape.local_block
    table = pages.table[0, : 160 // size].long()
    rows = pages.cache[table][:, 1:3, :size].float()  # slots 1 and 2: [pages, 2, size, 2D]
    rows[0, :, :5] = 0
    got = pages.layout.tails(pages.cache)[table][:, 1:3]
    torch.testing.assert_close(got, rows.sum(2).cumsum(0), rtol=1e-5, atol=1e-3)


def check_rejected() -> None:
    """Tokens written and taken back are in no sum once others stand there."""
    torch.set_num_threads(1)
    torch.manual_seed(4)
    shape = Shape(torch.float32, 2)
    feed = Feed(Case("", (Request((60, 10, 40), 0),), window=32), shape)
    form, params = make_form(feed, Variant()), params_of(shape)
    plain = feed.run(form, params)[0]
    spans = [(0, 60, 70)]
    k, v = (feed._rows(spans, part) for part in (1, 2))
    form.write(-k, v * 3, feed.heads, feed.step(spans), params)
    assert torch.equal(feed.run(form, params)[0], plain)


def check_far() -> None:
    """131,072 tokens: positions, page indices and sums of their size are no trouble."""
    torch.set_num_threads(1)
    far = Far(learned_sinks=True)
    layout, num_heads = far.layout, far.query.shape[1]
    form = TritonForm(
        torch.device("cpu"),
        (layout, layout),
        far.window,
        num_heads,
        far.query.shape[2],
        max_requests=4,
        dtype=far.query.dtype,
        traits=Device(FEW_SMS, 100),
    )
    torch.testing.assert_close(far.run(form).double(), far.expected(), rtol=1e-4, atol=1e-5)

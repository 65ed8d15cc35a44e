"""The Triton form, interpreted, against the oracle."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import pytest
from kernel_cases import CASES, SHAPES, SINK_SHAPES, Case, Request, Shape
from triton_forms import (
    Variant,
    check_far,
    check_graph,
    check_rejected,
    check_tails,
    check_variant,
)

from razor_kernels import DENSE_FOREVER
from razor_kernels.triton_interpreter import patch_interpreter

LONG = 450
"""Tokens of a case that the interpreter is spared."""


class Row(NamedTuple):
    """One check of the form; `test_equals_the_oracle` runs each."""

    case: Case
    shape: Shape
    variant: Variant = Variant()
    compensation: bool = True

    @property
    def name(self) -> str:
        slot = "" if self.compensation else "-no-slot"
        return f"{self.case.name}-{self.shape.name}-{self.variant.name}{slot}"


DRAFTED = Case(
    "drafted tokens",
    (
        Request((60, 4, 3, 4, 2, 1, 4), 62),
        Request((1, 2, 60, 3, 4, 4), 0),
        Request((33, 4, 4, 1, 4), DENSE_FOREVER),
    ),
    window=33,
)
DRAFTED_RATIO = Case(
    "drafted tokens, ratio",
    (Request((100, 4, 3), 0), Request((200, 3, 4), 202)),
    sinks=3,
    window=20,
    ratio=0.3,
)

BY_NAME = {case.name: case for case in CASES}
SHORT = [case for case in CASES if max(sum(r.chunks) for r in case.requests) <= LONG]
# What a shape changes shows in a prompt, a window that moved, and a decode.
TELLING = BY_NAME["sinks over pages"]
WIDE_GROUP = SHAPES[5]

ROWS = [
    *(Row(case, SHAPES[0]) for case in SHORT),
    *(Row(TELLING, shape) for shape in SHAPES[1:] if shape != WIDE_GROUP),
    Row(BY_NAME["on a page edge"], WIDE_GROUP),
    Row(DRAFTED, SHAPES[0], Variant(4)),
    Row(DRAFTED_RATIO, SHAPES[8], Variant(4)),
    Row(BY_NAME["mixed batch"], SHAPES[6], Variant(4, 80)),
    Row(TELLING, SHAPES[6], Variant(1, 80)),
    Row(TELLING, SHAPES[4], Variant(1, 80)),
    Row(BY_NAME["mixed batch"], SHAPES[2], compensation=False),
    Row(TELLING, SHAPES[0], compensation=False),
    *(Row(TELLING, shape) for shape in SINK_SHAPES if shape.group != WIDE_GROUP.group),
    *(Row(BY_NAME[name], SINK_SHAPES[0]) for name in ("on a page edge", "mixed batch")),
    Row(BY_NAME["on a page edge"], SINK_SHAPES[5]),
    Row(DRAFTED, SINK_SHAPES[0], Variant(4)),
    Row(DRAFTED_RATIO, SINK_SHAPES[8], Variant(4)),
    Row(TELLING, SINK_SHAPES[0], compensation=False),
]

CHECKS: dict[str, tuple[Callable[..., None], tuple]] = {
    "far": (check_far, ()),
    "rejected": (check_rejected, ()),
    "graph": (check_graph, (BY_NAME["mixed batch"], SHAPES[8], Variant())),
    "graph, drafted": (check_graph, (DRAFTED_RATIO, SHAPES[0], Variant(4))),
    **{
        f"tails, {shape.name}, {capability}": (check_tails, (shape, Variant(1, capability)))
        for shape, capability in [(SHAPES[0], 100), (SHAPES[2], 100), (SHAPES[6], 80)]
    },
}
"""What else is checked, by the parameter of the test that does."""


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """Every chosen check, under way in processes where Triton is interpreted.

    The flag is read once, on import, and nothing compiles afterwards: not in this process.
    """
    jobs = {row.name: (check_variant, tuple(row)) for row in ROWS} | CHECKS
    chosen = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(2, get_context("spawn"), initializer=patch_interpreter) as pool,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        for started in [pool.submit(os.getpid) for _ in range(2)]:
            started.result()
        patch.undo()
        yield {
            name: pool.submit(check, *arguments)
            for name, (check, arguments) in jobs.items()
            if name in chosen
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_equals_the_oracle(results: dict[str, Future], row: Row) -> None:
    """Invariant 2: pages, chunks, batches and how work is cut change nothing but rounding."""
    results[row.name].result()


@pytest.mark.parametrize("check", [name for name in CHECKS if name.startswith("tails")], ids=str)
def test_tails_are_running_sums_past_the_sinks(results: dict[str, Future], check: str) -> None:
    """Full pages hold them in fp32, as the cache's own rounding has K and V."""
    results[check].result()


@pytest.mark.parametrize("check", ["rejected"], ids=str)
def test_rejected_tokens_leave_the_sums(results: dict[str, Future], check: str) -> None:
    """Tokens that speculation wrote and took back are in no sum once others stand there."""
    results[check].result()


@pytest.mark.parametrize("check", ["graph", "graph, drafted"], ids=str)
def test_padding_of_a_graph_changes_nothing(results: dict[str, Future], check: str) -> None:
    """Requests that a CUDA graph has too many have no tokens, and no part in a plan."""
    results[check].result()


@pytest.mark.parametrize("check", ["far"], ids=str)
def test_far_positions(results: dict[str, Future], check: str) -> None:
    """131,072 tokens: positions, page indices and sums of their size are no trouble."""
    results[check].result()

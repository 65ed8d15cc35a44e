"""The Triton form, interpreted, against the oracle."""

import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import pytest
from kernel_cases import CASES, SHAPES, Case, Request, Shape
from triton_forms import Variant, check_variant

from razor_kernels import DENSE_FOREVER
from razor_kernels.triton_interpreter import mend

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
TELLING = [BY_NAME["sinks over pages"], BY_NAME["on a page edge"]]

ROWS = [
    *(Row(case, SHAPES[0]) for case in SHORT),
    *(Row(case, shape) for shape in SHAPES[1:] for case in TELLING),
    Row(DRAFTED, SHAPES[0], Variant(4)),
    Row(DRAFTED_RATIO, SHAPES[8], Variant(4)),
    Row(BY_NAME["mixed batch"], SHAPES[6], Variant(4, 80)),
    Row(BY_NAME["sinks over pages"], SHAPES[6], Variant(1, 80)),
    Row(BY_NAME["mixed batch"], SHAPES[2], compensation=False),
]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """Every chosen row's check, under way in processes where Triton is interpreted.

    The flag is read once, on import, and nothing compiles afterwards: not in this process.
    """
    chosen = {item.callspec.id for item in request.session.items if hasattr(item, "callspec")}
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(2, get_context("spawn"), initializer=mend) as pool,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        for started in [pool.submit(os.getpid) for _ in range(2)]:
            started.result()
        patch.undo()
        rows = [row for row in ROWS if row.name in chosen]
        yield {row.name: pool.submit(check_variant, *row) for row in rows}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_equals_the_oracle(results: dict[str, Future], row: Row) -> None:
    """Invariant 2: pages, chunks, batches and how work is cut change nothing but rounding."""
    results[row.name].result()

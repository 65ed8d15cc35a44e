"""The Triton form on this machine against the fp64 oracle, by the table of tests/kernel_cases.py.

On a GPU the kernels run compiled, on a CPU interpreted, which is slow: few rows then. Each
row's window is part of what is compiled, so rows are spread over processes.
"""

import contextlib
import functools
import os
import sys
import unittest.mock
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.scale import ROOT

FAMILIES = ("bf16 and fp16", "fp32", "fp8 cache", "drafted tokens")
PROCESSES = {"cuda": 8, "cpu": 2}
CPU_ROWS = ("on a page edge", "windowed, odd chunks", "exact, then decode")
"""Cases that the interpreter is asked, at the first shape of each family."""


class Row(NamedTuple):
    """Indices into the table's cases and shapes. max_queries: of a request in decode."""

    family: str
    case: int
    shape: int
    max_queries: int = 1


def _table() -> Any:
    sys.path.insert(0, str(ROOT / "tests"))
    import kernel_cases

    return kernel_cases


def _family(shape: Any) -> str:
    if shape.stored is not None:
        return "fp8 cache"
    return "fp32" if shape.dtype == torch.float32 else "bf16 and fp16"


def rows(device: str) -> list[Row]:
    """Every case at the first shape of a family, a telling one at the others."""
    return list(_rows(device))


def _rows(device: str) -> Iterator[Row]:
    table = _table()
    names = [case.name for case in table.CASES]
    telling, mixed = names.index("sinks over pages"), names.index("mixed batch")
    met: set[str] = set()
    for number, shape in enumerate(table.SHAPES):
        family = _family(shape)
        if family not in met:
            met.add(family)
            for case, name in enumerate(names):
                if device == "cuda" or name in CPU_ROWS:
                    yield Row(family, case, number)
            yield Row("drafted tokens", names.index("on a page edge"), number, 4)
            if device == "cuda":
                yield Row("drafted tokens", mixed, number, 4)
        elif device == "cuda":
            yield Row(family, telling, number)


def check_row(row: Row, device: str) -> str:
    """What differs from the oracle; "" where nothing does."""
    return _checked(_table(), row, device)


def _checked(table: Any, row: Row, device: str) -> str:
    from razor_kernels.triton_form import TritonForm

    case, shape = table.CASES[row.case], table.SHAPES[row.shape]
    torch.set_num_threads(1)
    try:
        with torch.device(device):
            feed = table.Feed(case, shape)
            form = TritonForm(
                torch.device(device),
                (feed.pages[0].layout, feed.pages[1].layout),
                feed.window,
                table.NUM_KV_HEADS,
                shape.group,
                8,
                shape.dtype,
                row.max_queries,
            )
            table.check(form, case, shape)
    except Exception as error:  # a kernel's fault of any kind is a verdict, not an end
        return f"{case.name}, {shape.name}: {str(error) or repr(error)}"[:400]
    return ""


@contextlib.contextmanager
def _interpreted(wanted: bool) -> Iterator[None]:
    """Processes started within have Triton interpreted; this one read the flag on import."""
    with unittest.mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if wanted else {}):
        yield


def check(device: str) -> dict[str, dict[str, Any]]:
    """By family, how many rows were checked and what failed."""
    found = {family: {"checked": 0, "failed": []} for family in FAMILIES}
    with (
        _interpreted(device == "cpu"),
        ProcessPoolExecutor(PROCESSES[device], get_context("spawn")) as pool,
    ):
        judged = functools.partial(check_row, device=device)
        running = {pool.submit(judged, row): row for row in rows(device)}
        for future in as_completed(running):
            tally: dict[str, Any] = found[running[future].family]
            try:
                fault = future.result()
            except Exception as error:  # the process died
                fault = f"{running[future]}: {error!r}"
            tally["checked"] += 1
            tally["failed"] += [fault] if fault else []
    return found

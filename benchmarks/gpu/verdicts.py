"""What is checked: each verdict's name, the results that it needs, and how they are judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.gpu.answers import Answer, Tolerance, compare
from benchmarks.gpu.cell import Cell
from benchmarks.gpu.compilations import OURS
from benchmarks.gpu.kernels import FAMILIES
from benchmarks.gpu.report import Outcome

Results = dict[str, Any]
"""Job name -> its result: of "kernels", of cells by name."""

FP32 = Tolerance(1e-3)
FP8 = Tolerance(0.1, ties=True)
"""With an fp8 cache, a number near the middle of two stored ones may round to either."""
BF16 = Tolerance(0.15, ties=True)
"""Other kernels round at other places."""


class Found(NamedTuple):
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Check:
    """One verdict.

    jobs: whose results `judge` is given. on: devices that it can be had on. whatever: whether
    it judges the jobs that answered, whichever they are.
    """

    name: str
    jobs: tuple[str, ...]
    judge: Callable[[Results], Found]
    on: tuple[str, ...] = ("cuda", "cpu")
    whatever: bool = False


CELLS = {
    cell.name: cell
    for cell in (
        Cell("stock", "stock"),
        Cell("all", "all"),
        Cell("exact", "some", rounds=("first", "again", "full", "repeats"), formula=True),
        Cell("exact eager", "some", graphs=False),
        Cell("windowed", "some", "windowed", rounds=("first", "again", "full"), formula=True),
        Cell("windowed eager", "some", "windowed", graphs=False),
        Cell("stock bf16", "stock", dtype="bfloat16"),
        Cell("all bf16", "all", dtype="bfloat16"),
        Cell("some bf16", "some", dtype="bfloat16", rounds=("first", "again", "repeats")),
        Cell("fp8", "some", kv_cache_dtype="fp8", rounds=("first", "again"), formula=True),
        Cell("fp8 eager", "some", kv_cache_dtype="fp8", graphs=False),
        Cell("stock fp8", "stock", kv_cache_dtype="fp8", graphs=False),
        Cell("all fp8", "all", kv_cache_dtype="fp8"),
        Cell("drafts", "some", drafts=True, rounds=("repeats",)),
    )
}


def _answers(results: Results, cell: str, name: str = "first") -> list[Answer]:
    return [Answer(*answer) for answer in results[cell]["rounds"][name]]


def _alike(
    got: Sequence[Answer], want: Sequence[Answer], tolerance: Tolerance, fault: str = ""
) -> Found:
    """fault: what makes the comparison meaningless, if anything does."""
    comparison = compare(got, want, tolerance)
    if comparison.fault or fault:
        return Found("FAIL", comparison.fault or fault)
    return Found("ok", f"{len(want)} prompts, {comparison}")


def _graphs(results: Results, *cells: str) -> str:
    """A fault where a cell served without graphs though it should have; none on a CPU."""
    idle = [c for c in cells if results["device"] == "cuda" and not results[c]["replays"]]
    return f"no CUDA graph was replayed ({', '.join(idle)})" if idle else ""


def kernels_equal_oracle(family: str) -> Callable[[Results], Found]:
    """A family of the table."""

    def judge(results: Results) -> Found:
        tally = results["kernels"][family]
        if not tally["checked"]:
            return Found("FAIL", "no case was checked")
        if failed := tally["failed"]:
            return Found("FAIL", f"{len(failed)} of {tally['checked']} cases, first {failed[0]}")
        return Found("ok", f"{tally['checked']} cases")

    return judge


def same(got: str, want: str, tolerance: Tolerance, name: str = "first") -> Callable:
    """Compare the named round of `got` with the first of `want`."""

    def judge(results: Results) -> Found:
        fault = _graphs(results, *(c for c in (got, want) if CELLS[c].graphs))
        return _alike(_answers(results, got, name), _answers(results, want), tolerance, fault)

    return judge


def hit_is_miss(cell: str, tolerance: Tolerance) -> Callable[[Results], Found]:
    """The second time the prefix cache serves, and nothing else changes."""

    def judge(results: Results) -> Found:
        again = _answers(results, cell, "again")
        hits = sum(answer.cached for answer in again)
        fault = "" if hits else "the prefix cache served no token"
        return _alike(again, _answers(results, cell), tolerance, fault)

    return judge


def is_formula(cell: str, tolerance: Tolerance) -> Callable[[Results], Found]:
    """Served log-probabilities are the oracle's."""

    def judge(results: Results) -> Found:
        served, formula = _answers(results, cell), results[cell]["formula"]
        worst = 0.0
        for index, want in formula.items():
            for step, (mine, theirs) in enumerate(
                zip(served[int(index)].logprobs, want, strict=True)
            ):
                if not (apart := abs(mine - theirs)) <= tolerance.logprob:
                    return Found("FAIL", f"request {index}, token {step}: {apart:.3g} apart")
                worst = max(worst, apart)
        if not formula:
            return Found("FAIL", "no request was computed")
        return Found("ok", f"{len(formula)} prompts, log-probabilities within {worst:.1g}")

    return judge


def drafts_change_nothing(results: Results) -> Found:
    """Drafted tokens were checked, some rejected, and the answers are those without."""
    fault = _graphs(results, "drafts")
    if not results["drafts"]["drafted"]:
        fault = "no token was drafted"
    got, want = (_answers(results, cell, "repeats") for cell in ("drafts", "exact"))
    found = _alike(got, want, FP32, fault)
    return found._replace(detail=f"{found.detail}, {results['drafts']['drafted']} drafted")


GRAPH_CELLS = tuple(c.name for c in CELLS.values() if c.graphs and c.heads != "stock")


def compiles_nothing(results: Results) -> Found:
    """No kernel of ours is compiled or loaded after start-up; vLLM's are reported, not judged."""
    served = {cell: results[cell]["compiled"] for cell in GRAPH_CELLS if cell in results}
    ours = {
        f"{name.split(':')[1]} ({cell})"
        for cell, names in served.items()
        for name in names
        if name.startswith(OURS)
    }
    theirs = sum(not name.startswith(OURS) for names in served.values() for name in names)
    if not served:
        return Found("FAIL", "no engine answered")
    if ours:
        return Found("FAIL", f"{len(ours)} kernels: {', '.join(sorted(ours))}")
    return Found("ok", f"{len(served)} engines" + (f"; vLLM's own: {theirs}" * bool(theirs)))


def all_free(results: Results) -> Found:
    """Invariant 5: when all requests ended, no page is held."""
    served = [cell for cell in CELLS if cell in results]
    held = [cell for cell in served if not results[cell]["free"]]
    if held or not served:
        return Found("FAIL", f"held in {', '.join(held)}" if held else "no engine answered")
    return Found("ok", f"{len(served)} engines")


def dropping_shows(results: Results) -> Found:
    """What the mixed map drops must show beyond the widest tolerance, or tests prove nothing."""
    comparison = compare(_answers(results, "exact"), _answers(results, "stock"), BF16)
    if not comparison.fault:
        return Found("FAIL", "the mixed map's answers are stock vLLM's")
    return Found("ok", "")


CHECKS = (
    *(
        Check(f"Triton form = fp64 oracle, {f}", ("kernels",), kernels_equal_oracle(f))
        for f in FAMILIES
    ),
    Check("all heads retrieval = stock vLLM, fp32", ("stock", "all"), same("all", "stock", FP32)),
    Check("mixed map is not stock vLLM", ("stock", "exact"), dropping_shows),
    Check("mixed map = fp64 oracle, exact prefill", ("exact",), is_formula("exact", FP32)),
    Check(
        "graphs on = graphs off, exact prefill",
        ("exact", "exact eager"),
        same("exact", "exact eager", FP32),
        ("cuda",),
    ),
    Check("prefix hit = miss, exact prefill", ("exact",), hit_is_miss("exact", FP32)),
    Check(
        "requests that opt out = stock vLLM",
        ("stock", "exact"),
        same("exact", "stock", FP32, "full"),
    ),
    Check("mixed map = fp64 oracle, windowed prefill", ("windowed",), is_formula("windowed", FP32)),
    Check(
        "graphs on = graphs off, windowed prefill",
        ("windowed", "windowed eager"),
        same("windowed", "windowed eager", FP32),
        ("cuda",),
    ),
    Check("prefix hit = miss, windowed prefill", ("windowed",), hit_is_miss("windowed", FP32)),
    Check(
        "all heads retrieval = stock vLLM, bf16",
        ("stock bf16", "all bf16"),
        same("all bf16", "stock bf16", BF16),
    ),
    Check("prefix hit = miss, bf16", ("some bf16",), hit_is_miss("some bf16", BF16)),
    Check("mixed map = fp64 oracle, fp8 cache", ("fp8",), is_formula("fp8", FP8)),
    Check(
        "graphs on = graphs off, fp8 cache",
        ("fp8", "fp8 eager"),
        same("fp8", "fp8 eager", FP8),
        ("cuda",),
    ),
    Check(
        "all heads retrieval = stock vLLM, fp8 cache",
        ("stock fp8", "all fp8"),
        same("all fp8", "stock fp8", FP8),
        ("cuda",),  # vLLM's own fp8 on a CPU is another rounding
    ),
    Check("n-gram drafts = none", ("exact", "drafts"), drafts_change_nothing),
    Check(
        "no Triton compilation after start-up",
        GRAPH_CELLS,
        compiles_nothing,
        ("cuda",),
        whatever=True,
    ),
    Check("every page is free at the end", tuple(CELLS), all_free, whatever=True),
)


def jobs_on(device: str) -> set[str]:
    """Names of the jobs that some check needs there."""
    return {job for c in CHECKS if device in c.on and not c.whatever for job in c.jobs}


SOUND = {
    "kernels": ("Triton form = fp64 oracle, bf16 and fp16",),
    "exact": (
        "Triton form = fp64 oracle, bf16 and fp16",
        "all heads retrieval = stock vLLM, fp32",
        "all heads retrieval = stock vLLM, bf16",
        "mixed map = fp64 oracle, exact prefill",
        "graphs on = graphs off, exact prefill",
        "every page is free at the end",
    ),
    "windowed": (
        "Triton form = fp64 oracle, bf16 and fp16",
        "all heads retrieval = stock vLLM, bf16",
        "mixed map = fp64 oracle, windowed prefill",
        "graphs on = graphs off, windowed prefill",
        "every page is free at the end",
    ),
    "fp8": (
        "Triton form = fp64 oracle, fp8 cache",
        "mixed map = fp64 oracle, fp8 cache",
        "graphs on = graphs off, fp8 cache",
        "all heads retrieval = stock vLLM, fp8 cache",
    ),
}
"""Verdicts that must be ok before a thing is timed."""

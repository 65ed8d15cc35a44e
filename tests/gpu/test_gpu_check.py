"""`make gpu-check` without a GPU: its correctness part on this CPU, and verdicts that fail."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import jobs as gpu_jobs
from benchmarks.gpu.answers import Answer, Tolerance, compare
from benchmarks.gpu.compilations import Compilations, Replays
from benchmarks.gpu.jobs import Job, NoTime
from benchmarks.gpu.kernels import FAMILIES
from benchmarks.gpu.report import Report, Verdict
from benchmarks.gpu.verdicts import CELLS, CHECKS, SOUND
from benchmarks.gpu.worker import Worker, WorkerError

ROOT = Path(__file__).parents[2]
ON_CPU = [check.name for check in CHECKS if "cpu" in check.on]


def run_check(output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(output), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.engine
def test_the_correctness_part_runs_here(tmp_path: Path) -> None:
    """Every verdict that a CPU can give is ok; a second call repeats no job."""
    output = tmp_path / "check.json"
    options = ("--parts", "correctness", "--device", "cpu", "--seconds")
    done = run_check(output, *options, "100000")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    verdicts = json.loads(output.read_text())["verdicts"]
    assert [name for name, v in verdicts.items() if v["outcome"] == "ok"] == ON_CPU
    assert len(verdicts) == len(CHECKS)
    for name in verdicts:
        assert name in done.stdout
    # No job could be done in so little time.
    again = run_check(output, *options, "1")
    assert again.returncode == 0, again.stdout + again.stderr[-3000:]


@pytest.mark.engine
def test_a_fault_of_the_kernels_is_a_verdict(tmp_path: Path) -> None:
    """The table sees an attention that leaves the compensation slot out."""
    code = """
from dataclasses import replace
from benchmarks.gpu import kernels
table = kernels._table()
run = table.Feed.run
row = next(row for row in kernels.rows("cpu") if table.CASES[row.case].name == "on a page edge")
print([kernels.check_row(row, "cpu")])
table.Feed.run = lambda feed, form, params: run(feed, form, replace(params, compensation=False))
print([kernels.check_row(row, "cpu")])
"""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    sound, faulty = done.stdout.splitlines()
    assert sound == "['']"
    assert "on a page edge" in faulty
    assert "error" in faulty


def answer(token: int = 7, logprob: float = -1.0, cached: int = 0) -> list[Any]:
    """Two tokens; the likeliest others are far from the one that was chosen."""
    top = {str(token): logprob, "8": logprob - 3.0, "9": logprob - 3.0}
    return [[token, token], [logprob, logprob], [top, top], cached]


def sound_results() -> dict[str, Any]:
    """What every job gives where nothing is wrong."""
    results: dict[str, Any] = {
        "kernels": {family: {"checked": 4, "failed": []} for family in FAMILIES}
    }
    for cell in CELLS.values():
        mixed = cell.heads == "some"
        rounds = {
            name: [
                answer(
                    7 if mixed and name != "full" else 5,
                    cached=16 * (name == "again"),
                )
            ]
            for name in cell.rounds
        }
        results[cell.name] = {
            "rounds": rounds,
            "formula": {"0": [-1.0, -1.0]},
            "compiled": ["vllm.sampler:_sample"],
            "replays": 3 * cell.graphs,
            "drafted": 9 * cell.drafts,
            "free": True,
        }
    return results


def verdicts_of(results: dict[str, Any]) -> dict[str, str]:
    """Outcomes on a GPU."""
    return {c.name: gpu_check.judge(c, results, {}, "cuda").outcome for c in CHECKS}


def other_tokens(cell: str, name: str = "first") -> Callable[[dict[str, Any]], None]:
    def fault(results: dict[str, Any]) -> None:
        results[cell]["rounds"][name][0][0][1] = 11

    return fault


def other_logprobs(cell: str, name: str = "first") -> Callable[[dict[str, Any]], None]:
    def fault(results: dict[str, Any]) -> None:
        results[cell]["rounds"][name][0][1][1] -= 0.2

    return fault


def value(*path: Any) -> Callable[[dict[str, Any]], None]:
    """The last of `path` where the others lead."""

    def fault(results: dict[str, Any]) -> None:
        *keys, last, new = path
        for key in keys:
            results = results[key]
        results[last] = new

    return fault


def mixed_map_drops_nothing(results: dict[str, Any]) -> None:
    results["exact"]["rounds"]["first"] = results["stock"]["rounds"]["first"]


OUR_KERNEL = ["razor_kernels.triton_decode:_decode_kernel"]
FAULTS = [
    *(
        (f"Triton form = fp64 oracle, {family}", fault)
        for family in FAMILIES
        for fault in (
            value("kernels", family, "failed", ["a case: error 3"]),
            value("kernels", family, "checked", 0),
        )
    ),
    ("all heads retrieval = stock vLLM, fp32", other_tokens("all")),
    ("all heads retrieval = stock vLLM, fp32", other_logprobs("all")),
    ("all heads retrieval = stock vLLM, fp32", value("all", "replays", 0)),
    ("mixed map is not stock vLLM", mixed_map_drops_nothing),
    ("mixed map = fp64 oracle, exact prefill", value("exact", "formula", "0", [-1.0, -1.1])),
    (
        "mixed map = fp64 oracle, exact prefill",
        value("exact", "formula", "0", [-1.0, float("nan")]),
    ),
    ("mixed map = fp64 oracle, exact prefill", value("exact", "formula", {})),
    ("graphs on = graphs off, exact prefill", other_tokens("exact eager")),
    ("graphs on = graphs off, exact prefill", value("exact", "replays", 0)),
    ("prefix hit = miss, exact prefill", other_tokens("exact", "again")),
    ("prefix hit = miss, exact prefill", value("exact", "rounds", "again", [answer()])),
    ("requests that opt out = stock vLLM", other_logprobs("exact", "full")),
    ("mixed map = fp64 oracle, windowed prefill", value("windowed", "formula", "0", [-1.1, -1.0])),
    ("graphs on = graphs off, windowed prefill", other_logprobs("windowed eager")),
    ("prefix hit = miss, windowed prefill", other_tokens("windowed", "again")),
    ("all heads retrieval = stock vLLM, bf16", other_logprobs("all bf16")),
    ("all heads retrieval = stock vLLM, bf16", other_tokens("all bf16")),
    ("prefix hit = miss, bf16", other_logprobs("some bf16", "again")),
    ("mixed map = fp64 oracle, fp8 cache", value("fp8", "formula", "0", [-1.0, -1.2])),
    ("graphs on = graphs off, fp8 cache", other_logprobs("fp8 eager")),
    ("all heads retrieval = stock vLLM, fp8 cache", other_tokens("all fp8")),
    ("n-gram drafts = none", other_tokens("drafts", "repeats")),
    ("n-gram drafts = none", value("drafts", "drafted", 0)),
    ("no Triton compilation after start-up", value("some bf16", "compiled", OUR_KERNEL)),
    ("every page is free at the end", value("windowed eager", "free", False)),
]


def test_sound_results_pass_every_verdict() -> None:
    assert set(verdicts_of(sound_results()).values()) == {"ok"}


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_every_verdict_can_fail(name: str, fault: Callable[[dict[str, Any]], None]) -> None:
    """A seeded fault fails its verdict, by comparison and not by an accident of form."""
    results = copy.deepcopy(sound_results())
    fault(results)
    check = next(check for check in CHECKS if check.name == name)
    found = gpu_check.judge(check, results, {}, "cuda")
    assert found.outcome == "FAIL"
    assert "form expected" not in found.detail


def test_each_verdict_has_a_fault() -> None:
    assert {name for name, _ in FAULTS} == {check.name for check in CHECKS}


@pytest.mark.parametrize("job", ["kernels", *CELLS])
def test_a_job_that_dies_fails_what_needs_it(job: str) -> None:
    """Nothing is ok that was not seen, and the other verdicts stand."""
    results = sound_results()
    del results[job]
    needing = {check.name for check in CHECKS if job in check.jobs and not check.whatever}
    found = {c.name: gpu_check.judge(c, results, {job: "it died"}, "cuda") for c in CHECKS}
    assert {name for name, verdict in found.items() if verdict.outcome == "FAIL"} == needing
    assert all("it died" in found[name].detail for name in needing)


def test_near_ties_are_pardoned_where_they_may_be() -> None:
    """The other token must have been nearly as likely to both, and most tokens compared."""
    tie = {"5": -1.0, "6": -1.1}
    one = Answer([5, 5, 5, 6], [-1.0] * 4, [tie] * 4)
    other = Answer([5, 5, 5, 5], [-1.0] * 4, [tie] * 4)
    turned = compare([one], [other], Tolerance(0.1, ties=True))
    assert (turned.fault, turned.compared, turned.turned) == ("", 3, 1)
    assert compare([one], [other], Tolerance(0.1)).fault
    unlikely = {"5": -1.0, "6": -1.5}
    for sure in (one._replace(top=[unlikely] * 4), one._replace(top=[{"6": -1.0}] * 4)):
        assert compare([sure], [other], Tolerance(0.1, ties=True)).fault
        assert compare([other], [sure._replace(tokens=one.tokens)], Tolerance(0.1, ties=True)).fault
    early = one._replace(tokens=[5, 6, 5, 5])
    assert "only 25%" in compare([early], [other], Tolerance(0.1, ties=True)).fault


def test_compilations_are_counted_beside_another_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's hook is ours while an engine serves, and whoever had it still hears of each."""
    from triton import knobs

    heard: list[Any] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **event: heard.append(event))
    compilations = Compilations()
    kernel = SimpleNamespace(module="razor_kernels.triton_decode", name="_decode_kernel")
    knobs.runtime.jit_post_compile_hook(fn=kernel, key="k")
    compilations.stop()
    knobs.runtime.jit_post_compile_hook(fn=kernel, key="k")
    assert compilations.names == OUR_KERNEL
    assert len(heard) == 2


def test_replays_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: None)
    replays = Replays()
    torch.cuda.CUDAGraph.replay(None)  # type: ignore[arg-type]
    replays.stop()
    torch.cuda.CUDAGraph.replay(None)  # type: ignore[arg-type]
    assert replays.count == 1


def worker_that(does: str) -> Worker:
    """A worker whose job is a line of Python."""
    return Worker({}, ("-c", f"import os, sys, time; sys.stdin.readline(); {does}"))


@pytest.mark.parametrize(
    ("does", "seconds", "message"),
    [
        ("time.sleep(600)", 1, "no result in 1 s"),
        ("print('a fault'); os._exit(3)", 60, "ended with status 3\na fault"),
        ("print('ERROR \"it raised\"')", 60, "it raised"),
    ],
)
def test_a_worker_that_hangs_dies_or_raises_is_told(
    does: str, seconds: float, message: str
) -> None:
    worker = worker_that(does)
    with pytest.raises(WorkerError, match=message):
        worker.do({"kind": "cell"}, seconds)
    worker.close()
    assert worker.process.poll() is not None


def test_a_worker_answers_beside_what_it_prints() -> None:
    worker = worker_that("print('loading'); print('RESULT [1, 2]')")
    assert worker.do({"kind": "cell"}, 60) == [1, 2]
    worker.close()


def report_at(path: Path, device: str = "a GPU") -> Report:
    return Report(path, {"device": device}, "python -m benchmarks.gpu")


def test_a_killed_run_leaves_what_it_had(tmp_path: Path) -> None:
    """Each verdict, time and result is in the file at once, for a run of the same device."""
    path = tmp_path / "check.json"
    report = report_at(path)
    report.add(Verdict("a", "ok", "4 cases"))
    report.add_result("kernels", {"checked": 4})
    report.add_time("host", "stock bf16", {"step_ms": 1.0})
    found = report_at(path)
    assert found.is_ok("a")
    assert found.results == {"kernels": {"checked": 4}}
    assert found.times == {"host": {"stock bf16": {"step_ms": 1.0}}}
    other = report_at(path, "another GPU")
    assert not other.is_ok("a")
    assert not other.results
    assert not other.times


def test_verdicts_of_other_sources_are_forgotten(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "check.json"
    report_at(path).add(Verdict("a", "ok", ""))
    monkeypatch.setattr("benchmarks.gpu.report.sources_digest", lambda: "other")
    assert not report_at(path).is_ok("a")


class FakeJobs:
    """Does every job at once but those that it fails or has no time for."""

    def __init__(self, ahead: list[Job], fails: str = "", late: str = "") -> None:
        self.ahead, self.fails, self.late = ahead, fails, late
        self.done: list[str] = []

    def do(self, job: Job) -> Any:
        if job.name == self.fails:
            raise WorkerError("ended with status -9\nout of memory")
        if job.name == self.late:
            raise NoTime("1 s left")
        self.done.append(job.name)
        return sound_results().get(job.name, {"step_ms": 1.0})

    def close(self) -> None:
        """Nothing was started."""


def checked(path: Path, **options: str) -> tuple[Report, FakeJobs]:
    """The correctness part with fake jobs."""
    report = report_at(path)
    jobs = FakeJobs(gpu_jobs.correctness_jobs(Path("model"), "cuda"), **options)
    gpu_check.check_correctness(report, "cuda", jobs)  # type: ignore[arg-type]
    return report, jobs


def test_each_job_is_done_once(tmp_path: Path, capsys) -> None:
    """Verdicts that share an engine share its answers; one verdict a line is printed."""
    report, jobs = checked(tmp_path / "check.json")
    assert sorted(jobs.done) == sorted(["kernels", *CELLS])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(line.startswith("ok   ") for line in lines)
    assert all(report.is_ok(check.name) for check in CHECKS)


def test_a_verdict_is_a_line_even_of_a_traceback(tmp_path: Path, capsys) -> None:
    checked(tmp_path / "check.json", fails="all")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert [x for x in lines if x.startswith("FAIL") and x.endswith("out of memory")]


def test_what_no_time_is_left_for_is_skipped(tmp_path: Path) -> None:
    """Neither ok nor wrong, and nothing that stands on it is timed."""
    report, _ = checked(tmp_path / "check.json", late="windowed")
    name = "mixed map = fp64 oracle, windowed prefill"
    assert report.verdicts[name]["outcome"] == "skip"
    assert not report.is_ok(name)


ROWS = gpu_jobs.speed_jobs(Path("whole"), Path("few"))


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_wrong_is_not_timed(tmp_path: Path, kind: str, capsys) -> None:
    """One failed verdict takes the rows that stand on it away, and says so; stock's remain."""
    report, _ = checked(tmp_path / "check.json")
    broken = SOUND[kind][-1]
    report.add(Verdict(broken, "FAIL", "token 3"))
    jobs = FakeJobs([])
    capsys.readouterr()
    assert not gpu_check.measure_speed(report, ROWS, jobs)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    without = {job.name for part, row, job in ROWS if broken in gpu_check.stands_on(part, row)}
    assert without
    assert set(jobs.done) == {job.name for _, _, job in ROWS} - without
    assert {"slopes stock bf16", "host stock bf16"} <= set(jobs.done)
    assert printed.count("not timed") == len(without)
    assert broken in printed


def test_what_is_right_is_timed_once(tmp_path: Path) -> None:
    report, _ = checked(tmp_path / "check.json")
    first, second = FakeJobs([]), FakeJobs([])
    assert gpu_check.measure_speed(report, ROWS, first)  # type: ignore[arg-type]
    assert gpu_check.measure_speed(report, ROWS, second)  # type: ignore[arg-type]
    assert len(first.done) == len(ROWS)
    assert second.done == []


def test_nothing_is_timed_before_it_is_checked(tmp_path: Path) -> None:
    jobs = FakeJobs([])
    assert not gpu_check.measure_speed(report_at(tmp_path / "x.json"), ROWS, jobs)  # type: ignore[arg-type]
    assert all("stock" in name for name in jobs.done)


@pytest.mark.parametrize(
    ("options", "status"), [({}, 0), ({"fails": "fp8"}, 1), ({"late": "drafts"}, 2)]
)
def test_the_exit_status_tells(tmp_path: Path, monkeypatch, options, status: int) -> None:
    """0: every verdict is ok and every time taken; 1: a verdict fails; 2: one is missing."""
    monkeypatch.setattr(gpu_check, "described", lambda device: {"device": device})
    monkeypatch.setattr(gpu_check, "make_model", lambda folder, scale: None)
    monkeypatch.setattr(gpu_check, "Jobs", lambda ahead, *_: FakeJobs(ahead, **options))
    args = SimpleNamespace(
        output=tmp_path / "check.json", parts=list(gpu_check.PARTS), profile=None, seconds=600
    )
    assert gpu_check.run(args, "cuda", tmp_path) == status  # type: ignore[arg-type]


def test_a_machine_without_the_plugin_is_refused(monkeypatch) -> None:
    """Else stock vLLM would be compared with itself."""
    gpu_check.check_installed()
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [])
    with pytest.raises(RuntimeError, match="no plugin named razor"):
        gpu_check.check_installed()


def test_rows_for_a_gpu_are_of_every_case_and_shape() -> None:
    from kernel_cases import CASES, SHAPES

    from benchmarks.gpu.kernels import rows

    on_gpu, here = rows("cuda"), rows("cpu")
    assert {row.case for row in on_gpu} == set(range(len(CASES)))
    assert {row.shape for row in on_gpu} == set(range(len(SHAPES)))
    assert {row.family for row in here} == {row.family for row in on_gpu} == set(FAMILIES)

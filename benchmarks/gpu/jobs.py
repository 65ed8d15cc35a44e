"""The jobs of both parts, in the order that they run, and the workers that do them.

On a GPU every job has its own process, and the next job's process is started while one is busy.
On a CPU an engine starts in seconds, but importing vLLM takes ten times that. So one process does
all jobs, except those after which it cannot do another.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import cell, decode, engine, kernels
from benchmarks.gpu.scale import SCALES
from benchmarks.gpu.verdicts import CELLS, jobs_on
from benchmarks.gpu.worker import Worker, WorkerError

BUDGETS_S = {"cuda": (180.0, 120.0), "cpu": (900.0, 600.0)}
"""Of the kernels' table and of an engine: GPU time is short, a CPU may have other work."""

GRACE_S = 5.0
"""Seconds of a call that are kept for writing the results."""


@dataclass(frozen=True)
class Job:
    """fields: arguments of the function of its kind. seconds: its budget.

    last: whether the process can do nothing after it (vLLM's n-gram drafter starts numba's
    threads, with which no second engine starts).
    """

    name: str
    kind: str
    fields: dict[str, Any]
    seconds: float
    env: dict[str, str] = field(default_factory=dict)
    last: bool = False


def correctness_jobs(model: Path, device: str) -> list[Job]:
    """The kernels' table, then an engine a cell."""
    rest = {"model": str(model), "device": device}
    kernels_s, cell_s = BUDGETS_S[device]
    jobs = [Job("kernels", "kernels", {"device": device}, kernels_s)]
    for one in CELLS.values():
        if one.name not in jobs_on(device):
            continue
        env = one.env if device == "cuda" else {}
        jobs.append(
            Job(one.name, "cell", {"made_of": asdict(one), **rest}, cell_s, env, one.drafts)
        )
    return jobs


def speed_jobs(whole: Path, few_layers: Path) -> list[tuple[str, str, Job]]:
    """(part, row, job): kernels first, then host time, then the slopes that take longest."""
    found = []
    for requests, length in decode.LOADS:
        row = f"{requests} x {length}"
        load = {"requests": requests, "length": length}
        fields = {"profile": str(whole / "heads.json"), **load}
        found.append(("kernels", row, Job(f"kernels {row}", "decode", fields, 60)))
    served = [
        engine.Served("stock"),
        engine.Served("razor"),
        engine.Served("razor", "windowed"),
        engine.Served("stock", "exact", "fp8"),
        engine.Served("razor", "exact", "fp8"),
    ]
    for part, folder, engines in (("host", few_layers, served[:2]), ("slopes", whole, served)):
        for one in engines:
            fields = {"served": asdict(one), "model": str(folder)}
            job = Job(f"{part} {one.name}", part, fields, 240, one.env)
            found.append((part, one.name, job))
    return found


def _cell(made_of: dict[str, Any], model: str, device: str) -> Any:
    rounds = tuple(made_of.pop("rounds"))
    served = cell.Cell(**made_of, rounds=rounds)
    return cell.serve(served, SCALES[device], Path(model), device)


KINDS = {
    "kernels": kernels.check,
    "cell": _cell,
    "decode": decode.measure,
    "slopes": lambda served, model: engine.measure_slopes(engine.Served(**served), Path(model)),
    "host": lambda served, model: engine.measure_host(engine.Served(**served), Path(model)),
}
"""What a worker does for each kind of job."""


class NoTime(Exception):
    """The call's time is too short for a job."""


class Jobs:
    """Does jobs by name. ahead: the order in which they will be asked for.

    Args:
        seconds: of the whole call.
    """

    def __init__(self, ahead: Sequence[Job], device: str, seconds: float) -> None:
        self.ahead, self.device = list(ahead), device
        self.end = time.monotonic() + seconds
        self.worker: Worker | None = None
        self.next: Worker | None = None

    def do(self, job: Job) -> Any:
        """The job's result.

        Raises:
            WorkerError: it gave none.
            NoTime: less than a third of its budget is left.
        """
        left = self.end - time.monotonic() - GRACE_S
        if left < job.seconds / 3:
            raise NoTime(f"{max(left, 0):.0f} s left, its budget is {job.seconds:.0f} s")
        worker = self._take(job)
        self.ahead = [other for other in self.ahead if other.name != job.name]
        if self.device == "cuda" and self.ahead:
            self.next = Worker(self.ahead[0].env)
        try:
            return worker.do({"kind": job.kind, **job.fields}, min(job.seconds, left))
        except WorkerError:
            worker.close()
            self.worker = None
            raise
        finally:
            if self.device == "cuda" or job.last:
                worker.close()
                self.worker = None

    def _take(self, job: Job) -> Worker:
        """A process for the job: the one started ahead, the one in use, or a fresh one."""
        kept = None
        for worker in (self.next, self.worker):
            if worker is not None and kept is None and worker.env == job.env:
                kept = worker
            elif worker is not None:
                worker.close()
        self.worker, self.next = kept or Worker(job.env), None
        return self.worker

    def close(self) -> None:
        for worker in (self.worker, self.next):
            if worker is not None:
                worker.close()

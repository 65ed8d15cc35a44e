"""Locust, in a process of its own, and what it recorded.

Locust replaces parts of Python's standard library (gevent), so no other code shares its
process.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.load.sampler import Sample, since_start
from benchmarks.load.server import Server, end_of
from benchmarks.load.streaming import Record
from benchmarks.load.workload import Workload

ROOT = Path(__file__).parents[2]
LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class Measured(NamedTuple):
    """What one run recorded: a record per request, and samples over time."""

    records: list[Record]
    samples: list[Sample]


def run_load(
    server: Server,
    workload: Workload,
    folder: Path,
    title: str,
    seconds: float = 0,
    sample_seconds: float = 1.0,
) -> Measured:
    """Put a workload on a server.

    Args:
        folder: gets the workload, records, samples and locust's log.
        seconds: after which no session begins; 0 for none such.

    Raises:
        RuntimeError: locust failed, or not one request was made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workload.json").write_text(workload.to_json(), encoding="utf-8")
    log = folder / "locust.log"
    options = ["--headless", "--only-summary", "--logfile", str(log)]
    options += ["--json-file", str(folder / "locust")]
    options += ["--exit-code-on-error", "0"]
    options += ["--users", str(workload.users), "--spawn-rate", str(workload.users)]
    options += ["--host", server.url, "--server-pid", str(server.pid), "--title", title]
    options += ["--workload", str(folder / "workload.json"), "--output", str(folder)]
    options += ["--seconds", str(seconds), "--sample-seconds", str(sample_seconds)]
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), *options]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"locust ended with {done.returncode}:\n{end_of(log)}")
    measured = read_measured(folder)
    if not measured.records:
        raise RuntimeError(f"not one request was made:\n{end_of(log)}")
    return measured


def read_measured(folder: Path) -> Measured:
    """Records by session and turn, and samples with counters from the run's start."""
    records = [Record(**line) for line in _lines(folder / "records.jsonl")]
    samples = [Sample(**line) for line in _lines(folder / "samples.jsonl")]
    records.sort(key=lambda record: (record.session, record.turn))
    return Measured(records, since_start(samples))


def _lines(path: Path) -> Sequence[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]

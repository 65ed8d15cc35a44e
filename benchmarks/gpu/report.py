"""The output file: verdicts and times as they come, each written at once.

The jobs' own results are next to it (`NAME.results.json`). A run that finds both, with the same
sources, versions and device, continues where the last one ended: it repeats no job with a result.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from benchmarks.gpu.scale import ROOT

Outcome = Literal["ok", "FAIL", "skip"]
SOURCES = ("kernels/razor_kernels", "razor_vllm")


class Verdict(NamedTuple):
    """detail: what was compared, what differed, or why it was not checked."""

    name: str
    outcome: Outcome
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line: of a traceback, its beginning and its end."""
        lines = self.detail.splitlines()
        shown = " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
        return f"{self.outcome:<4} {self.name}" + (f": {shown}" if shown else "")


def sources_digest() -> str:
    """Digest of the Python that is judged: verdicts on other sources do not count."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class Report:
    """what: device, versions, whatever must be the same for everything in a file."""

    def __init__(self, path: Path, what: dict[str, Any], command: str) -> None:
        self.path = path
        self.results_path = path.with_suffix(".results.json")
        self.what = {**what, "sources": sources_digest()}
        before = self._read(path)
        self.verdicts: dict[str, dict[str, Any]] = before.get("verdicts", {})
        self.times: dict[str, dict[str, Any]] = before.get("times", {})
        self.commands: list[str] = [*before.get("commands", []), command]
        self.results: dict[str, Any] = self._read(self.results_path).get("results", {})

    def _read(self, path: Path) -> dict[str, Any]:
        """What a file holds; nothing if it is about something else."""
        if not path.exists():
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
        same = all(found.get(name) == value for name, value in self.what.items())
        return found if same else {}

    def add(self, verdict: Verdict) -> None:
        self.verdicts[verdict.name] = verdict._asdict()
        self._write_report()

    def add_time(self, part: str, row: str, measured: Any) -> None:
        self.times.setdefault(part, {})[row] = measured
        self._write_report()

    def add_result(self, job: str, result: Any) -> None:
        self.results[job] = result
        _replace(self.results_path, {**self.what, "results": self.results}, indent=None)

    def is_ok(self, name: str) -> bool:
        return self.verdicts.get(name, {}).get("outcome") == "ok"

    def _write_report(self) -> None:
        content = {"verdicts": self.verdicts, "times": self.times}
        _replace(self.path, {"commands": self.commands, **self.what, **content})


def _replace(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """Write a file completely or not at all: a run may be killed at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    os.replace(fresh, path)

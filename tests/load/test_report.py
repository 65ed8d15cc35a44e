"""The report, from records and samples that are known."""

import argparse
import base64
import json
import socket
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.load.__main__ import (
    figures_of,
    for_policy,
    parse,
    rounded,
    server_options,
    workload_of,
    write_report,
)
from benchmarks.load.charts import CHARTS, svg
from benchmarks.load.page import page, text_table
from benchmarks.load.run import Measured
from benchmarks.load.sampler import Sample
from benchmarks.load.server import POLICIES, command, refuse_taken
from benchmarks.load.streaming import Record
from benchmarks.load.workload import Workload


def measured(speed: float, pools: bool) -> Measured:
    """Four requests one after the other; `speed` times as fast."""
    records = [
        Record(
            index, index % 2, "chat", index / speed, 3, False, 200, "done", "", 50, 0, 3,
            ttft=0.4 / speed, gaps=[0.1 / speed, 0.2 / speed], seconds=0.7 / speed,
        )
        for index in range(4)
    ]  # fmt: skip
    states = {"local": {"held": 500.0, "cached": 0.0}, "any": {"free": 1000.0}} if pools else {}
    samples = [Sample(i / speed, 2, 1, 0.5, i, 0, 0, states, 0, 0, 2**28) for i in range(5)]
    return Measured(records, samples)


@pytest.fixture
def results() -> dict:
    """Full, and razor twice as fast."""
    return {
        "command": "python -m benchmarks.load <model>",
        "device": "a device",
        "versions": {"vllm": "0"},
        "workload": asdict(Workload()),
        "runs": {
            "full": figures_of(measured(1.0, pools=False), 2000),
            "razor": figures_of(measured(2.0, pools=True), 2000),
        },
    }


class Page(HTMLParser):
    """Pictures, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href") and value is not None:
                (self.pictures if value.startswith("data:") else self.outside).append(value)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_file(results: dict) -> None:
    """Every chart inside, nothing fetched, the command shown as text."""
    shown = Page(page(results, "Load <test>"))
    assert len(shown.pictures) == len(CHARTS)
    assert shown.outside == []
    assert "python -m benchmarks.load <model>" in shown.text
    assert "Load <test>" in shown.text
    for picture in shown.pictures:
        head, data = picture.split(",", 1)
        assert head == "data:image/svg+xml;base64"
        ElementTree.fromstring(base64.b64decode(data))


def test_the_table_has_the_figures(results: dict) -> None:
    """12 tokens in 3.7 s, and in half of it."""
    rows = {
        cells[0]: cells[1:]
        for cells in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in text_table(results).splitlines()
        )
    }
    assert rows[""] == ["full", "razor"]
    assert rows["output tokens/s"] == ["3.2", "6.5"]
    assert rows["time to first token, median, s"] == ["0.40", "0.20"]
    assert rows["inter-token latency, median, ms"] == ["150.0", "75.0"]
    assert rows["requests finished"] == ["4", "4"]
    assert rows["preemptions"] == ["4", "4"]
    assert "requests failed" not in rows


def test_the_same_figures_make_the_same_pictures(results: dict) -> None:
    """A report that was made again differs only where its figures do."""
    assert page(results, "x") == page(results, "x")


@pytest.mark.parametrize("name", list(CHARTS))
def test_a_run_without_anything_is_drawn_too(name: str) -> None:
    """Empty charts, no error."""
    failed = Measured([Record(0, 0, "chat", 0.0, 3, outcome="error")], [])
    assert svg(name, {"full": figures_of(failed, 10)}).startswith("data:image/svg+xml")


def test_files_say_the_same(results: dict, tmp_path: Path) -> None:
    """The JSON holds each request and sample, times rounded, gaps as a distribution."""
    write_report(results, tmp_path, "Load test")
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["runs"]["full"]["requests"][1]["gaps"] == 2
    assert written["runs"]["full"]["requests"][1]["start"] == 1.0
    assert len(written["runs"]["razor"]["samples"]) == 5
    assert written == rounded(results)
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_rounded_to_six_digits() -> None:
    assert rounded({"a": [1.23456789, 3], "b": (0.000123456789, "x")}) == {
        "a": [1.23457, 3],
        "b": [0.000123457, "x"],
    }


def test_all_policies_get_the_same_memory_and_length() -> None:
    """Options of the policy go to its own servers only; what the user says comes last."""
    user = ["--enforce-eager", "--razor-window", "256", "--max-model-len", "9000"]
    workload = Workload()
    full, razor = (server_options(policy, 1234, workload, user) for policy in ("full", "razor"))
    assert full[:4] == razor[:4]
    assert full[:2] == ["--kv-cache-memory-bytes", "1234"]
    assert int(full[3]) >= workload.most_tokens
    assert full[4:] == ["--enforce-eager", "--max-model-len", "9000"]
    assert razor[4:] == user
    assert for_policy("stock", ["--razor-prefill=windowed", "--dtype", "auto"]) == [
        "--dtype",
        "auto",
    ]


def test_each_policy_is_asked_for() -> None:
    """stock goes round our command; the others through it."""
    commands = {policy: command("m", policy, 1, []) for policy in POLICIES}
    assert "vllm.entrypoints.cli.main" in commands["stock"]
    assert "--kv-policy" not in commands["stock"]
    for policy in ("full", "razor", "razor-chat", "razor-windowed"):
        assert "razor_serving.cli" in commands[policy]
        assert commands[policy][commands[policy].index("--kv-policy") + 1] == policy.split("-")[0]
    for mode in ("chat", "windowed"):
        assert commands[f"razor-{mode}"][-2:] == ["--razor-prefill", mode]


def test_options_become_the_workload() -> None:
    args, others = parse(
        ["m", "--users", "3", "--turns", "2", "5", "--cancel-share", "0.5", "--dtype", "auto"]
    )
    workload = workload_of(args)
    assert (workload.users, workload.turns, workload.cancel_share) == (3, (2, 5), 0.5)
    assert others == ["--dtype", "auto"]
    args.users = 0
    with pytest.raises(ValueError, match="users is 0"):
        workload_of(args)
    assert workload_of(argparse.Namespace(**{**vars(args), "users": 12, "turns": [1, 3],
                                             "cancel_share": 0.0})) == Workload()  # fmt: skip


def test_a_taken_port_is_refused() -> None:
    """Two servers can share a port: the figures would be of both."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"port {port} is taken"):
            refuse_taken(port)
    refuse_taken(port)

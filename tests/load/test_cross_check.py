"""What is compared with `vllm bench serve`, and that both get the same load."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.load.cross_check import COMPARED, bench_command, compare, text_table, write_prompts
from benchmarks.load.server import Server
from benchmarks.load.workload import Workload

LOAD = Workload(
    sessions=5, users=2, prompt_tokens=(8, 12), output_tokens=(3, 6), chat_share=0, prefix_share=0
)


def one(value: float) -> dict[str, float]:
    return dict.fromkeys(COMPARED, value)


def test_medians_are_compared_as_shares_of_theirs() -> None:
    """Medians 110 and 100: ten per cent over; a single far round moves neither."""
    rounds = [
        {"ours": one(110.0), "bench": one(100.0)},
        {"ours": one(900.0), "bench": one(90.0)},
        {"ours": one(100.0), "bench": one(500.0)},
    ]
    for name, row in compare(rounds, tolerance=0.11).items():
        assert name in COMPARED
        assert (row["ours"], row["bench"]) == (110.0, 100.0)
        assert row["difference"] == pytest.approx(0.1)
        assert row["within"]
    assert not any(row["within"] for row in compare(rounds, tolerance=0.09).values())
    assert "| +10.0% |" in text_table(compare(rounds, 0.1))


def test_slower_counts_as_faster_does() -> None:
    rounds = [{"ours": one(80.0), "bench": one(100.0)}]
    assert not any(row["within"] for row in compare(rounds, tolerance=0.1).values())


def test_both_get_the_same_prompts_in_the_same_order(tmp_path: Path) -> None:
    """The data set is the workload's; nothing shuffles it, nothing is asked beforehand."""
    write_prompts(LOAD, tmp_path / "prompts.jsonl")
    lines = (tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [session.turns[0] for session in LOAD.draw()]
    assert [json.loads(line) for line in lines] == [
        {"prompt": turn.text, "output_tokens": turn.max_tokens} for turn in turns
    ]
    server = Server("http://h:1", "name", 0, tmp_path / "log")
    asked = bench_command(server, replace(LOAD, users=7), "folder", tmp_path)

    def value(option: str) -> str:
        return asked[asked.index(option) + 1]

    assert value("--num-prompts") == "5"
    assert value("--max-concurrency") == "7"
    assert value("--custom-output-len") == "-1"
    assert value("--ready-check-timeout-sec") == "0"
    assert value("--tokenizer") == "folder"
    assert {"--disable-shuffle", "--ignore-eos", "--skip-chat-template"} <= set(asked)

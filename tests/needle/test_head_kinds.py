"""The study of kinds of heads: what each kind attends, and equal bytes."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import head_kinds
from benchmarks.head_kinds import (
    SINKS,
    Kind,
    Result,
    attend,
    equal_window,
    held,
    interval,
    pairs,
)

LENGTH, HEAD_DIM = 60, 8


@pytest.fixture(scope="module")
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, LENGTH, HEAD_DIM), *torch.randn(2, LENGTH, HEAD_DIM)


def naive(query, key, value, row: int, kind: Kind, marks: torch.Tensor) -> torch.Tensor:
    """One query's output, by lists."""
    seen = range(row + 1)
    kept = [
        j for j in seen if j < SINKS or j > row - kind.window or (kind.marks and bool(marks[j]))
    ]
    dropped = [j for j in seen if j not in kept]
    logits = [float(query @ key[j]) for j in kept]
    values = [value[j] for j in kept]
    if kind.slot and dropped:
        logits.append(float(query @ key[dropped].mean(0)) + math.log(len(dropped)))
        values.append(value[dropped].mean(0))
    return torch.tensor(logits).softmax(0) @ torch.stack(values)


@pytest.mark.parametrize(
    "kind",
    [
        Kind(7),
        Kind(7, slot=False),
        Kind(7, marks=True),
        Kind(1),
        Kind(LENGTH),
        Kind(20, False, True),
    ],
)
def test_a_kind_attends_what_it_keeps(qkv, kind: Kind) -> None:
    """Sinks, window, marks and the mean of the rest; for rows of which some drop nothing."""
    query, key, value = qkv
    marks = torch.arange(LENGTH) % 5 == 0
    rows = torch.arange(3, LENGTH, 4)
    got = attend(query[:, rows], key, value, rows, kind, marks, None)
    for group in range(2):
        for at, row in enumerate(rows.tolist()):
            wanted = naive(query[group, row], key, value, row, kind, marks)
            torch.testing.assert_close(got[group, at], wanted)


def test_equal_bytes() -> None:
    """The largest window within a budget; one token more would pass it."""
    study = SimpleNamespace(heads=[(0, h) for h in range(4)], head_dim=HEAD_DIM)

    def make(window: int):
        return {(0, h): Kind(window) for h in (1, 2, 3)}

    kinds = equal_window(make, 0.5, study, 1000, 0)
    window = kinds[0, 1].window
    assert held(kinds, study, 1000, 0) <= 0.5 < held(make(window + 1), study, 1000, 0)
    assert held({}, study, 1000, 0) == 1


def test_pairs() -> None:
    """Who gains and who loses, and by how much: intervals of answers and of nats a token."""

    def results(right: list[bool], loss: float) -> list[Result]:
        passages = [Result([], [loss * scored, loss * scored], [scored] * 2) for scored in (7, 9)]
        return [Result(right, [8.0] * 5, [10] * 5), *passages]

    base = results([True, True, False, False] * 5, 3.0)
    other = results([True, False, True, True] * 5, 2.5)
    found = pairs(base, other)
    assert (found["gained"], found["lost"]) == (10, 5)
    assert found["interval"] == [0.25, 0.25]  # every passage gains one of four
    assert found["answer_nats"] == [0, 0]
    assert found["text_nats"] == found["copy_nats"] == [-0.5, -0.5]
    assert pairs(base, base)["interval"] == [0, 0]


def test_interval() -> None:
    """Passages weigh by their tokens; where they disagree the interval is wide."""
    low, high = interval([1.0, -1.0, 0.0, 0.0], [10, 10, 10, 10], 0)
    assert low < 0 < high
    assert low >= -0.1
    assert high <= 0.1


def test_prose(tmp_path) -> None:
    """Markdown's paragraphs alone; any other file as it is."""
    long = "A sentence with `code` in it that is long enough to count as prose: eighty letters."
    (tmp_path / "b.md").write_text(f"# Head\n\n- {long}\n\n| a |\n\n    code\n\nShort.\n")
    (tmp_path / "a.txt").write_text("| kept |")
    found = head_kinds.prose([tmp_path / "b.md", tmp_path / "a.txt"])
    assert found == "| kept |\n\n" + long.replace("`", "")

"""Tables of a folder of results: each policy, and policies in pairs on the same questions.

    python -m benchmarks.tasks.report FOLDER [--pair BASE OTHER ...] [--tasks single multi-key]

Every policy is compared with `--base`, and with the base of each `--pair` it is the other of.
A heat-map of each policy (depth by length) is drawn with `--pictures FOLDER`.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.heatmap import draw_heatmap
from benchmarks.tasks.pairs import Comparison, compare

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Rows of a heat-map: a fact counts for the nearest."""

Results = dict[str, Any]
Row = dict[str, Any]


def read(folder: Path) -> dict[str, Results]:
    """Results of a folder by name, `full` first.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stem != "full", path.stem))
    if not paths:
        raise ValueError(f"{folder} holds no results of benchmarks.tasks")
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def scores(results: Results, length: str, tasks: Sequence[str] | None) -> dict[str, list[float]]:
    """Scores by context. Names hold the context's digest: other texts do not match."""
    return {
        f"{row['kind']}/{row['index']}/{row['text']}": kept
        for row in results["lengths"].get(length, {"contexts": []})["contexts"]
        if (kept := [s for task, _, s in row["questions"] if tasks is None or task in tasks])
    }


def tasks_of(results: Results) -> list[str]:
    """Tasks in the order in which they were asked."""
    rows = [row for found in results["lengths"].values() for row in found["contexts"]]
    return list(dict.fromkeys(task for row in rows for task, _, _ in row["questions"]))


def score_table(policies: dict[str, Results], length: str, tasks: Sequence[str]) -> str:
    """Mean score of each policy and task, and the bytes that one request holds."""
    whole = held(policies.get("full"), length)
    lines = [f"| {int(length):,} tokens | KV, decode | " + " | ".join(tasks) + " | all |"]
    lines.append("|---" * (3 + len(tasks)) + "|")
    for name, results in policies.items():
        if length not in results["lengths"]:
            continue
        cells = [mean(scores(results, length, [task])) for task in tasks]
        cells.append(mean(scores(results, length, tasks)))
        lines.append(f"| {name} | {kib(results, length, whole)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def held(results: Results | None, length: str) -> int | None:
    """KV bytes in the last decode step."""
    found = (results or {"lengths": {}})["lengths"].get(length)
    return found["kv_bytes"]["decode"] if found and found["kv_bytes"] else None


def kib(results: Results, length: str, whole: int | None) -> str:
    """Held bytes, and their share of the full policy's."""
    found = held(results, length)
    if found is None:
        return "not known"
    return f"{found / 1024:,.0f} KiB" + (f" ({found / whole:.0%})" if whole else "")


def mean(found: dict[str, list[float]]) -> str:
    flat = [score for row in found.values() for score in row]
    return f"{sum(flat) / len(flat):.1%} of {len(flat)}" if flat else ""


def pair_table(
    policies: dict[str, Results], length: str, tasks: Sequence[str], pairs: Sequence[Sequence[str]]
) -> str:
    """Where the second policy of each pair differs from the first, on contexts of both."""
    lines = [
        f"| {int(length):,} tokens | questions (contexts) | lost | gained | difference (95 %) "
        "| kept of the first's score |",
        "|---|---|---|---|---|---|",
    ]
    for base, other in pairs:
        first, second = (scores(policies[name], length, tasks) for name in (base, other))
        if shared := first.keys() & second.keys():
            found = compare(
                {name: first[name] for name in shared}, {name: second[name] for name in shared}
            )
            lines.append(f"| {other} vs {base} | {pair_cells(found)} |")
    return "\n".join(lines)


def pair_cells(found: Comparison) -> str:
    kept = (
        ""
        if found.kept is None
        else f"{found.kept:.1%} ({found.kept_low:.1%}, {found.kept_high:.1%})"
    )
    points = [100 * value for value in (found.difference, found.low, found.high)]
    return (
        f"{found.questions} ({found.contexts}) | {found.lost} | {found.gained} | "
        f"{points[0]:+.1f} ({points[1]:+.1f}, {points[2]:+.1f}) | {kept}"
    )


def draw(policies: dict[str, Results], tasks: Sequence[str], folder: Path) -> None:
    """A heat-map of each policy, of the tasks whose facts have a place."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, results in policies.items():
        cells = depth_cells(results, tasks)
        kinds = [task for task in tasks if any(cell["kind"] == task for cell in cells)]
        lengths = sorted({cell["length"] for cell in cells})
        grid = {"kinds": kinds, "lengths": lengths, "depths": list(DEPTHS)}
        result = {
            "title": name,
            "cells": cells,
            "accuracy": {kind: accuracy(cells, kind) for kind in kinds},
            "kv_bytes": {
                length: found["kv_bytes"]
                for length, found in results["lengths"].items()
                if found["kv_bytes"]
            },
        }
        draw_heatmap(result, grid, results["about"], folder / f"{name}.png")


def depth_cells(results: Results, tasks: Sequence[str]) -> list[Row]:
    """Sums of scores by task, length and nearest depth."""
    grouped: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for length, found in results["lengths"].items():
        for row in found["contexts"]:
            for task, depth, right in row["questions"]:
                if task in tasks and depth is not None:
                    grouped[task, int(length), nearest(depth)].append(right)
    return [
        {"kind": kind, "length": length, "depth": depth, "questions": len(r), "right": sum(r)}
        for (kind, length, depth), r in sorted(grouped.items())
    ]


def nearest(depth: float) -> float:
    return min(DEPTHS, key=lambda row: abs(row - depth))


def accuracy(cells: Sequence[Row], kind: str) -> Row:
    chosen = [cell for cell in cells if cell["kind"] == kind]
    questions = sum(cell["questions"] for cell in chosen)
    return {"all": sum(cell["right"] for cell in chosen) / questions, "questions": questions}


def tables(
    policies: dict[str, Results], tasks: Sequence[str], base: str, more: Sequence[Sequence[str]]
) -> list[str]:
    """Both tables of every length."""
    pairs = [(base, name) for name in policies if base in policies and name != base]
    lengths = {length for results in policies.values() for length in results["lengths"]}
    found = []
    for length in sorted(lengths, key=int):
        found.append(score_table(policies, length, tasks))
        if compared := [*pairs, *more]:
            found.append(pair_table(policies, length, tasks, compared))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pair", nargs=2, action="append", default=[], metavar=("BASE", "OTHER"))
    parser.add_argument("--base", default="full", help="policy that all are compared with")
    parser.add_argument("--tasks", nargs="+", help="all by default")
    parser.add_argument("--pictures", type=Path, help="folder for a heat-map of each policy")
    args = parser.parse_args(argv)
    policies = read(args.folder)
    tasks = args.tasks or tasks_of(next(iter(policies.values())))
    print("\n\n".join(tables(policies, tasks, args.base, args.pair)))
    if args.pictures:
        draw(policies, tasks, args.pictures)


if __name__ == "__main__":
    main()

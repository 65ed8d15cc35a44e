"""The report: one HTML file with everything in it, from its JSON."""

import html
import json
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.load import charts

Figures = dict[str, Any]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
figure { display: inline-block; margin: .5rem; }
code, pre { background: #f4f4f4; padding: .1rem .3rem; }
pre { overflow-x: auto; padding: .6rem; }
"""


def _at(*keys: str) -> Callable[[Figures], Any]:
    """A value inside a summary; None where it was not measured."""

    def find(summary: Figures) -> Any:
        value: Any = summary
        for key in keys:
            value = value.get(key) if value is not None else None
        return value

    return find


ROWS: tuple[tuple[str, Callable[[Figures], Any], float, str], ...] = (
    ("requests finished", _at("requests", "done"), 1, ",.0f"),
    ("requests cancelled by the client", _at("requests", "cancelled"), 1, ",.0f"),
    ("requests refused (4xx)", _at("requests", "refused"), 1, ",.0f"),
    ("requests failed", _at("requests", "error"), 1, ",.0f"),
    ("time for all, s", _at("seconds"), 1, ",.1f"),
    ("output tokens/s", _at("output_tokens_per_second"), 1, ",.1f"),
    ("time to first token, median, s", _at("ttft", "p50"), 1, ",.2f"),
    ("time to first token, 90 %, s", _at("ttft", "p90"), 1, ",.2f"),
    ("time to first token, 99 %, s", _at("ttft", "p99"), 1, ",.2f"),
    ("the same of a chat's later turns, median, s", _at("follow_up_ttft", "p50"), 1, ",.2f"),
    ("inter-token latency, median, ms", _at("gap", "p50"), 1e3, ",.1f"),
    ("inter-token latency, 90 %, ms", _at("gap", "p90"), 1e3, ",.1f"),
    ("inter-token latency, 99 %, ms", _at("gap", "p99"), 1e3, ",.1f"),
    ("end to end, median, s", _at("request_seconds", "p50"), 1, ",.2f"),
    ("end to end, 99 %, s", _at("request_seconds", "p99"), 1, ",.2f"),
    ("most resident requests", _at("most_running"), 1, ",.0f"),
    ("resident requests, mean", _at("mean_running"), 1, ",.1f"),
    ("waiting requests, mean", _at("mean_waiting"), 1, ",.1f"),
    ("most KV memory held, share", _at("most_kv_usage"), 100, ",.0f"),
    ("preemptions", _at("preemptions"), 1, ",.0f"),
    ("prompt tokens from the prefix cache, %", _at("hit_share"), 100, ",.1f"),
)
"""Rows of the table: what is said, where it stands in a summary, factor, format."""


def cells(results: Figures) -> list[list[str]]:
    """The table, first row the policies'; a row that no run has is left out."""
    summaries = [run["summary"] for run in results["runs"].values()]
    rows = [["", *results["runs"]]]
    for name, find, factor, form in ROWS:
        values = [find(summary) for summary in summaries]
        if any(value is not None for value in values):
            rows.append([name, *(_number(value, factor, form) for value in values)])
    return rows


def _number(value: float | None, factor: float, form: str) -> str:
    return "0" if value is None else format(value * factor, form)


def text_table(results: Figures) -> str:
    """The table as Markdown."""
    rows = cells(results)
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def page(results: Figures, title: str, names: Sequence[str] = tuple(charts.CHARTS)) -> str:
    """The whole report.

    Args:
        results: `command`, `device`, `versions`, `workload`, `server`, and `runs`.
        names: of the charts.
    """
    about = {key: value for key, value in results.items() if key != "runs"}
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<pre>{html.escape(results['command'])}</pre>",
        f"<p>{html.escape(results['device'])}</p>",
        _html_table(cells(results)),
        *(_picture(name, results["runs"]) for name in names),
        "<h2>What was run</h2>",
        f"<pre>{html.escape(json.dumps(about, indent=1))}</pre>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _picture(name: str, runs: charts.Runs) -> str:
    return f'<figure><img alt="{name}" src="{charts.svg(name, runs)}"></figure>'


def _html_table(rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"

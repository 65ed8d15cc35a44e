"""The report's pictures, from the figures in its JSON.

Each policy has one colour throughout; time is seconds since a run's first request.
"""

import base64
import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = {
    "stock": "#7f7f7f",
    "full": "#4477aa",
    "razor": "#cc6633",
    "razor-chat": "#aa3377",
    "razor-windowed": "#228833",
}
_MIB = 1024**2
_WIDTH, _HEIGHT = 6.4, 3.6
_LEAST = 0.1
"""Left end of logarithmic axes: chunks that arrive in one read are microseconds apart."""

Runs = dict[str, dict[str, Any]]
"""Of each policy: summary, curves, samples."""


def throughput(axes: Axes, runs: Runs) -> None:
    """Output tokens per second, over time."""
    for policy, run in runs.items():
        _line(axes, policy, run["curves"]["tokens_per_second"])
        mean = run["summary"]["output_tokens_per_second"]
        axes.axhline(mean, color=COLOURS[policy], linewidth=0.8, linestyle=":")
    _finish(axes, "Output tokens a second (dotted: finished requests, whole run)", "s", "tokens/s")


def resident(axes: Axes, runs: Runs) -> None:
    """Requests that the engine works on, and those that wait."""
    for policy, run in runs.items():
        times = [sample["time"] for sample in run["samples"]]
        running = [sample["running"] for sample in run["samples"]]
        waiting = [sample["waiting"] for sample in run["samples"]]
        axes.plot(times, running, color=COLOURS[policy], label=f"{policy}, resident")
        axes.plot(times, waiting, color=COLOURS[policy], linestyle=":", label=f"{policy}, waiting")
    _finish(axes, "Resident and waiting requests", "s", "requests")


def memory(axes: Axes, runs: Runs) -> None:
    """KV memory that requests hold, and the local pool's part, if the server reports it."""
    for policy, run in runs.items():
        samples = run["samples"]
        times = [sample["time"] for sample in samples]
        held = [sample["kv_usage"] * run["kv_bytes"] / _MIB for sample in samples]
        axes.plot(times, held, color=COLOURS[policy], label=f"{policy}, held")
        told = [sample for sample in samples if "local" in sample["pools"]]
        if told:
            local = [sample["pools"]["local"]["held"] / _MIB for sample in told]
            axes.fill_between(
                [sample["time"] for sample in told],
                local,
                color=COLOURS[policy],
                alpha=0.3,
                label=f"{policy}, local pool",
            )
    limit = max(run["kv_bytes"] for run in runs.values()) / _MIB
    axes.axhline(limit, color="black", linewidth=0.8, linestyle="--", label="KV memory")
    _finish(axes, "KV memory held by requests", "s", "MiB")


def preemptions(axes: Axes, runs: Runs) -> None:
    """Preemptions so far, over time."""
    for policy, run in runs.items():
        points = [[sample["time"], sample["preemptions"]] for sample in run["samples"]]
        _line(axes, policy, points)
    _finish(axes, "Preemptions so far", "s", "preemptions")


def distribution(name: str, title: str, scale: float, unit: str) -> Callable[[Axes, Runs], None]:
    """A chart of one latency's cumulative distribution, on a logarithmic axis."""

    def draw(axes: Axes, runs: Runs) -> None:
        for policy, run in runs.items():
            points = [[max(value * scale, _LEAST), q] for value, q in run["curves"][name]]
            _line(axes, policy, points)
        _logarithmic(axes)
        _finish(axes, title, unit, "share of all")

    return draw


def rss(axes: Axes, runs: Runs) -> None:
    """Resident memory of the server's processes, over time."""
    for policy, run in runs.items():
        points = [[s["time"], s["rss"] / _MIB] for s in run["samples"] if s["rss"]]
        _line(axes, policy, points)
    _finish(axes, "Resident memory of the server's processes", "s", "MiB")


CHARTS: dict[str, Callable[[Axes, Runs], None]] = {
    "throughput": throughput,
    "resident": resident,
    "memory": memory,
    "preemptions": preemptions,
    "ttft": distribution("ttft", "Time to first token, waiting included", 1.0, "s"),
    "gap": distribution("gap", "Inter-token latency", 1e3, "ms"),
    "request_seconds": distribution("request_seconds", "End to end, one request", 1.0, "s"),
    "rss": rss,
}
OVERVIEW = ("throughput", "resident", "memory", "ttft", "gap", "request_seconds")


def svg(name: str, runs: Runs) -> str:
    """One chart as a data URL of an SVG picture."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    CHARTS[name](figure.add_subplot(), runs)
    return "data:image/svg+xml;base64," + base64.b64encode(_bytes(figure, "svg")).decode()


def overview(runs: Runs) -> bytes:
    """The main charts in one PNG picture."""
    figure = Figure(figsize=(2 * _WIDTH, 3 * _HEIGHT), layout="constrained")
    for name, axes in zip(OVERVIEW, _cells(figure), strict=True):
        CHARTS[name](axes, runs)
    return _bytes(figure, "png")


def _cells(figure: Figure) -> Iterator[Axes]:
    yield from figure.subplots(3, 2).flat


def _line(axes: Axes, policy: str, points: list[list[float]]) -> None:
    axes.plot(
        [point[0] for point in points],
        [point[1] for point in points],
        color=COLOURS[policy],
        label=policy,
    )


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers, no more than have room."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 200 * low else (1.0,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend(fontsize=8)


def _bytes(figure: Figure, form: str) -> bytes:
    out = io.BytesIO()
    # No date, no random ids: the same figures make the same file.
    with matplotlib.rc_context({"svg.hashsalt": "razor"}):
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(out, format=form, dpi=100, metadata=metadata)
    return out.getvalue()

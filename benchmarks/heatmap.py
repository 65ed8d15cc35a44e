"""Needle heat-maps: length across, depth down, one panel per kind of trial."""

from pathlib import Path
from typing import Any


def draw_heatmap(
    result: dict[str, Any], grid: dict[str, Any], about: dict[str, Any], path: Path
) -> None:
    """Draw one policy's cells: green where all questions were answered, red where none.

    Args:
        result: of the policy; `cells`, `title`, `accuracy` and `kv_bytes` are read.
        grid: kinds, lengths and depths.
        about: model and window, for the caption.
        path: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = grid["kinds"]
    width = 1.5 + len(kinds) * (1.2 + 0.85 * len(grid["lengths"]))
    figure, panels = pyplot.subplots(
        1, len(kinds), figsize=(width, 1.8 + 0.38 * len(grid["depths"])), squeeze=False
    )
    for panel, kind in zip(panels[0], kinds, strict=True):
        _draw_panel(panel, result, grid, kind)
    figure.suptitle(f"{about['model']}: {result['title']}", fontsize=11)
    figure.text(0.5, 0.005, _caption(result, about), ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(panel: Any, result: dict[str, Any], grid: dict[str, Any], kind: str) -> None:
    lengths, depths = grid["lengths"], grid["depths"]
    shares = {
        (cell["length"], cell["depth"]): cell["right"] / cell["questions"]
        for cell in result["cells"]
        if cell["kind"] == kind
    }
    rows = [[shares[length, depth] for length in lengths] for depth in depths]
    panel.imshow(rows, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            color = "black" if 0.15 < value < 0.85 else "white"
            panel.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=9, color=color)
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    panel.set_xlabel("tokens of context")
    panel.set_ylabel("depth of the fact")
    accuracy = result["accuracy"][kind]
    panel.set_title(f"{kind}: {accuracy['all']:.1%} of {accuracy['questions']}", fontsize=10)


def _caption(result: dict[str, Any], about: dict[str, Any]) -> str:
    parts = []
    if result.get("options") is not None:
        kept = sum(len(row) for row in result["retrieval_heads"])
        parts.append(f"{kept} retrieval heads, window {about['window']}, sinks {about['sinks']}")
    if result["kv_bytes"]:
        longest = max(result["kv_bytes"], key=int)
        held = result["kv_bytes"][longest]["decode"]
        parts.append(f"{held / 1024:,.0f} KiB of KV held at {int(longest):,} tokens")
    parts.append(f"vLLM {about.get('vllm', 'unknown')}, {about.get('dtype', 'server dtype')}")
    return "; ".join(parts)

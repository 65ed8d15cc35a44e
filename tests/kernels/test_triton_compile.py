"""The Triton form's kernels, compiled for devices that are not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import triton_resources

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks" / "results" / "triton-resources.json"

CORNERS = {
    80: ["bf16-d128-g4", "bf16/fp8-d128-g4", "bf16-d80-g7-cap"],
    90: ["bf16-d128-g4", "bf16/fp8-d256-g4", "bf16-d128-g1-alibi", "bf16-d512-g8"],
    100: ["bf16-d256-g4", "bf16/fp8-d128-g4", "fp32-d64-g1", "bf16-d64-g8-sinks"],
}
"""Models that between them use each type and each way to make logits on each device; the
whole table, `python -m benchmarks.triton_resources`, takes too long for every run."""

LAUNCHES = {"_plan_kernel", "_write_kernel", "_decode_kernel", "_merge_kernel", "_prefill_kernel"}


@pytest.mark.parametrize("capability", CORNERS)
def test_every_launch_compiles_and_fits(capability: int, tmp_path: Path) -> None:
    """Nothing spills, and no block asks for more shared memory than the device gives it."""
    names, output = CORNERS[capability], tmp_path / "resources.json"
    command = [sys.executable, "-m", "benchmarks.triton_resources", "--output", output]
    # A process of its own: a stand-in driver takes the device's place in it.
    done = subprocess.run(
        [*command, "--capabilities", str(capability), "--models", *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert output.exists(), done.stderr[-2000:]
    rows = json.loads(output.read_text())["rows"]
    assert {row["model"] for row in rows} == set(names)
    assert {row["kernel"] for row in rows if row["model"] == rows[0]["model"]} == LAUNCHES
    assert all(0 < row["registers"] <= 255 for row in rows)
    assert [row for row in rows if not row["fits"]] == []
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_committed_table_is_of_these_kernels() -> None:
    """Every launch for every device was compiled from today's sources, and none spills.

    After a change: `python -m benchmarks.triton_resources --output FILE`, some 20 minutes.
    """
    table = json.loads(TABLE.read_text())
    assert table["sources"] == triton_resources.sources_digest()
    wanted = {(c, m.name) for c in triton_resources.CAPABILITIES for m in triton_resources.MODELS}
    assert {(row["capability"], row["model"]) for row in table["rows"]} == wanted
    assert all(row["fits"] for row in table["rows"])


def test_a_spill_fails_the_table(tmp_path: Path) -> None:
    """The exit status tells: a tile that the registers cannot hold is found out."""
    program = (
        "import sys\n"
        "from benchmarks import triton_resources\n"
        "from razor_kernels import triton_form\n"
        "triton_form.prefill_tile = lambda *_: triton_form.PrefillTile(128, 64, 8, 2)\n"
        "triton_resources.main()\n"
    )
    arguments = ["--capabilities", "80", "--models", "bf16-d128-g4", "--kernels", "_prefill_kernel"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "False" in done.stdout

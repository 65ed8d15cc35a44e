"""The script that times the probe, with a small shape on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "calibrate_speed.py"
SHAPE = {"layers": 3, "hidden": 64, "intermediate": 96, "heads": 4, "kv-heads": 2, "vocab": 200}
SMALL = ["--device", "cpu", "--period", "30", "--rounds", "2"]
SMALL += [part for name, size in SHAPE.items() for part in (f"--{name}", str(size))]


def test_it_times_rounds_and_scores(tmp_path: Path) -> None:
    """Scores are a part of the whole, every round is written, the command beside them."""
    output = tmp_path / "speed.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, "--output", output], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "121 tokens, 3 layers of 4 heads on CPU" in done.stdout
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert len(figures["rounds"]) == 2
    assert 0 < figures["score_share"] < 1
    for row in [figures["first"], *figures["rounds"]]:
        assert 0 < row["score_seconds"] < row["seconds"]
    assert figures["command"].endswith(str(output))


def test_without_a_gpu_it_says_so() -> None:
    """The default shape is never run on a CPU by mistake."""
    done = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin"},
    )
    assert done.returncode == 2
    assert "no CUDA device is here" in done.stderr

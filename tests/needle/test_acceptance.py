"""Acceptance of drafts: the figures are vLLM's, and a model agrees with itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.acceptance import Drafts, summary

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "models" / "needle" / "weights"


def test_a_summary_by_hand() -> None:
    """Shares are of drafted tokens; a step gives a token more than it accepts."""
    full = [Drafts(4, 12, 12, (4, 4, 4)), Drafts(2, 6, 3, (1, 1, 1))]
    razor = [Drafts(4, 12, 6, (3, 2, 1)), Drafts(3, 9, 0, (0, 0, 0))]
    found = summary({"full": full, "razor": razor})
    assert found["full"]["share"] == round(15 / 18, 4)
    assert found["full"]["tokens_a_step"] == 3.5
    assert found["full"]["by_position"] == [5, 5, 5]
    assert found["razor"]["by_position"] == [3, 2, 1]
    assert found["difference"] == -0.5  # mean over chats: 1 and 0.5 against 0.5 and 0
    assert found["interval"] == [-0.5, -0.5]


@pytest.mark.engine
def test_a_model_accepts_its_own_drafts(tmp_path: Path) -> None:
    """Under full nearly all; where heads compress, fewer. Prompts are twice in the cache."""
    output = tmp_path / "acceptance.json"
    drafts = {"method": "draft_model", "model": str(WEIGHTS)}
    command = [
        *(sys.executable, "-m", "benchmarks.acceptance", "--model", str(WEIGHTS)),
        *("--drafts", json.dumps(drafts), "--window", "32", "--length", "1600"),
        *("--samples", "2", "--tokens", "32", "--dtype", "float32", "--enforce-eager"),
        *("--engine-options", '{"kv_cache_memory_bytes": 134217728}', "--output", str(output)),
    ]
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "serving"))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kinds = json.loads(output.read_text())["kinds"]
    assert set(kinds) == {"open", "repeated"}
    for found in kinds.values():
        for policy in ("full", "razor"):
            row = found[policy]
            assert row["accepted"] == sum(row["by_position"])
            assert 0 < row["tokens"] <= 3 * row["drafts"]
        assert found["full"]["share"] > 0.85
    assert min(found["difference"] for found in kinds.values()) < -0.05

"""The `razor` command: calibrate, and its refusals."""

import shutil
import sys
from pathlib import Path

import pytest

from razor_serving import cli
from razor_vllm.profile import read_profile


def razor(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["razor", *arguments])
    cli.main()


def test_calibrate_writes_a_profile_that_is_read(
    model_dir: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """The profile lies beside the weights, and is not overwritten unasked."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    (model / "razor_profile.json").unlink()
    arguments = ["calibrate", str(model), "--period", "50", "--seeds", "1", "2"]
    razor(monkeypatch, *arguments)
    profile = read_profile(model / "razor_profile.json")
    assert set(profile.scores) == {"echo", "induction"}
    assert profile.made_by["seeds"] == [1, 2]
    assert "of 16 KV heads retrieve" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        razor(monkeypatch, *arguments)
    assert stop.value.code == 2
    assert "--force overwrites it" in capsys.readouterr().err
    razor(monkeypatch, *arguments, "--force", "--induction", "0.5")
    assert read_profile(model / "razor_profile.json").num_retrieval_heads >= 8
    assert sorted(path.name for path in model.glob("razor*")) == ["razor_profile.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--period", "1"], "period is 1"),
        (["--induction", "2"], "induction is 2.0"),
        (["--output", "/no/such/folder/p.json"], "/no/such/folder is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    model_dir: Path, tmp_path: Path, monkeypatch, capsys, arguments, message: str
) -> None:
    """Nothing is written, nothing is traced back."""
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "p.json")]
    with pytest.raises(SystemExit) as stop:
        razor(monkeypatch, "calibrate", str(model_dir), *output, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())

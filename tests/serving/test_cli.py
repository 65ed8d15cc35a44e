"""The `razor` command: calibrate, and its refusals."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from razor_serving import cli
from razor_vllm.heads.profile import read_profile


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


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What `razor serve` hands to vLLM."""
    from vllm.entrypoints.cli import main

    handed: list[str] = []
    monkeypatch.setattr(main, "main", lambda: handed.extend(sys.argv))

    def serve(*options: str) -> list[str]:
        handed.clear()
        razor(monkeypatch, "serve", "model", *options)
        return list(handed)

    return serve


def test_requests_in_flight_get_half_a_minute(told: Callable[..., list[str]], capsys) -> None:
    """Unless the user says otherwise; with one API server there is nothing to add."""
    before = ["vllm", "serve", "model", "--kv-policy", "razor", "--host", "127.0.0.1"]
    assert told() == [*before, "--shutdown-timeout", "30"]
    for options in (["--shutdown-timeout", "0"], ["--shutdown_timeout=7", "-asc", "1"]):
        assert told(*options) == [*before, *options]
    assert "razor: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "servers"),
    [
        (["--api-server-count", "2"], 2),
        (["-asc=3", "--data-parallel-size", "2"], 3),
        (["-dp", "4"], 4),
        (["-dp", "4", "-dph", "-dpl", "2"], 2),
        (["-dp", "4", "--data_parallel_rank", "1"], 1),
        (["-dp", "4", "-dpe"], 1),
        (["-dp", "4", "-asc", "1"], 1),
    ],
)
def test_several_api_servers_get_no_time(
    told: Callable[..., list[str]], capsys, options: list[str], servers: int
) -> None:
    """With them vLLM's time for requests is time that they hang; one line says so."""
    assert ("--shutdown-timeout" in told(*options)) == (servers == 1)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("razor: ")]
    assert len(said) == (servers > 1)
    assert all(f"with {servers} API servers, requests in flight at SIGTERM" in x for x in said)
    told(*options, "--shutdown-timeout", "9")
    assert ("hang for 9 s" in capsys.readouterr().out) == (servers > 1)
    told(*options, "--shutdown-timeout", "0")
    assert "in flight" not in capsys.readouterr().out


def test_the_options_that_count_servers_are_vllms() -> None:
    """Each of their names and short names means the same to vLLM's own parser."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = make_arg_parser(FlexibleArgumentParser())._option_string_actions
    for name, short in {**cli._COUNTS, **cli._BALANCERS}.items():
        assert known[f"--{name}"] is known[short]


def test_show_prints_and_draws(model_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Heads as a grid, bytes at lengths, and a picture that is not overwritten unasked."""
    profile = tmp_path / "p.json"
    arguments = ["--period", "50", "--seeds", "0", "--output", str(profile)]
    razor(monkeypatch, "calibrate", str(model_dir), *arguments)
    capsys.readouterr()
    picture = tmp_path / "heads.png"
    show = ["show", str(profile), "--png", str(picture), "--window", "256"]
    razor(monkeypatch, *show)
    out = capsys.readouterr().out
    chosen = read_profile(profile)
    assert f"{chosen.num_retrieval_heads} of 16 KV heads retrieve" in out
    grid = [line.split()[1] for line in out.splitlines()[2:6]]
    assert [
        "".join("#" if h in row else "." for h in range(4)) for row in chosen.retrieval_heads
    ] == grid
    assert "131,072 tokens" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as stop:
        razor(monkeypatch, *show)
    assert stop.value.code == 2


def test_convert_reads_and_writes(model_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A published pattern into a profile and back; what does not fit is one line."""
    gates = tmp_path / "full_attention_heads.tsv"
    gates.write_text("0.9\t0.1\t0.2\t0.3\n" * 4, encoding="utf-8")
    output, duo = tmp_path / "p.json", tmp_path / "duo"
    duo.mkdir()
    model = ["--model", str(model_dir), "--output", str(output)]
    razor(monkeypatch, "convert", str(tmp_path), *model, "--share", "0.25")
    assert read_profile(output).retrieval_heads == ((0,),) * 4
    razor(monkeypatch, "convert", str(output), "--to-duo", str(duo))
    assert (duo / "full_attention_heads.tsv").read_text() == "1.0\t0.0\t0.0\t0.0\n" * 4
    capsys.readouterr()
    for arguments in (["--share", "0.25"], ["--force"], ["--force", "--share", "7"]):
        with pytest.raises(SystemExit) as stop:
            razor(monkeypatch, "convert", str(tmp_path), *model, *arguments)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert read_profile(output).retrieval_heads == ((0,),) * 4


def test_plan_prints_slots_and_what_fits(model_dir: Path, monkeypatch, capsys) -> None:
    """Ranks, quotas, requests that fit; what does not divide is one line."""
    profile = str(model_dir / "razor_profile.json")
    plan = ["plan", profile, "--kv-memory", "0.25", "--max-model-len", "8192", "--window", "256"]
    razor(monkeypatch, *plan, "--tp", "2", "--pp", "2")
    out = capsys.readouterr().out
    assert "4 ranks (tp 2, pp 2): 2 retrieval and 2 local slots each" in out
    assert "rank 1: layers 0-1, KV heads 2-3, 2 retrieve" in out
    assert "such requests fit 268,435,456 bytes a rank" in out
    assert "(exact prefill): " in out
    for arguments in (["--tp", "3"], ["--pp", "9"], ["--window", "9000"]):
        with pytest.raises(SystemExit) as stop:
            razor(monkeypatch, *plan, *arguments)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_serve_is_understood_whatever_plugins_are_named(monkeypatch) -> None:
    """`VLLM_PLUGINS=other razor serve M`: vLLM is to load ours beside it."""
    from vllm.entrypoints.cli import main as vllm_cli

    started = []
    monkeypatch.setattr(vllm_cli, "main", lambda: started.append(list(sys.argv)))
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    razor(monkeypatch, "serve", "some/model", "--port", "9")
    assert os.environ["VLLM_PLUGINS"].split(",") == ["other", "razor"]
    assert started[0][:5] == ["vllm", "serve", "some/model", "--kv-policy", "razor"]

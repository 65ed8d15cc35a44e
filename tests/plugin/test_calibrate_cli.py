"""Bad input to `razor calibrate`, `choose`, `show`, `plan` and `convert`: one line, status 2."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from razor_serving import cli
from razor_vllm.heads.calibrate import default_method
from razor_vllm.heads.profile import HeadProfile, read_profile, write_profile

PROFILE = HeadProfile(4, 4, 32, ((0,), (1, 3), (), (2,)), {"induction": ((0.5, 0, 0.1, 0),) * 4})
SLIDING = HeadProfile(2, 2, 16, ((), (1,)), {"echo": ((0, 0), (0.1, 0.4))}, other_layers=(0,))
GATED = HeadProfile(
    num_layers=3,
    num_kv_heads=4,
    head_size=32,
    retrieval_heads=((0,), (), ()),
    scores={
        "attribution": ((0.5, 0.1, 0.2, 0), (0, 0, 0, 0), (0.3, 0, 0.7, 0.2)),
        "induction": ((0.5, 0, 0.1, 0), (0.9, 0.9, 0, 0), (0, 0, 0, 0.2)),
        "echo": ((0, 0, 0, 0.3), (0.9, 0, 0, 0), (0, 0, 0, 0)),
    },
    made_by={"method": "two", "rule": {"count": 1}, "stability": 0.9},
    other_layers=(1,),
)
GOOD = PROFILE.to_json()


class Hostile:
    """Would run a command if it were unpickled."""

    def __reduce__(self):
        return (Path("/tmp/razor-pwned").touch, ())


def razor(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["razor", *map(str, arguments)])
    cli.main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys, *arguments: object) -> str:
    """What the command says when it refuses: one line, status 2."""
    with pytest.raises(SystemExit) as stop:
        razor(monkeypatch, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    lines = [line for line in error.splitlines() if line.startswith("razor")]
    assert "Traceback" not in error
    assert len(lines) == 1, error
    assert lines[0] == error.splitlines()[-1]
    return lines[0]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of good and bad profiles and patterns."""
    write_profile(PROFILE, tmp_path / "good.json")
    write_profile(SLIDING, tmp_path / "sliding.json")
    write_profile(GATED, tmp_path / "gated.json")
    texts = {
        "cut.json": GOOD[:200],
        "nan.json": GOOD.replace("0.5", "NaN"),
        "negative.json": GOOD.replace("0.5", "-0.5"),
        "shape.json": GOOD.replace('"num_layers": 4', '"num_layers": 5'),
        "head.json": GOOD.replace("3\n", "9\n"),
        "bom.json": "\ufeff" + GOOD,
        "ragged.tsv": "1\t0\t0\t0\n" * 3 + "1\t0\n",
        "comma.tsv": "1,0,0,0\n" * 4,
        "bom.tsv": "\ufeff" + "1\t0\t0\t0\n" * 4,
        "nan.tsv": "1\t0\t0\tnan\n" * 4,
        "negative.tsv": "1\t0\t0\t-1\n" * 4,
        "wide.tsv": "1\t0\t0\t0\t0\n" * 4,
        "gates.tsv": "0.9\t0.1\t0.2\t0.3\n" * 4,
        "heads.json": json.dumps({"0": [0, 1, 2, 3, 4]}),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "pickle.json").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Hostile()))
    torch.save({"prefix_matching": {0: [4]}}, tmp_path / "heads.pt")
    torch.save({"other": {0: [1]}}, tmp_path / "keys.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "heads.pt").read_bytes()[:90])
    for name in ("large.json", "large.tsv", "large.pt"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(17 * 1024**2)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.json", "No such file"),
        ("cut.json", "cut.json: "),
        ("nan.json", "NaN is not a number"),
        ("negative.json", "-0.5 is not finite and >= 0"),
        ("shape.json", "retrieval_heads has 4 layers, the model has 5"),
        ("head.json", "head 9 is outside 0..3"),
        ("bom.json", "BOM"),
        ("pickle.json", "can't decode"),
        ("large.json", "over 16 MB"),
        ("", "Is a directory"),
    ],
)
@pytest.mark.parametrize("command", [["show"], ["plan", "--kv-memory", "1"], ["convert"]])
def test_profiles_that_do_not_fit(files, monkeypatch, capsys, command, name, message) -> None:
    """Every command that reads a profile says what is wrong with the file, and writes nothing."""
    out = files / "out"
    out.mkdir()
    more = {"show": ["--png", out / "a.png"], "convert": ["--to-duo", out], "plan": []}
    line = refused(monkeypatch, capsys, *command, files / name, *more[command[0]])
    assert message in line
    assert str(files) in line
    assert not list(out.iterdir())
    assert not Path("/tmp/razor-pwned").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "good.json", "--window", "-1"], "window is -1"),
        (["show", "good.json", "--lengths", "0"], "a length is 0"),
        (["show", "good.json", "--png", "nowhere/a.png"], "nowhere is not a folder"),
        (["show", "good.json", "--png", "cut.json"], "--force overwrites it"),
        (["show", "good.json", "--png", "."], "is a folder; a file is needed"),
        (["plan", "good.json", "--kv-memory", "0"], "kv-memory is 0.0"),
        (["plan", "good.json", "--kv-memory", "nan"], "kv-memory is nan"),
        (["plan", "good.json", "--kv-memory", "inf"], "kv-memory is inf"),
        (["plan", "good.json", "--kv-memory", "1", "--tp", "0"], "tp is 0"),
        (["plan", "good.json", "--kv-memory", "1", "--tp", "3"], "do not divide over 3"),
        (["plan", "good.json", "--kv-memory", "1", "--pp", "0"], "do not make 0 pipeline stages"),
        (
            ["plan", "good.json", "--kv-memory", "1", "--max-model-len", "0"],
            "window is 4096, above",
        ),
        (["plan", "good.json", "--kv-memory", "1", "--sinks", "-4"], "sinks is -4"),
        (["plan", "good.json", "--kv-memory", "1", "--window-ratio", "2"], "window_ratio is 2.0"),
        (["plan", "sliding.json", "--kv-memory", "1"], "1 of 2 layers have no full attention"),
        (["choose", "good.json", "--output", "new.json"], "choose by --share, --count or --mass"),
        (
            ["choose", "good.json", "--output", "new.json", "--count", "3", "--echo", "0.1"],
            "choose by --share, --count or --mass",
        ),
        (
            ["choose", "good.json", "--output", "new.json", "--count", "3"],
            "no scores of attribution (it has: induction)",
        ),
        (
            ["choose", "good.json", "--output", "new.json", "--echo", "0.1"],
            "no scores of induction and echo",
        ),
        (["choose", "gated.json", "--output", "new.json", "--count", "9"], "model has 8 KV heads"),
        (["choose", "gated.json", "--output", "new.json", "--mass", "2"], "mass is 2.0"),
        (["choose", "gated.json", "--output", "cut.json", "--count", "2"], "--force overwrites it"),
        (["convert", "gates.tsv"], "--model is needed"),
        (["convert", "good.json", "--to-duo", "nowhere"], "nowhere is not a folder"),
        (["convert", "good.json", "--to-duo", ".", "--sinks", "-1"], "sinks is -1"),
    ],
)
def test_options_that_make_no_sense(files, monkeypatch, capsys, arguments, message) -> None:
    """Sizes that are none, files that are in the way; nothing is written."""
    monkeypatch.chdir(files)
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert message in refused(monkeypatch, capsys, *arguments)
    assert {path: path.read_bytes() for path in files.iterdir()} == before


@pytest.mark.parametrize(
    ("rule", "heads"),
    [
        (["--count", "3"], ((0,), (), (0, 2))),
        (["--share", "0.5"], ((0, 2), (), (0, 2))),
        (["--mass", "0.6"], ((0,), (), (2,))),
        (["--induction", "0.25", "--echo", "0.125"], ((0, 3), (), (3,))),
    ],
)
def test_choose(files, monkeypatch, capsys, rule, heads) -> None:
    """Other heads by a profile's scores; layers without full attention have none."""
    output = files / "new.json"
    razor(monkeypatch, "choose", files / "gated.json", "--output", output, *rule)
    chosen = read_profile(output)
    assert chosen.retrieval_heads == heads
    assert (chosen.scores, chosen.other_layers) == (GATED.scores, GATED.other_layers)
    assert chosen.made_by["chosen_by"]["rule"] == {
        name.removeprefix("--") + ("_share" if "--echo" in rule else ""): float(value)
        for name, value in zip(rule[::2], rule[1::2], strict=True)
    }
    assert "stability" not in chosen.made_by  # said of another choice
    assert f"{sum(map(len, heads))} of 8 KV heads retrieve (1 in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("none.tsv", [], "No such file"),
        ("ragged.tsv", [], "rows differ in length"),
        ("comma.tsv", [], "is not numbers with tabs between"),
        ("bom.tsv", [], "byte-order mark"),
        ("nan.tsv", [], "gates lie in 0 to 1"),
        ("negative.tsv", [], "gates lie in 0 to 1"),
        ("wide.tsv", [], "has 4 layers of 5 KV heads; the model has 4 of 4"),
        ("large.tsv", [], "over 16 MB"),
        ("large.pt", [], "over 16 MB"),
        ("gates.tsv", [], "need one of --share and --threshold"),
        ("gates.tsv", ["--share", "1.5"], "share is 1.5"),
        ("gates.tsv", ["--share", "nan"], "share is nan"),
        ("gates.tsv", ["--share", "0.5", "--threshold", "0.5"], "need one of"),
        ("gates.tsv", ["--threshold", "nan"], "threshold is nan"),
        ("gates.tsv", ["--threshold", "0.95"], "threshold is 0.95: no gate"),
        ("gates.tsv", ["--threshold", "-1"], "threshold is -1.0"),
        ("pickle.pt", [], "it was not run"),
        ("cut.pt", [], "it was not run"),
        ("keys.pt", [], "holds other keys than"),
        ("heads.pt", [], "head 4 is outside 0..3"),
        ("heads.json", [], "head 4 is outside 0..3"),
        ("cut.json", [], "cut.json: "),
        ("nan.json", [], "NaN is not a number"),
    ],
)
def test_patterns_that_do_not_fit(
    files, model_dir, monkeypatch, capsys, name, options, message
) -> None:
    """Every form that is read; nothing in a file is run, and no profile is written."""
    output = files / "new.json"
    arguments = ["--model", model_dir, "--output", output, *options]
    assert message in refused(monkeypatch, capsys, "convert", files / name, *arguments)
    assert not output.exists()
    assert not Path("/tmp/razor-pwned").exists()


def broken_model(folder: Path, model_dir: Path, kind: str) -> Path:
    """A model folder with one thing wrong."""
    model = shutil.copytree(model_dir, folder / "model")
    config, weights = model / "config.json", model / "model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "config cut":
        config.write_text(config.read_text(encoding="utf-8")[:50], encoding="utf-8")
    elif kind == "weights cut":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "weights pickled":
        weights.unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile()))
    elif kind == "no weights":
        weights.unlink()
    elif kind == "short":
        text = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps({**text, "max_position_embeddings": 7}), encoding="utf-8")
    elif kind == "quantised":
        text = json.loads(config.read_text(encoding="utf-8"))
        quantised = {"quant_method": "gptq", "bits": 4}
        config.write_text(json.dumps({**text, "quantization_config": quantised}), encoding="utf-8")
    elif kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).unlink()
    elif kind == "gpt2":
        shape = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)
        GPT2LMHeadModel(shape).save_pretrained(model)
    return model


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "config.json"),
        ("config cut", "config.json"),
        ("weights cut", "model: Error while deserializing header"),
        ("weights pickled", "its weights are not plain tensors; nothing was run"),
        ("no weights", "model.safetensors"),
        ("short", "a model of 7 positions is too short for the probe"),
        ("gpt2", "a gpt2 model, without rotary embeddings, is not covered"),
    ],
)
def test_models_that_cannot_be_probed(
    tmp_path, model_dir, monkeypatch, capsys, kind: str, message: str
) -> None:
    """The line names the file, or what the model is; no profile is written."""
    model = broken_model(tmp_path, model_dir, kind)
    output = tmp_path / "new.json"
    line = refused(monkeypatch, capsys, "calibrate", model, "--output", output, "--period", "20")
    assert message in line
    assert not output.exists()
    assert not Path("/tmp/razor-pwned").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("whole", "the text has 12 tokens, fewer than a prompt of 1,024: give a longer --text"),
        ("quantised", "is quantised and gives no gradients: calibrate the model it was made from"),
        ("no tokenizer", "has no tokenizer that transformers reads"),
        ("short", "a prompt of 1,024 tokens is longer than the model's 7 positions"),
        ("gpt2", "a gpt2 model, without rotary embeddings, is not covered"),
    ],
)
def test_models_and_texts_that_attribution_cannot_use(
    tmp_path, model_dir, monkeypatch, capsys, kind: str, message: str
) -> None:
    """The line says what would help, before weights are loaded; no profile is written."""
    model, output = broken_model(tmp_path, model_dir, kind), tmp_path / "new.json"
    (tmp_path / "text").write_text("Hello there.", encoding="utf-8")
    text = ["--text", tmp_path / "text"]
    line = refused(
        monkeypatch,
        capsys,
        "calibrate",
        model,
        "--output",
        output,
        "--method",
        "attribution",
        *text,
    )
    assert message in line
    assert not output.exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "prompts of 4,000 tokens, with gradients"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "a shorter --length"),
    ],
)
def test_out_of_memory_is_one_line(
    tmp_path, model_dir, monkeypatch, capsys, error, message
) -> None:
    """What does not fit, and what to try; no profile is written."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("razor_vllm.heads.attribution.loss_of", fail)
    output = ["--output", tmp_path / "new.json"]
    method = ["--method", "attribution", "--length", "4000"]
    assert message in refused(monkeypatch, capsys, "calibrate", model_dir, *output, *method)
    assert not list(tmp_path.iterdir())


def test_both_methods_run_and_the_last_one_chooses(tmp_path, monkeypatch, capsys) -> None:
    """The profile has everyone's scores; `show` says how far the choice goes."""
    needle = Path(__file__).parents[2] / "models/needle/weights"
    output = tmp_path / "new.json"
    options = ["--period", "50", "--seeds", "0", "--length", "400", "--window", "32"]
    both = ["--method", "probe", "attribution", "--count", "1"]
    razor(monkeypatch, "calibrate", needle, "--output", output, *options, *both)
    out = capsys.readouterr().out
    assert "1 of 16 KV heads retrieve" in out
    assert "KV heads that hold a share of the attribution score:" in out
    profile = read_profile(output)
    assert set(profile.scores) == {"echo", "induction", "attribution"}
    rows = profile.scores["attribution"]
    best = max((x, layer, head) for layer, row in enumerate(rows) for head, x in enumerate(row))
    assert profile.retrieval_heads[best[1]] == (best[2],)
    assert sum(map(sum, rows)) == pytest.approx(1, abs=0.3)
    assert profile.made_by["rule"] == {"count": 1}
    assert profile.made_by["scores_by"][0]["period"] == 50
    razor(monkeypatch, "show", output)
    assert (
        f"warning: heads that hold {best[0] / sum(map(sum, rows)):.1%}" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("change", "options", "scores"),
    [
        ("", ["--length", "400", "--window", "32"], {"attribution"}),
        ("", ["--period", "50"], {"echo", "induction"}),
        ("no tokenizer", ["--seeds", "0"], {"echo", "induction"}),
    ],
)
def test_method_by_default(tmp_path, monkeypatch, change, options, scores) -> None:
    """Attribution, the method of the options given, or the probe where it alone can be run."""
    model = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[2] / "models/needle/weights", model)
    if change:
        for file in model.glob("token*"):
            file.unlink()
    output = tmp_path / "new.json"
    razor(monkeypatch, "calibrate", model, "--output", output, "--seeds", "0", *options)
    assert set(read_profile(output).scores) == scores


@pytest.mark.parametrize(
    ("change", "method"),
    [
        ({}, "attribution"),
        ({"quantization_config": {"bits": 4}}, "probe"),
        ({"max_position_embeddings": 1000}, "probe"),
    ],
)
def test_method_by_default_of_a_configuration(tmp_path, change, method) -> None:
    """No gradients, or no room for a prompt: the probe."""
    model = tmp_path / "model"
    shutil.copytree(Path(__file__).parents[2] / "models/needle/weights", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **change}))
    assert default_method(str(model)) == method


def test_models_of_single_bytes_are_probed_by_default(model_dir) -> None:
    """A prompt has no room for its questions in their tokens."""
    assert default_method(str(model_dir)) == "probe"


def test_show_tells_of_windowed_prefill_what_the_scores_tell(files, monkeypatch, capsys) -> None:
    """A probe's profile gets a note, heads that hold little a warning, enough of them nothing."""
    said = {}
    for name, value in (("little", 0.1), ("enough", 0.0)):
        rows = tuple(
            tuple(1.0 if head in chosen else value for head in range(4))
            for chosen in PROFILE.retrieval_heads
        )
        held = HeadProfile(4, 4, 32, PROFILE.retrieval_heads, {"attribution": rows})
        write_profile(held, files / f"{name}.json")
    for name in ("good", "little", "enough"):
        razor(monkeypatch, "show", files / f"{name}.json")
        said[name] = capsys.readouterr().out
    assert "note: the probe alone" in said["good"]
    assert "warning: heads that hold 76.9% of the attribution score" in said["little"]
    assert "warning" not in said["enough"]
    assert "note" not in said["enough"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--induction", "nan"], "induction is nan"),
        (["--period", "50", "--mass", "0.9"], "--mass belongs to --method attribution"),
        (["--method", "attribution", "--echo", "0.1"], "--echo belongs to --method probe"),
        (["--method", "attribution", "--share", "0.5", "--count", "2"], "one of share, count"),
        (["--method", "attribution", "--text", "none"], "cannot read text none"),
        (["--echo", "-0.1"], "echo is -0.1"),
        (["--induction", "0", "--echo", "0"], "both 0"),
        (["--seeds", "0", "-1"], "seed is -1"),
        (["--epsilon", "0"], "epsilon is 0"),
        (["--window", "-1"], "window is -1"),
        (["--output", "."], "is a folder; a file is needed"),
        (["--period", "50", "--device-map", "nowhere"], "nowhere"),
        (["--device-map", "cuda:99"], "cuda:99"),
    ],
)
def test_calibrate_options_that_make_no_sense(
    tmp_path, model_dir, monkeypatch, capsys, options, message: str
) -> None:
    """Before the model is run, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    where = [] if "--output" in options else ["--output", "new.json"]
    assert message in refused(monkeypatch, capsys, "calibrate", model_dir, *where, *options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_nowhere(tmp_path, monkeypatch, capsys) -> None:
    """Neither a folder nor in the hub's cache: the line names it."""
    line = refused(
        monkeypatch, capsys, "calibrate", "no/such-model", "--output", tmp_path / "new.json"
    )
    assert "no/such-model" in line


def test_a_model_without_a_tokenizer_is_probed(model_dir, tmp_path, monkeypatch, capsys) -> None:
    """Weights alone: the probe draws from the vocabulary that the model's config has."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir / name, folder / name)
    razor(monkeypatch, "calibrate", folder, "--period", "50", "--seeds", "0")
    assert "KV heads retrieve" in capsys.readouterr().out
    profile = read_profile(folder / "razor_profile.json")
    assert max(x for row in profile.scores["induction"] for x in row) > 0


def test_an_alibi_model_is_bounded(tmp_path, monkeypatch, capsys) -> None:
    """Calibrating it needs no other command: the weights say how far its heads see."""
    config = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=50)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    razor(monkeypatch, "calibrate", tmp_path, "--window", "300", "--epsilon", "0.01")
    out = capsys.readouterr().out
    assert "they may see further than 300 tokens" in out
    profile = read_profile(tmp_path / "razor_profile.json")
    assert profile.made_by["window"] == 300
    assert [
        [head for head, reach in enumerate(row) if reach > 300] for row in profile.scores["reach"]
    ] == [list(row) for row in profile.retrieval_heads]
    razor(monkeypatch, "show", tmp_path / "razor_profile.json", "--png", tmp_path / "a.png")
    assert "reach" in capsys.readouterr().out
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    line = refused(monkeypatch, capsys, "calibrate", tmp_path, "--force")
    assert "0 weights called h.0.self_attention.query_key_value.weight" in line
    assert read_profile(tmp_path / "razor_profile.json") == profile


def test_a_model_with_sliding_layers_is_shown(files, monkeypatch, capsys) -> None:
    """Its layers are marked, and it is said whose bytes are counted."""
    razor(monkeypatch, "show", files / "sliding.json")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["0", "~~", "0%"]
    assert lines[3].split()[:3] == ["1", ".#", "50%"]
    assert "~ a layer without full attention: its memory is not counted below" in lines


def test_duo_sizes_are_read_and_passed_on(files, model_dir, monkeypatch, capsys) -> None:
    """What the pattern was made for is said as flags; a size that is none is refused."""
    folder = files / "duo"
    folder.mkdir()
    shutil.copy(files / "gates.tsv", folder / "full_attention_heads.tsv")
    sizes = {"sink_size": 128, "recent_size": 256, "lr": 0.02}
    (folder / "config.json").write_text(json.dumps(sizes), encoding="utf-8")
    output = files / "new.json"
    command = ["convert", folder, "--model", model_dir, "--output", output, "--share", "0.5"]
    razor(monkeypatch, *command)
    assert "made for --razor-sinks 128 --razor-window 256" in capsys.readouterr().out
    assert read_profile(output).made_by["made_for"] == {"sinks": 128, "window": 256}
    (folder / "config.json").write_text('{"sink_size": -1}', encoding="utf-8")
    assert "sink_size -1 is negative" in refused(monkeypatch, capsys, *command, "--force")

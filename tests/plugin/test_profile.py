"""The head profile file: every way in which it can be wrong is one clear line."""

import json
from pathlib import Path
from typing import Any

import pytest

from razor_vllm.heads import profile as profile_module
from razor_vllm.heads.profile import (
    MAX_BYTES,
    HeadProfile,
    cache_path,
    locate_profile,
    read_profile,
    write_profile,
)

GOOD: dict[str, Any] = {
    "format": "razor-head-profile",
    "version": 1,
    "model": {"num_layers": 2, "num_kv_heads": 2, "head_size": 16},
    "retrieval_heads": [[0], []],
    "scores": {"induction": [[0.5, 0.1], [0, 0.2]]},
    "made_by": {"method": "by hand"},
}


def write(folder: Path, data: Any) -> Path:
    path = folder / "razor_profile.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def test_a_profile_survives_the_file(tmp_path: Path) -> None:
    """What is written is read."""
    profile = read_profile(write(tmp_path, GOOD))
    assert profile.retrieval_heads == ((0,), ())
    assert profile.local_heads(0) == (1,)
    assert profile.local_heads(1) == (0, 1)
    assert read_profile(write(tmp_path, profile.to_json())) == profile


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "format is 'other'; accepted is 'razor-head-profile'"),
        ({"version": 2}, "version is 2; accepted is 1"),
        ({"version": True}, "version is True"),
        ({"extra": 1}, "unknown keys extra"),
        ({"model": {"num_layers": 2}}, "model lacks num_kv_heads, head_size"),
        ({"model": {**GOOD["model"], "num_layers": 0}}, "num_layers is 0"),
        ({"model": {**GOOD["model"], "head_size": 1.5}}, "head_size is 1.5"),
        ({"model": []}, "model is not an object"),
        ({"retrieval_heads": [[0]]}, "has 1 layers, the model has 2"),
        ({"retrieval_heads": [[0], [2]]}, "layer 1: head 2 is outside 0..1"),
        ({"retrieval_heads": [[0], [-1]]}, "layer 1: head -1 is outside 0..1"),
        ({"retrieval_heads": [[1, 0], []]}, "not sorted and unique"),
        ({"retrieval_heads": [[0, 0], []]}, "not sorted and unique"),
        ({"retrieval_heads": [["0"], []]}, "head '0' is not a whole number"),
        ({"retrieval_heads": [[True], []]}, "head True is not a whole number"),
        ({"retrieval_heads": "all"}, "retrieval_heads is not a list of lists"),
        ({"scores": {"echo": [[1, 2]]}}, "scores 'echo' are not 2 rows of 2"),
        ({"scores": {"echo": [[1, 2], [3]]}}, "scores 'echo' are not 2 rows of 2"),
        ({"scores": {"echo": [[1, 2], [3, -4]]}}, "-4 is not finite and >= 0"),
        ({"scores": {"echo": [[1, 2], [3, "x"]]}}, "scores 'echo', layer 1: 'x'"),
        ({"scores": [1]}, "scores is not an object"),
        ({"made_by": "me"}, "made_by is not an object"),
        ({"other_layers": 1}, "other_layers is not a list"),
        ({"other_layers": [2]}, "other layer 2 is outside 0..1"),
        ({"other_layers": ["1"]}, "other layer '1' is not a whole number"),
        ({"other_layers": [1, 1]}, "other_layers [1, 1] are not sorted and unique"),
        ({"other_layers": [0]}, "layer 0 is no full attention, and has retrieval heads"),
        ({"retrieval_heads": [[], []], "other_layers": [0, 1]}, "other_layers are all layers"),
    ],
)
def test_contents_that_do_not_fit_are_named(tmp_path: Path, change, message: str) -> None:
    """Version, shape, heads and scores are all checked."""
    path = write(tmp_path, {**GOOD, **change})
    with pytest.raises(ValueError) as error:
        read_profile(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_kept_shares_are_counted_per_layer_and_in_all(tmp_path: Path) -> None:
    """Of the heads of layers with full attention; others have none that count."""
    profile = HeadProfile(3, 4, 16, ((0, 2, 3), (), (1,)), other_layers=(1,))
    assert profile.kept_shares == (0.75, 0.0, 0.25)
    assert profile.kept_share == 4 / 8
    assert profile.full_layers == (0, 2)
    write_profile(profile, tmp_path / "p.json")
    assert read_profile(tmp_path / "p.json") == profile
    text = (tmp_path / "p.json").read_text().replace("other_layers", "sliding_layers")
    (tmp_path / "old.json").write_text(text)
    assert read_profile(tmp_path / "old.json") == profile


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    """Where a write fails, the old file stays as it was and nothing else lies beside it."""
    path = write(tmp_path, GOOD)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_profile(read_profile(path), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[1, 2]", "not an object"),
        ('{"format": "razor-head-pro', "Unterminated string"),
        (json.dumps(GOOD).replace("0.5", "NaN"), "NaN is not a number"),
        (json.dumps(GOOD).replace("0.5", "Infinity"), "Infinity is not a number"),
        ("[" * 100_000, "nested too deeply"),
        ("\ufeff" + json.dumps(GOOD), "BOM"),
        ("cposix\nsystem\n(S'touch /tmp/razor-pwned'\ntR.", "Expecting value"),
    ],
    ids=["empty", "list", "cut", "nan", "inf", "deep", "bom", "pickle"],
)
def test_text_that_is_no_profile_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Nothing is unpickled, nothing is guessed."""
    with pytest.raises(ValueError, match=message):
        read_profile(write(tmp_path, text))
    assert not Path("/tmp/razor-pwned").exists()


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """Missing, a folder, not text, too large."""
    with pytest.raises(ValueError, match="No such file"):
        read_profile(tmp_path / "none.json")
    with pytest.raises(ValueError, match="Is a directory"):
        read_profile(tmp_path)
    (tmp_path / "raw.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="codec can't decode"):
        read_profile(tmp_path / "raw.json")
    (tmp_path / "big.json").write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ValueError, match="over 16 MB"):
        read_profile(tmp_path / "big.json")


def test_a_profile_of_another_model_is_refused() -> None:
    """Layers, KV heads, head size, and which layers have full attention, are the fingerprint."""
    profile = HeadProfile(2, 2, 16, ((0,), ()))
    profile.check_model(2, 2, 16, [0, 1])
    with pytest.raises(ValueError, match="layers are 0, 1; this model's are 1"):
        profile.check_model(2, 2, 16, [1])
    with pytest.raises(
        ValueError, match="of 2 layers, 2 KV heads and head size 16; this model has 32, 8 and 128"
    ):
        profile.check_model(32, 8, 128, range(32))


def test_the_profile_lies_beside_the_weights_or_in_the_cache(tmp_path: Path, monkeypatch) -> None:
    """Without a path it is looked for there, and the refusal says the command to run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"razor calibrate {tmp_path} "):
        locate_profile(None, str(tmp_path))
    with pytest.raises(ValueError, match="razor calibrate some/model "):
        locate_profile(None, "some/model")
    profile = HeadProfile(2, 2, 16, ((0,), ()))
    for model in ("some/model", str(tmp_path)):
        write_profile(profile, cache_path(model))
        assert locate_profile(None, model) == cache_path(model)
        assert read_profile(cache_path(model)) == profile
    assert cache_path("some/model") != cache_path(str(tmp_path))
    path = write(tmp_path, GOOD)
    assert locate_profile(None, str(tmp_path)) == path
    assert locate_profile("/else/where.json", str(tmp_path)) == Path("/else/where.json")


def test_a_revision_has_a_profile_of_its_own(tmp_path: Path, monkeypatch) -> None:
    """Beside that revision's weights or under its own name: never the main branch's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def snapshot(model: str, name: str, revision: str | None = None) -> str | None:
        asked.append(revision)
        folder = tmp_path / "hub" / (revision or "main")
        return str(folder / name) if folder.is_dir() else None

    monkeypatch.setattr(profile_module, "try_to_load_from_cache", snapshot)
    profile = HeadProfile(2, 2, 16, ((0,), ()))
    write_profile(profile, cache_path("org/m"))
    main = tmp_path / "hub" / "main" / "razor_profile.json"
    write_profile(profile, main)
    assert locate_profile(None, "org/m") == main
    with pytest.raises(ValueError, match="razor calibrate org/m --revision B "):
        locate_profile(None, "org/m", "B")
    write_profile(profile, cache_path("org/m", "B"))
    assert locate_profile(None, "org/m", "B") == cache_path("org/m", "B") != cache_path("org/m")
    own = tmp_path / "hub" / "B" / "razor_profile.json"
    write_profile(profile, own)
    assert locate_profile(None, "org/m", "B") == own
    assert "B" in asked
    # A folder has no revisions.
    assert cache_path(str(tmp_path), "B") == cache_path(str(tmp_path))

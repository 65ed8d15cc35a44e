"""Published head patterns, in and out."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from razor_vllm.heads.convert import (
    ModelShape,
    Selection,
    convert,
    scores_of_ranking,
    select,
    write_duo,
)

SHAPE = ModelShape(num_layers=2, num_heads=4, num_kv_heads=2, head_size=16)
PUBLISHED = Path(__file__).parents[3] / "shared" / "head_patterns"
published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published patterns are not here")


def file(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_text(text, encoding="utf-8")
    return path


def test_gates_are_chosen_by_share_or_threshold(tmp_path: Path) -> None:
    """A share is of all heads, upward; ties go to the lower layer and head."""
    gates = "0.9\t0.5\n0.5\t0.1\n"
    path = file(tmp_path, "full_attention_heads.tsv", gates)
    assert convert(path, SHAPE, Selection(share=0.5)).retrieval_heads == ((0, 1), ())
    assert convert(tmp_path, SHAPE, Selection(share=0.51)).retrieval_heads == ((0, 1), (0,))
    profile = convert(tmp_path, SHAPE, Selection(threshold=0.5))
    assert profile.retrieval_heads == ((0, 1), (0,))
    assert profile.scores == {"gate": ((0.9, 0.5), (0.5, 0.1))}
    with pytest.raises(ValueError, match="one of --share and --threshold"):
        convert(path, SHAPE, Selection())


def test_sets_are_taken_as_they_are(tmp_path: Path) -> None:
    """0/1 rows, msModelSlim's file, GoldenStick's JSON."""
    rows = file(tmp_path, "set.tsv", "0.0\t1.0\n1.0\t0.0\n")
    assert convert(rows, SHAPE, Selection()).retrieval_heads == ((1,), (0,))
    torch.save({"prefix_matching": {0: [1]}, "copying": {0: [0], 1: [1]}}, tmp_path / "h.pt")
    assert convert(tmp_path / "h.pt", SHAPE, Selection()).retrieval_heads == ((0, 1), (1,))
    golden = file(tmp_path, "golden.json", {"1": [1, 0]})
    assert convert(golden, SHAPE, Selection()).retrieval_heads == ((), (0, 1))


def test_a_ranking_scores_the_best_of_a_group(tmp_path: Path) -> None:
    """HeadKV scores query heads, in lists: means, then the maximum over a KV group."""
    ranking = {f"{at}-{h}": [at + h / 10, at + h / 10] for at in (0, 1) for h in range(4)}
    assert scores_of_ranking(ranking, SHAPE) == ((0.1, 0.3), (1.1, 1.3))
    path = file(tmp_path, "headkv.json", ranking)
    assert convert(path, SHAPE, Selection(share=0.25)).retrieval_heads == ((), (1,))


def test_a_profile_goes_out_and_comes_back(tmp_path: Path) -> None:
    """DuoAttention's form holds the same choice."""
    golden = file(tmp_path, "golden.json", {"0": [0], "1": [0, 1]})
    profile = convert(golden, SHAPE, Selection())
    write_duo(profile, tmp_path, sinks=4, window=256)
    assert convert(tmp_path, SHAPE, Selection()).retrieval_heads == profile.retrieval_heads
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "sink_size": 4,
        "recent_size": 256,
    }


class Hostile:
    def __reduce__(self):
        return (Path("/tmp/razor-pwned").touch, ())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "holds no rows"),
        ("a.tsv", "0.1\t0.2\n0.3\n", "rows differ in length"),
        ("a.tsv", "0.1,0.2\n0.3,0.4\n", "is not numbers with tabs between"),
        ("a.tsv", "\ufeff0.1\t0.2\n", "byte-order mark"),
        ("a.tsv", "nan\t0.2\n0\t0\n", "line 1: gates lie in 0 to 1"),
        ("a.tsv", "-0.1\t0.2\n0\t0\n", "line 1: gates lie in 0 to 1"),
        ("a.tsv", "0.1\t0.2\n", "has 1 layers of 2 KV heads; the model has 2 of 2"),
        ("a.tsv", "0.1\t0.2\t0.3\n" * 2, "has 2 layers of 3 KV heads"),
        ("a.tsv", "0\n1\n", "has 2 layers of 1 KV heads"),
        ("a.tsv", b"\xff\xfe\x00", "codec can't decode"),
        ("a.pt", pickle.dumps(Hostile()), "it was not run"),
        ("a.pt", b"PK\x03\x04 cut", "it was not run"),
        ("a.json", "[1]", "is not an object"),
        ("a.json", '{"0": [5]}', "head 5 is outside 0..1"),
        ("a.json", '{"7": [0]}', "layer 7 is outside 0..1"),
        ("a.json", '{"0": 1}', "is not a list of KV heads"),
        ("a.json", '{"0": [NaN]}', "NaN is not a number"),
        ("a.json", '{"0-0": [1]}', "scores of 7 heads are missing, 0-1 first"),
        ("a.json", '{"0-9": [1]}', "head '0-9' is not one of the model's"),
        ("a.json", '{"0-0": [-1]}', "finite and not negative"),
        ("a.csv", "1", "accepted are .tsv, .pt, .json"),
        ("a.json", " " * (16 * 1024 * 1024 + 1), "over 16 MB"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(tmp_path, name, content, message: str) -> None:
    """Truncated, over-large and hostile files; nothing is run."""
    path = file(tmp_path, name, content)
    with pytest.raises(ValueError) as error:
        convert(path, SHAPE, Selection(share=0.5))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert not Path("/tmp/razor-pwned").exists()


def test_shares_that_make_no_sense_are_refused() -> None:
    """More heads than there are, or none."""
    for share in (0.0, 1.1, -0.2):
        with pytest.raises(ValueError, match="share is"):
            select(((0.5,),), Selection(share=share))


@published
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Llama-2-7B-32K-Instruct", ModelShape(32, 32, 32, 128)),
        ("Meta-Llama-3.1-8B-Instruct", ModelShape(32, 32, 8, 128)),
        ("Mistral-7B-Instruct-v0.3", ModelShape(32, 32, 8, 128)),
    ],
)
def test_published_gates_are_read(name: str, shape: ModelShape) -> None:
    """DuoAttention's files, half of the heads kept."""
    profile = convert(PUBLISHED / "duo_attention" / name, shape, Selection(share=0.5))
    assert profile.num_retrieval_heads == profile.num_heads // 2


@published
@pytest.mark.parametrize(
    ("name", "shape", "heads"),
    [
        ("llama3.1-8b-chat-32k.number-14-1.tsv", ModelShape(32, 32, 8, 128), 38),
        ("qwen-2.5-chat-7b.number-14-1.tsv", ModelShape(28, 28, 4, 128), 17),
        ("qwen-2.5-chat-14b.number-14-1.tsv", ModelShape(48, 40, 8, 128), 57),
        ("qwq-32b.number-14-1.tsv", ModelShape(64, 40, 8, 128), 76),
    ],
)
def test_published_sets_are_read(name: str, shape: ModelShape, heads: int) -> None:
    """Sets found with RazorAttention's scores."""
    profile = convert(PUBLISHED / "razor" / name, shape, Selection())
    assert profile.num_retrieval_heads == heads

"""What a text costs: which tokens are counted, and that the served figures are the model's."""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from benchmarks import nats
from benchmarks.served_model import EngineModel, open_engine, set_environment
from models.needle.language import draw_prose, render

WEIGHTS = Path(__file__).parents[2] / "models" / "needle" / "weights"
LENGTH, DECODED, SAMPLES = 320, 24, 2


def test_repeated_texts_are_told_twice() -> None:
    """Plain texts follow one another; a repeated one is the first half of each, twice."""
    kinds = nats.cut(range(25), 8, 3)
    assert kinds["plain"] == {str(i): list(range(8 * i, 8 * i + 8)) for i in range(3)}
    assert kinds["repeated"]["1"] == [8, 9, 10, 11] * 2


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(ValueError, match="has 23 tokens; 3 samples of 8 tokens need 24"):
        nats.cut(range(23), 8, 3)


def test_a_summary_compares_token_by_token() -> None:
    found = nats.summary({"a": [1.0, 2.0], "b": [3.0, 4.0]}, {"a": [1.5, 2.5], "b": [3.5, 4.5]})
    assert (found["full"], found["razor"], found["difference"]) == (2.5, 3.0, 0.5)
    assert found["interval"] == [0.5, 0.5]
    assert (found["tokens"], found["texts"]) == (4, 2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    """The needle model under exact prefill, with a window that is shorter than the texts."""
    set_environment()
    from benchmarks.forced_tokens import ForcedTokens

    razor = {"head_profile": str(WEIGHTS / "razor_profile.json"), "window": 32, "sinks": 4}
    options = {
        "dtype": "float32",
        "max_model_len": LENGTH + 1,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 * 1024**2,
        "logits_processors": [ForcedTokens],
    }
    with open_engine(str(WEIGHTS), razor, **options) as model:
        yield model


def test_nats_are_those_of_the_model(engine: EngineModel, tmp_path: Path) -> None:
    """The full policy's are transformers', both ways; exact prefill adds none, decoding does."""
    import random

    text = tmp_path / "text.txt"
    words = [word for sentence in draw_prose(random.Random(0), 700) for word in sentence]
    text.write_text(render(words))
    args = argparse.Namespace(text=text, length=LENGTH, decoded=DECODED, samples=SAMPLES)
    found = nats.measure(engine, args)
    ids = engine.tokenizer.encode(text.read_text(), add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    for kind, named in nats.cut(ids, LENGTH, SAMPLES).items():
        tokens = torch.tensor(list(named.values()))
        with torch.no_grad():
            logits = model(tokens).logits[:, :-1]
        costs = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        counted = {"prefill": costs[:, LENGTH // 2 - 1 :], "decode": costs[:, -DECODED:]}
        for way, expected in counted.items():
            row = found[f"{kind}, {way}"]
            assert row["full"] == pytest.approx(expected.mean().item(), abs=1e-3)
            assert row["tokens"] == expected.numel()
    assert abs(found["repeated, prefill"]["difference"]) < 1e-4
    assert found["plain, decode"]["difference"] != 0.0

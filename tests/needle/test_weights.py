"""The shipped model: small, whole, and as good as its card says, on fewer samples."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks import needle
from benchmarks.served_model import EngineModel, open_engine
from models.needle.language import draw_facts, haystack, render
from razor_vllm.profile import FILE_NAME, read_profile

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "models" / "needle" / "weights"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ENGINE = {
    "dtype": "float32",
    "max_model_len": 4608,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 256 * 1024**2,
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS)


def test_model_is_small_but_has_heads_to_choose_from() -> None:
    config = AutoConfig.from_pretrained(WEIGHTS)
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 12 * 1024**2
    assert config.num_hidden_layers >= 4
    assert config.num_hidden_layers * config.num_key_value_heads >= 16
    assert config.num_attention_heads > config.num_key_value_heads
    assert config.max_position_embeddings >= 16384


@pytest.mark.parametrize("length", [512, 4096])
@pytest.mark.parametrize("num_facts", [1, 5])
def test_codes_are_told_at_every_depth(model, tokenizer, length: int, num_facts: int) -> None:
    """Full attention, every depth: the code is what greedy decoding says."""
    right = 0
    for index, depth in enumerate(DEPTHS):
        rng = random.Random(f"weights/{length}/{num_facts}/{index}")
        facts = draw_facts(rng, num_facts)
        depths = [depth, *(rng.random() for _ in facts[1:])]
        text = render([*haystack(rng, facts, length - 12, depths), *facts[0].question()])
        chat = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": " ".join(facts[0].digits)},
        ]
        ids = torch.tensor([tokenizer.apply_chat_template(chat, return_dict=False)])
        assert ids.shape[1] == length + 5
        with torch.no_grad():
            guesses = model(ids).logits[0].argmax(-1)
        # Greedy decoding gives the answer if every token of it is the first guess.
        right += guesses[-6:-1].equal(ids[0, -5:])
    assert right >= len(DEPTHS) - (num_facts > 1)


@pytest.fixture(scope="module")
def trials() -> list[needle.Trial]:
    grid = needle.Grid(("single",), (4096,), tuple(i / 8 for i in range(9)), 1, 0)
    # One token a word; <bos>, <user>, <assistant> and the question come on top.
    return needle.draw_trials(grid, needle.Sizing(1.0, 12.0))


def accuracy(model: EngineModel, trials: list[needle.Trial], policy: str = "razor") -> float:
    chats = [[needle.opening(t.text, t.questions[0].fact)] for t in trials]
    replies = model.reply(chats, 8, policy, lambda: None)
    judged = [needle.judge(t, 0, reply) for t, reply in zip(trials, replies, strict=True)]
    return sum(j.right for j in judged) / len(judged)


@pytest.mark.engine
def test_retrieval_heads_carry_the_accuracy(tmp_path: Path, trials: list[needle.Trial]) -> None:
    """At 4,096 tokens, windows of 1/16 of the context or less, 25 % of KV heads or fewer:
    razor answers as the full policy does, and sinks and a window alone do not."""
    path = WEIGHTS / FILE_NAME
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    profile = read_profile(path)
    assert profile.num_retrieval_heads <= profile.num_heads / 4
    razor = {"head_profile": str(path), "window": 128, "sinks": 4}
    with open_engine(str(WEIGHTS), razor, **ENGINE) as served:
        full = accuracy(served, trials, "full")
        kept = accuracy(served, trials)
    assert full >= 0.85
    assert kept >= 0.99 * full
    none = tmp_path / "none.json"
    none.write_text(needle.with_heads(profile, [], "none").to_json(), encoding="utf-8")
    razor |= {
        "head_profile": str(none),
        "compensation": False,
        "allow_no_retrieval_heads": True,
    }
    with open_engine(str(WEIGHTS), razor, **ENGINE) as served:
        assert accuracy(served, trials) <= 0.2


def test_card_and_results_say_the_same() -> None:
    """The figures of the model card are those of the results file beside it."""
    scores = json.loads((WEIGHTS / "scores.json").read_text(encoding="utf-8"))
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    for kind, accuracies in scores["policies"]["full"]["accuracy"].items():
        row = " | ".join(f"{share:.1%}" for share in accuracies["by_length"].values())
        assert f"| {kind} | {row} |" in card

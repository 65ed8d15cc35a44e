"""Kinds of attention beside rotary bf16: ALiBi, logit soft-cap, a quantized cache."""

from pathlib import Path

import hybrids
import pytest
import torch
from engines import Answer, answers, caches, engine, profile_file, prompts
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM

pytestmark = pytest.mark.engine

NUM_LAYERS, NUM_KV_HEADS = 2, 4


def make_bloom(folder: Path) -> Path:
    """ALiBi; as many KV heads as heads, 6 of them: no power of two."""
    config = BloomConfig(vocab_size=300, hidden_size=6 * 32, n_layer=NUM_LAYERS, n_head=6)
    BloomForCausalLM(config).apply(_spread).save_pretrained(folder)
    return folder


def make_gemma(folder: Path) -> Path:
    """A soft-cap low enough to bend every logit."""
    config = Gemma2Config(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=32,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=3.0,
        layer_types=["full_attention"] * NUM_LAYERS,
        sliding_window=None,
    )
    Gemma2ForCausalLM(config).apply(_spread).save_pretrained(folder)
    return folder


def _spread(module: torch.nn.Module) -> None:
    """Weights wide enough that no two tokens are as likely."""
    for weight in module.parameters(recurse=False):
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.15)


KINDS = {"alibi": (make_bloom, 6), "soft-cap": (make_gemma, 4)}
OPTIONS = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 256}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dropped_is_stock(kind: str, tmp_path: Path) -> None:
    """Invariant 1 with ALiBi and with a soft-cap; and once heads drop, the answers differ."""
    torch.manual_seed(0)
    make, num_heads = KINDS[kind]
    model = make(tmp_path / kind)
    requests = prompts([1, 40, 300, 700], seed=3)
    with engine(model, None, **OPTIONS) as llm:
        stock = answers(llm, requests)
    every = [list(range(num_heads))] * NUM_LAYERS
    some = [[0, 2]] * NUM_LAYERS
    found = {}
    for name, heads, window in (("all", every, 64), ("wide", some, 1024), ("narrow", some, 32)):
        razor = {
            "head_profile": profile_file(tmp_path, heads, shape=(NUM_LAYERS, num_heads, 32)),
            "window": window,
        }
        with engine(model, razor, **OPTIONS) as llm:
            found[name] = answers(llm, requests)
    for name in ("all", "wide"):
        assert [a.tokens for a in found[name]] == [a.tokens for a in stock], name
    rounding, moved = moved_by(stock, found["wide"]), moved_by(found["wide"], found["narrow"])
    assert moved > 20 * rounding, f"a window of 32 in 700 tokens moves {moved}, rounding {rounding}"


def moved_by(one: list[Answer], other: list[Answer]) -> float:
    """How far the log-probability of the first token decoded is moved, at most."""
    return max(abs(a.logprobs[1] - b.logprobs[1]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt-oss"])
def test_fp8_cache(kind: str, model_dir: Path, tmp_path: Path) -> None:
    """`--kv-cache-dtype fp8` stores a byte a number, and costs rounding only.

    The kernels' tests hold it against the oracle of what is stored; here the first token's
    log-probability is near the unquantized one's. Sliding layers of hybrids are vLLM's own.
    """
    requests = prompts([40, 300, 900], seed=5)
    model, options = model_dir, {"max_model_len": 1024}
    profile = profile_file(tmp_path, [[0]] * 4)
    if kind != "llama":
        model, options = hybrids.make(kind, tmp_path / kind), OPTIONS
        profile = hybrids.write(hybrids.some_heads(model), tmp_path, "profile")
    razor = {"head_profile": profile, "window": 1024}
    found = {}
    for dtype in ("auto", "fp8"):
        with engine(model, razor, kv_cache_dtype=dtype, **options) as llm:
            found[dtype] = answers(llm, requests, max_tokens=1)
            sizes = {name: cache.element_size() for name, cache in caches(llm)}
            assert "razor.layers.1.local" in sizes
            assert set(sizes.values()) == {1 if dtype == "fp8" else 4}
    pairs = zip(found["fp8"], found["auto"], strict=True)
    errors = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in pairs]
    assert 0 < sum(errors) / len(errors) < 0.15

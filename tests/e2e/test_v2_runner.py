"""The V2 model runner, the default on CUDA: the same tokens as the V1 runner's."""

from pathlib import Path
from typing import Any

import hybrids
import pytest
from engines import (
    GENERATION_PROMPT,
    SOME_HEADS,
    answers,
    engine,
    profile_file,
    prompts,
    run_v2,
)

pytestmark = pytest.mark.engine

LENGTHS = [1, 33, 96, 150]
FULL = {"extra_args": {"kv_policy": "full"}}
OPTIONS = {"max_model_len": 512, "max_num_batched_tokens": 64, "max_num_seqs": 4}


@pytest.mark.parametrize(
    ("prefill", "kernels", "lengths", "max_tokens"),
    [
        ("exact", "native", LENGTHS, 12),
        ("windowed", "native", LENGTHS, 12),
        # Interpreted: few tokens, but chunks, a full page, a moved window and a hit.
        ("exact", "triton", [1, 100], 4),
        ("windowed", "triton", [1, 100], 4),
    ],
)
def test_v2_runner_answers_as_v1(
    model_dir: Path,
    tmp_path: Path,
    prefill: str,
    kernels: str,
    lengths: list[int],
    max_tokens: int,
) -> None:
    """Cache misses, cache hits and opt-out requests, on both runners.

    V2's attention runs in Triton, interpreted, or natively; V1's natively.
    """
    razor = {
        "head_profile": profile_file(tmp_path, SOME_HEADS),
        "window": 32,
        "prefill": prefill,
    }
    rounds: list[dict[str, Any]] = [{}, {}, FULL]
    job = {
        "razor": razor,
        "options": OPTIONS,
        "lengths": lengths,
        "max_tokens": max_tokens,
        "rounds": rounds,
    }
    result = run_v2(model_dir, job, kernels)
    assert result["form"] == {"triton": "TritonForm", "native": "NativeForm"}[kernels]
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner", "not the V2 runner"
    assert result["free"]
    with engine(model_dir, razor, **OPTIONS) as llm:
        for got, sampling in zip(result["rounds"], rounds, strict=True):
            want = answers(llm, prompts(lengths), max_tokens, **sampling)
            assert [tokens for tokens, _ in got] == [list(a.tokens) for a in want]
            for (_, logprobs), answer in zip(got, want, strict=True):
                assert logprobs == pytest.approx(answer.logprobs, abs=2e-2)


@pytest.mark.parametrize(("kernels", "lengths"), [("native", [33, 150]), ("triton", [70])])
def test_v2_runner_holds_chats(model_dir: Path, kernels: str, lengths: list[int]) -> None:
    """Chat mode, turn by turn with the cache: each turn as V1 answers it alone without."""
    razor = {"window": 32, "prefill": "chat"}
    max_tokens = 4 if kernels == "triton" else 40
    chats = [[*p["prompt_token_ids"][:-1], GENERATION_PROMPT] for p in prompts(lengths)]
    job: dict[str, Any] = {"razor": razor, "options": OPTIONS, "rounds": [], "chats": chats}
    result = run_v2(model_dir, {**job, "max_tokens": max_tokens}, kernels)
    assert result["free"]
    assert all(cached > 0 for _, _, cached in result["chats"][-len(chats) :])
    with engine(model_dir, razor, enable_prefix_caching=False, **OPTIONS) as llm:
        for prompt, (tokens, logprobs), _ in result["chats"]:
            (alone,) = answers(llm, [{"prompt_token_ids": prompt}], max_tokens)
            assert tokens == list(alone.tokens)
            assert logprobs == pytest.approx(alone.logprobs, abs=2e-2)


@pytest.mark.parametrize(("kind", "error"), [("gpt-oss", 1e-4), ("qwen3-next", 5e-2)])
def test_v2_runner_serves_a_hybrid(kind: str, error: float, tmp_path: Path) -> None:
    """One runner's tokens are the other's, missed and hit, and with the policy full.

    Qwen3-Next in bf16, its states taken up from the cache.
    """
    model = hybrids.make(kind, tmp_path / kind)
    profile = hybrids.write(hybrids.some_heads(model), tmp_path, "profile")
    razor = {"head_profile": profile, "window": 48}
    options = {**OPTIONS, "skip_tokenizer_init": True}
    lengths = LENGTHS
    if kind == "qwen3-next":
        options |= {"dtype": "bfloat16", "enable_prefix_caching": True}
        lengths = [1, 450]  # pages are long
    rounds: list[dict[str, Any]] = [{}, {}, FULL]
    job = {"razor": razor, "options": options, "lengths": lengths, "max_tokens": 12}
    result = run_v2(model, {**job, "rounds": rounds}, "native")
    assert result["runner"] == "vllm.v1.worker.cpu.model_runner", "not the V2 runner"
    assert result["free"]
    with engine(model, razor, **options) as llm:
        for got, sampling in zip(result["rounds"], rounds, strict=True):
            want = answers(llm, prompts(lengths), 12, **sampling)
            assert [tokens for tokens, _ in got] == [list(a.tokens) for a in want]
            for (_, logprobs), answer in zip(got, want, strict=True):
                assert logprobs == pytest.approx(answer.logprobs, abs=error)


def test_v2_runner_survives_preemption(model_dir: Path) -> None:
    """A pool too small for all: the V2 runner recomputes, and answers as V1 with room."""
    razor = {"window": 32}
    options = {**OPTIONS, "max_model_len": 200}
    job = {
        "razor": razor,
        "options": {**options, "num_gpu_blocks_override": 14},
        "lengths": [60, 70, 80],
        "max_tokens": 60,
        "rounds": [{}],
    }
    result = run_v2(model_dir, job, "native")
    assert result["free"]
    assert result["preemptions"] > 0
    with engine(model_dir, razor, **options) as llm:
        want = answers(llm, prompts(job["lengths"]), job["max_tokens"])
    got = result["rounds"][0]
    assert [tokens for tokens, _ in got] == [list(answer.tokens) for answer in want]

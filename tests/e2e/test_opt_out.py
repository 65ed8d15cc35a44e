"""Requests that opt out: bounded, and apart from others. Requests that ask for nonsense."""

import json
from pathlib import Path
from typing import Any

import pytest
from engines import answers, engine, manager_of, prompts, run_script
from vllm.exceptions import VLLMValidationError

pytestmark = pytest.mark.engine

FULL = {"extra_args": {"kv_policy": "full"}}
SMALL = {
    "max_model_len": 4096,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 8_000_000,
}
"""Too small for one whole uncompressed request."""


def longest_dense(llm: Any) -> int:
    return llm.llm_engine.engine_core.engine_core.razor_memory()["dense_limits"][0]


def test_what_can_never_fit_is_refused(model_dir: Path) -> None:
    """Windowed: a prompt too long for the pools without compression is refused, and says so.

    An answer too long ends by length, two such requests at a time both end, and with
    compression the same prompt is served.
    """
    with engine(model_dir, {"window": 64, "prefill": "windowed"}, **SMALL) as llm:
        longest = longest_dense(llm)
        assert 500 < longest < 3000
        with pytest.raises(
            VLLMValidationError, match=rf"holds prompt and answer of up to {longest} tokens"
        ):
            answers(llm, prompts([longest]), 1, **FULL)
        long = prompts([longest - 5, longest - 40], seed=1)
        found = answers(llm, long, 60, **FULL)
        assert [len(answer.tokens) for answer in found] == [5, 40]
        assert len(answers(llm, prompts([longest + 500]), 4)[0].tokens) == 4
        pool = manager_of(llm).block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    with engine(model_dir, max_model_len=4096) as llm:
        stock = answers(llm, long, 40)
    assert [a.tokens for a in found] == [stock[0].tokens[:5], stock[1].tokens]


@pytest.mark.parametrize("salt", ["razor_dense_part", "full"])
def test_no_salt_reaches_pages_that_opted_out(model_dir: Path, salt: str) -> None:
    """The same prompt under a salt like ours finds no page of the request that opted out."""
    from vllm import SamplingParams

    (prompt,) = prompts([400])
    with engine(model_dir, {"window": 64, "prefill": "windowed"}, max_model_len=1024) as llm:
        plain = answers(llm, [prompt], 4)
        llm.reset_prefix_cache()
        answers(llm, [prompt], 4, **FULL)
        answers(llm, [{**prompt, "cache_salt": salt}], 4, **FULL)
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        for tried in ({**prompt, "cache_salt": salt}, prompt):
            (result,) = llm.generate([tried], params, use_tqdm=False)
            assert result.num_cached_tokens == 0
            assert tuple(result.outputs[0].token_ids) == plain[0].tokens
        # The salt itself still works: the second request under it finds the first one's pages.
        (result,) = llm.generate([{**prompt, "cache_salt": salt}], params, use_tqdm=False)
        assert result.num_cached_tokens > 0


def test_a_bad_request_ends_alone(model_dir: Path) -> None:
    """A front end that checks nothing: the engine answers the request, and serves the others."""
    bad = [
        {"kv_policy": "x"},
        {"kv_policy": ["full"]},
        {"kv_dense_tokens": 51},
        {"kv_dense_tokens": True},
        {"kv_dense_tokens": 0, "kv_policy": "full"},
    ]
    job = {"razor": {"window": 64}, "bad": bad}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    result = run_script("unchecked_requests.py", model_dir, job, env)
    errors = {f"bad-{number}": "error" for number in range(len(bad))}
    assert result["reasons"] == {"good": "length", **errors}
    assert result["later"] == 8, json.dumps(result)

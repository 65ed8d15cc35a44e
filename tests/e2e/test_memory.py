"""What requests really hold, read from vLLM's block pool."""

from pathlib import Path

import hybrids
import pytest
from engines import caches, engine, manager_of, prompts
from vllm import SamplingParams

from razor_kernels import DENSE_FOREVER
from razor_vllm.report import plan_of

pytestmark = pytest.mark.engine

LENGTH = 4096
RAZOR = {"window": 256}  # the bundled profile: 25 % retrieval heads
POOL_BYTES = 40 * 1024**2


def held_bytes(llm) -> int:
    """Bytes of all pages that requests hold now."""
    config = manager_of(llm).kv_cache_config
    pool = manager_of(llm).block_pool
    size = config.kv_cache_tensors[0].size // config.num_blocks
    return (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * size


def running(llm) -> list:
    return llm.llm_engine.engine_core.engine_core.scheduler.running


def start(llm, count: int) -> None:
    """Add requests of LENGTH tokens, the last few of them generated."""
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    for index, prompt in enumerate(prompts([LENGTH - 32] * count, seed=3)):
        llm.llm_engine.add_request(str(index), prompt, params)


def bytes_of_one(llm) -> int:
    """Bytes that one request holds once it has LENGTH tokens."""
    start(llm, 1)
    while True:
        llm.llm_engine.step()
        if running(llm)[0].num_tokens == LENGTH:
            return held_bytes(llm)


def most_resident(llm, count: int = 8) -> int:
    """Most requests that decode at one time."""
    start(llm, count)
    most = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        most = max(most, sum(r.num_output_tokens > 0 for r in running(llm)))
    return most


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_a_request_holds_a_third_and_three_fit_for_one(model_dir: Path, prefill: str) -> None:
    """At 4,096 tokens: at most 0.36 of stock's bytes; at least 2.5 times as many resident."""
    options = {
        "kv_cache_memory_bytes": POOL_BYTES,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
    }
    with engine(model_dir, **options) as llm:
        stock_bytes = bytes_of_one(llm)
    with engine(model_dir, **options) as llm:
        stock_count = most_resident(llm)
    with engine(model_dir, {**RAZOR, "prefill": prefill}, **options) as llm:
        razor_bytes = bytes_of_one(llm)
    with engine(model_dir, {**RAZOR, "prefill": prefill}, **options) as llm:
        razor_count = most_resident(llm)
    assert stock_count == POOL_BYTES // stock_bytes
    assert razor_bytes <= 0.36 * stock_bytes
    assert razor_count >= 2.5 * stock_count


def test_report_says_what_the_pool_gives(model_dir: Path) -> None:
    """`request_memory` and the block pool agree, for the policy and for stock vLLM."""
    from razor_vllm.report import Capacity, report_lines, request_memory

    with engine(model_dir) as llm:
        stock_bytes = bytes_of_one(llm)
    with engine(model_dir, RAZOR) as llm:
        config = manager_of(llm).kv_cache_config
        plan = plan_of(llm.llm_engine.vllm_config, config)
        # The last of the LENGTH tokens is sampled but not computed yet.
        capacity = Capacity.of(plan, config.num_blocks * plan.page_bytes)
        memory = request_memory(plan, LENGTH - 1, capacity)
        assert bytes_of_one(llm) == memory.held
        assert stock_bytes == memory.full
        lines = report_lines(plan, 8192, config.num_blocks)
    text = "\n".join(lines)
    assert "4 of 16 KV heads retrieve (25.0%)" in text
    assert "retrieval heads by layer: 1 1 1 1" in text
    assert f"{plan.request_bytes(4096):,}" in text
    assert f"{plan.request_bytes(8192):,}" in text


@pytest.mark.parametrize(
    ("kind", "prefill"),
    [
        ("gemma3", "exact"),
        ("gemma3", "windowed"),
        ("gemma4", "windowed"),
        ("gpt-oss", "exact"),
        ("cohere2", "windowed"),
        ("qwen3-next", "exact"),
    ],
)
def test_a_hybrid_holds_the_formulas_pages(kind: str, prefill: str, tmp_path: Path) -> None:
    """Other layers included: the block pool gives out `MemoryPlan.request_pages`, no page more.

    In each step of decoding, by requests of many lengths at once, one of which opts out. Not Olmo
    3: once vLLM has run it, transformers can make none in the same process.
    """
    model = hybrids.make(kind, tmp_path / kind)
    profile = hybrids.write(hybrids.some_heads(model), tmp_path, "profile")
    razor = {"head_profile": profile, "window": 48, "sinks": 4, "prefill": prefill}
    options = {"skip_tokenizer_init": True, "max_model_len": 1024, "max_num_batched_tokens": 2048}
    if kind == "qwen3-next":  # vLLM caches no states unless asked to, and wants bf16
        options |= {"dtype": "bfloat16", "enable_prefix_caching": True}
    with engine(model, razor, **options) as llm:
        config = manager_of(llm).kv_cache_config
        plan = plan_of(llm.llm_engine.vllm_config, config)
        assert plan.num_foreign_groups > 0
        memory = [tensor.untyped_storage() for _, tensor in caches(llm)]
        allocated = {storage.data_ptr(): storage.nbytes() for storage in memory}
        assert list(allocated.values()) == [config.num_blocks * plan.page_bytes]
        for index, prompt in enumerate(prompts([1, 17, 33, 100, 400, 400], seed=3)):
            policy = {"kv_policy": "full"} if index == 5 else {}
            params = SamplingParams(
                temperature=0, max_tokens=80, ignore_eos=True, extra_args=policy
            )
            llm.llm_engine.add_request(str(index), prompt, params)
        compared = 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            requests = running(llm)
            if len(requests) < 6 or requests[-1].num_output_tokens < 2:
                continue  # a prompt's pages go with the first step after it
            # The last token is sampled and not computed yet.
            until = [DENSE_FOREVER if r.request_id.startswith("5") else 0 for r in requests]
            held = zip(requests, until, strict=True)
            want = sum(plan.request_pages(r.num_tokens - 1, dense) for r, dense in held)
            # The step before computed the token before the last.
            begun = [r for r in requests if (r.num_tokens - 2) % plan.hit_tokens == 0]
            want += len(begun) * plan.moving_pages
            assert held_bytes(llm) == want * plan.page_bytes
            compared += 1
        assert compared > 70
        assert held_bytes(llm) == 0

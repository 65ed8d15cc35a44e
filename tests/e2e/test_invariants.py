"""The design's invariants through the real engine (V1 runner, CPU, float32)."""

from pathlib import Path

import pytest
from engines import (
    ALL_HEADS,
    MAX_LEN,
    NO_HEADS,
    SOME_HEADS,
    Answer,
    answers,
    counted_preemptions,
    engine,
    manager_of,
    profile_file,
    prompts,
    run_script,
)

pytestmark = pytest.mark.engine

TWENTY = [1, 2, 3, 5, 31, 32, 33, 63, 64, 95, 96, 97, 111, 200, 333, 512, 700, 1000, 1500, 2047]
MIXED = [3, 40, 95, 96, 300, 700, 1111]
WINDOW = {"window": 64}


def assert_same(got: list[Answer], want: list[Answer], tolerance: float = 2e-2) -> None:
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.tokens == other.tokens, f"request {index}"
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=tolerance), f"request {index}"


def assert_all_free(llm) -> None:
    """Invariant 5: no request, no block held, no reference left."""
    pool = manager_of(llm).block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert all(block.ref_cnt == 0 for block in pool.blocks if not block.is_null)


@pytest.fixture(scope="module")
def stock(model_dir: Path) -> list[Answer]:
    """What vLLM without the policy says."""
    with engine(model_dir) as llm:
        return answers(llm, prompts(TWENTY))


def test_full_policy_is_vllm_itself(model_dir: Path, stock: list[Answer]) -> None:
    """Invariant 6: the plugin is loaded, the policy is not asked for, nothing is ours."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with engine(model_dir, {"policy": "full"}) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert {layer.attn_backend for layer in layers.values()} == {CPUAttentionBackend}
        assert not any(name.startswith("razor") for name in layers)
        assert_same(answers(llm, prompts(TWENTY)), stock)


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        (ALL_HEADS, {"window": 0, "sinks": 0}),
        (ALL_HEADS, {"window": 0, "sinks": 0, "prefill": "windowed"}),
        (NO_HEADS, {"window": MAX_LEN, "prefill": "windowed"}),
        (SOME_HEADS, {"window": MAX_LEN, "prefill": "windowed"}),
        (SOME_HEADS, {"window": 0, "sinks": MAX_LEN, "prefill": "windowed"}),
    ],
    ids=["all-retrieval", "all-retrieval-windowed", "all-local", "some-local", "all-sinks"],
)
def test_nothing_dropped_is_stock(
    model_dir: Path, tmp_path: Path, stock: list[Answer], heads, options
) -> None:
    """Invariant 1: where nothing is dropped, the output is stock vLLM's token for token."""
    razor = {
        "head_profile": profile_file(tmp_path, heads),
        "allow_no_retrieval_heads": True,
        **options,
    }
    with engine(model_dir, razor) as llm:
        assert_same(answers(llm, prompts(TWENTY)), stock)
        assert_all_free(llm)


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_chunks_batches_and_cache_change_nothing(model_dir: Path, prefill: str) -> None:
    """Invariant 3: chunk sizes, batch mixes, cache hits and preemption give the same tokens."""
    razor = {**WINDOW, "prefill": prefill}
    requests = prompts(MIXED)
    with engine(model_dir, razor, max_num_batched_tokens=2048) as llm:
        want = answers(llm, requests)
        assert_same(answers(llm, requests), want)  # prefix-cache hits
        alone = [answers(llm, [request])[0] for request in requests]
        assert_same(alone, want)
        llm.reset_prefix_cache()
        assert_same([answers(llm, [request])[0] for request in requests], want)
        assert_all_free(llm)
    for tokens in (64, 256):
        with engine(model_dir, razor, max_num_batched_tokens=tokens) as llm:
            assert_same(answers(llm, requests), want)
            assert_same(answers(llm, requests), want)
            assert_all_free(llm)
    with engine(model_dir, razor, enable_prefix_caching=False) as llm:
        assert_same(answers(llm, requests), want)
        assert_all_free(llm)


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_preemption_changes_nothing(model_dir: Path, prefill: str) -> None:
    """Invariant 3: a pool too small for all requests preempts, and the tokens stay."""
    razor = {**WINDOW, "prefill": prefill}
    requests = prompts([300, 310, 320, 330, 340, 350], seed=5)
    with engine(model_dir, razor) as llm:
        want = answers(llm, requests, max_tokens=300)
    preempted = counted_preemptions()
    with engine(model_dir, razor, max_model_len=700, num_gpu_blocks_override=48) as llm:
        assert_same(answers(llm, requests, max_tokens=300), want)
        assert_all_free(llm)
    assert any(generated > 0 for generated in preempted)


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_generated_text_as_a_prompt(model_dir: Path, prefill: str) -> None:
    """A cached page is reused only where a miss would compute the same values.

    The second turn's prompt holds the first turn's answer. In exact mode that answer's
    pages were computed under compression, while as a prompt they are dense.
    """
    razor = {**WINDOW, "prefill": prefill}
    with engine(model_dir, razor) as llm:
        first = prompts([400], seed=7)[0]
        reply = answers(llm, [first], max_tokens=300)[0]
        second = {"prompt_token_ids": first["prompt_token_ids"] + list(reply.tokens) + [9, 8, 7]}
        warm = answers(llm, [second])
        again = answers(llm, [second])
        llm.reset_prefix_cache()
        cold = answers(llm, [second])
        assert_same(warm, cold)
        assert_same(again, cold)


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_opt_out_is_stock_beside_compressed_requests(
    model_dir: Path, stock: list[Answer], prefill: str
) -> None:
    """A request with kv_policy full is stock vLLM's, whatever shares the cache with it."""
    with engine(model_dir, {**WINDOW, "prefill": prefill}) as llm:
        requests = prompts(TWENTY)
        compressed = answers(llm, requests)
        full = answers(llm, requests, extra_args={"kv_policy": "full"})
        assert_same(full, stock)
        assert_same(answers(llm, requests), compressed)
        assert_same(answers(llm, requests, extra_args={"kv_policy": "full"}), stock)
        assert [a.tokens for a in compressed] != [a.tokens for a in stock]
        assert_all_free(llm)


def test_every_step_holds_what_the_formula_says(model_dir: Path) -> None:
    """Invariant 4: a decoding request's pages are those of `memory`, step by step."""
    from vllm import SamplingParams

    from razor_vllm.report import plan_of

    razor = {"window": 96, "sinks": 40, "window_ratio": 0.2, "prefill": "exact"}
    with engine(model_dir, razor) as llm:
        manager = manager_of(llm)
        plan = plan_of(llm.llm_engine.vllm_config, manager.kv_cache_config)
        params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        request_id = llm.llm_engine.add_request("a", prompts([333])[0], params)
        request_id = next(iter(llm.llm_engine.engine_core.engine_core.scheduler.requests))
        seen = set()
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            request = scheduler.requests.get(request_id)
            if request is None:
                break
            # The step just done computed all tokens but the one it sampled.
            computed = request.num_tokens - 1
            held = [
                sum(not block.is_null for block in group)
                for group in manager.coordinator.get_blocks(request_id)
            ]
            assert held == [
                plan.retrieval_pages(computed),
                plan.local_pages(computed, dense_until=333),
            ]
            seen.add(tuple(held))
        assert len(seen) > 5
        assert_all_free(llm)


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_drafts_change_no_token(model_dir: Path, tmp_path: Path, prefill: str) -> None:
    """Cold and from the prefix cache: rejected drafts were written to pages and sums, and are
    undone; accepted ones stay.

    Of each three drafts 0 to 3 are right, at all places of a page, while windows move.
    """
    profile = profile_file(tmp_path, SOME_HEADS)
    razor = {"head_profile": profile, "window": 32, "prefill": prefill}
    lengths, options = [1, 40, 95, 300], {"max_num_batched_tokens": 256}
    with engine(model_dir, razor, **options) as llm:
        want = answers(llm, prompts(lengths), max_tokens=150)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    job = {
        "razor": razor,
        "options": {**options, "speculative_config": drafts},
        "lengths": lengths,
        "max_tokens": 150,
    }
    # vLLM's drafter imports numba, after which it starts no second engine in a process.
    got = run_script("drafted_answers.py", model_dir, job, {})
    assert all(got["accepted"].get(str(count), 0) > 20 for count in range(4)), got["accepted"]
    for answered in got["rounds"]:
        assert_same([Answer(tuple(tokens), tuple(logs)) for tokens, logs in answered], want)


def test_abort_frees_everything(model_dir: Path) -> None:
    """Invariant 5 under cancellation, in prefill and in decode."""
    from vllm import SamplingParams

    with engine(model_dir, WINDOW, max_num_batched_tokens=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        for index, prompt in enumerate(prompts([500, 500, 20, 20])):
            llm.llm_engine.add_request(str(index), prompt, params)
        for _ in range(9):
            llm.llm_engine.step()
        for index in range(4):
            llm.llm_engine.abort_request([str(index)])
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        assert_all_free(llm)


def test_parallel_samples_share_their_prompt(model_dir: Path) -> None:
    """n > 1: greedy samples of one prompt are equal, and equal to a single one."""
    from vllm import SamplingParams

    with engine(model_dir, WINDOW) as llm:
        prompt = prompts([300])
        single = answers(llm, prompt)[0]
        params = SamplingParams(n=3, temperature=0.7, seed=1, max_tokens=24, ignore_eos=True)
        sampled = llm.generate(prompt, params, use_tqdm=False)[0]
        assert len({out.token_ids[0] for out in sampled.outputs}) > 1
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, prompt_logprobs=1)
        out = llm.generate(prompt, params, use_tqdm=False)[0]
        assert tuple(out.outputs[0].token_ids) == single.tokens
        assert len(out.prompt_logprobs) == 300
        assert_all_free(llm)

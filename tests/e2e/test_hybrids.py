"""Hybrid models: full-attention layers are split by heads, every other layer stays vLLM's.

Tiny random models of each kind. Invariants 1 to 3 and 5 of docs/architecture.md, and what is the
hybrids' own: cache groups of layers, chunks that end where Mamba states are kept.
"""

from pathlib import Path
from typing import Any

import hybrids
import make_random_llama
import pytest
import torch
from engines import (
    GENERATION_PROMPT,
    Answer,
    answers,
    counted_preemptions,
    engine,
    hold_chats,
    local_block_size,
    manager_of,
    prompts,
    run_script,
)

from razor_kernels import Window
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.integrity import check_pools
from razor_vllm.report import plan_of

pytestmark = pytest.mark.engine

SLIDING = ["gemma3", "gemma4", "cohere2", "gpt-oss"]
LENGTHS = [1, 33, 100, 400]
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 128,
}
RAZOR = {"window": 48, "sinks": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory):
    """Folders of the models, each made when it is first asked for."""
    folder = tmp_path_factory.mktemp("hybrids")

    def model(kind: str) -> Path:
        path = folder / kind
        return path if path.is_dir() else hybrids.make(kind, path)

    return model


def razor_of(model: Path, profile: HeadProfile, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"head_profile": hybrids.write(profile, tmp_path, "profile"), **RAZOR, **more}


def worst(got: list[Answer], want: list[Answer]) -> float:
    """Largest difference of log-probabilities of the same tokens."""
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.tokens == other.tokens, f"request {index}"
    return max(
        abs(mine - theirs)
        for one, other in zip(got, want, strict=True)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True)
    )


def assert_clean(llm: Any) -> None:
    """No request: all pages are free, and integrity finds nothing in any group."""
    manager = manager_of(llm)
    assert check_pools(manager, idle=True) == []
    pool = manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


# vLLM serves Olmo 3 through transformers' own class, which it changes for good: no formula then.
@pytest.mark.parametrize("kind", [*SLIDING, "olmo3"])
def test_all_heads_retrieval_is_stock(kind: str, models, tmp_path: Path) -> None:
    """Invariant 1, token for token: in chunks, cold and from the prefix cache."""
    model, requests = models(kind), prompts(LENGTHS)
    with engine(model, None, **OPTIONS) as llm:
        stock = answers(llm, requests)
    razor = razor_of(model, hybrids.all_heads(model), tmp_path)
    with engine(model, razor, **OPTIONS) as llm:
        for _ in ("cold", "hit"):
            assert worst(answers(llm, requests), stock) < 1e-5
        assert_clean(llm)


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
@pytest.mark.parametrize("kind", SLIDING)
def test_mixed_heads_are_the_formula(kind: str, prefill: str, models, tmp_path: Path) -> None:
    """Invariant 2: chunks, hits and preemption; and opting out is stock beside them."""
    model, requests = models(kind), prompts(LENGTHS)
    profile = hybrids.some_heads(model)
    razor = razor_of(model, profile, tmp_path, prefill=prefill)
    with engine(model, razor, **OPTIONS) as llm:
        served = answers(llm, requests)
        assert worst(answers(llm, requests), served) < 1e-5
        block_size = local_block_size(llm)
        full = answers(llm, requests, extra_args={"kv_policy": "full"})
        assert worst(answers(llm, requests), served) < 1e-5
        assert_clean(llm)
    formula = hybrids.Formula(model, hybrids.KINDS[kind].window)
    window = Window(RAZOR["sinks"], RAZOR["window"], 0.0, block_size)
    for request, answer in zip(requests, served, strict=True):
        prompt = request["prompt_token_ids"]
        until = len(prompt) if prefill == "exact" else 0
        want = formula.logprobs(profile, window, [*prompt, *answer.tokens], len(prompt), until)
        assert answer.logprobs == pytest.approx(want.tolist(), abs=1e-5)
    prompt, last = requests[-1]["prompt_token_ids"], full[-1]
    want = formula.logprobs(profile, window, [*prompt, *last.tokens], len(prompt), 2**30)
    assert last.logprobs == pytest.approx(want.tolist(), abs=1e-5)
    tokens = [*prompt, *served[-1].tokens]
    dense = formula.logprobs(profile, window, tokens, len(prompt), 2**30)
    # Else the formula with local heads would show nothing.
    assert served[-1].logprobs != pytest.approx(dense.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "gpt-oss"])
@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_preemption_changes_nothing(kind: str, prefill: str, models, tmp_path: Path) -> None:
    """Invariant 3: pools too small for all requests, in which foreign groups hold most pages."""
    model = models(kind)
    razor = razor_of(model, hybrids.some_heads(model), tmp_path, prefill=prefill)
    length, answer = 230, 300
    requests = prompts([length - 3, length - 2, length - 1, length], seed=5)
    options = {**OPTIONS, "max_num_batched_tokens": 32}
    with engine(model, razor, **options) as llm:
        want = answers(llm, requests, answer)
        plan = plan_of(llm.llm_engine.vllm_config, manager_of(llm).kv_cache_config)
    # Room for three prompts, of which the last is being read, and not for three answers.
    until = length if prefill == "exact" else 0
    room = 2 * plan.request_pages(length) + plan.request_pages(length, until)
    room += plan.num_foreign_groups + 3
    assert room < 3 * plan.request_pages(length + answer)
    preempted = counted_preemptions()
    tight = {**options, "max_model_len": 600, "num_gpu_blocks_override": room}
    with engine(model, razor, **tight) as llm:
        assert worst(answers(llm, requests, answer), want) < 1e-5
        assert_clean(llm)
    assert any(generated > 0 for generated in preempted)


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_generated_text_as_a_prompt(prefill: str, models, tmp_path: Path) -> None:
    """In exact mode no layer may cache what was generated: its K and V came from compression.

    A sliding layer's pages too: their tokens' hidden states went through local heads.
    """
    model = models("gemma3")
    razor = razor_of(model, hybrids.some_heads(model), tmp_path, prefill=prefill)
    with engine(model, razor, **OPTIONS) as llm:
        first = prompts([300], seed=7)[0]
        reply = answers(llm, [first], max_tokens=200)[0]
        second = {"prompt_token_ids": [*first["prompt_token_ids"], *reply.tokens, 9, 8, 7]}
        warm, again = answers(llm, [second]), answers(llm, [second])
        llm.reset_prefix_cache()
        cold = answers(llm, [second])
        assert worst(warm, cold) < 1e-5
        assert worst(again, cold) < 1e-5


STATES: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_batched_tokens": 128,
    "dtype": "bfloat16",
    "enable_prefix_caching": True,
}
# The second is long enough for a hit.
STATE_LENGTHS = [5, 600]


def distance(
    formula: hybrids.Formula,
    profile: HeadProfile,
    window: Window,
    served: list[tuple[list[int], Answer]],
    dense_until: int | None = None,
) -> float:
    """Mean |difference| of log-probabilities to the formula.

    Args:
        served: prompts and their answers. dense_until: the prompt's length where None.
    """
    found = []
    for prompt, answer in served:
        until = len(prompt) if dense_until is None else dense_until
        tokens = [*prompt, *answer.tokens]
        want = formula.logprobs(profile, window, tokens, len(prompt), until)
        found.append((want - torch.tensor(answer.logprobs)).abs())
    return float(torch.cat(found).mean())


def test_states_are_as_near_to_the_formula_as_stocks(models, tmp_path: Path) -> None:
    """Gated DeltaNet beside split heads: cold and hit, chats, and two ranks in processes of their
    own.

    vLLM's DeltaNet runs in bf16 on a CPU, and depends on chunks a little. A hit that took the
    state of another position would be a hundred times as far.
    """
    model = models("qwen3-next")
    make_random_llama.make_tokenizer().save_pretrained(model)
    profile = hybrids.some_heads(model)
    asked = [prompt["prompt_token_ids"] for prompt in prompts(STATE_LENGTHS)]
    with engine(model, None, **STATES) as llm:
        stock = answers(llm, prompts(STATE_LENGTHS))
    formula = hybrids.Formula(model)
    for weight in formula.model.parameters():
        weight.data = weight.data.bfloat16().float()
    nothing = Window(4, 2**20, 0.0, 32)
    allowed = 1.5 * distance(formula, profile, nothing, list(zip(asked, stock, strict=True)))
    # These prompts hold no chat, so they are read as in exact mode.
    razor = razor_of(model, profile, tmp_path, prefill="chat")
    rounds = []
    with engine(model, razor, **STATES) as llm:
        config = manager_of(llm).kv_cache_config
        plan = plan_of(llm.llm_engine.vllm_config, config)
        for _ in ("cold", "hit"):
            rounds.append(answers(llm, prompts(STATE_LENGTHS)))
        first = [*asked[-1][:-1], GENERATION_PROMPT]
        chat = hold_chats(llm, [first], 3, 40)
        early = hold_chats(llm, [first], 2, 40, extra_args={"kv_dense_tokens": 9})
        assert_clean(llm)
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.block_size == plan.hit_tokens
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    job = {"razor": razor, "options": {**STATES, **ranks}, "lengths": STATE_LENGTHS}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for result in run_script("engine_answers.py", model, {**job, "max_tokens": 24}, env):
        rounds.append([Answer(tuple(tokens), tuple(logprobs)) for tokens, logprobs in result])
    assert len(rounds) == 4
    window = Window(RAZOR["sinks"], RAZOR["window"], 0.0, plan.blocks.local)
    for served in rounds:
        pairs = list(zip(asked, served, strict=True))
        assert distance(formula, profile, window, pairs) < allowed
        # Else the formula with local heads would show nothing.
        assert distance(formula, profile, nothing, pairs[1:]) > allowed
    for turns, until in ((chat, len(first)), (early, 9)):
        for number, turn in enumerate(turns):
            assert turn.cached >= plan.hit_tokens or number == 0
            pairs = [(turn.prompt, turn.answer)]
            assert distance(formula, profile, window, pairs, until) < allowed, f"turn {number}"

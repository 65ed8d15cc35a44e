"""Real vLLM engines for tests, in this process, one at a time."""

import contextlib
import gc
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from make_random_llama import HEAD_SIZE, NUM_KV_HEADS, NUM_LAYERS

from razor_vllm.heads.profile import HeadProfile
from razor_vllm.report import plan_of

MAX_LEN = 8192
GENERATION_PROMPT = 3
"""Token that the bundled model's chat template ends a prompt with."""
TESTS = Path(__file__).parent


class Answer(NamedTuple):
    """Greedy tokens of one request, and the log-probability of each."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@contextlib.contextmanager
def engine(model: Path, razor: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in float32; with the policy where `razor` gives its options."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    if razor is not None:
        options["additional_config"] = {"razor": razor}
    defaults = {
        "dtype": "float32",
        "max_model_len": MAX_LEN,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 256 * 1024**2,
    }
    llm = LLM(str(model), disable_log_stats=True, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def prompts(lengths: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of random bytes; each begins with the model's first token."""
    draw = random.Random(seed)
    return [
        {"prompt_token_ids": [0] + [draw.randrange(5, 261) for _ in range(n - 1)]} for n in lengths
    ]


def answers(
    llm: Any, requests: Sequence[Any], max_tokens: int = 24, **sampling: Any
) -> list[Answer]:
    """Greedy answers, all requests at once."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, **sampling
    )
    results = llm.generate(list(requests), params, use_tqdm=False)
    return [_answer(result.outputs[0]) for result in results]


def _answer(out: Any) -> Answer:
    steps = zip(out.logprobs, out.token_ids, strict=True)
    return Answer(tuple(out.token_ids), tuple(step[token].logprob for step, token in steps))


class ChatTurn(NamedTuple):
    """One turn of a chat: its prompt's tokens, the answer, and the prompt's cached tokens."""

    prompt: list[int]
    answer: Answer
    cached: int


def hold_chats(
    llm: Any, first: Sequence[list[int]], turns: int, max_tokens: int, **sampling: Any
) -> list[ChatTurn]:
    """Chats whose turns are taken in rounds, all chats at once.

    Args:
        first: tokens of each chat's first turn. A later one adds the answer before it, some
            random tokens, other ones in each chat, and the model's generation prompt.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0, **sampling
    )
    draw = random.Random(1)
    held: list[ChatTurn] = []
    chats = [list(prompt) for prompt in first]
    for _ in range(turns):
        requests: list[Any] = [{"prompt_token_ids": list(chat)} for chat in chats]
        results = llm.generate(requests, params, use_tqdm=False)
        for chat, result in zip(chats, results, strict=True):
            answer = _answer(result.outputs[0])
            held.append(ChatTurn(list(chat), answer, result.num_cached_tokens or 0))
            added = [draw.randrange(5, 261) for _ in range(draw.randrange(1, 90))]
            chat += [*answer.tokens, *added, GENERATION_PROMPT]
    return held


def run_script(
    name: str, model: Path, job: dict[str, Any], env: dict[str, str], paths: Sequence[Path] = ()
) -> Any:
    """What a script of tests/e2e prints after RESULT, from a process of its own."""
    root = TESTS.parent
    python_path = [root, root / "kernels", root / "serving", TESTS, root / "models", *paths]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path)), **env}
    command = [sys.executable, str(TESTS / "e2e" / name), str(model), json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))


def run_v2(model: Path, job: dict[str, Any], kernels: str) -> dict[str, Any]:
    """Answers of an engine on the V2 runner, from a process of its own.

    Args:
        kernels: their form, see `razor_kernels.forms`.
    """
    env = {
        "RAZOR_KERNELS": kernels,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        # Skips a warm-up whose dummy logits upset the interpreted sampler.
        "VLLM_CPU_CI_ENV": "1",
    }
    return run_script("v2_answers.py", model, job, env, [TESTS / "stubs" / "triton_cpu"])


def manager_of(llm: Any) -> Any:
    """vLLM's KVCacheManager of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager


def caches(llm: Any) -> list[tuple[str, Any]]:
    """Tensors of the caches of an in-process engine, each with its layer; a state has several."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    found = []
    for name, layer in layers.items():
        cache = getattr(layer, "kv_cache", ())
        tensors = cache if isinstance(cache, list | tuple) else [cache]
        found += [(name, tensor) for tensor in tensors if tensor.numel()]
    return found


def local_block_size(llm: Any) -> int:
    """Tokens of a local page of an engine under the policy, whose scheduler is in this process."""
    config = manager_of(llm).kv_cache_config
    return plan_of(llm.llm_engine.vllm_config, config).blocks.local


def poison_pages(llm: Any) -> None:
    """Fill all pages with NaN, as sums of local heads may be in the type of other layers.

    Nothing where the workers are other processes. States are left: they are zeroed elsewhere.
    """
    for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values():
        pages = getattr(layer, "kv_cache", None)
        if isinstance(pages, torch.Tensor) and pages.numel():
            pages.view(torch.uint8).fill_(0xFF)


def counted_preemptions() -> list[int]:
    """A list that gets, at each preemption from now on, the tokens generated so far."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: list[int] = []
    original = Scheduler._preempt_request

    def counting(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.num_tokens - request.num_prompt_tokens)
        return original(self, request, *args, **kwargs)

    Scheduler._preempt_request = counting
    return seen


def counted_drafts() -> Counter[int]:
    """A counter that gets, of each request's drafts in a step, how many were accepted."""
    from vllm.v1.core.sched.scheduler import Scheduler

    seen: Counter[int] = Counter()
    original = Scheduler.make_spec_decoding_stats

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen[kwargs["num_accepted_tokens"]] += 1
        return original(self, *args, **kwargs)

    Scheduler.make_spec_decoding_stats = counting
    return seen


def profile_file(
    folder: Path,
    retrieval_heads: Sequence[Sequence[int]],
    shape: tuple[int, int, int] = (NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE),
) -> str:
    """A head profile with the given choice; shape: layers, KV heads, head size."""
    profile = HeadProfile(*shape, tuple(tuple(row) for row in retrieval_heads))
    name = "-".join("".join(map(str, row)) or "n" for row in retrieval_heads)
    path = folder / f"profile-{name}.json"
    path.write_text(profile.to_json(), encoding="utf-8")
    return str(path)


ALL_HEADS = [list(range(NUM_KV_HEADS))] * NUM_LAYERS
NO_HEADS: list[list[int]] = [[]] * NUM_LAYERS
SOME_HEADS = [[0, 3], [], [1], [0, 1, 2, 3]]

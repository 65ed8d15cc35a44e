"""Tensor parallelism: the tokens of one device.

Pipeline parallelism is planned by the same code (tests/plugin/test_partition.py) but does
not run here: vLLM 0.32's CPU build fails with it, with and without the plugin.
"""

from pathlib import Path
from typing import Any

import hybrids
import pytest
from engines import answers, engine, profile_file, prompts, run_script

from razor_vllm.heads.profile import read_profile
from razor_vllm.partition import partition

pytestmark = pytest.mark.engine

LENGTHS = [3, 97, 300]
# Each of two ranks holds three of these.
EVEN = [[0, 2], [1], [0, 2], [3]]
# Heads 0 and 1 alone: the second tensor-parallel rank promotes as many.
ONE_SIDED = [[0, 1], [0], [1], []]


def two_ranks(model: Path, razor: dict[str, Any], options: dict[str, Any]) -> Any:
    """Answers to the same prompts, asked twice, of an engine with two worker processes."""
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    job = {"razor": razor, "options": {**options, **ranks}, "lengths": LENGTHS, "max_tokens": 16}
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return run_script("engine_answers.py", model, job, env)


@pytest.mark.parametrize(
    ("heads", "promotes"), [(EVEN, False), (ONE_SIDED, True)], ids=["even", "one-sided"]
)
def test_two_ranks_answer_as_one_device(model_dir: Path, tmp_path: Path, heads, promotes) -> None:
    """Same tokens as one device that keeps the same heads, promoted ones included."""
    razor = {"head_profile": profile_file(tmp_path, heads), "window": 64}
    options = {"max_model_len": 1024, "max_num_batched_tokens": 256}
    rounds = two_ranks(model_dir, razor, options)

    kept = [set(row) for row in heads]
    for rank in partition(read_profile(razor["head_profile"]), tp_size=2):
        for layer, head in rank.promoted:
            kept[layer].add(head)
    assert ([sorted(row) for row in kept] != heads) == promotes
    razor = {**razor, "head_profile": profile_file(tmp_path, [sorted(row) for row in kept])}
    with engine(model_dir, razor, **options) as llm:
        want = answers(llm, prompts(LENGTHS), 16)
    for got in rounds:
        assert [tokens for tokens, _ in got] == [list(answer.tokens) for answer in want]


@pytest.mark.parametrize("kind", ["gemma4", "gpt-oss"])
def test_two_ranks_of_a_hybrid_answer_as_one_device(kind: str, tmp_path: Path) -> None:
    """Gemma 4: both ranks hold the one KV head of full layers, and one each of sliding layers.

    gpt-oss: one KV head a rank, which in most layers retrieves on one rank alone, and the learned
    sinks of its query heads.
    """
    model = hybrids.make(kind, tmp_path / kind)
    profile = hybrids.write(hybrids.some_heads(model), tmp_path, "profile")
    razor = {"head_profile": profile, "window": 48}
    options = {"max_model_len": 1024, "max_num_batched_tokens": 256, "skip_tokenizer_init": True}
    rounds = two_ranks(model, razor, options)
    with engine(model, razor, **options) as llm:
        want = answers(llm, prompts(LENGTHS), 16)
    for got in rounds:
        assert [tokens for tokens, _ in got] == [list(answer.tokens) for answer in want]
        for (_, logprobs), answer in zip(got, want, strict=True):
            assert logprobs == pytest.approx(answer.logprobs, abs=1e-4)

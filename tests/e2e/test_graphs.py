"""vLLM's start-up on CUDA, lived through on a CPU: graphs on are graphs off.

Profile run, graphs of a throw-away cache, the cache itself, warm-up, graphs; then requests,
a second cache, sleep. Graphs are stood in for (`graph_standin`), kernels are interpreted.
"""

from pathlib import Path
from typing import Any

import make_random_llama
import pytest
from engines import TESTS, answers, engine, prompts, run_script

pytestmark = pytest.mark.engine

RAZOR = {"window": 32}
MAX_TOKENS = 4
SHAPE = make_random_llama.Shape(num_layers=2, num_heads=4, num_kv_heads=2, head_size=128)
"""Few heads, for the interpreter's sake; so wide that a decode of 70 tokens is split."""
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 2,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    make_random_llama.save(folder, shape=SHAPE)
    return folder


Rounds = list[tuple[str, list[int]]]


def run_graphs(
    model: Path, mode: str, sizes: list[int], runs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What graph_answers.py reports of its runs.

    Args:
        mode: vLLM's `cudagraph_mode`. sizes: its `cudagraph_capture_sizes`.
    """
    env = {
        "RAZOR_KERNELS": "triton",
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        # Piecewise graphs without a compiler.
        "VLLM_USE_BREAKABLE_CUDAGRAPH": str(int("PIECEWISE" in mode)),
    }
    shared = {
        "max_model_len": 256,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 2,
        "kv_cache_memory_bytes": 8 * 1024**2,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": mode,
            "cudagraph_capture_sizes": sizes,
        },
    }
    runs = [{"fault": None, **run, "options": {**shared, **run["options"]}} for run in runs]
    job = {"razor": RAZOR, "max_tokens": MAX_TOKENS, "runs": runs}
    return run_script("graph_answers.py", model, job, env, [TESTS / "stubs" / "triton_cpu"])


def eager(model: Path, rounds: Rounds) -> list[list[list[int]]]:
    """Tokens of the rounds without graphs: of the V1 runner, natively."""
    with engine(model, RAZOR, max_model_len=256, kv_cache_memory_bytes=8 * 1024**2) as llm:
        return [
            [list(answer.tokens) for answer in answers(llm, prompts(lengths), MAX_TOKENS)]
            for _, lengths in rounds
        ]


def tokens(result: dict[str, Any]) -> list[list[list[int]]]:
    return [[tokens for tokens, _ in answered] for answered in result["rounds"]]


@pytest.mark.parametrize(
    ("mode", "sizes", "rounds", "options", "kinds"),
    [
        pytest.param(
            "FULL_AND_PIECEWISE",
            [2, 32],
            [("serve", [70, 40]), ("reinitialize", [70]), ("sleep", [40, 1])],
            {},
            {"FULL", "PIECEWISE"},
            id="decode and prefill",
        ),
        pytest.param(
            "FULL_DECODE_ONLY",
            [6],
            [("serve", [70, 40])],
            {"speculative_config": NGRAM},
            {"FULL"},
            id="drafted tokens",
        ),
    ],
)
def test_graphs_answer_as_eager_steps_do(
    small_model: Path,
    mode: str,
    sizes: list[int],
    rounds: Rounds,
    options: dict[str, Any],
    kinds: set[str],
) -> None:
    """Token for token; with padded rows; nobody holds a cache that vLLM dropped."""
    (result,) = run_graphs(small_model, mode, sizes, [{"rounds": rounds, "options": options}])
    assert tokens(result) == eager(small_model, rounds)
    for kind in kinds:
        batches = [(used, padded) for name, used, padded, _ in result["batches"] if name == kind]
        assert any(used < padded for used, padded in batches), f"no padded batch: {batches}"
        assert any(used == padded for used, padded in batches), f"no full batch: {batches}"
    assert result["captures"] > 0
    assert result["replays"] > 0
    assert result["still_held"] == 0


FAULTS = {
    "stale cache": "FreedMemory",
    "grid by content": None,
    "buffer of a step": "FreedMemory",
    "converted buffer": "FreedMemory",
}
"""Seeded by graph_answers.py, and the error that each ends in; None: in wrong tokens."""


@pytest.fixture(scope="module")
def faulty(small_model: Path) -> dict[str, dict[str, Any]]:
    """Of each fault what came of it; of None, without any."""
    # vLLM's warm-up of kernels is spared them.
    options = {"kernel_config": {"enable_jit_warmup": False}}
    runs = [
        {"rounds": [("serve", [70])], "options": options, "fault": fault}
        for fault in [None, *FAULTS]
    ]
    results = run_graphs(small_model, "FULL_DECODE_ONLY", [2], runs)
    return dict(zip([None, *FAULTS], results, strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(faulty: dict[str, dict[str, Any]], fault: str) -> None:
    """By an error, where the fault uses memory that is gone, else by its tokens."""
    result, error = faulty[fault], FAULTS[fault]
    if error is not None:
        assert error in result.get("error", "no error")
    else:
        assert "error" not in result, result
        assert result["replays"] > 0
        assert tokens(result) != tokens(faulty[None])

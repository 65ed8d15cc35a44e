"""Speculative decoding: tokens with drafts are the formula's, whatever drafts them.

Every engine runs in a process of its own (`drafted_answers.py`): of each three drafts 0 to 3 are
right. Tokens are not those of a run without drafts: with a draft's layers the plan may have other
pages, and windows are whole pages. N-grams have no layers: see also test_invariants.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import drafts
import hybrids
import pytest
import torch
from engines import prompts, run_script, run_v2

from razor_kernels import Window
from razor_vllm.heads.profile import HeadProfile

pytestmark = pytest.mark.engine

LENGTHS = [1, 40, 95, 300]
RAZOR = {"window": 32, "sinks": 4}
OPTIONS: dict[str, Any] = {
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "skip_tokenizer_init": True,
}


class Case(NamedTuple):
    """A target and what drafts for it.

    make: makes the target's folder, and gives it and the draft's (None for none of its own).
    tolerance: of log-probabilities.
    """

    method: str
    make: Callable[[Path, Path], tuple[Path, Path | None]]
    tolerance: float = 1e-3
    options: dict[str, Any] = {}


def of_the_llama(make: Callable[[Path, Path], Path]) -> Callable[..., tuple[Path, Path]]:
    return lambda model_dir, folder: (model_dir, make(model_dir, folder / "draft"))


def mimo(model_dir: Path, folder: Path) -> tuple[Path, None]:
    return drafts.make_mimo(folder / "mimo"), None


def hybrid(kind: str, draft: Callable[[Path, Path], Path] | None) -> Callable[..., Any]:
    """A hybrid; its draft is made from a Llama of its width."""

    def make(model_dir: Path, folder: Path) -> tuple[Path, Path | None]:
        target = hybrids.make(kind, folder / kind)
        if draft is None:
            return target, None
        width = hybrids.config_of_model(target).hidden_size
        return target, draft(drafts.make_llama(folder / "llama", width), folder / "draft")

    return make


CASES = {
    "draft_model": Case("draft_model", of_the_llama(drafts.the_model_itself), 2e-2),
    "eagle": Case("eagle", of_the_llama(drafts.make_eagle), 2e-2),
    "eagle3": Case("eagle3", of_the_llama(drafts.make_eagle3), 2e-2),
    "mimo-mtp": Case("mtp", mimo),
    "gemma3-ngram": Case("ngram", hybrid("gemma3", None), 1e-4),
    "gemma3-draft_model": Case("draft_model", hybrid("gemma3", drafts.the_model_itself), 1e-4),
    "gemma3-eagle": Case("eagle", hybrid("gemma3", drafts.make_eagle), 1e-4),
}


def job_of(
    target: Path,
    draft: Path | None,
    case: Case,
    profile: HeadProfile,
    folder: Path,
    prefill: str = "exact",
) -> dict[str, Any]:
    """What an engine is asked for, as a script of tests/e2e takes it."""
    speculative = {"method": case.method, "num_speculative_tokens": 3}
    if case.method == "ngram":
        speculative["prompt_lookup_max"] = 2
    if draft is not None:
        speculative["model"] = str(draft)
    path = hybrids.write(profile, folder, "profile")
    return {
        "razor": {"head_profile": path, "prefill": prefill, **RAZOR},
        "options": {**OPTIONS, **case.options, "speculative_config": speculative},
        "lengths": LENGTHS,
        "max_tokens": 150,
    }


def assert_formula(
    got: dict[str, Any],
    target: Path,
    profile: HeadProfile,
    lengths: list[int],
    tolerance: float,
    prefill: str = "exact",
) -> None:
    """Each token is as likely as the formula says, and by the formula none is likelier."""
    formula = hybrids.Formula(target)
    window = Window(RAZOR["sinks"], RAZOR["window"], 0.0, got["block_size"])
    for answered in got["rounds"]:
        for request, (tokens, logprobs) in zip(prompts(lengths), answered, strict=True):
            prompt = request["prompt_token_ids"]
            until = len(prompt) if prefill == "exact" else 0
            want = formula.distributions(profile, window, [*prompt, *tokens], len(prompt), until)
            chosen = want.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
            assert logprobs == pytest.approx(chosen.tolist(), abs=tolerance)
            assert (want.amax(1) - chosen).max() < tolerance


@pytest.mark.parametrize(
    ("name", "prefill"),
    [
        ("draft_model", "windowed"),
        ("eagle", "exact"),
        ("eagle3", "windowed"),
        ("mimo-mtp", "exact"),
        ("gemma3-ngram", "exact"),
        ("gemma3-draft_model", "windowed"),
        ("gemma3-eagle", "exact"),
    ],
)
def test_tokens_with_drafts_are_the_formulas(
    name: str, prefill: str, model_dir: Path, tmp_path: Path
) -> None:
    """A draft's layers lie in pages beside the split heads', and drafts leave no trace."""
    case = CASES[name]
    target, draft = case.make(model_dir, tmp_path)
    profile = hybrids.some_heads(target)
    job = job_of(target, draft, case, profile, tmp_path, prefill)
    got = run_script("drafted_answers.py", target, job, {})
    assert all(got["accepted"].get(str(count), 0) > 20 for count in range(4)), got["accepted"]
    assert_formula(got, target, profile, LENGTHS, case.tolerance, prefill)


@pytest.mark.parametrize("name", ["draft_model", "gemma3-draft_model"])
def test_two_ranks_draft(name: str, model_dir: Path, tmp_path: Path) -> None:
    """Tensor parallelism of two; drafts are what the draft says, since workers are elsewhere."""
    target, draft = CASES[name].make(model_dir, tmp_path)
    # As many on each rank: none is promoted.
    rows = [[0], [1]] if name.startswith("gemma3") else [[0, 2], [1, 3]]
    profile = hybrids.profile_of_heads(target, rows)
    job = job_of(target, draft, CASES[name], profile, tmp_path)
    job["options"] |= {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    got = run_script("drafted_answers.py", target, job, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    assert got["accepted"]["0"] > 20
    if name == "draft_model":
        assert got["accepted"]["3"] > 20
    assert_formula(got, target, profile, LENGTHS, CASES[name].tolerance)


@pytest.mark.parametrize("name", ["draft_model", "gemma3-draft_model"])
def test_the_v2_runner_drafts(name: str, model_dir: Path, tmp_path: Path) -> None:
    """vLLM's V2 runner; its drafts by n-grams are of a kernel that cannot be interpreted."""
    target, draft = CASES[name].make(model_dir, tmp_path)
    profile = hybrids.some_heads(target)
    job = job_of(target, draft, CASES[name], profile, tmp_path)
    job |= {"lengths": [1, 33, 150], "max_tokens": 40, "rounds": [{}, {}], "poison": True}
    job["options"] |= {"max_model_len": 512, "max_num_batched_tokens": 64, "max_num_seqs": 4}
    got = run_v2(target, job, "native")
    assert got["runner"] == "vllm.v1.worker.cpu.model_runner", "not the V2 runner"
    assert got["accepted"]["0"] > 20
    if name == "draft_model":
        assert got["accepted"]["3"] > 20
    assert got["free"]
    assert_formula(got, target, profile, job["lengths"], CASES[name].tolerance)


def distance(got: dict[str, Any], target: Path, dense: bool) -> float:
    """Mean |difference| of log-probabilities to the formula, with weights as bf16 has them."""
    formula, profile = hybrids.Formula(target), hybrids.some_heads(target)
    for weight in formula.model.parameters():
        weight.data = weight.data.bfloat16().float()
    window = Window(RAZOR["sinks"], 2**20 if dense else RAZOR["window"], 0.0, got["block_size"])
    found = []
    for answered in got["rounds"]:
        for request, (tokens, logprobs) in zip(prompts(LENGTHS), answered, strict=True):
            prompt = request["prompt_token_ids"]
            until = 2**30 if dense else len(prompt)
            want = formula.logprobs(profile, window, [*prompt, *tokens], len(prompt), until)
            found.append((want - torch.tensor(logprobs)).abs())
    return torch.cat(found).mean().item()


def test_an_mtp_layer_beside_states_is_as_near_to_the_formula_as_stocks(tmp_path: Path) -> None:
    """Qwen3-Next: a rejected draft's DeltaNet states are not gone on from.

    These prompts are shorter than a local page, which beside states is long: nothing is dropped.
    vLLM's DeltaNet runs in bf16 on a CPU, and its drafts beside cached states need Triton. Taking
    up the state of another position would be thirty times as far.
    """
    target = drafts.add_mtp(hybrids.make("qwen3-next", tmp_path / "qwen3-next"))
    options = {"dtype": "bfloat16", "enable_prefix_caching": False}
    profile = hybrids.some_heads(target)
    job = job_of(target, None, Case("mtp", mimo, options=options), profile, tmp_path)
    served = run_script("drafted_answers.py", target, job, {})
    assert all(served["accepted"].get(str(count), 0) > 20 for count in range(4))
    stock = run_script("drafted_answers.py", target, {**job, "razor": None}, {})
    stock["block_size"] = served["block_size"]
    assert distance(served, target, False) < 1.5 * distance(stock, target, True)

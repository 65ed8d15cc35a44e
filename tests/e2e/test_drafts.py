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
from engines import prompts, run_script

from razor_kernels import Window

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


def qwen3_next(model_dir: Path, folder: Path) -> tuple[Path, None]:
    return drafts.add_mtp(hybrids.make("qwen3-next", folder / "qwen3-next")), None


# vLLM's DeltaNet runs in bf16 on a CPU.
STATES = {"dtype": "bfloat16"}
CASES = {
    "draft_model": Case("draft_model", of_the_llama(drafts.the_model_itself), 2e-2),
    "eagle": Case("eagle", of_the_llama(drafts.make_eagle), 2e-2),
    "eagle3": Case("eagle3", of_the_llama(drafts.make_eagle3), 2e-2),
    "mimo-mtp": Case("mtp", mimo),
    "gemma3-ngram": Case("ngram", hybrid("gemma3", None), 1e-4),
    "gemma3-draft_model": Case("draft_model", hybrid("gemma3", drafts.the_model_itself), 1e-4),
    "gemma3-eagle": Case("eagle", hybrid("gemma3", drafts.make_eagle), 1e-4),
    "qwen3-next-mtp": Case("mtp", qwen3_next, 5e-2, STATES),
    "qwen3-next-ngram": Case("ngram", hybrid("qwen3-next", None), 5e-2, STATES),
}


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tokens_with_drafts_are_the_formulas(
    case: Case, prefill: str, model_dir: Path, tmp_path: Path
) -> None:
    """A draft's layers lie in pages beside the split heads', and drafts leave no trace."""
    target, draft = case.make(model_dir, tmp_path)
    profile = hybrids.some_heads(target)
    speculative = {"method": case.method, "num_speculative_tokens": 3}
    if case.method == "ngram":
        speculative["prompt_lookup_max"] = 2
    if draft is not None:
        speculative["model"] = str(draft)
    job = {
        "razor": {
            "head_profile": hybrids.write(profile, tmp_path, "profile"),
            "prefill": prefill,
            **RAZOR,
        },
        "options": {**OPTIONS, **case.options, "speculative_config": speculative},
        "lengths": LENGTHS,
        "max_tokens": 150,
    }
    got = run_script("drafted_answers.py", target, job, {})
    assert all(got["accepted"].get(str(count), 0) > 20 for count in range(4)), got["accepted"]
    formula = hybrids.Formula(target)
    window = Window(RAZOR["sinks"], RAZOR["window"], 0.0, got["block_size"])
    for answered in got["rounds"]:
        for request, (tokens, logprobs) in zip(prompts(LENGTHS), answered, strict=True):
            prompt = request["prompt_token_ids"]
            until = len(prompt) if prefill == "exact" else 0
            want = formula.distributions(profile, window, [*prompt, *tokens], len(prompt), until)
            chosen = want.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
            assert logprobs == pytest.approx(chosen.tolist(), abs=case.tolerance)
            # Greedy: by the formula none is likelier.
            assert (want.amax(1) - chosen).max() < case.tolerance

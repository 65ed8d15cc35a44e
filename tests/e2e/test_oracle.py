"""The served log-probabilities are those of the formula.

A plain transformers model runs the served tokens through the fp64 oracle in place of
its attention: no pages, no chunks, no cache.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines import SOME_HEADS, Answer, answers, engine, profile_file, prompts, run_script
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, LlamaForCausalLM

from razor_kernels import Window, oracle

pytestmark = pytest.mark.engine

TOLERANCE = 2e-2


def oracle_logprobs(
    model_dir: Path, tokens: list[int], prompt_len: int, window: Window, dense_until: int
) -> torch.Tensor:
    """Log-probabilities by the oracle: `[tokens after the prompt, vocabulary]`."""

    def attend(module, query, key, value, attention_mask, scaling, **kwargs):
        is_retrieval = torch.zeros(key.shape[1], dtype=torch.bool)
        is_retrieval[SOME_HEADS[module.layer_idx]] = True
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = oracle.attention(q, k, v, is_retrieval, window, scaling, dense_until)
        return out.to(query.dtype).unsqueeze(0), None

    AttentionInterface.register("razor_oracle", attend)
    model = LlamaForCausalLM.from_pretrained(
        model_dir, attn_implementation="razor_oracle", dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    return logits[prompt_len - 1 :].log_softmax(-1)


def assert_greedy(
    model_dir: Path, prompt: list[int], answer: Answer, window: Window, prefill: str
) -> None:
    """Each token is as likely as the oracle says, and by the oracle none is likelier."""
    tokens = torch.tensor(answer.tokens)
    dense_until = len(prompt) if prefill == "exact" else 0
    want = oracle_logprobs(model_dir, prompt + tokens.tolist(), len(prompt), window, dense_until)
    chosen = want.gather(1, tokens.unsqueeze(1)).squeeze(1)
    assert answer.logprobs == pytest.approx(chosen.tolist(), abs=TOLERANCE)
    assert (want.amax(1) - chosen).max() < TOLERANCE


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_served_logprobs_are_the_formulas(model_dir: Path, tmp_path: Path, prefill: str) -> None:
    """Invariant 2 through the engine: both modes, lengths up to 4096, an uneven head map."""
    razor = {
        "head_profile": profile_file(tmp_path, SOME_HEADS),
        "window": 200,
        "sinks": 4,
        "window_ratio": 0.1,
        "prefill": prefill,
    }
    requests = prompts([1, 150, 1000, 4096 - 40], seed=11)
    with engine(model_dir, razor, max_num_batched_tokens=512) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        local = layers["razor.layers.1.local"]
        block_size = local.get_kv_cache_spec(llm.llm_engine.vllm_config).block_size
        served = answers(llm, requests, max_tokens=40)
    window = Window(4, 200, 0.1, block_size)
    for request, answer in zip(requests, served, strict=True):
        assert_greedy(model_dir, request["prompt_token_ids"], answer, window, prefill)


def make_eagle(model_dir: Path, folder: Path) -> Path:
    """An EAGLE head of one layer, the model's first: what it proposes is never right."""
    shutil.copytree(model_dir, folder)
    path = folder / "config.json"
    changes = {"architectures": ["EagleLlamaForCausalLM"], "num_hidden_layers": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    prefix = "model.layers.0."
    weights = {
        name.removeprefix("model."): weight
        for name, weight in load_file(folder / "model.safetensors").items()
        # An EAGLE head has no norm before its layer.
        if name.startswith(prefix) and not name.startswith(f"{prefix}input_layernorm")
    }
    width = weights["layers.0.self_attn.q_proj.weight"].shape[1]
    weights["fc.weight"] = torch.eye(width, 2 * width)
    save_file(weights, folder / "model.safetensors")
    return folder


def the_model_itself(model_dir: Path, folder: Path) -> Path:
    return model_dir


@pytest.mark.parametrize("prefill", ["exact", "windowed"])
@pytest.mark.parametrize(
    ("method", "make"), [("draft_model", the_model_itself), ("eagle", make_eagle)]
)
def test_tokens_with_a_drafting_model_are_the_formulas(
    model_dir: Path, tmp_path: Path, method: str, make: Callable[..., Path], prefill: str
) -> None:
    """A draft's layers lie in pages beside the split heads', and drafts leave no trace.

    Tokens are not those of a run without drafts: with a draft's layers the plan may have other
    pages, and windows are whole pages.
    """
    razor = {"head_profile": profile_file(tmp_path, SOME_HEADS), "window": 32, "prefill": prefill}
    draft = str(make(model_dir, tmp_path / "draft"))
    drafts = {"method": method, "model": draft, "num_speculative_tokens": 3}
    lengths = [1, 40, 95, 300]
    options = {"max_model_len": 1024, "max_num_batched_tokens": 256, "speculative_config": drafts}
    job = {"razor": razor, "options": options, "lengths": lengths, "max_tokens": 150}
    got = run_script("drafted_answers.py", model_dir, job, {})
    assert all(got["accepted"].get(str(count), 0) > 20 for count in range(4)), got["accepted"]
    window = Window(4, 32, 0.0, got["block_size"])
    for answered in got["rounds"]:
        for prompt, (tokens, logs) in zip(prompts(lengths), answered, strict=True):
            answer = Answer(tuple(tokens), tuple(logs))
            assert_greedy(model_dir, prompt["prompt_token_ids"], answer, window, prefill)

"""The served log-probabilities are those of the formula.

A plain transformers model runs the served tokens through the fp64 oracle in place of
its attention: no pages, no chunks, no cache.
"""

from pathlib import Path

import pytest
import torch
from engines import SOME_HEADS, Answer, answers, engine, profile_file, prompts
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

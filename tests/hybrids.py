"""Tiny random hybrid models, and the log-probabilities that the formula gives for them.

The formula is the fp64 oracle in the full-attention layers of a plain transformers model: no
pages, no chunks, no cache. Other layers attend as transformers has them.

    python tests/hybrids.py KIND FOLDER        a model to measure, with tokenizer and head profile
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig

from razor_kernels import Window, oracle
from razor_vllm.heads.profile import FILE_NAME, HeadProfile
from razor_vllm.heads.shapes import shape_of

WINDOW = 32
"""Tokens of the models' own sliding windows."""
_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]


class Kind(NamedTuple):
    """A kind of hybrid: classes of transformers, what their configuration adds to `_SIZES`.

    window: tokens that a sliding layer's query sees in vLLM, itself included.
    """

    config: str
    model: str
    options: dict[str, Any]
    window: int = WINDOW


_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}

KINDS = {
    "gemma3": Kind(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": [*_PATTERN * 2, "sliding_attention"],
        },
    ),
    # As deep as Gemma 3 270M, for benchmarks: with a window of 256, 7 block tables to stock's 6.
    "gemma3-deep": Kind(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 18,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 32,
        },
    ),
    # Full layers of 1 x 64 and keys that are values, sliding layers of 2 x 32.
    "gemma4": Kind(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "global_head_dim": 64,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "layer_types": [*_PATTERN * 2, "full_attention"],
        },
    ),
    "cohere2": Kind(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {
            "num_hidden_layers": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "sliding_window": WINDOW,
        },
        # Cohere's layers see the token a window back as well; transformers' do not.
        WINDOW + 1,
    ),
    "olmo3": Kind(
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {"hidden_size": 128, "num_hidden_layers": 4, "sliding_window": WINDOW},
    ),
    "gpt-oss": Kind(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "head_dim": 32,
            "sliding_window": WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3-next": Kind(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            "num_hidden_layers": 8,
            # Beside states pages hold few bytes a token or many tokens: 144 here.
            "head_dim": 128,
            **_DELTA_NET,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
            # vLLM wants one layer of experts, and so an MTP layer has them, since it counts as
            # the first; the others are quicker without.
            "mlp_only_layers": list(range(1, 8)),
        },
    ),
}


def make(kind: str, folder: Path) -> Path:
    """Save a model of a kind, with weights wide enough that no two tokens are as likely."""
    config_class, model_class, options, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**_SIZES, **options})
    model = getattr(transformers, model_class)(config).float().eval()
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and "embed" not in name and "A_log" not in name:
            torch.nn.init.normal_(weight, std=0.08)
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    return folder


def config_of_model(model: Path) -> PreTrainedConfig:
    return transformers.AutoConfig.from_pretrained(model).get_text_config()


def all_heads(model: Path) -> HeadProfile:
    """A profile by which every head retrieves."""
    shape = shape_of(config_of_model(model))
    return profile_of_heads(model, [range(shape.num_kv_heads)])


def some_heads(model: Path) -> HeadProfile:
    """A profile that splits heads unevenly: with one head a layer, every other layer's."""
    shape = shape_of(config_of_model(model))
    if shape.num_kv_heads == 1:
        return profile_of_heads(model, [[0], []])
    return profile_of_heads(model, [[0], [1], range(shape.num_kv_heads)])


def profile_of_heads(model: Path, rows: Sequence[Sequence[int]]) -> HeadProfile:
    """Retrieval heads of the full layers, in turns of the rows."""
    shape = shape_of(config_of_model(model))
    full = [at for at in range(shape.num_layers) if at not in shape.other_layers]
    heads = [()] * shape.num_layers
    for index, layer in enumerate(full):
        heads[layer] = tuple(rows[index % len(rows)])
    return HeadProfile(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_size,
        tuple(heads),
        other_layers=shape.other_layers,
    )


def write(profile: HeadProfile, folder: Path, name: str) -> str:
    """The path of a profile's file."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(profile.to_dict()), encoding="utf-8")
    return str(path)


def _attend(
    profile: HeadProfile, window: Window, dense_until: int, sliding_window: int
) -> Callable[..., tuple[torch.Tensor, None]]:
    """transformers' attention function: the oracle in full layers, a plain softmax in others."""

    def attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
        q, k, v = (x[0].transpose(0, 1).double() for x in (query, key, value))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        sinks = kwargs.get("s_aux")
        layer = module.layer_idx
        if layer in profile.other_layers:
            out = _sliding(q, k, v, scale, sinks, sliding_window)
        else:
            is_retrieval = torch.zeros(k.shape[1], dtype=torch.bool)
            is_retrieval[list(profile.retrieval_heads[layer])] = True
            more = {} if sinks is None else {"sink_logits": sinks.double()}
            out = oracle.attention(
                q, k, v, is_retrieval, window, scale, dense_until, soft_cap=softcap or 0.0, **more
            )
        return out.to(query.dtype).unsqueeze(0), None

    return attend


def _sliding(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
    window: int,
) -> torch.Tensor:
    """Attention of a layer with a sliding window; arguments are `[tokens, heads, head_dim]`."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    at = torch.arange(q.shape[0])
    back = at[:, None] - at[None, :]
    logits = logits.masked_fill((back < 0) | (back >= window), -torch.inf)
    if sinks is not None:
        more = sinks.double()[:, None, None].expand(-1, q.shape[0], 1)
        logits = torch.cat([logits, more], -1)
    weights = logits.softmax(-1)[..., : q.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, v)


class Formula:
    """A model whose full layers follow the formula.

    Args:
        window: of its sliding layers. dtype: of weights and of what passes between layers.
    """

    def __init__(
        self, model: Path, window: int = WINDOW, dtype: torch.dtype = torch.float32
    ) -> None:
        self.window = window
        # `logprobs` registers what attends; loading wants the name to be there.
        AttentionInterface.register("razor_oracle", _sliding)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, attn_implementation="razor_oracle", dtype=dtype
        ).eval()

    def logprobs(
        self,
        profile: HeadProfile,
        window: Window,
        tokens: list[int],
        prompt_len: int,
        dense_until: int,
    ) -> torch.Tensor:
        """Log-probability of each token after the prompt: fp32 `[tokens after it]`."""
        found = self.distributions(profile, window, tokens, prompt_len, dense_until)
        return found.gather(1, torch.tensor(tokens[prompt_len:]).unsqueeze(1)).squeeze(1)

    def distributions(
        self,
        profile: HeadProfile,
        window: Window,
        tokens: list[int],
        prompt_len: int,
        dense_until: int,
    ) -> torch.Tensor:
        """Log-probabilities where each token after the prompt stands: fp32 `[tokens, vocab]`."""
        AttentionInterface.register(
            "razor_oracle", _attend(profile, window, dense_until, self.window)
        )
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].float()
        return logits[prompt_len - 1 :].log_softmax(-1)


if __name__ == "__main__":
    from make_random_llama import make_tokenizer

    made = make(sys.argv[1], Path(sys.argv[2]))
    make_tokenizer().save_pretrained(made)
    write(profile_of_heads(made, [[0]]), made, Path(FILE_NAME).stem)

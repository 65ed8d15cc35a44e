"""What hybrid models of published shapes would hold, by `razor plan`: a table in Markdown.

    python -m benchmarks.hybrid_plans

No weights are read: the shapes stand below, and 15 % of the KV heads of full-attention layers,
spread evenly, retrieve. Values are of bf16, a window of 4,096, and one device.
"""

import math

import torch
from transformers import Gemma4TextConfig, GptOssConfig, PreTrainedConfig, Qwen3NextConfig

from razor_vllm.config import RazorConfig
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.heads.shapes import shape_of
from razor_vllm.other_layers import other_layers
from razor_vllm.partition import whole
from razor_vllm.plan import MemoryPlan, plan_memory

SHARE = 0.15
LENGTHS = (8192, 32768, 131072)

MODELS: dict[str, PreTrainedConfig] = {
    "Gemma 4 31B": Gemma4TextConfig(  # type: ignore[call-arg]
        num_hidden_layers=60,
        hidden_size=5376,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=256,
        global_head_dim=512,
        num_global_key_value_heads=4,
        attention_k_eq_v=True,
        sliding_window=1024,
    ),
    "gpt-oss-120b": GptOssConfig(num_hidden_layers=36),
    "Qwen3.5-27B-like": Qwen3NextConfig(
        num_hidden_layers=64,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
    ),
}


def profile_of(config: PreTrainedConfig, share: float = SHARE) -> HeadProfile:
    """A profile in which a share of the full layers' heads retrieves, rounded up."""
    shape = shape_of(config)
    full = [layer for layer in range(shape.num_layers) if layer not in shape.other_layers]
    heads = [(layer, head) for layer in full for head in range(shape.num_kv_heads)]
    count = math.ceil(round(share * len(heads), 6))
    chosen = {heads[index * len(heads) // count] for index in range(count)}
    rows = tuple(
        tuple(head for at, head in sorted(chosen) if at == layer)
        for layer in range(shape.num_layers)
    )
    return HeadProfile(
        shape.num_layers,
        shape.num_kv_heads,
        shape.head_size,
        rows,
        other_layers=shape.other_layers,
    )


def plan_of(config: PreTrainedConfig, max_model_len: int = LENGTHS[-1]) -> MemoryPlan:
    """The plan of a model on one device."""
    dtype = torch.bfloat16
    foreign = other_layers(config, 1, dtype)
    heads = whole(profile_of(config))
    return plan_memory(RazorConfig(window=4096), heads, dtype, max_model_len, 16, foreign)


def rows() -> list[str]:
    """The table."""
    head = "| model | tables | page, MiB | tokens of a local / retrieval / other page | hits in |"
    head += "".join(f" MiB at {length // 1024}k (stock) |" for length in LENGTHS)
    lines = [head, "|---" * (5 + len(LENGTHS)) + "|"]
    for name, config in MODELS.items():
        plan = plan_of(config)
        other = ", ".join(
            "a state" if layers.is_state else str(layers.block_size) for layers in plan.foreign
        )
        cells = [
            name,
            str(plan.num_tables),
            f"{plan.page_bytes / 2**20:.2f}",
            f"{plan.blocks.local} / {plan.blocks.retrieval} / {other}",
            f"{plan.hit_tokens:,}",
            *(
                f"{plan.request_bytes(n) / 2**20:,.0f} ({plan.full_request_bytes(n) / 2**20:,.0f})"
                for n in LENGTHS
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(rows()))

"""How large the correctness part is: on a GPU a model of served heads, on a CPU a tiny one."""

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SOME_HEADS = ((0, 3), (), (1,), (0, 1, 2, 3))
"""Retrieval heads of the mixed map: layers of either kind alone, and uneven ones."""


class Scale(NamedTuple):
    """num_heads, num_kv_heads, head_size: of the model, which has a layer a row of SOME_HEADS.

    lengths: of the prompts. repeated: of a phrase that a prompt says five times, for drafts.
    max_tokens: of an answer. chunk: tokens a step at most. formula: prompts of at most so many
    tokens are recomputed by the oracle.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    lengths: tuple[int, ...]
    repeated: tuple[int, ...]
    max_tokens: int
    window: int
    chunk: int
    formula: int
    max_model_len: int


SCALES = {
    "cuda": Scale(
        16,
        4,
        128,
        (1, 2, 3, 31, 32, 33, 63, 64, 97, 111, 200, 333, 512, 700, 1000, 1500),
        (40, 61),
        32,
        128,
        512,
        1000,
        4096,
    ),
    "cpu": Scale(8, 4, 32, (1, 2, 31, 33, 64, 97, 150, 333), (40,), 16, 32, 128, 150, 1024),
}


def make_model(folder: Path, scale: Scale) -> None:
    """Random weights of the bundled model's kind, and head profiles of all heads and of some.

    Wide layers get smaller weights, so that attention is as peaked as in the bundled model.
    """
    sys.path.insert(0, str(ROOT / "models"))
    import make_random_llama
    import torch

    from razor_vllm.heads.profile import HeadProfile

    shape = make_random_llama.Shape(
        len(SOME_HEADS), scale.num_heads, scale.num_kv_heads, scale.head_size
    )
    width = scale.num_heads * scale.head_size
    bundled = make_random_llama.NUM_HEADS * make_random_llama.HEAD_SIZE
    tokenizer = make_random_llama.make_tokenizer()
    model = make_random_llama.make_model(len(tokenizer), 0, shape)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight *= (bundled / width) ** 0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    every = tuple(tuple(range(scale.num_kv_heads)) for _ in SOME_HEADS)
    for name, heads in (("all", every), ("some", SOME_HEADS)):
        profile = HeadProfile(len(heads), scale.num_kv_heads, scale.head_size, heads)
        (folder / f"{name}.json").write_text(profile.to_json(), encoding="utf-8")

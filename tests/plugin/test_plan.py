"""Slots, page sizes and bytes."""

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from razor_vllm.config import RazorConfig
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import whole
from razor_vllm.plan import plan_memory
from razor_vllm.specs import pool_specs

PUBLISHED = Path(__file__).parents[3] / "shared" / "head_patterns" / "razor"


@st.composite
def profiles(draw) -> HeadProfile:
    layers, heads = draw(st.integers(1, 48)), draw(st.integers(1, 16))
    rows = st.lists(st.sets(st.integers(0, heads - 1)), min_size=layers, max_size=layers)
    chosen = tuple(tuple(sorted(row)) for row in draw(rows))
    return HeadProfile(layers, heads, draw(st.sampled_from([32, 64, 128])), chosen)


@given(
    profiles(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([512, 8192, 131072]),
)
def test_every_head_has_one_slot_and_pages_are_equal(profile, dtype, max_model_len) -> None:
    """Slots of a layer are contiguous, no two heads share one; pages hold the same bytes."""
    config = RazorConfig(window=256, allow_no_retrieval_heads=True)
    plan = plan_memory(config, whole(profile), dtype, max_model_len, 16)
    next_retrieval = next_local = 0
    for layer in range(profile.num_layers):
        retrieval, local = plan.retrieval_slots(layer), plan.local_slots(layer)
        assert sorted((*retrieval.heads, *local.heads)) == list(range(profile.num_kv_heads))
        assert (retrieval.start, local.start) == (next_retrieval, next_local)
        next_retrieval, next_local = retrieval.stop, local.stop
    assert (next_retrieval, next_local) == (plan.num_retrieval_slots, plan.num_local_slots)
    specs = [spec for spec in pool_specs(plan) if spec is not None]
    assert {spec.page_size_bytes for spec in specs} == {plan.page_bytes}
    assert plan.page_bytes % 4 == 0
    assert all(block % 16 == 0 for block in plan.blocks)


def test_no_retrieval_head_is_refused() -> None:
    """A profile without retrieval heads is a mistake, unless that is what is measured."""
    profile = HeadProfile(1, 2, 64, ((),))
    with pytest.raises(ValueError, match="names no retrieval head"):
        plan_memory(RazorConfig(), whole(profile), torch.bfloat16, 4096, 16)
    config = RazorConfig(allow_no_retrieval_heads=True)
    assert plan_memory(config, whole(profile), torch.bfloat16, 4096, 16).num_retrieval_slots == 0


def published(name: str) -> HeadProfile:
    with (PUBLISHED / name).open(encoding="utf-8") as file:
        rows = [[float(cell) for cell in row] for row in csv.reader(file, delimiter="\t")]
    chosen = tuple(tuple(h for h, cell in enumerate(row) if cell) for row in rows)
    return HeadProfile(len(rows), len(rows[0]), 128, chosen)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="published head sets are not here")
@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama3.1-8b-chat-32k.number-14-1.tsv", 38),
        ("qwen-2.5-chat-7b.number-14-1.tsv", 17),
        ("qwen-2.5-chat-14b.number-14-1.tsv", 57),
        ("qwq-32b.number-14-1.tsv", 76),
    ],
)
def test_published_head_sets_keep_a_quarter_at_32k(name: str, heads: int) -> None:
    """At 32k tokens and the default window a request costs at most 30 % of the full cache."""
    profile = published(name)
    assert profile.num_retrieval_heads == heads
    plan = plan_memory(RazorConfig(), whole(profile), torch.bfloat16, 131072, 16)
    assert max(plan.padding_share()) < 0.05
    assert math.lcm(*plan.blocks) <= 512
    assert plan.request_bytes(32768) <= 0.30 * plan.full_request_bytes(32768)
    assert plan.request_bytes(131072) <= 0.20 * plan.full_request_bytes(131072)

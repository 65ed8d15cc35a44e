"""Slots, page sizes and bytes."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import hybrid_plans
from razor_vllm import report
from razor_vllm.config import PROFILE_KEY, RazorConfig
from razor_vllm.foreign import ForeignLayers, grouped
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import whole
from razor_vllm.plan import plan_memory
from razor_vllm.show import plan_text
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


@pytest.mark.parametrize("name", hybrid_plans.MODELS)
def test_hybrids_of_published_shapes(name: str) -> None:
    """Few block tables, hits in few tokens, and at 128k at most 30 % of what stock vLLM holds."""
    plan = hybrid_plans.plan_of(hybrid_plans.MODELS[name])
    (layers,) = plan.foreign
    assert plan.num_tables <= 8
    assert plan.hit_tokens <= (1500 if layers.is_state else 256)
    assert plan.page_bytes % 256 == 0
    # All layers of a group fit a page, and one group less would not hold them all.
    assert layers.num_layers <= plan.num_foreign_groups * (plan.page_bytes // layers.page_bytes)
    assert plan.request_bytes(131072) <= 0.3 * plan.full_request_bytes(131072)
    for length in hybrid_plans.LENGTHS:
        own = plan.retrieval_pages(length) + plan.local_pages(length)
        held = own + plan.num_foreign_groups * layers.held_pages(length)
        assert plan.request_bytes(length) == held * plan.page_bytes


def test_a_layers_share_of_stocks_memory_by_hand() -> None:
    """A window of 1,024 in pages of 16; a state; and full attention of a draft."""
    sliding = ForeignLayers(50, 16 * 1024, 16, 1024)
    assert [sliding.held_pages(n) for n in (1, 16, 17, 1024, 1025, 1039, 1040)] == [
        1, 1, 2, 64, 65, 65, 64,
    ]  # fmt: skip
    assert sliding.with_block_size(32) == ForeignLayers(50, 32 * 1024, 32, 1024)
    assert [sliding.num_groups(size * 1024) for size in (16, 100, 160, 800)] == [50, 9, 5, 1]
    state = ForeignLayers(48, 1000, 128, None, 1, 1)
    assert (state.held_pages(1), state.held_pages(10**6)) == (1, 1)
    assert state.with_block_size(16) == state
    assert ForeignLayers(1, 100, 32).held_pages(65) == 3
    assert grouped("abcdefg", 10, 35) == [["a", "d", "g"], ["b", "e"], ["c", "f"]]


def test_no_plan_for_what_an_engine_refuses() -> None:
    """Pipeline stages of a hybrid."""
    profile = HeadProfile(4, 2, 32, ((), (0,), (), (1,)), other_layers=(0, 2))
    with pytest.raises(NotImplementedError, match="pipeline parallelism of a model with sliding"):
        plan_text(profile, RazorConfig(), 1, 2, 8192, 2**28, torch.bfloat16)


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


@pytest.mark.parametrize(
    ("prefill", "scores", "said"),
    [
        ("exact", {"induction": ((1.0, 0.0),)}, []),
        ("windowed", {"attribution": ((1.0, 0.0),)}, ["SmolLM2"]),
        ("chat", {"attribution": ((1.0, 0.0),)}, ["chat prefill reads later turns"]),
        ("chat", {"attribution": ((1.0, 0.5),)}, ["SmolLM2", "warning: heads that hold 66.7%"]),
        ("windowed", {"attribution": ((1.0, 0.5),)}, ["SmolLM2", "warning: heads that hold 66.7%"]),
        ("windowed", {"induction": ((1.0, 0.0),)}, ["SmolLM2", "note: the probe alone"]),
    ],
)
def test_start_up_report_tells_what_windows_cost(monkeypatch, prefill, scores, said) -> None:
    """What a mode cost a real model, and whether these heads can carry it; exact costs nothing."""
    profile = HeadProfile(1, 2, 64, ((0,),), scores)
    plan = plan_memory(RazorConfig(prefill=prefill), whole(profile), torch.bfloat16, 4096, 16)
    lines: list[str] = []
    monkeypatch.setattr(report.logger, "info", lambda text, line: lines.append(line))
    monkeypatch.setattr(report.logger, "warning", lambda text, line: lines.append(line))
    monkeypatch.setattr(report, "report_lines", lambda *args: [])
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=4096),
        additional_config={PROFILE_KEY: {"path": "p.json", "contents": profile.to_dict()}},
    )
    report.log_report(config, plan, 100)
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))

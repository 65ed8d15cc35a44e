"""Cache groups of hybrids and drafts: who shares a block table, and how large a page is."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from razor_vllm.config import RazorConfig
from razor_vllm.foreign import ForeignLayers
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import whole
from razor_vllm.plan import LOCAL_POOL, RETRIEVAL_POOL, MemoryPlan, plan_memory
from razor_vllm.specs import LocalSpec, kv_cache_groups, pool_specs

HEADS = whole(HeadProfile(2, 4, 64, ((0,), (2, 3))))
WINDOW = 256
SHAPE = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def specs_of(plan: MemoryPlan, num_sliding: int, num_drafted: int) -> dict:
    """Specs as the layers give them: with stock vLLM's own pages."""
    retrieval, local = pool_specs(plan)
    sliding = SlidingWindowSpec(block_size=128, sliding_window=WINDOW, **SHAPE)
    draft = FullAttentionSpec(block_size=128, **SHAPE)
    return {
        **{f"sliding.{i}": sliding for i in range(num_sliding)},
        RETRIEVAL_POOL: retrieval,
        LOCAL_POOL: local,
        **{f"draft.{i}": draft for i in range(num_drafted)},
    }


def plan_for(num_sliding: int, num_drafted: int) -> MemoryPlan:
    page = 2 * 2 * 64 * 2 * 128
    foreign = [ForeignLayers(num_sliding, page, 128, WINDOW)] if num_sliding else []
    foreign += [ForeignLayers(num_drafted, page, 128)] if num_drafted else []
    return plan_memory(RazorConfig(window=WINDOW), HEADS, torch.bfloat16, 8192, 16, foreign)


@pytest.mark.parametrize(("num_sliding", "num_drafted"), [(0, 0), (1, 0), (23, 0), (5, 6), (0, 1)])
def test_groups_are_those_of_the_plan(num_sliding: int, num_drafted: int) -> None:
    """Every layer is in one group, which fits a page; there are as many as the plan counts.

    A sliding layer whose window is the local heads' stays apart from the local pool.
    """
    plan = plan_for(num_sliding, num_drafted)
    specs = specs_of(plan, num_sliding, num_drafted)
    groups = kv_cache_groups(specs)
    assert sorted(name for group in groups for name in group.layer_names) == sorted(specs)
    assert len(groups) == plan.num_tables
    for group in groups:
        spec = group.kv_cache_spec
        assert len(group.layer_names) * spec.page_size_bytes <= plan.page_bytes
        if LOCAL_POOL in group.layer_names:
            assert isinstance(spec, LocalSpec)
            assert group.layer_names == [LOCAL_POOL]
        if isinstance(spec, SlidingWindowSpec) and not isinstance(spec, LocalSpec):
            assert spec.block_size in (16, 32)
    assert not any(group.is_eagle_group for group in groups)


@pytest.mark.parametrize("lag", [False, True])
def test_a_drafts_layers_are_one_group_and_the_first(lag: bool) -> None:
    """vLLM's V1 runner gives the first group's table to a draft model, whatever its group is.

    With EAGLE heads that group alone is marked; without a mark vLLM takes all groups for drafts.
    """
    groups = kv_cache_groups(specs_of(plan_for(5, 6), 5, 6), lag)
    assert groups[0].layer_names == [f"draft.{i}" for i in range(6)]
    assert [group.is_eagle_group for group in groups] == [lag] + [False] * (len(groups) - 1)


@pytest.mark.parametrize(("num_layers", "head_size"), [(1, 128), (16, 64)], ids=["eagle", "1b"])
def test_a_drafts_pages_are_filled(num_layers: int, head_size: int) -> None:
    """Drafts of Llama 3.1 8B: an EAGLE head, and a model of 1B.

    16 tokens of one layer would leave 98 % of a page empty, and every page costs as much.
    """
    heads = whole(HeadProfile(32, 8, 128, ((0,),) * 32))
    draft = ForeignLayers(num_layers, 16 * 2 * 8 * head_size * 2, 16)
    plan, without = (
        plan_memory(RazorConfig(), heads, torch.bfloat16, 131072, 16, layers)
        for layers in ([draft], [])
    )
    for length in (8192, 32768, 131072):
        added = plan.request_bytes(length) - without.request_bytes(length)
        assert added < 1.3 * draft.layer_bytes(length) + plan.page_bytes
    assert plan.hit_tokens <= 1024


def test_a_layer_that_was_not_planned_is_a_fault() -> None:
    """Pages of layers come from the plan; there is none for a layer that it does not know."""
    retrieval, local = pool_specs(plan_for(0, 0))
    late = FullAttentionSpec(block_size=128, **SHAPE)
    with pytest.raises(AssertionError, match="not planned"):
        kv_cache_groups({RETRIEVAL_POOL: retrieval, LOCAL_POOL: local, "late": late})

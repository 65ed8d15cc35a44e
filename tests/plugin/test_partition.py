"""Heads over ranks."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from razor_vllm.heads.profile import HeadProfile
from razor_vllm.partition import partition, pipeline_stages


@st.composite
def splits(draw) -> tuple[HeadProfile, int, list[range]]:
    """A profile with scores, tensor-parallel ranks that divide it, and pipeline stages."""
    layers, heads = draw(st.integers(2, 24)), draw(st.sampled_from([1, 2, 4, 8]))
    rows = st.lists(st.sets(st.integers(0, heads - 1)), min_size=layers, max_size=layers)
    chosen = tuple(tuple(sorted(row)) for row in draw(rows))
    scores = tuple(
        tuple(draw(st.lists(st.integers(0, 9), min_size=heads, max_size=heads)))
        for _ in range(layers)
    )
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=3)))
    edges = [0, *cuts, layers]
    stages = [range(a, b) for a, b in pairwise(edges)]
    profile = HeadProfile(layers, heads, 64, chosen, {"induction": scores})
    return profile, draw(st.sampled_from([1, 2, 4, 8, 16])), stages


@given(splits())
def test_ranks_are_alike_and_lose_nothing(split) -> None:
    """Quotas are equal, every head is somewhere, and no retrieval head became local."""
    profile, tp_size, stages = split
    ranks = partition(profile, tp_size, stages)
    assert len(ranks) == tp_size * len(stages)
    assert len({(rank.retrieval_quota, rank.local_quota) for rank in ranks}) == 1
    seen = set()
    for rank in ranks:
        own = rank.profile
        assert own.num_retrieval_heads <= rank.retrieval_quota
        assert own.num_heads - own.num_retrieval_heads <= rank.local_quota
        for at, layer in enumerate(rank.layers):
            for head in range(own.num_kv_heads):
                place = (layer, rank.first_head + head)
                seen.add(place)
                retrieves = head in own.retrieval_heads[at]
                chosen = place[1] in profile.retrieval_heads[layer]
                assert retrieves == (chosen or place in rank.promoted)
                assert not (chosen and place in rank.promoted)
    assert len(seen) == profile.num_heads


@given(splits())
def test_spare_slots_go_to_the_best_local_heads(split) -> None:
    """A rank promotes as many as it can, and none with a lower score than one it leaves."""
    profile, tp_size, stages = split
    scores = profile.scores["induction"]
    for rank in partition(profile, tp_size, stages):
        own = rank.profile
        left = [
            scores[layer][rank.first_head + head]
            for at, layer in enumerate(rank.layers)
            for head in own.local_heads(at)
        ]
        assert own.num_retrieval_heads == rank.retrieval_quota or not left
        if rank.promoted and left:
            assert min(scores[at][head] for at, head in rank.promoted) >= max(left)


def test_one_rank_is_the_profile_itself() -> None:
    """On one device nothing is promoted and nothing is spare."""
    profile = HeadProfile(2, 4, 64, ((0, 2), (1,)))
    (rank,) = partition(profile)
    assert rank.profile.retrieval_heads == profile.retrieval_heads
    assert (rank.promoted, rank.retrieval_quota, rank.local_quota) == ((), 3, 5)


def test_evening_out_by_hand() -> None:
    """Two ranks, three heads and none: the second promotes its best three."""
    scores = {"induction": ((0.9, 0.8, 0.1, 0.3), (0.9, 0.2, 0.2, 0.0))}
    profile = HeadProfile(2, 4, 64, ((0, 1), (0,)), scores)
    first, second = partition(profile, tp_size=2)
    assert first.promoted == ()
    assert second.promoted == ((0, 2), (0, 3), (1, 2))
    assert second.profile.retrieval_heads == ((0, 1), (0,))
    assert (second.retrieval_quota, second.local_quota) == (3, 1)


def test_more_stages_than_layers_are_refused() -> None:
    """Every stage has a layer."""
    assert pipeline_stages(7, 2) == [range(4), range(4, 7)]
    with pytest.raises(ValueError, match="4 layers do not make 5 pipeline stages"):
        pipeline_stages(4, 5)


def test_heads_that_do_not_divide_are_refused() -> None:
    """As vLLM refuses them."""
    with pytest.raises(ValueError, match="6 KV heads do not divide over 4"):
        partition(HeadProfile(1, 6, 64, ((0,),)), tp_size=4)


def test_layers_without_full_attention_have_no_slots() -> None:
    """A hybrid's stages are cut by all layers, and hold the heads of the full ones."""
    heads = ((), (0,), (), (1,), (), (0, 1))
    profile = HeadProfile(6, 2, 64, heads, other_layers=(0, 2, 4))
    (whole,) = partition(profile)
    assert whole.layers == (1, 3, 5)
    assert whole.profile == HeadProfile(3, 2, 64, ((0,), (1,), (0, 1)))
    assert (whole.retrieval_quota, whole.local_quota) == (4, 2)
    ranks = partition(profile, 1, [range(3), range(3, 6)])
    assert [rank.layers for rank in ranks] == [(1,), (3, 5)]
    with pytest.raises(ValueError, match="layers 0 to 0 are a pipeline stage without full"):
        partition(profile, 1, [range(1), range(1, 6)])

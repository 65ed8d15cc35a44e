"""Heads over ranks: tensor and pipeline parallelism.

vLLM requires the pools of all ranks to be equal, while ranks hold different heads. So the
slots of a rank are quotas, equal on all ranks:

    retrieval quota   the most retrieval heads on any rank
    local quota       the most local heads that are left on any rank

A rank with spare retrieval slots promotes its best-scoring local heads into them; slots that
it cannot fill stay empty.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices

from razor_vllm.config import profile_of
from razor_vllm.heads.profile import HeadProfile


@dataclass(frozen=True)
class RankHeads:
    """The heads of one rank, and the quotas of all.

    Args:
        layers: of the model with full attention, on this rank. first_head: its first KV head.
        profile: of those layers and this rank's heads alone, promoted ones among the
            retrieval heads.
        promoted: local heads that took a spare retrieval slot, as (layer, KV head) of the model.
        retrieval_quota, local_quota: slots of either pool.
    """

    layers: tuple[int, ...]
    first_head: int
    profile: HeadProfile
    promoted: tuple[tuple[int, int], ...]
    retrieval_quota: int
    local_quota: int


def partition(
    profile: HeadProfile, tp_size: int = 1, stages: Sequence[range] | None = None
) -> tuple[RankHeads, ...]:
    """Heads of every rank: by stage, then by tensor-parallel rank.

    Args:
        tp_size: tensor-parallel ranks. With more ranks than KV heads, vLLM gives a head to
            several ranks.
        stages: layers of each pipeline stage; one stage by default.

    Raises:
        ValueError: KV heads that do not divide over the ranks, or a stage without full attention.
    """
    stages = stages or (range(profile.num_layers),)
    ranks = [
        _own_heads(profile, layers, tp_size, rank) for layers in stages for rank in range(tp_size)
    ]
    quota = max(rank.profile.num_retrieval_heads for rank in ranks)
    ranks = [_promote(rank, profile, quota) for rank in ranks]
    local = max(r.profile.num_heads - r.profile.num_retrieval_heads for r in ranks)
    return tuple(replace(rank, retrieval_quota=quota, local_quota=local) for rank in ranks)


def pipeline_stages(num_layers: int, pp_size: int) -> list[range]:
    """Layers of each pipeline stage, as vLLM splits them.

    Raises:
        ValueError: more stages than layers.
    """
    if not 1 <= pp_size <= num_layers:
        raise ValueError(f"{num_layers} layers do not make {pp_size} pipeline stages")
    return [range(*get_pp_indices(num_layers, rank, pp_size)) for rank in range(pp_size)]


def rank_heads(vllm_config: VllmConfig, stage: int, tp_rank: int) -> RankHeads:
    """Heads of one rank of an engine under the policy.

    Args:
        stage: pipeline stage. tp_rank: tensor-parallel rank within it.

    Raises:
        ValueError: heads or layers that do not divide.
    """
    profile, parallel = profile_of(vllm_config.additional_config), vllm_config.parallel_config
    stages = pipeline_stages(profile.num_layers, parallel.pipeline_parallel_size)
    ranks = partition(profile, parallel.tensor_parallel_size, stages)
    return ranks[stage * parallel.tensor_parallel_size + tp_rank]


def whole(profile: HeadProfile) -> RankHeads:
    """All heads on one device."""
    return partition(profile)[0]


def _own_heads(profile: HeadProfile, stage: range, tp_size: int, rank: int) -> RankHeads:
    layers = tuple(layer for layer in profile.full_layers if layer in stage)
    if not layers:
        raise ValueError(
            f"layers {stage.start} to {stage.stop - 1} are a pipeline stage without full attention"
        )
    total = profile.num_kv_heads
    if total % tp_size and tp_size % total:
        raise ValueError(f"{total} KV heads do not divide over {tp_size} tensor-parallel ranks")
    count = max(total // tp_size, 1)
    first = rank * count if total >= tp_size else rank // (tp_size // total)
    heads = range(first, first + count)
    own = HeadProfile(
        num_layers=len(layers),
        num_kv_heads=count,
        head_size=profile.head_size,
        retrieval_heads=tuple(
            tuple(head - first for head in profile.retrieval_heads[layer] if head in heads)
            for layer in layers
        ),
    )
    return RankHeads(layers, first, own, (), 0, 0)


def _promote(rank: RankHeads, profile: HeadProfile, quota: int) -> RankHeads:
    """Fill spare retrieval slots with the rank's best local heads."""
    own = rank.profile
    spare = quota - own.num_retrieval_heads
    ranked = sorted(
        (-_score(profile, layer, rank.first_head + head), at, head)
        for at, layer in enumerate(rank.layers)
        for head in own.local_heads(at)
    )
    taken = {(at, head) for _, at, head in ranked[:spare]}
    rows = tuple(
        tuple(sorted({*heads, *(head for layer, head in taken if layer == at)}))
        for at, heads in enumerate(own.retrieval_heads)
    )
    promoted = tuple(sorted((rank.layers[at], rank.first_head + head) for at, head in taken))
    return replace(rank, profile=replace(own, retrieval_heads=rows), promoted=promoted)


def _score(profile: HeadProfile, layer: int, head: int) -> float:
    """By attribution if there is one, else by induction, else the best of the other scores."""
    scores = profile.scores
    for name in ("attribution", "induction"):
        if name in scores:
            return scores[name][layer][head]
    return max((rows[layer][head] for rows in scores.values()), default=0.0)

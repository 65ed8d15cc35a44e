"""What the policy holds and saves: the start-up report, and figures of requests and mixes."""

import logging
from collections.abc import Mapping
from typing import NamedTuple, cast

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec

from razor_vllm.config import config_of, profile_of
from razor_vllm.heads.mass import windowed_note
from razor_vllm.partition import rank_heads
from razor_vllm.plan import MemoryPlan, PoolSizes
from razor_vllm.specs import LocalSpec, RetrievalSpec, foreign_layers, is_pool
from razor_vllm.support import refuse
from razor_vllm.turns import turn_of

logger = init_logger("vllm.razor")

_COSTS = {
    "chat": "chat prefill reads later turns through windows: on SmolLM2-135M 82-94 % of full's "
    "right answers were left, with 24 to 35 of 90 heads (docs/quality.md)",
    "windowed": "windowed prefill reads the prompt itself through windows: on SmolLM2-135M 86-93 % "
    "of full's right answers were left, where exact prefill left 97-101 % (docs/quality.md)",
}
"""What a mode was seen to cost on a real model."""

_REPORT_LENGTHS = (4096, 32768)


class RequestMemory(NamedTuple):
    """KV memory of one decoding request.

    num_tokens: of the request. held, full: bytes under the policy and under stock vLLM.
    fit, fit_full: such requests that the engine's KV memory holds at a time.
    prefill: bytes that the request holds when a prompt of that length ends.
    waiting, fit_waiting, fit_waiting_full: bytes that its next turn needs in the prefix cache
        while a chat of that length waits, and such chats that the memory holds.
    """

    num_tokens: int
    held: int
    full: int
    fit: int
    fit_full: int
    prefill: int
    waiting: int
    fit_waiting: int
    fit_waiting_full: int


class MixMemory(NamedTuple):
    """KV memory of a mix of decoding requests.

    held, full: mean bytes of a request under the policy and under stock vLLM. fit, fit_full:
    requests of the mix that the memory holds at a time.
    """

    held: float
    full: float
    fit: int
    fit_full: int


def check_attached(kv_cache_specs: list[dict[str, KVCacheSpec]]) -> None:
    """Refuse an engine whose workers report no caches of ours.

    Raises:
        NotImplementedError: no layer has full attention.
        RuntimeError: naming what was found.
    """
    for specs in kv_cache_specs:
        if not any(is_pool(spec) for spec in specs.values()):
            if specs and not any(isinstance(spec, FullAttentionSpec) for spec in specs.values()):
                kinds = {type(spec).__name__ for spec in specs.values()}
                raise refuse(f"a model without full attention (caches: {', '.join(kinds)})")
            found = {name: type(spec).__name__ for name, spec in specs.items()}
            raise RuntimeError(
                "razor: the policy did not attach to the model: expected razor's pools among the "
                f"KV caches, found {found or 'none'}. Is the plugin 'razor' loaded in every "
                "process (VLLM_PLUGINS)?"
            )


def plan_of(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> MemoryPlan:
    """The plan of the allocated pools of an engine's first rank; all ranks cost the same."""
    config = config_of(vllm_config.additional_config)
    assert config is not None, "the policy was not asked for"
    groups = kv_cache_config.kv_cache_groups
    pools = [group.kv_cache_spec for group in groups if is_pool(group.kv_cache_spec)]
    first = cast(RetrievalSpec | LocalSpec, pools[0])
    sizes = {type(spec): spec.block_size for spec in pools}
    # With one kind of head there is one pool, and the other's size does not matter.
    blocks = PoolSizes(
        sizes.get(RetrievalSpec, first.block_size), sizes.get(LocalSpec, first.block_size)
    )
    heads = rank_heads(vllm_config, 0, 0)
    others = (
        group.kv_cache_spec
        for group in groups
        if not is_pool(group.kv_cache_spec)
        for _ in group.layer_names
    )
    return MemoryPlan(
        config,
        heads,
        first.dtype,
        blocks,
        first.full_block_size,
        foreign_layers(others, vllm_config),
        first.page_size_bytes,
    )


class Capacity(NamedTuple):
    """Bytes that requests may hold in an engine's KV memory, under the policy and under stock
    vLLM; each also has a null page. pages: of the block pool, without that one."""

    pages: int
    held: int
    full: int

    @classmethod
    def of(cls, plan: MemoryPlan, memory: int) -> "Capacity":
        """The capacity of `memory` bytes."""
        pages = max(memory // plan.page_bytes - 1, 0)
        full_pages = max(memory // plan.full_page_bytes - 1, 0)
        return cls(pages, pages * plan.page_bytes, full_pages * plan.full_page_bytes)


def request_memory(plan: MemoryPlan, num_tokens: int, capacity: Capacity) -> RequestMemory:
    """KV memory of one decoding request, and how many fit."""
    until = 0 if plan.config.prefill == "windowed" else num_tokens
    held, full = plan.request_bytes(num_tokens), plan.full_request_bytes(num_tokens)
    waiting = plan.waiting_pages(num_tokens)
    return RequestMemory(
        num_tokens=num_tokens,
        held=held,
        full=full,
        fit=capacity.held // held,
        fit_full=capacity.full // full,
        prefill=plan.request_bytes(num_tokens, dense_until=until),
        waiting=waiting * plan.page_bytes,
        fit_waiting=capacity.pages // max(waiting, 1),
        fit_waiting_full=capacity.full // full,
    )


def mix_memory(plan: MemoryPlan, mix: Mapping[int, float], capacity: Capacity) -> MixMemory:
    """KV memory of a mix of decoding requests, and how many fit at a time.

    Args:
        mix: weight of requests of so many tokens; the weights need not sum to 1.
    """
    total = sum(mix.values())
    held = sum(plan.request_bytes(n) * weight for n, weight in mix.items()) / total
    full = sum(plan.full_request_bytes(n) * weight for n, weight in mix.items()) / total
    return MixMemory(held, full, int(capacity.held // held), int(capacity.full // full))


def report_lines(plan: MemoryPlan, max_model_len: int, num_blocks: int) -> list[str]:
    """The start-up report; num_blocks: pages of the block pool, vLLM's null page included."""
    capacity = Capacity.of(plan, num_blocks * plan.page_bytes)
    config, profile = plan.config, plan.profile
    padding = plan.padding_share()
    window = f"{config.window} tokens"
    if config.window_ratio:
        window += f" or {config.window_ratio:g} of the position, whichever is more"
    lines = [
        f"KV policy razor: {profile.num_retrieval_heads} of {profile.num_heads} KV heads "
        f"retrieve ({profile.num_retrieval_heads / profile.num_heads:.1%}), "
        f"{config.prefill} prefill",
        "  retrieval heads by layer: "
        + " ".join(str(len(heads)) for heads in profile.retrieval_heads),
        f"  local heads keep {config.sinks} sinks, a window of {window}"
        + (" and a compensation slot" if config.compensation else ", NO compensation"),
        f"  page: {plan.page_bytes:,} bytes = {plan.blocks.retrieval} tokens of "
        f"{plan.num_retrieval_slots} retrieval heads ({padding[0]:.1%} padding) or "
        f"{plan.blocks.local} tokens of {plan.num_local_slots} local heads "
        f"({padding[1]:.1%} padding); {capacity.pages:,} pages",
    ]
    lines += foreign_lines(plan)
    lines.append(
        "  tokens    bytes/request   of full   fit (full policy)   waiting chats (full policy)"
    )
    lengths = sorted({*(n for n in _REPORT_LENGTHS if n < max_model_len), max_model_len})
    memories = [request_memory(plan, n, capacity) for n in lengths]
    lines += [
        f"  {m.num_tokens:>7,} {m.held:>15,} {m.held / m.full:>9.1%} {m.fit:>6,} ({m.fit_full:,})"
        f"   {m.fit_waiting:>6,} ({m.fit_waiting_full:,})"
        for m in memories
    ]
    last = memories[-1]
    if config.prefill != "windowed":
        lines.append(
            f"  {config.prefill} prefill holds a whole "
            f"{'prompt' if config.prefill == 'exact' else 'first turn'} while it is read: "
            f"{last.prefill:,} bytes for {last.num_tokens:,} tokens; "
            "--razor-prefill windowed bounds it"
        )
    again = "the answer before them and " if config.prefill == "exact" else ""
    lines.append(
        f"  a waiting chat of {last.num_tokens:,} tokens needs {last.waiting:,} bytes of cache; "
        f"its next turn computes its own tokens, {again}at most {plan.hit_tokens} more"
    )
    return lines


def foreign_lines(plan: MemoryPlan) -> list[str]:
    """What layers that are not split by heads hold, and in how many tokens hits come."""
    lines = []
    for layers in plan.foreign:
        groups = layers.num_groups(plan.page_bytes)
        page = "a state" if layers.is_state else f"{layers.block_size} tokens"
        lines.append(
            f"  {layers.num_layers} other layers ({layers.kind}) keep vLLM's own cache: {groups} "
            f"block tables, a page holds {page} of up to {plan.page_bytes // layers.page_bytes}"
        )
    if plan.foreign:
        lines.append(
            f"  {plan.num_tables} block tables a request; prefix-cache hits come in "
            f"{plan.hit_tokens:,} tokens"
        )
    return lines


def log_report(vllm_config: VllmConfig, plan: MemoryPlan, num_blocks: int) -> None:
    """Print the start-up report to vLLM's log."""
    for line in report_lines(plan, vllm_config.model_config.max_model_len, num_blocks):
        logger.info("%s", line)
    if cost := _COSTS.get(plan.config.prefill):
        logger.info("  %s", cost)
        if note := windowed_note(profile_of(vllm_config.additional_config)):
            logger.warning("  %s", note)
    turn = turn_of(vllm_config.additional_config)
    if turn.note:
        logger.log(logging.INFO if turn.marker else logging.WARNING, "  %s", turn.note)

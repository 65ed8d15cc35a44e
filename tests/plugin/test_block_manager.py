"""The block managers of both pools under vLLM's real KVCacheManager, alone and beside the groups
of layers with sliding windows, which are vLLM's own.

Random sequences of add, advance, finish and preempt run against a model of the pages'
contents: each written token carries a signature of what its K and V depend on, and each
query checks that every page it reads holds the signatures that it would have computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from razor_kernels import DENSE_FOREVER
from razor_vllm.compat import install_engine_patches
from razor_vllm.config import RazorConfig
from razor_vllm.foreign import ForeignLayers
from razor_vllm.heads.profile import HeadProfile
from razor_vllm.integrity import check_pools, pages_by_state
from razor_vllm.managers import LocalManager, register_specs
from razor_vllm.partition import whole
from razor_vllm.plan import MemoryPlan, PoolSizes
from razor_vllm.policy import carrying, dense_part
from razor_vllm.specs import pool_specs

register_specs()
install_engine_patches()
init_none_hash(sha256)

HEADS = whole(HeadProfile(2, 2, 16, ((0,), ())))
RETRIEVAL, LOCAL = 0, 1
CHUNK = 40
MARKER = [1, 1]
"""Of a chat's first turn: of the streams below, one ends a turn, at another place than the rest."""


class Signature(NamedTuple):
    """What the K and V of the token at position t depend on.

    tokens: hash of tokens [0, t]. dense: how many of them were attended densely.
    """

    tokens: int
    dense: int


@dataclass
class Live:
    """A request, and the signatures of all its tokens so far."""

    request: Request
    until: int
    frontier: int = 0
    nulls: set[int] = field(default_factory=set)

    def signature(self, position: int) -> Signature:
        tokens = self.request.all_token_ids[: position + 1]
        return Signature(hash(tuple(tokens)), min(self.until, position + 1))


class World:
    """A scheduler's view of the manager, and the contents of all pages."""

    def __init__(
        self, plan: MemoryPlan, num_blocks: int, caching: bool, windows: Sequence[int] = ()
    ) -> None:
        """windows: of the groups of sliding layers, in tokens; their pages are the plan's."""
        self.plan = plan
        specs: list[Any] = [spec for spec in pool_specs(plan) if spec is not None]
        assert [layers.window for layers in plan.foreign] == list(windows)
        for layers in plan.foreign:
            specs.append(sliding_spec(layers))
        groups = [KVCacheGroupSpec([str(at)], spec) for at, spec in enumerate(specs)]
        self.sizes = [spec.block_size for spec in specs]
        self.hash_size = 16
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks, [], groups),
            max_model_len=400,
            scheduler_block_size=plan.hit_tokens,
            hash_block_size=self.hash_size,
            max_in_flight_tokens=CHUNK,
            enable_caching=caching,
        )
        self.hasher = get_request_block_hasher(self.hash_size, sha256) if caching else None
        self.contents: dict[int, dict[int, Signature]] = {}
        self.live: list[Live] = []
        self.waiting: list[Live] = []
        self.count = 0
        self.hits = 0
        self.hit_tokens = 0

    def add(self, prompt: list[int], asked: str | int) -> None:
        """A request that asks for a policy, or for so many dense tokens (at most its prompt's)."""
        extra: dict = {"kv_policy": asked}
        if isinstance(asked, int):
            extra = {"kv_dense_tokens": min(asked, len(prompt))}
        part = dense_part(self.plan.config, extra, prompt, len(prompt), MARKER)
        self.count += 1
        request = Request(
            request_id=str(self.count),
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=1000, extra_args=carrying(extra, part)),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.waiting.append(Live(request, part.until))
        self.admit()

    def admit(self) -> None:
        """Start the first waiting request, if it fits."""
        if not self.waiting:
            return
        live = self.waiting[0]
        blocks, computed, _ = self.manager.get_computed_blocks(live.request)
        todo = min(live.request.num_tokens - computed, CHUNK)
        new = self.manager.allocate_slots(
            live.request,
            todo,
            num_new_computed_tokens=computed,
            new_computed_blocks=blocks,
            full_sequence_must_fit=True,
        )
        if new is None:
            return
        self.hits += computed > 0
        self.hit_tokens += computed
        self.waiting.pop(0)
        self.live.append(live)
        live.request.num_computed_tokens = computed
        live.frontier, live.nulls = 0, set()
        self.compute(live, computed, computed + todo)

    def advance(self, index: int, token: int | None) -> None:
        """One step of a running request: a chunk of what is to compute, or a new token.

        Args:
            token: None for one like the last, as in the stream that the prompt is of.
        """
        if not self.live:
            return
        live = self.live[index % len(self.live)]
        request = live.request
        if request.num_computed_tokens == request.num_tokens:
            if request.num_tokens >= 390:
                self.finish(index)
                return
            last = request.all_token_ids[-1]
            request.append_output_token_ids(last if token is None else token)
        start = request.num_computed_tokens
        todo = min(request.num_tokens - start, CHUNK)
        while self.manager.allocate_slots(request, todo) is None:
            victim = self.live[-1]
            self.preempt(len(self.live) - 1)
            if victim is live:
                return
        self.compute(live, start, start + todo)

    def compute(self, live: Live, start: int, stop: int) -> None:
        """Write tokens [start, stop), check all that their queries read."""
        self.check_eviction(live, start)
        for position in range(start, stop):
            for group in range(len(self.sizes)):
                self.write(live, group, position)
        for position in {start, (start + stop) // 2, stop - 1}:
            self.check_reads(live, position)
        live.request.num_computed_tokens = stop
        self.check_counts(live, start, stop)

    def page(self, live: Live, group: int, index: int):
        return self.manager.coordinator.get_blocks(live.request.request_id)[group][index]

    def size(self, group: int) -> int:
        return self.sizes[group]

    def write(self, live: Live, group: int, position: int) -> None:
        block = self.page(live, group, position // self.size(group))
        assert not block.is_null
        assert block.ref_cnt == 1, "a shared page is written to"
        slots = self.contents.setdefault(block.block_id, {})
        slots[position % self.size(group)] = live.signature(position)

    def read(self, live: Live, group: int, position: int) -> None:
        block = self.page(live, group, position // self.size(group))
        assert not block.is_null, f"position {position} of pool {group} is gone"
        found = self.contents[block.block_id].get(position % self.size(group))
        assert found == live.signature(position), f"position {position} of pool {group}"

    def check_reads(self, live: Live, t: int) -> None:
        """Every page that the query at t reads holds what it would have computed."""
        for position in range(0, t + 1, 5):
            self.read(live, RETRIEVAL, position)
        for group, layers in enumerate(self.plan.foreign, LOCAL + 1):
            for position in {t, *range(max(t - layers.window + 1, 0), t, 5)}:
                self.read(live, group, position)
        window, size = self.plan.window, self.size(LOCAL)
        start = 0
        if t >= live.until:
            start = window.first_window_page(t // size) * size
            if window.num_dropped(t // size) > 0:
                self.read(live, LOCAL, start - 1)  # its page's tail is the slot
        for position in {*range(min(window.sinks, t + 1)), *range(start, t + 1, 5), t}:
            self.read(live, LOCAL, position)
        # The sums of the page under way continue those of the page before.
        if t >= size:
            self.read(live, LOCAL, t // size * size - 1)

    def check_eviction(self, live: Live, start: int) -> None:
        """The frontier moves forward only; what is gone stays gone, and lies behind it."""
        window = self.plan.window
        blocks = self.manager.coordinator.get_blocks(live.request.request_id)[LOCAL]
        nulls = {index for index, block in enumerate(blocks) if block.is_null}
        assert live.nulls <= nulls
        live.nulls = nulls
        if start < live.until:
            assert not nulls
            return
        frontier = window.first_kept_page(start)
        assert frontier >= live.frontier
        live.frontier = frontier
        assert nulls == set(range(window.sink_pages, frontier))

    def check_counts(self, live: Live, start: int, stop: int) -> None:
        """Invariant 4: a request that computes one token holds what the formula says."""
        held = [
            sum(not block.is_null for block in group)
            for group in self.manager.coordinator.get_blocks(live.request.request_id)
        ]
        plan = self.plan
        assert held[RETRIEVAL] == plan.retrieval_pages(stop)
        if stop - start == 1:
            assert held[LOCAL] == plan.local_pages(stop, live.until)
            for pages, layers in zip(held[LOCAL + 1 :], plan.foreign, strict=True):
                assert pages == layers.held_pages(stop)
        if start >= live.until:
            in_flight = -(-(stop - start) // plan.blocks.local)
            assert held[LOCAL] <= plan.window.max_held_pages(stop) + in_flight

    def preempt(self, index: int) -> None:
        if self.live:
            live = self.live.pop(index % len(self.live))
            self.manager.free(live.request)
            live.request.num_computed_tokens = 0
            self.waiting.insert(0, live)

    def finish(self, index: int) -> None:
        if self.live:
            self.manager.free(self.live.pop(index % len(self.live)).request)

    def check_pool(self) -> None:
        """Invariant 5: references are exactly the requests', the rest is free."""
        references: dict[int, int] = {}
        for live in self.live:
            for group in self.manager.coordinator.get_blocks(live.request.request_id):
                for block in group:
                    if not block.is_null:
                        references[block.block_id] = references.get(block.block_id, 0) + 1
        pool = self.manager.block_pool
        for block in pool.blocks:
            if not block.is_null:
                assert block.ref_cnt == references.get(block.block_id, 0)
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1 - len(references)
        # What integrity says of all groups, and the figures that users see.
        assert check_pools(self.manager, idle=False) == []
        states = pages_by_state(self.manager)
        assert sum(states.held.values()) == len(references)
        assert states.free + sum(states.cached.values()) == pool.get_num_free_blocks()


def sliding_layers(window: int, block_size: int) -> ForeignLayers:
    """A group of one sliding layer."""
    return ForeignLayers(1, block_size * 128, block_size, window)


def sliding_spec(layers: ForeignLayers) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=layers.block_size,
        num_kv_heads=1,
        head_size=16,
        dtype=torch.float32,
        sliding_window=layers.window,
    )


# Prompts are prefixes of a few streams, so that they share much and differ somewhere.
ASKED = ["razor", "razor", "full", 0, 16, 41, 64, 96, 97, 150]
prompt_shapes = st.tuples(st.integers(0, 2), st.integers(1, 230))
operations = st.one_of(
    st.tuples(st.just("add"), prompt_shapes, st.sampled_from(ASKED)),
    st.tuples(st.just("advance"), st.integers(0, 7), st.integers(0, 2)),
    st.tuples(st.just("advance"), st.integers(0, 7), st.integers(0, 2)),
    st.tuples(st.just("advance"), st.integers(0, 7), st.just(0)),
    st.tuples(st.just("decode"), st.integers(0, 7), st.integers(1, 60)),
    st.tuples(st.just("finish"), st.integers(0, 7), st.none()),
    st.tuples(st.just("preempt"), st.integers(0, 7), st.none()),
)
configs = st.builds(
    RazorConfig,
    window=st.sampled_from([0, 16, 40]),
    window_ratio=st.sampled_from([0.0, 0.0, 0.2]),
    sinks=st.sampled_from([0, 4, 20]),
    prefill=st.sampled_from(["exact", "chat", "windowed"]),
)


def stream(which: int, length: int) -> list[int]:
    """Zeros up to a position of the stream's own, so that answers continue prompts."""
    return [0 if i < 60 + 50 * which else 1 + which for i in range(length)]


def apply(world: World, operation: tuple) -> None:
    kind, first, second = operation
    if kind == "add":
        world.add(stream(*first), second)
    elif kind == "advance":
        world.advance(first, second)
    elif kind == "decode":
        for _ in range(second):
            world.advance(first, None)
    else:
        getattr(world, kind)(first)
        world.admit()


@given(
    config=configs,
    blocks=st.sampled_from([PoolSizes(48, 16), PoolSizes(32, 32), PoolSizes(16, 32)]),
    num_blocks=st.integers(40, 90),
    windows=st.lists(st.integers(1, 120), max_size=4),
    foreign_block=st.sampled_from([16, 32]),
    caching=st.sampled_from([True, True, True, False]),
    sequence=st.lists(operations, min_size=6, max_size=24),
)
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_random_sequences(
    config, blocks, num_blocks, windows, foreign_block, caching, sequence
) -> None:
    """No leak, no double reference, no page read that holds other values than a miss."""
    foreign = tuple(sliding_layers(window, foreign_block) for window in windows)
    plan = MemoryPlan(config, HEADS, torch.float32, blocks, 16, foreign)
    world = World(plan, num_blocks + 10 * len(windows), caching, windows)
    for operation in sequence:
        apply(world, operation)
        world.check_pool()
    event(f"cache hits: {min(world.hits, 3)}")
    while world.live:
        world.finish(0)
    world.check_pool()
    pool = world.manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not world.manager.coordinator.single_type_managers[LOCAL].dense_parts.keys() - {
        live.request.request_id for live in world.waiting
    }


def test_opt_out_holds_every_page() -> None:
    """A request that is never compressed frees nothing."""
    config = RazorConfig(window=16, prefill="windowed")
    plan = MemoryPlan(config, HEADS, torch.float32, PoolSizes(48, 16), 16)
    world = World(plan, 100, True)
    world.add([7] * 30, "full")
    for _ in range(120):
        world.advance(0, 1)
    assert world.live[0].until == DENSE_FOREVER
    blocks = world.manager.coordinator.get_blocks("1")[LOCAL]
    assert len(blocks) == 10
    assert not any(block.is_null for block in blocks)


def chat_world(num_blocks: int) -> World:
    config = RazorConfig(window=64, prefill="windowed")
    return World(MemoryPlan(config, HEADS, torch.float32, PoolSizes(16, 16), 16), num_blocks, True)


def run_out(world: World, num_tokens: int) -> None:
    """The last request, until it has so many tokens and ends."""
    live = world.live[-1]
    while live.request.num_computed_tokens < num_tokens:
        world.advance(len(world.live) - 1, 9)
    world.finish(len(world.live) - 1)


def test_room_is_not_given_up_for_nothing() -> None:
    """Where free pages abound, pages out of a window stay cached for who shares the prefix."""
    world = chat_world(1000)
    shared = [3] * 160
    world.add([*shared, *[4] * 120], "razor")
    run_out(world, 280)
    blocks = world.manager.coordinator.get_blocks
    world.add([*shared, *[5] * 100], "razor")
    held = blocks(world.live[-1].request.request_id)[LOCAL]
    assert sum(block.is_null for block in held) == 160 // 16 - 64 // 16 - 2
    assert world.hits == 1
    world.finish(0)


def follow_up_hits(num_blocks: int, chats: int = 4, turns: int = 4) -> int:
    """Turns that find their chat in the cache; each chat has its turn in each round."""
    world = chat_world(num_blocks)
    texts = [[10 + number] * 100 for number in range(chats)]
    for turn in range(turns):
        for text in texts:
            world.add(list(text), "razor")
            request = world.live[-1].request
            run_out(world, len(text) + 10)
            text[:] = [*request.all_token_ids, *[1 + turn] * 40]
    return world.hits


def test_what_a_next_turn_needs_goes_last(monkeypatch) -> None:
    """A memory that is full: pages that no next turn needs are evicted before those that one does.

    11 of the 12 follow-up turns find their chat where it would be 5 by age alone; with memory
    for all, either finds all.
    """
    assert follow_up_hits(76) >= 10
    assert follow_up_hits(130) == 12
    monkeypatch.setattr(LocalManager, "_pages_before", lambda *_: [])
    assert follow_up_hits(76) <= 6
    assert follow_up_hits(130) == 12


@pytest.mark.parametrize("prefill", ["chat", "windowed", "exact"])
@pytest.mark.parametrize("num_tokens", [48, 100, 144, 200, 330])
def test_a_waiting_chat_needs_what_the_plan_says(prefill: str, num_tokens: int) -> None:
    """The pages that the next turn takes from the cache; in exact mode those of the last prompt."""
    config = RazorConfig(window=40, prefill=prefill)  # type: ignore[arg-type]
    plan = MemoryPlan(config, HEADS, torch.float32, PoolSizes(48, 16), 16)
    world = World(plan, 200, True)
    first = num_tokens if prefill == "exact" else 30
    world.add([5] * (first - 2) + MARKER, "razor")
    request = world.live[-1].request
    run_out(world, num_tokens)
    text = list(request.all_token_ids[:num_tokens])
    world.add([*text, *[6] * 60], "razor")
    blocks, computed, _ = world.manager.get_computed_blocks(world.live[-1].request)
    assert computed == num_tokens - num_tokens % plan.hit_tokens
    held = sum(not block.is_null for group in blocks.blocks for block in group)
    assert held == plan.waiting_pages(num_tokens)


def test_others_begin_like_a_dense_prefix_that_was_found(monkeypatch) -> None:
    """Many chats about one text: its local pages stay, though no next turn needs them."""

    def found(num_blocks: int) -> int:
        config = RazorConfig(window=16, prefill="chat")
        plan = MemoryPlan(config, HEADS, torch.float32, PoolSizes(16, 16), 16)
        world = World(plan, num_blocks, True)
        for number in range(8):
            world.add([*[9] * 160, *[10 + number] * 40, *MARKER], "razor")
            run_out(world, 300)
        return world.hit_tokens

    assert found(70) == 7 * 160
    whole = LocalManager._hit_pages
    monkeypatch.setattr(
        LocalManager, "_hit_pages", lambda *args: range(0) if args[-1] == 160 else whole(*args)
    )
    assert found(70) < 7 * 160


def waiting_chats_found(num_blocks: int) -> int:
    """Of 8 chats that waited, those that are found, the latest asked first."""
    config = RazorConfig(window=16, prefill="chat")
    plan = MemoryPlan(config, HEADS, torch.float32, PoolSizes(16, 16), 16)
    world = World(plan, num_blocks, True)
    texts = [[*[10 + number] * 200, *MARKER] for number in range(8)]
    for text in texts:
        world.add(list(text), "razor")
        request = world.live[-1].request
        run_out(world, 240)
        text[:] = request.all_token_ids[:240]
    world.hit_tokens = 0
    for text in reversed(texts):
        world.add([*text, 3], "razor")
        world.finish(0)
    return world.hit_tokens // 240


def test_pages_dropped_before_anything_was_evicted_go_first_too(monkeypatch) -> None:
    """Of 8 chats that wait, more are found than by age alone: 4, where it would be 3."""
    found = waiting_chats_found(100)
    monkeypatch.setattr(LocalManager, "_pages_before", lambda *_: [])
    assert found > waiting_chats_found(100)


class CountingPool:
    """A prefix cache in which all pages but some are found; counts who asks.

    missing: indices of pages. Hashes are the pages' indices.
    """

    hash_block_size = 32
    null_block = object()

    def __init__(self, missing: set[int]) -> None:
        self.missing = missing
        self.lookups = 0

    def get_cached_block(self, block_hash: int, group_ids: list[int]) -> list[str] | None:
        self.lookups += 1
        return None if block_hash in self.missing else [f"page {block_hash}"]


@pytest.mark.parametrize(
    ("missing", "length"),
    [
        ({0}, 0),
        ({4095}, 4095 * 32),
        ({2000}, 131072),
        ({4000}, 4000 * 32),
        # The window of a prefix that ends before page 4000 begins after page 3840.
        ({3900, 4000}, 3900 * 32),
        (set(range(1, 4000)), 32),
    ],
)
def test_a_miss_costs_no_more_lookups_than_pages(missing: set[int], length: int) -> None:
    """131k tokens, windowed: after a miss the search goes on where no prefix needs that page."""
    spec = pool_specs(
        MemoryPlan(
            RazorConfig(window=4096, prefill="windowed"),
            HEADS,
            torch.float32,
            PoolSizes(32, 32),
            16,
        )
    )[1]
    pool = CountingPool(missing)
    groups, found = LocalManager._longest_windowed_hit(
        list(range(4096)), 0, 131072, [0], pool, spec, 32
    )
    assert found == length
    assert len(groups[0]) == length // 32
    assert pool.lookups <= 4096
    kept = spec.window.first_kept_page(length) if length else 0
    expected = {*range(min(spec.window.sink_pages, kept, length // 32)), *range(kept, length // 32)}
    assert {i for i, page in enumerate(groups[0]) if page is not pool.null_block} == expected

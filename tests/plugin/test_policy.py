"""`dense_until` by mode and request, in keys of cached pages, and as requests ask for it."""

import pytest
from vllm import SamplingParams

from razor_vllm.admission import DenseLimits, check_request
from razor_vllm.config import RazorConfig
from razor_vllm.policy import (
    NEVER_COMPRESSED,
    DensePart,
    cache_key,
    carried,
    carrying,
    dense_part,
    dense_tokens,
)

PROMPT = [5, 6, 7, 8, 9, 7, 8, 5]
MARKER = [7, 8]
LIMITS = DenseLimits(100, 40)


@pytest.mark.parametrize(
    ("prefill", "marker", "asked", "part"),
    [
        ("exact", MARKER, {}, DensePart(8, False)),
        ("chat", MARKER, {}, DensePart(4, True)),
        ("chat", [8, 7], {}, DensePart(8, False)),
        ("chat", [], {}, DensePart(8, False)),
        ("windowed", MARKER, {}, DensePart(0, True)),
        ("exact", MARKER, {"kv_dense_tokens": 8}, DensePart(8, True)),
        ("chat", MARKER, {"kv_dense_tokens": 0}, DensePart(0, True)),
        ("windowed", MARKER, {"kv_dense_tokens": 3}, DensePart(3, True)),
        ("exact", MARKER, {"kv_policy": "full"}, NEVER_COMPRESSED),
        ("chat", MARKER, {"kv_policy": "full"}, NEVER_COMPRESSED),
        ("windowed", MARKER, {"kv_policy": "full"}, NEVER_COMPRESSED),
    ],
)
def test_the_rule(prefill: str, marker: list[int], asked: dict, part: DensePart) -> None:
    """The docstring's table; a prompt without a turn is exact mode's."""
    config = RazorConfig(prefill=prefill)  # type: ignore[arg-type]
    assert dense_part(config, asked, PROMPT, len(PROMPT), marker) == part


def test_embeddings_have_no_turns() -> None:
    """A prompt without tokens is read as in exact mode."""
    assert dense_part(RazorConfig(prefill="chat"), None, None, 8, MARKER) == DensePart(8, False)


@pytest.mark.parametrize("until", [0, 15, 16, 17, 64])
@pytest.mark.parametrize("size", [16, 48])
def test_one_page_brings_the_dense_part_into_the_chain(until: int, size: int) -> None:
    """The first page with a token past it, and no other: those before are everybody's."""
    params = SamplingParams(extra_args=carrying({}, DensePart(until, True)))
    keys = [cache_key(params, start, start + size) for start in range(0, 192, size)]
    assert [i for i, key in enumerate(keys) if key] == [until // size]
    assert keys[until // size][1] == until


def test_what_no_engine_carried_is_not_believed() -> None:
    """A client's own value under the same name."""
    (name,) = carrying({}, NEVER_COMPRESSED)
    for value in (5, [5, True], {"until": 5}):
        assert carried(SamplingParams(extra_args={name: value})) is None
    assert carried(SamplingParams(extra_args=carrying({name: 5}, DensePart(3, True)))).until == 3


@pytest.mark.parametrize("value", [-1, 1.0, 1.5, "5", True, None, [5], 9])
def test_bad_dense_tokens(value: object) -> None:
    """Not whole, below 0, above the prompt."""
    with pytest.raises(ValueError, match="kv_dense_tokens is .*; accepted are whole numbers"):
        check_request({"kv_dense_tokens": value}, 8)


def test_dense_tokens_beside_the_policy_full() -> None:
    """Two answers to one question."""
    with pytest.raises(ValueError, match="accepted is one of the two"):
        dense_tokens({"kv_dense_tokens": 5, "kv_policy": "full"})
    assert dense_tokens({"kv_dense_tokens": 5, "kv_policy": "razor"}) == 5


@pytest.mark.parametrize(
    ("asked", "prompt", "told"),
    [
        ({"kv_policy": "full"}, 100, "kv_policy is 'full'"),
        ({"kv_dense_tokens": 41}, 100, "kv_dense_tokens is 41"),
        ({"kv_policy": "full"}, 99, None),
        ({"kv_dense_tokens": 41}, 99, None),
        ({"kv_dense_tokens": 40}, 10_000, None),
        ({}, 10_000, None),
    ],
)
def test_what_pools_cannot_hold(asked: dict, prompt: int, told: str | None) -> None:
    """A long dense part counts as a request that is never compressed."""
    if told is None:
        check_request(asked, prompt, LIMITS)
        return
    with pytest.raises(ValueError, match=told + ".* up to 100 tokens"):
        check_request(asked, prompt, LIMITS)

"""Chat mode: dense up to the end of the first turn, compressed from there on in every turn."""

from pathlib import Path
from typing import Any

import hybrids
import make_random_llama
import pytest
from engines import (
    GENERATION_PROMPT,
    ChatTurn,
    answers,
    counted_preemptions,
    engine,
    hold_chats,
    manager_of,
    prompts,
)

pytestmark = pytest.mark.engine

CHAT = {"window": 64, "prefill": "chat"}
FIRST = [5, 64, 95, 96, 333, 700]
TURNS = 4


def first_turns(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts that end with the generation prompt."""
    return [
        [*request["prompt_token_ids"][:-1], GENERATION_PROMPT] for request in prompts(lengths, seed)
    ]


def assert_each_alone(llm: Any, held: list[ChatTurn], max_tokens: int, **sampling: Any) -> None:
    """Every turn has the answer that its prompt has in an engine without a prefix cache."""
    for number, turn in enumerate(held):
        request = {"prompt_token_ids": turn.prompt}
        (alone,) = answers(llm, [request], max_tokens, **sampling)
        assert turn.answer.tokens == alone.tokens, f"turn {number}"
        assert turn.answer.logprobs == pytest.approx(alone.logprobs, abs=1e-4), f"turn {number}"


def assert_hits(llm: Any, held: list[ChatTurn], num_chats: int) -> None:
    """A turn after the first finds all whole steps of the tokens that the turn before computed."""
    step = manager_of(llm).coordinator.scheduler_block_size
    for before, turn in zip(held, held[num_chats:], strict=False):
        computed = len(before.prompt) + len(before.answer.tokens) - 1
        assert turn.cached == computed // step * step


@pytest.mark.parametrize("chunk", [64, 200, 2048])
def test_a_turn_with_the_cache_is_that_turn_alone(model_dir: Path, chunk: int) -> None:
    """Chunks, batches, hits: turn by turn the tokens of a miss, and all of them hits."""
    with engine(model_dir, CHAT, max_num_batched_tokens=chunk) as llm:
        held = hold_chats(llm, first_turns(FIRST), TURNS, 40)
        assert_hits(llm, held, len(FIRST))
        pool = manager_of(llm).block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    with engine(model_dir, CHAT, enable_prefix_caching=False) as llm:
        assert_each_alone(llm, held, 40)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "gpt-oss"])
def test_a_hybrids_turn_with_the_cache_is_that_turn_alone(kind: str, tmp_path: Path) -> None:
    """Sliding layers cache what follows the first turn too, and are found again."""
    model = hybrids.make(kind, tmp_path / kind)
    make_random_llama.make_tokenizer().save_pretrained(model)
    profile = hybrids.write(hybrids.some_heads(model), tmp_path, "profile")
    razor = {**CHAT, "head_profile": profile}
    first = first_turns([5, 64, 333])
    asked: list[dict[str, Any]] = [{}, {"extra_args": {"kv_dense_tokens": 3}}]
    options = {"max_model_len": 2048, "max_num_batched_tokens": 200}
    with engine(model, razor, **options) as llm:
        held = [hold_chats(llm, first, TURNS, 40, **sampling) for sampling in asked]
        step = manager_of(llm).coordinator.scheduler_block_size
        for chats in held:
            for before, turn in zip(chats, chats[len(first) :], strict=False):
                # A sliding layer can be taken up where a prompt ended.
                assert turn.cached >= (len(before.prompt) - 1) // step * step
        pool = manager_of(llm).block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert held[0][-1].answer.logprobs != held[1][-1].answer.logprobs
    with engine(model, razor, enable_prefix_caching=False, **options) as llm:
        for chats, sampling in zip(held, asked, strict=True):
            assert_each_alone(llm, chats, 40, **sampling)


def test_preempted_turns_are_those_turns_alone(model_dir: Path) -> None:
    """A pool that is too small for all chats at once."""
    preempted = counted_preemptions()
    options = {"max_model_len": 1050, "num_gpu_blocks_override": 68, "max_num_batched_tokens": 64}
    with engine(model_dir, CHAT, **options) as llm:
        held = hold_chats(llm, first_turns([300, 310, 320, 330, 340, 350], 3), 2, 300)
        assert any(turn.cached for turn in held)
    assert any(generated > 0 for generated in preempted)
    with engine(model_dir, CHAT, enable_prefix_caching=False) as llm:
        assert_each_alone(llm, held, 300)


def test_the_first_turn_is_exact_modes(model_dir: Path) -> None:
    """And so is a prompt in which no turn ends; a later turn is compressed."""
    first, plain = first_turns([300, 700]), prompts([300, 700], seed=9)
    with engine(model_dir, CHAT) as llm:
        held = hold_chats(llm, first, 2, 24)
        without = answers(llm, plain)
    with engine(model_dir, {**CHAT, "prefill": "exact"}) as llm:
        exact = answers(llm, [{"prompt_token_ids": turn.prompt} for turn in held])
        assert [turn.answer.tokens for turn in held[:2]] == [a.tokens for a in exact[:2]]
        assert [turn.answer.logprobs for turn in held[2:]] != [a.logprobs for a in exact[2:]]
        assert [a.tokens for a in answers(llm, plain)] == [a.tokens for a in without]


@pytest.mark.parametrize("prefill", ["exact", "chat", "windowed"])
def test_dense_tokens_are_the_modes_by_number(model_dir: Path, prefill: str) -> None:
    """`kv_dense_tokens` in any mode: 0 is windowed, the prompt's length exact, and between."""
    first = first_turns([700])
    options = {"max_num_batched_tokens": 200}
    (prompt,) = [{"prompt_token_ids": tokens * 2} for tokens in first]
    with engine(model_dir, {**CHAT, "prefill": prefill}, **options) as llm:
        found = {
            tokens: answers(llm, [prompt], extra_args={"kv_dense_tokens": tokens})[0]
            for tokens in (0, 333, 700, 1400)
        }
        again = answers(llm, [prompt], extra_args={"kv_dense_tokens": 333})[0]
        held = hold_chats(llm, first, 3, 24, extra_args={"kv_dense_tokens": 700})
        assert_hits(llm, held, 1)
    assert again.tokens == found[333].tokens
    assert len({answer.logprobs for answer in found.values()}) == 4
    for mode, tokens in (("windowed", 0), ("chat", 700), ("exact", 1400)):
        with engine(model_dir, {**CHAT, "prefill": mode}, **options) as llm:
            (want,) = answers(llm, [prompt])
        assert found[tokens].tokens == want.tokens
        assert found[tokens].logprobs == pytest.approx(want.logprobs, abs=2e-2)


def test_neighbours_that_ask_otherwise(model_dir: Path) -> None:
    """Requests of other dense parts and the same tokens, in turns: each has its own answers."""
    others: list[dict[str, Any]] = [
        {"extra_args": {"kv_policy": "full"}},
        {"extra_args": {"kv_dense_tokens": 0}},
        {"extra_args": {"kv_dense_tokens": 100}},
        {},
    ]
    with engine(model_dir, CHAT, max_num_batched_tokens=128) as llm:
        held = hold_chats(llm, first_turns([333, 500]), 3, 24)
        requests = [{"prompt_token_ids": turn.prompt} for turn in held]
        beside = [answers(llm, requests, **sampling) for sampling in others]
        again = [answers(llm, requests, **sampling) for sampling in reversed(others)]
    assert [turn.answer.tokens for turn in held] == [a.tokens for a in beside[-1]]
    with engine(model_dir, CHAT, enable_prefix_caching=False) as llm:
        for sampling, one, other in zip(others, beside, reversed(again), strict=True):
            want = [answer.tokens for answer in answers(llm, requests, **sampling)]
            assert [answer.tokens for answer in one] == want
            assert [answer.tokens for answer in other] == want

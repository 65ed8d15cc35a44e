"""Two engines under Ray Serve on this machine."""

import concurrent.futures
import os
import signal
from typing import Any, NamedTuple

import openai
import pytest
from ray_cluster import START_SECONDS, Cluster, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.engine]
MODEL = "needle"
TOKENS = 64
ASKED: list[str] = []
"""Prompts sent so far; Ray's counters reach their number some seconds later."""


class Answered(NamedTuple):
    """What became of one request."""

    tokens: int
    retries: int


def ask(client: openai.OpenAI, prompt: str, tokens: int = TOKENS, **options: Any) -> Answered:
    """One answer of exactly `tokens` tokens."""
    ASKED.append(prompt)
    raw = client.completions.with_raw_response.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, **options},
    )
    usage = raw.parse().usage
    assert usage is not None
    return Answered(usage.completion_tokens, raw.retries_taken)


def counted(cluster: Cluster) -> dict[str, int]:
    """Requests that each engine has answered, once all that were sent are counted."""
    return wait_for(
        lambda: counts if sum((counts := cluster.answered()).values()) == len(ASKED) else None,
        f"counts of {len(ASKED)} requests",
    )


def prompt_of(number: int) -> str:
    """A prompt whose beginning no other one shares."""
    return f"{number} men went to the {number}th town . " * 8


def test_policy_is_on_in_every_engine(cluster: Cluster) -> None:
    """Both engines refuse an unknown policy and answer under a known one."""
    client = cluster.client()
    for number in range(8):
        with pytest.raises(openai.BadRequestError, match="accepted are full, razor"):
            ask(client, prompt_of(number), 1, vllm_xargs={"kv_policy": "none"})
        ask(client, prompt_of(number), 1, vllm_xargs={"kv_policy": "full"})


def test_requests_are_spread(cluster: Cluster) -> None:
    """Prompts that share nothing reach both engines; each is counted once."""
    before = counted(cluster)
    for number in range(20):
        ask(cluster.client(), prompt_of(100 + number), 4)
    after = counted(cluster)
    new = sorted(count - before.get(name, 0) for name, count in after.items())
    assert len(new) == 2
    assert sum(new) == 20
    assert new[0] >= 4


def test_shared_beginnings_meet(cluster: Cluster) -> None:
    """Prompts with one beginning go to one engine, where its pages are cached."""
    before = counted(cluster)
    for number in range(12):
        ask(cluster.client(), f"{prompt_of(1000)} {number}", 4)
    after = counted(cluster)
    assert sorted(count - before.get(name, 0) for name, count in after.items()) == [0, 12]


def test_killed_engine_loses_no_request(cluster: Cluster) -> None:
    """With one engine killed under load, every request is answered in full, the
    interrupted ones by one retry of their client; then a new engine takes its place."""
    engines = cluster.engines()
    client = cluster.client(retries=1)
    # Long enough that at any moment some are running in either engine.
    tokens = 4 * TOKENS
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        requests = [
            pool.submit(ask, client, prompt_of(2000 + number), tokens) for number in range(48)
        ]
        wait_for(lambda: sum(request.done() for request in requests) >= 12, "12 answers")
        victim = sorted(engines)[0]
        os.kill(engines[victim], signal.SIGKILL)
        answers = [request.result(START_SECONDS) for request in requests]
    assert [answer.tokens for answer in answers] == [tokens] * 48
    assert max(answer.retries for answer in answers) == 1
    replaced = wait_for(
        lambda: now if len(now := cluster.engines()) == 2 and victim not in now else None,
        "a new engine",
    )
    assert set(replaced) - set(engines)

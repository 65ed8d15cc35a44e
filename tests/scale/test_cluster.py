"""Two engines under Ray Serve on this machine."""

import concurrent.futures
import itertools
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil
import pytest
from held_steps import held, holders
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
    (counts,) = wait_for(
        # No counts at all are right before the first request.
        lambda: (counts,) if sum((counts := cluster.answered()).values()) == len(ASKED) else (),
        f"counts of {len(ASKED)} requests",
    )
    return counts


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
    """Prompts that share nothing go to both engines in turn; each is counted once.

    Not by chance: a prompt that nobody knows goes to the engine that has seen less text. So two
    engines never differ by more than one prompt, neither before these 20 nor after them.
    """
    before = counted(cluster)
    for number in range(20):
        ask(cluster.client(), prompt_of(100 + number), 4)
    after = counted(cluster)
    new = sorted(count - before.get(name, 0) for name, count in after.items())
    assert len(new) == 2
    assert sum(new) == 20
    assert new[0] >= 9


def test_shared_beginnings_meet(cluster: Cluster) -> None:
    """Prompts with one beginning go to one engine, where its pages are cached."""
    before = counted(cluster)
    for number in range(12):
        ask(cluster.client(), f"{prompt_of(1000)} {number}", 4)
    after = counted(cluster)
    assert sorted(count - before.get(name, 0) for name, count in after.items()) == [0, 12]


def holding(cluster: Cluster, let_go: Path) -> set[str]:
    """Engines that hold a step until the file `let_go` is made."""
    families = [{p.pid for p in psutil.Process(pid).parents()} for pid in holders(let_go)]
    return {
        name for name, pid in cluster.engines().items() if any(pid in family for family in families)
    }


def test_killed_engine_loses_no_request(cluster: Cluster, tmp_path: Path) -> None:
    """With one engine killed under load, every request is answered in full, the
    interrupted ones by one retry of their client; then a new engine takes its place.

    Both engines stand still in the middle of their requests when one of them is killed, and go
    on once it is gone and more requests have been sent.
    """
    engines = cluster.engines()
    client = cluster.client(retries=1)
    let_go = tmp_path / "go"
    wish = {"vllm_xargs": held(let_go)}
    numbers = itertools.count(2000)
    requests: list[concurrent.futures.Future[Answered]] = []
    with concurrent.futures.ThreadPoolExecutor(256) as pool:

        def send() -> None:
            requests.append(pool.submit(ask, client, prompt_of(next(numbers)), **wish))

        def both_hold() -> bool:
            # A burst may go to one engine whole: only one by one does the router see queues.
            if holding(cluster, let_go) == set(engines):
                return True
            send()
            return False

        try:
            wait_for(both_hold, "requests in both engines", 120)
            for _ in range(24):
                send()
            interrupted = len(requests)
            assert not any(request.done() for request in requests), "a held request ended"
            victim = sorted(engines)[0]
            process = psutil.Process(engines[victim])
            os.kill(process.pid, signal.SIGKILL)
            for _ in range(24):
                send()
            process.wait(START_SECONDS)
        finally:
            let_go.touch()
        answers = [request.result(START_SECONDS) for request in requests]
    assert [answer.tokens for answer in answers] == [TOKENS] * len(requests)
    assert {answer.retries for answer in answers[:interrupted]} == {0, 1}
    assert max(answer.retries for answer in answers[interrupted:]) <= 1
    replaced = wait_for(
        lambda: now if len(now := cluster.engines()) == 2 and victim not in now else None,
        "a new engine",
    )
    assert set(replaced) - set(engines)

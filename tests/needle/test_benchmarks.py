"""The harnesses: what they draw, how they judge, what they write."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fidelity, needle
from benchmarks.fidelity import Step, compare, kl_divergence
from benchmarks.forced_tokens import ForcedContinuation
from benchmarks.served_model import Chat, HeldBytes
from razor_vllm.heads.profile import HeadProfile

PROFILE = HeadProfile(4, 4, 32, ((0,), (1, 3), (), (2,)))
GRID = needle.Grid(("single", "multi", "chat"), (150, 301), (0.0, 0.5, 1.0), 2, 0)


def look_up(chat: Chat) -> str:
    """A perfect model: the code that the chat gives to the last thing asked for."""
    thing = re.findall(r"What is the code of the (\w+ \w+) \?", chat[-1]["content"])[-1]
    told = re.search(rf"{thing} is (\d+ \d+)", chat[0]["content"])
    assert told is not None, f"no code of the {thing}"
    return told[1]


class FakeModel:
    """A model of one word a token. broken: whether it forgets what stands in the first half."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def num_tokens(self, chat: Chat) -> int:
        return 3 + sum(len(message["content"].split()) for message in chat)

    def reply(
        self, chats: Sequence[Chat], max_tokens: int, policy: str, done: Callable[[], Any]
    ) -> list[str]:
        for _ in chats:
            done()
        return [self._reply(chat) for chat in chats]

    def _reply(self, chat: Chat) -> str:
        code = look_up(chat)
        text = chat[0]["content"]
        if self.broken and text.index(code) < len(text) / 2:
            return code[:3] + " x"
        return code

    def held_bytes(self, chat: Chat, max_tokens: int, policy: str) -> HeldBytes:
        return HeldBytes(4096, 2048)

    def describe(self) -> dict[str, Any]:
        return {"model": "fake", "vllm": "none"}


@pytest.mark.parametrize("length", [150, 301, 1000])
def test_prompts_have_the_length_asked_for(length: int) -> None:
    """Haystacks are sized by the model's own tokenizer."""
    model = FakeModel()
    grid = GRID._replace(lengths=(length,))
    for trial in needle.draw_trials(grid, needle.measure_sizing(model)):
        chat = [needle.opening(trial.text, trial.questions[0].fact)]
        assert model.num_tokens(chat) == length


def test_all_policies_get_the_same_trials() -> None:
    sizing = needle.measure_sizing(FakeModel())
    assert needle.draw_trials(GRID, sizing) == needle.draw_trials(GRID, sizing)
    assert len(needle.draw_trials(GRID, sizing)) == 2 * 2 * (3 + 3 + 1)


def test_results_tell_depths_apart() -> None:
    """A perfect model is right everywhere; one that forgets the first half, only below it."""
    trials = needle.draw_trials(GRID, needle.measure_sizing(FakeModel()))
    policy = needle.POLICIES[0]
    perfect = needle.run_policy(FakeModel(), policy, GRID, trials, 8)
    assert [a["all"] for a in perfect["accuracy"].values()] == [1.0, 1.0, 1.0]
    assert perfect["kv_bytes"] == {n: {"peak": 4096, "decode": 2048} for n in ("150", "301")}
    broken = needle.run_policy(FakeModel(broken=True), policy, GRID, trials, 8)
    shares = {(c["depth"], c["right"] / c["questions"]) for c in broken["cells"]}
    assert {(0.0, 0.0), (1.0, 1.0)} <= shares
    by_digit = broken["accuracy"]["single"]["by_digit"]
    assert by_digit[0] == 1.0
    assert by_digit[3] < 1.0


@pytest.mark.parametrize(
    ("reply", "digits"),
    [
        ("471 902", (True,) * 6),
        ("The code is 471902.", (True,) * 6),
        ("4 7 1 9 0", (True,) * 5 + (False,)),
        ("", (False,) * 6),
        ("741 902", (False, False, True, True, True, True)),
    ],
)
def test_replies_are_judged_by_their_first_digits(reply: str, digits: tuple[bool, ...]) -> None:
    fact = needle.Fact("amber", "door", ("471", "902"))
    trial = needle.Trial("single", 100, "", (needle.Question(fact, 0.5),))
    judged = needle.judge(trial, 0, reply)
    assert judged.digits == digits
    assert judged.right == all(digits)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_heads_are_as_many(seed: int) -> None:
    """The comparison is fair: the same number of heads, of the same model."""
    drawn = needle.random_profile(PROFILE, seed)
    assert drawn.num_retrieval_heads == PROFILE.num_retrieval_heads
    drawn.check_model(4, 4, 32, range(4))
    assert drawn == needle.random_profile(PROFILE, seed)


def test_unknown_policies_are_refused() -> None:
    args = needle.parse(["--model", "m", "--policies", "razor", "rasor"])
    with pytest.raises(ValueError, match="found rasor"):
        needle.chosen_policies(args)


def test_results_are_json_and_a_heatmap_a_policy(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trials = needle.draw_trials(GRID, needle.measure_sizing(FakeModel()))
    policies = {
        p.name: needle.run_policy(FakeModel(), p, GRID, trials, 8) for p in needle.SERVER_POLICIES
    }
    results = {"grid": GRID._asdict(), "about": {"model": "fake"}, "policies": policies}
    needle.write_results(results, tmp_path)
    assert json.loads((tmp_path / "needle.json").read_text())["about"] == {"model": "fake"}
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["full.png", "server.png"]
    assert "| full | 100.0%, 2 KiB | 100.0%, 2 KiB |" in needle.table(results)


def distribution(*shares: float) -> dict[int | str, float]:
    return {token: math.log(share) for token, share in enumerate(shares)}


def test_kl_of_whole_distributions_is_the_formula() -> None:
    p, q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
    want = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert kl_divergence(distribution(*p), distribution(*q)) == pytest.approx(want)
    assert kl_divergence(distribution(*p), distribution(*p)) == 0


def test_kl_of_parts_is_a_lower_bound() -> None:
    """Tokens that one side does not report fall into one bucket."""
    full = distribution(0.5, 0.25, 0.125, 0.125)
    compressed = distribution(0.25, 0.25, 0.4, 0.1)
    part = {token: compressed[token] for token in (0, 1)}
    assert 0 < kl_divergence(full, part) <= kl_divergence(full, compressed)


def test_positions_are_compared_until_the_tokens_part() -> None:
    """After another token the contexts differ, and so the distributions mean nothing."""
    likely, other = distribution(0.9, 0.1), distribution(0.1, 0.9)
    full = [Step(0, likely), Step(0, likely), Step(0, likely)]
    compressed = [Step(0, likely), Step(1, other), Step(0, likely)]
    compared = compare(full, compressed)
    assert [row.position for row in compared] == [0, 1]
    assert [row.same for row in compared] == [True, False]
    assert compared[0].kl == 0
    assert compared[1].kl > 0


def test_forced_tokens_are_the_only_ones_left() -> None:
    force = ForcedContinuation([3, 1])
    logits = torch.zeros(5)
    assert force([], logits).argmax() == 3
    assert force([3], logits).argmax() == 1
    assert force([3, 1], logits) is logits
    assert logits.eq(0).all()


def test_prompts_of_a_file_are_its_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\nline\n\n\n two \n\n", encoding="utf-8")
    assert fidelity.read_prompts(path) == ["one\nline", "two"]
    path.write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no prompt"):
        fidelity.read_prompts(path)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-like server that looks codes up; its URL, and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "fake"}], "version": "0"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            usage = {"prompt_tokens": 0}
            if "messages" in body:
                usage["prompt_tokens"] = FakeModel().num_tokens(body["messages"])
                message = {"role": "assistant", "content": look_up(body["messages"])}
                self._send({"choices": [{"message": message}], "usage": usage})
                return
            full = "vllm_xargs" in body
            said = {
                "tokens": ["a", "b" if full else "c"],
                "top_logprobs": [{"a": -0.1}, {"b": -0.2} if full else {"c": -0.1, "b": -2.0}],
            }
            self._send({"choices": [{"logprobs": said}], "usage": usage})

        def _send(self, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def test_needle_runs_against_a_server(server, tmp_path: Path) -> None:
    """A server is asked under both policies, by the per-request opt-out alone."""
    pytest.importorskip("matplotlib")
    url, asked = server
    needle.main(["--url", url, "--lengths", "200", "--depths", "3", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "needle.json").read_text())
    assert results["about"]["model"] == "fake"
    assert {p: r["accuracy"]["single"]["all"] for p, r in results["policies"].items()} == {
        "full": 1.0,
        "server": 1.0,
    }
    assert all(r["kv_bytes"] == {} for r in results["policies"].values())
    policies = [body.get("vllm_xargs") for body in asked if body["max_tokens"] > 1]
    assert policies.count({"kv_policy": "full"}) == policies.count(None) == 6


def test_fidelity_runs_against_a_server(server, tmp_path: Path) -> None:
    """Positions are compared until the greedy continuations part."""
    url, _ = server
    path = tmp_path / "fidelity.json"
    fidelity.main(["--url", url, "--num-prompts", "2", "--output", str(path)])
    results = json.loads(path.read_text())
    assert results["method"] == "parting"
    assert [row["positions"] for row in results["by_position"]] == [2, 2]
    assert [row["top1_agreement"] for row in results["by_position"]] == [1.0, 0.0]


@pytest.mark.engine
@pytest.mark.parametrize("prefill", ["exact", "windowed"])
def test_fidelity_in_an_engine(model_dir: Path, tmp_path: Path, prefill: str) -> None:
    """Nothing dropped: no divergence. Something dropped: some, though in exact mode none at
    the first position, which the densely attended prompt alone decides."""
    path = tmp_path / "fidelity.json"
    common = ["--model", str(model_dir), "--num-prompts", "2", "--words", "80", "--tokens", "8"]
    common += ["--dtype", "float32", "--enforce-eager", "--prefill", prefill]
    common += ["--max-model-len", "2048", "--output", str(path)]
    common += ["--engine-options", json.dumps({"kv_cache_memory_bytes": 256 * 1024**2})]
    fidelity.main([*common, "--window", "2048"])
    same = json.loads(path.read_text())
    assert same["method"] == "forced"
    assert same["kl_max"] < 1e-4
    assert same["top1_agreement"] == 1.0
    fidelity.main([*common, "--window", "32"])
    dropped = json.loads(path.read_text())
    assert dropped["kl_mean"] > 1e-3
    first = dropped["by_position"][0]["kl_max"]
    assert (first < 1e-4) == (prefill == "exact")

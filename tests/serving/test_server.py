"""The server as a person meets it: the official client against `razor serve`."""

import contextlib
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import IO

import openai
import pytest
from held_steps import PROCESSOR, slow
from servers import PATIENCE, START_SECONDS, environment, free_port, until

pytestmark = pytest.mark.engine

NAME = "bundled"
MESSAGES = [{"role": "user", "content": "Tell me. " * 60}]


def serve(model: Path, *options: str, out: int | IO[str] = PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "razor_serving.cli", "serve", str(model), *options]
    env = environment()
    return subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """URL of a running server, and its log."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    options = ["--port", str(port), "--served-model-name", NAME, "--dtype", "float32"]
    options += ["--razor-window", "64", "--razor-prefill", "windowed", "--enforce-eager"]
    options += ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(128 * 1024**2)]
    options += ["--logits-processors", PROCESSOR]
    with log.open("w") as out:
        process = serve(model_dir, *options, out=out)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{url}/health", timeout=PATIENCE).status == 200
        return False

    until(answers, START_SECONDS, lambda: log.read_text()[-3000:])
    yield url, log
    process.terminate()
    process.wait(PATIENCE)


@pytest.fixture(scope="module")
def client(server: tuple[str, Path]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def test_the_policy_is_on_and_says_so(server: tuple[str, Path]) -> None:
    """The log holds the start-up report, and the request to copy."""
    text = server[1].read_text()
    assert "KV policy razor: 4 of 16 KV heads retrieve (25.0%), windowed prefill" in text
    assert "a window of 64 tokens and a compensation slot" in text
    assert f"curl -s {server[0]}/v1/chat/completions" in text


def test_chat_streams_what_it_answers(client: openai.OpenAI) -> None:
    """/v1/chat/completions, whole and streamed, greedy: the same text."""
    request = {"model": NAME, "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**request)
    assert whole.usage.completion_tokens == 20
    parts = client.chat.completions.create(**request, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content


def test_completions_streams_what_it_answers(client: openai.OpenAI) -> None:
    """/v1/completions, whole and streamed, with log-probabilities and n > 1."""
    request = {"model": NAME, "prompt": "abc" * 100, "max_tokens": 16, "temperature": 0}
    whole = client.completions.create(**request, logprobs=1)
    assert len(whole.choices[0].logprobs.token_logprobs) == 16
    parts = client.completions.create(**request, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    many = client.completions.create(**{**request, "temperature": 1.0}, n=3, seed=1)
    assert len({choice.text for choice in many.choices}) == 3


def test_a_request_may_opt_out(client: openai.OpenAI) -> None:
    """vllm_xargs: kv_policy full answers otherwise than razor on a long prompt."""
    request = {"model": NAME, "prompt": "xyz 123 " * 200, "max_tokens": 24, "temperature": 0}

    def text(policy: str) -> str:
        extra = {"vllm_xargs": {"kv_policy": policy}}
        return client.completions.create(**request, extra_body=extra).choices[0].text

    assert text("razor") == client.completions.create(**request).choices[0].text
    assert text("full") != text("razor")
    assert text("full") == text("full")


@pytest.mark.parametrize("policy", ["half", "", 7, ["razor"]])
def test_a_bad_policy_is_a_400(client: openai.OpenAI, server, policy) -> None:
    """A bad kv_policy: 400, with the accepted values; the server lives on."""
    request = {"model": NAME, "messages": MESSAGES, "max_tokens": 4}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                **request, stream=stream, extra_body={"vllm_xargs": {"kv_policy": policy}}
            )
        assert "accepted are full, razor" in str(error.value)
    assert client.chat.completions.create(**request).choices
    assert urllib.request.urlopen(f"{server[0]}/health").status == 200


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"kv_dense_tokens": -1}, "is -1; accepted are whole numbers"),
        ({"kv_dense_tokens": 1.5}, "is 1.5; accepted are whole numbers"),
        ({"kv_dense_tokens": "5"}, "is '5'; accepted are whole numbers"),
        ({"kv_dense_tokens": 544}, "is 544; accepted are whole numbers from 0 to the prompt's 543"),
        ({"kv_dense_tokens": 5, "kv_policy": "full"}, "accepted is one of the two"),
    ],
)
def test_bad_dense_tokens_are_a_400(client: openai.OpenAI, asked: dict, told: str) -> None:
    """Also where the answer would be a stream, and only the prompt's length tells."""
    request = {"model": NAME, "messages": MESSAGES, "max_tokens": 4}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            client.chat.completions.create(
                **request, stream=stream, extra_body={"vllm_xargs": asked}
            )
        assert told in str(error.value)
        assert error.value.param == "kv_dense_tokens"
    good = {"vllm_xargs": {"kv_dense_tokens": 543}}
    assert client.chat.completions.create(**request, extra_body=good).choices


def test_a_cancelled_stream_leaves_the_server_well(
    client: openai.OpenAI, server: tuple[str, Path]
) -> None:
    """Closing a stream half-way cancels its request, which would take longer than the test."""
    request = {"model": NAME, "messages": MESSAGES, "max_tokens": 2000}

    def running() -> int:
        with urllib.request.urlopen(f"{server[0]}/v1/razor/memory", timeout=PATIENCE) as answer:
            requests = json.load(answer)["engines"][0]["requests"]
        return requests["running"] + requests["waiting"]

    stream = client.chat.completions.create(
        **request, stream=True, extra_body={"ignore_eos": True, "vllm_xargs": slow()}
    )
    next(iter(stream))
    until(lambda: running() == 1)
    stream.close()
    until(lambda: running() == 0)
    assert client.chat.completions.create(**{**request, "max_tokens": 4}).choices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-policy", "h2o"], "policy is 'h2o'; accepted are full, razor"),
        (["--razor-window", "-1"], "window is -1"),
        (["--razor-head-profile", "/none.json"], "cannot read head profile /none.json"),
        (["--kv-cache-dtype", "fp8_e5m2"], "a KV cache of fp8_e5m2 is not covered"),
    ],
)
def test_bad_options_stop_the_command(model_dir: Path, options, message: str) -> None:
    """`razor serve` ends with an error that names what is accepted."""
    process = serve(model_dir, "--port", str(free_port()), *options)
    output, _ = process.communicate(timeout=START_SECONDS)
    assert process.returncode != 0
    assert message in output

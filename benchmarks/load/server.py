"""A server under one KV policy, for as long as it is measured."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.needle.language import draw_prose, render

POLICIES: dict[str, tuple[str, ...]] = {
    "stock": (),
    "full": ("--kv-policy", "full"),
    "razor": ("--kv-policy", "razor"),
    "razor-chat": ("--kv-policy", "razor", "--razor-prefill", "chat"),
    "razor-windowed": ("--kv-policy", "razor", "--razor-prefill", "windowed"),
}
"""Names of the policies, and the options that ask for them; stock is vLLM without the plugin."""

START_SECONDS = 600
STOP_SECONDS = 120


class Server(NamedTuple):
    """A server that answers. url: without `/v1`. pid: of its first process."""

    url: str
    model: str
    pid: int
    log: Path


def command(model: str, policy: str, port: int, options: Sequence[str]) -> list[str]:
    """The command that serves a model under a policy."""
    module = "vllm.entrypoints.cli.main" if policy == "stock" else "razor_serving.cli"
    network = ["--host", "127.0.0.1", "--port", str(port)]
    return [sys.executable, "-m", module, "serve", model, *network, *POLICIES[policy], *options]


@contextlib.contextmanager
def serving(
    model: str, policy: str, port: int, options: Sequence[str], log: Path
) -> Iterator[Server]:
    """A server of its own processes, ended with SIGTERM.

    Raises:
        RuntimeError: its port is taken; or it does not start, or does not end, with the end
            of its log.
    """
    refuse_taken(port)
    env = dict(os.environ)
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule --kv-cache-memory-bytes
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # the engine has a process of its own
    # A user who rests for vLLM's 5 s would send the next request as its connection is closed.
    env.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "3600")
    if policy == "stock":
        env["VLLM_PLUGINS"] = ""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command(model, policy, port, options),
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(f"http://127.0.0.1:{port}", model, process.pid, log)
        try:
            wait_until_ready(server, process)
            yield server._replace(model=first_model(server.url))
        finally:
            stop(process, log)


def refuse_taken(port: int) -> None:
    """Two of vLLM's servers can listen on one port: another one's answers would be measured.

    Raises:
        RuntimeError: something listens there.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise RuntimeError(f"port {port} is taken ({error}); --port N takes another") from None


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Until `/health` answers.

    Raises:
        RuntimeError: the process ended, or too much time went by.
    """
    deadline = time.monotonic() + START_SECONDS
    while not healthy(server.url):
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{end_of(server.log)}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer after {START_SECONDS} s:\n{end_of(server.log)}")
        time.sleep(0.5)


def stop(process: subprocess.Popen[bytes], log: Path) -> None:
    """End a server and whatever it started.

    Raises:
        RuntimeError: SIGTERM did not end it.
    """
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"SIGTERM did not end the server:\n{end_of(log)}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def get(url: str) -> tuple[int, str]:
    """GET: HTTP status and body.

    Raises:
        OSError: the server does not answer.
    """
    request = urllib.request.Request(url, headers=_headers())
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def healthy(url: str) -> bool:
    """Whether `/health` says so."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def first_model(url: str) -> str:
    return _call(f"{url}/v1/models")["data"][0]["id"]


def words_per_token(server: Server, num_words: int = 2000) -> float:
    """Words of the needle language that make one token, by the server's tokenizer."""
    sentences = draw_prose(random.Random("words per token"), num_words)
    text = render([word for sentence in sentences for word in sentence])
    body = {"model": server.model, "prompt": text, "add_special_tokens": False}
    return num_words / _call(f"{server.url}/tokenize", body)["count"]


def warm_up(server: Server) -> None:
    """A short request, so that what is done once is done: not measured, not in the load."""
    body = {"model": server.model, "prompt": "a b c d e f g h", "max_tokens": 8}
    _call(f"{server.url}/v1/completions", body)


def end_of(log: Path, characters: int = 3000) -> str:
    """The end of a log, for an error."""
    return log.read_text(encoding="utf-8", errors="replace")[-characters:]


def _call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, _headers())
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    return headers

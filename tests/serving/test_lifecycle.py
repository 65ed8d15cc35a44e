"""How a server ends: killed engine, restart, SIGTERM with and without requests."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
from held_steps import held, holders
from servers import MODEL, PATIENCE, Server, until

pytestmark = pytest.mark.engine

TOKENS = 40
LONG = {
    "model": MODEL,
    "prompt": "abc",
    "max_tokens": TOKENS,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


class Streamed(threading.Thread):
    """A streamed completion that stops in the middle, until the file `let_go` is made.

    `lines` grows as it comes.
    """

    def __init__(self, server: Server, let_go: Path) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.body = {**LONG, "vllm_xargs": held(let_go)}
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.start()
        until(lambda: self.lines and holders(let_go), complain=server.tail)

    def run(self) -> None:
        try:
            with (
                self.server.client() as client,
                client.stream("POST", "/v1/completions", json=self.body) as answer,
            ):
                for line in answer.iter_lines():
                    self.lines += [line] if line else []
        except httpx.HTTPError as error:
            self.error = error


def children(server: Server, name: str) -> list[psutil.Process]:
    """Processes that the server started, by a part of their title."""
    every = psutil.Process(server.process.pid).children(recursive=True)
    return [p for p in every if any(name in part for part in p.cmdline())]


def complete(server: Server) -> httpx.Response:
    with server.client() as client:
        body = {"model": MODEL, "prompt": "abc", "max_tokens": 2}
        return client.post("/v1/completions", json=body)


def health(server: Server) -> int:
    with server.client() as client:
        return client.get("/health").status_code


def test_a_killed_worker_ends_the_server_with_an_error(
    launch: Callable[..., Server], tmp_path: Path
) -> None:
    """The request in flight gets an error, health turns bad, the exit status is not 0."""
    server = launch().wait()
    stream = Streamed(server, tmp_path / "never")
    (worker,) = children(server, "VLLM::Worker")
    started = psutil.Process(server.process.pid).children(recursive=True)

    def unhealthy_or_gone() -> bool:
        try:
            return health(server) == 503
        except (httpx.NetworkError, httpx.RemoteProtocolError):
            return True

    os.kill(worker.pid, signal.SIGKILL)
    until(unhealthy_or_gone, complain=server.tail)
    stream.join(PATIENCE)
    text = "".join(stream.lines)
    assert stream.error is not None or '"error"' in text, text[-500:]
    assert "[DONE]" not in text or '"error"' in text
    assert server.process.wait(PATIENCE) == 1, server.tail()
    assert "razor: the engine ended by itself" in server.log.read_text()
    until(lambda: not any(p.is_running() for p in started))


def test_a_clean_stop_logs_no_traceback(launch: Callable[..., Server]) -> None:
    """A server that has answered and is idle ends with status 0, and complains of nothing."""
    server = launch().wait()
    assert complete(server).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0, server.tail()
    log = server.log.read_text()
    assert "mode=drain timeout=30s" in log, "requests in flight would have got 30 s"
    assert "Traceback" not in log
    assert "EngineDeadError" not in log


@pytest.fixture(scope="module")
def restarted(launch: Callable[..., Server]) -> Server:
    """A server that was started after another one's end.

    Its requests in flight get longer than any test waits: the default of 30 s is in the test
    above, and how many tokens a machine makes in it is no matter here.
    """
    return launch("--shutdown-timeout", str(round(2 * PATIENCE))).wait()


def test_a_restart_serves_again(restarted: Server) -> None:
    """After a server that was killed, a new one answers."""
    assert complete(restarted).status_code == 200


def test_sigterm_lets_requests_finish(restarted: Server, tmp_path: Path) -> None:
    """The stream under way ends whole, new requests are sent away, the exit status is 0.

    The stream stands still while the server is asked for something else.
    """
    let_go = tmp_path / "go"
    stream = Streamed(restarted, let_go)
    restarted.process.send_signal(signal.SIGTERM)
    until(lambda: health(restarted) == 503, complain=restarted.tail)
    refused = complete(restarted)
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "The server is shutting down"
    assert stream.is_alive(), "a held stream ended"
    let_go.touch()
    stream.join(PATIENCE)
    assert stream.error is None
    # Tokens that come while the server is busy may share a chunk, so usage counts them.
    *_, last, usage, done = stream.lines
    assert done == "data: [DONE]"
    assert '"finish_reason":"length"' in last
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == TOKENS
    assert restarted.process.wait(PATIENCE) == 0, restarted.tail()
    assert "Traceback" not in restarted.log.read_text()

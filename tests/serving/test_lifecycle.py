"""How a server ends: killed engine, restart, SIGTERM while requests run."""

import os
import signal
import threading
from collections.abc import Callable

import httpx
import psutil
import pytest
from servers import MODEL, Server, until

pytestmark = pytest.mark.engine

LONG = {"model": MODEL, "prompt": "abc", "max_tokens": 1500, "ignore_eos": True, "stream": True}


class Streamed(threading.Thread):
    """A long streamed completion; `lines` grows as it comes."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.lines: list[str] = []
        self.error: Exception | None = None
        self.start()
        until(lambda: len(self.lines) > 4, 60, server.tail)

    def run(self) -> None:
        try:
            with (
                self.server.client(timeout=120) as client,
                client.stream("POST", "/v1/completions", json=LONG) as answer,
            ):
                self.lines += (line for line in answer.iter_lines() if line)
        except httpx.HTTPError as error:
            self.error = error


def children(server: Server, name: str) -> list[psutil.Process]:
    """Processes that the server started, by a part of their title."""
    every = psutil.Process(server.process.pid).children(recursive=True)
    return [p for p in every if any(name in part for part in p.cmdline())]


def complete(server: Server) -> httpx.Response:
    with server.client(timeout=20) as client:
        body = {"model": MODEL, "prompt": "abc", "max_tokens": 2}
        return client.post("/v1/completions", json=body)


def test_a_killed_worker_ends_the_server_with_an_error(launch: Callable[..., Server]) -> None:
    """The request in flight gets an error, health turns bad, the exit status is not 0."""
    server = launch().wait()
    stream = Streamed(server)
    (worker,) = children(server, "VLLM::Worker")
    started = psutil.Process(server.process.pid).children(recursive=True)
    statuses: list[int] = []

    def unhealthy_or_gone() -> bool:
        try:
            statuses.append(httpx.get(f"{server.url}/health", timeout=5).status_code)
        except httpx.TransportError:
            return True
        return statuses[-1] == 503

    os.kill(worker.pid, signal.SIGKILL)
    until(unhealthy_or_gone, 60, server.tail)
    stream.join(60)
    text = "".join(stream.lines)
    assert stream.error is not None or '"error"' in text, text[-500:]
    assert "[DONE]" not in text or '"error"' in text
    assert server.process.wait(60) == 1, server.tail()
    assert "razor: the engine ended by itself" in server.log.read_text()
    until(lambda: not any(p.is_running() for p in started), 60)


@pytest.fixture(scope="module")
def restarted(launch: Callable[..., Server]) -> Server:
    """A server that was started after another one's end."""
    return launch().wait()


def test_a_restart_serves_again(restarted: Server) -> None:
    """After a server that was killed, a new one answers."""
    assert complete(restarted).status_code == 200


def test_sigterm_lets_requests_finish(restarted: Server) -> None:
    """The stream under way ends whole, new requests are sent away, the exit status is 0."""
    stream = Streamed(restarted)
    restarted.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        answer = complete(restarted)
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 503:
            assert answer.json()["error"]["message"] == "The server is shutting down"
        return answer.status_code == 503

    until(refused, 20, restarted.tail)
    assert httpx.get(f"{restarted.url}/health", timeout=5).status_code == 503
    assert stream.is_alive(), "the stream was over before the server was asked for anything else"
    stream.join(60)
    assert stream.error is None
    assert stream.lines[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in stream.lines[-2]
    assert restarted.process.wait(60) == 0, restarted.tail()

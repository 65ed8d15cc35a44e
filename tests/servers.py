"""Real servers for tests: `razor serve` in a process of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

MODEL = "bundled"
KEY = "test-key"
SMALL = ["--served-model-name", MODEL, "--enforce-eager", "--max-model-len", "4096"]
SMALL += ["--razor-window", "64", "--kv-cache-memory-bytes", str(64 * 1024**2)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A `razor serve` of the bundled model.

    Args:
        model: its folder. folder: for the log. options: of the command line, beside SMALL.
    """

    def __init__(self, model: Path, folder: Path, *options: str, key: str | None = None) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = key
        self.log = folder / f"server-{self.port}.log"
        keyed = ["--api-key", key] if key else []
        command = [sys.executable, "-m", "razor_serving.cli", "serve", str(model)]
        command += ["--port", str(self.port), *SMALL, *keyed, *options]
        # The engine gets a process of its own, as it does for a user.
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def client(self, key: bool = True, timeout: float = 60) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if key and self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def wait(self, seconds: float = 600) -> "Server":
        """Return once it answers."""
        until(self._answers, seconds, self.tail)
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.tail()
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End it and all that it started, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


def until(
    holds: Callable[[], object], seconds: float, complain: Callable[[], str] = lambda: ""
) -> None:
    """Return once something holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s\n{complain()}"
        time.sleep(0.1)

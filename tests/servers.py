"""Real servers for tests: `razor serve` in a process of its own."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from held_steps import PROCESSOR

MODEL = "bundled"
KEY = "test-key"
SMALL = ["--served-model-name", MODEL, "--enforce-eager", "--max-model-len", "4096"]
SMALL += ["--razor-window", "64", "--kv-cache-memory-bytes", str(64 * 1024**2)]
SMALL += ["--logits-processors", PROCESSOR]
PATIENCE = 300.0
"""Seconds that anything may take on a busy machine. Nothing is judged by them: what a test waits
for comes, or the test fails."""
START_SECONDS = 2 * PATIENCE
"""The same of a server's start, or of its refusal to."""


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection will be given meanwhile.

    Those come from 32768 up by Linux's default, while a server takes seconds to bind its port.
    """
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20000, 32768)))
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
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                env=environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def client(self, key: bool = True) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if key and self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE)

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def wait(self, seconds: float = START_SECONDS) -> "Server":
        """Return once it answers."""
        until(self._answers, seconds, self.tail)
        return self

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.tail()
        try:
            return httpx.get(f"{self.url}/health", timeout=PATIENCE).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End it and all that it started, whatever state it is in."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


def environment() -> dict[str, str]:
    """Of a server: its engine has a process of its own, as a user's has, and finds `held_steps`."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }


def until(
    holds: Callable[[], object],
    seconds: float = PATIENCE,
    complain: Callable[[], str] = lambda: "",
) -> None:
    """Return once something holds; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s\n{complain()}"
        time.sleep(0.1)

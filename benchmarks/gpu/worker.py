"""A process that does jobs, so that one that hangs or dies takes nothing else with it.

    parent   one JSON line per job on the worker's standard input
    worker   `RESULT <json>` or `ERROR <text>` per job on its standard output

A worker imports vLLM before it reads its first job: the next worker is started while the last
one is busy. Whatever else it prints is kept, and reported when it dies.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.scale import ROOT

RESULT, ERROR = "RESULT ", "ERROR "
TOLD_LINES = 40


class WorkerError(RuntimeError):
    """A job that gave no result, and why."""


class Worker:
    """env: of the process, beyond this one's. arguments: of Python, which then does `work`."""

    def __init__(
        self, env: dict[str, str], arguments: Sequence[str] = ("-m", "benchmarks.gpu", "--worker")
    ) -> None:
        self.env = env
        everything = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            **env,
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=everything,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.told: deque[str] = deque(maxlen=TOLD_LINES)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def do(self, job: dict[str, Any], seconds: float) -> Any:
        """The job's result.

        Raises:
            WorkerError: it raised, died, or took longer than `seconds`; the worker is ended.
        """
        deadline = time.monotonic() + seconds
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            while (line := self._next(deadline)) is not None:
                if line.startswith(RESULT):
                    return json.loads(line.removeprefix(RESULT))
                if line.startswith(ERROR):
                    raise WorkerError(json.loads(line.removeprefix(ERROR)))
                self.told.append(line)
        except queue.Empty:
            self.close()
            raise WorkerError(f"no result in {seconds:.0f} s\n" + "\n".join(self.told)) from None
        except OSError:
            pass
        self.close()
        status = self.process.returncode
        raise WorkerError(f"ended with status {status}\n" + "\n".join(self.told))

    def _next(self, deadline: float) -> str | None:
        return self.lines.get(timeout=max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """End the process and those that it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def work(jobs: dict[str, Any]) -> None:
    """The worker's side: each line's job by the function of its kind, until the input ends.

    Args:
        jobs: kind -> function of the job's other fields.
    """
    import traceback

    import vllm  # noqa: F401, so that it is there when the job comes

    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = RESULT + json.dumps(jobs[job.pop("kind")](**job))
        except Exception:  # reported to the parent, which judges it
            answer = ERROR + json.dumps(traceback.format_exc()[-3000:])
        # Something else may have left the line open.
        print("\n" + answer, flush=True)

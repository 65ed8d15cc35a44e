"""A local Ray cluster that serves docker/ray-serve-cpu.yaml, as docs/scale.md has it.

Only ports and a logits processor, by which a test holds a request, are the tests' own.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil
import servers
import yaml
from held_steps import PROCESSOR
from servers import free_port

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LOCAL = "127.0.0.1"
START_SECONDS = 480
COUNTER = re.compile(
    r'^ray_serve_deployment_request_counter_total\{.*"LLMServer:.*replica="(\w+)".*\} (\S+)$', re.M
)


def wait_for(reached: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
    """The first true value of `reached`, which may fail with OSError until then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if value := reached():
                return value
        time.sleep(0.5)
    raise TimeoutError(f"not within {seconds} s: {what}")


class Cluster(NamedTuple):
    """Addresses of a running cluster."""

    http: int
    dashboard: int
    metrics: int

    def client(self, retries: int = 0) -> openai.OpenAI:
        """The official client of the application."""
        return openai.OpenAI(
            base_url=f"http://{LOCAL}:{self.http}/v1", api_key="none", max_retries=retries
        )

    def engines(self) -> dict[str, int]:
        """Process of each engine that runs, by its replica's name."""
        url = f"http://{LOCAL}:{self.dashboard}/api/serve/applications/"
        with urllib.request.urlopen(url, timeout=10) as answer:
            app = json.load(answer)["applications"]["razor"]
        assert app["status"] != "DEPLOY_FAILED", app
        replicas = next(
            deployment["replicas"]
            for name, deployment in app["deployments"].items()
            if name.startswith("LLMServer")
        )
        return {r["replica_id"]: r["pid"] for r in replicas if r["state"] == "RUNNING"}

    def answered(self) -> dict[str, int]:
        """Requests that each replica has answered, as Ray's metrics have it."""
        url = f"http://{LOCAL}:{self.metrics}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        counts: dict[str, int] = {}
        for replica, value in COUNTER.findall(text):
            counts[replica] = counts.get(replica, 0) + int(float(value))
        return counts


def _environment(folder: str) -> dict[str, str]:
    return {
        **servers.environment(),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        # Loopback only, and no token in the home folder.
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": folder,
        "RAY_metrics_report_interval_ms": "1000",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=30)
        for child in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait(START_SECONDS)


def _deploy(cluster: Cluster, folder: Path, environment: dict[str, str]) -> None:
    config = yaml.safe_load((ROOT / "docker/ray-serve-cpu.yaml").read_text(encoding="utf-8"))
    config["http_options"]["port"] = cluster.http
    config["applications"][0]["args"]["engine"]["logits_processors"] = [PROCESSOR]
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["serve", "deploy", str(file), "--address", f"http://{LOCAL}:{cluster.dashboard}"]
    # On a busy machine Ray gives its own actors up before they run; the next try has new ones.
    wait_for(
        lambda: not subprocess.run(
            command, cwd=ROOT, env=environment, check=False, timeout=START_SECONDS
        ).returncode,
        "an accepted configuration",
    )


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A one-node cluster with two engines that run; ended afterwards."""
    # Ray's sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    environment = _environment(str(folder))
    gcs, agent, *ports = (free_port() for _ in range(5))
    cluster = Cluster(*ports)
    options = {
        "node-ip-address": LOCAL,
        "port": gcs,
        "dashboard-port": cluster.dashboard,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": cluster.metrics,
        # Reservations, not cores: more than a small machine has.
        "num-cpus": 8,
        "object-store-memory": 100_000_000,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    command = ["ray", "start", "--head", "--block", "--disable-usage-stats", *flags]
    with (folder / "ray.log").open("wb") as log:
        node = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        wait_for(
            lambda: socket.create_connection((LOCAL, cluster.dashboard)).close() or True, "Ray"
        )
        _deploy(cluster, folder, environment)
        wait_for(lambda: _is_ready(cluster), "two engines")
        yield cluster
    finally:
        _end(node)
        shutil.rmtree(folder, ignore_errors=True)


def _listens(port: int) -> bool:
    socket.create_connection((LOCAL, port), timeout=5).close()
    return True


def _is_ready(cluster: Cluster) -> bool:
    with contextlib.suppress(KeyError, StopIteration):
        return len(cluster.engines()) == 2 and bool(cluster.client().models.list().data)
    return False

"""How fast long contexts decode on a CPU: stock vLLM and razor with the same requests.

    python -m benchmarks.decode MODEL --output FILE [--lengths 512 16384] [--requests 4]

Each policy's engine has its own process, and the two take turns, so that other work on the
machine affects both alike: each answers one request alone a few times, then reads the prompts
and decodes in rounds. `host` is a step's time outside the model's forward pass: scheduling,
block tables, metadata, sampling. `first token` is the time to it, of a request alone.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.residency import device

POLICIES = ("stock", "razor")
_RESULT = "RESULT "


class Engine:
    """One policy's engine in this process; `serve` calls what it is told to."""

    def __init__(self, model: str, job: dict[str, Any]) -> None:
        from vllm import LLM

        razor = {"window": job["window"]}
        if job["profile"]:
            razor["head_profile"] = job["profile"]
        self.job, self.draw = job, random.Random(0)
        self.total = job["steps"] * (job["rounds"] + 1)
        llm = LLM(
            model,
            # The same for all lengths, so that a model is compiled once.
            max_model_len=max(job["longest"], job["window"]) + self.total + 8,
            dtype=job["dtype"],
            kv_cache_memory_bytes=job["kv_bytes"],
            enable_prefix_caching=False,
            disable_log_stats=True,
            additional_config={"razor": razor} if job["policy"] == "razor" else {},
        )
        self.engine: Any = llm.llm_engine
        client: Any = llm.llm_engine.engine_core
        core = client.engine_core
        self.running = core.scheduler.running
        self.forward = ForwardTimer(core.model_executor.driver_worker.worker.model_runner)

    def _add(self, name: str, max_tokens: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        tokens = [self.draw.randrange(5, 200) for _ in range(self.job["length"])]
        self.engine.add_request(name, {"prompt_token_ids": tokens}, params)

    def first_token(self) -> float:
        """Seconds to the first token of a request that is alone."""
        begin = time.perf_counter()
        self._add("first", 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - begin

    def start(self) -> None:
        """Read the prompts of the requests that decode."""
        for index in range(self.job["requests"]):
            self._add(str(index), self.total)
        count = self.job["requests"]
        while len(self.running) < count or any(r.num_output_tokens < 2 for r in self.running):
            self.engine.step()

    def decode(self) -> "Times":
        """Medians of a round's steps."""
        steps, host = [], []
        for _ in range(self.job["steps"]):
            self.forward.seconds, begin = 0.0, time.perf_counter()
            self.engine.step()
            steps.append(time.perf_counter() - begin)
            host.append(steps[-1] - self.forward.seconds)
        return Times(statistics.median(steps), statistics.median(host))


def serve(model: str, job: dict[str, Any]) -> None:
    """One policy in this process: a result for each line read, the name of a method."""
    engine = Engine(model, job)
    for line in sys.stdin:
        print(_RESULT + json.dumps(getattr(engine, line.strip())()), flush=True)


class Times(NamedTuple):
    """Seconds of a step, and of its part outside the forward pass."""

    step: float
    host: float


class ForwardTimer:
    """Adds up what a model runner's forward passes take, in seconds."""

    def __init__(self, runner: Any) -> None:
        self.seconds = 0.0
        self.original = runner._model_forward
        runner._model_forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.original(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - begin


class Server:
    """A policy's engine in a process of its own."""

    def __init__(self, model: str, job: dict[str, Any]) -> None:
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        if job["policy"] == "stock":
            env["VLLM_PLUGINS"] = ""
        env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule kv_bytes
        command = [sys.executable, "-m", "benchmarks.decode", model, "--job", json.dumps(job)]
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, method: str) -> Any:
        """What a method of the process's `Engine` returns.

        Raises:
            RuntimeError: the process ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(method + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(_RESULT):
                return json.loads(line.removeprefix(_RESULT))
        raise RuntimeError(f"the engine ended with status {self.process.wait()}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(model: str, job: dict[str, Any]) -> dict[str, Any]:
    """Both policies at one length: medians of the rounds, in turn."""
    servers = {policy: Server(model, {**job, "policy": policy}) for policy in POLICIES}
    try:
        first: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        for _ in range(1 + job["first_rounds"]):
            for policy, server in servers.items():
                first[policy].append(server.ask("first_token"))
        for server in servers.values():
            server.ask("start")
        rounds: dict[str, list[Times]] = {policy: [] for policy in POLICIES}
        for _ in tqdm(range(job["rounds"]), desc=f"{job['length']} tokens"):
            for policy, server in servers.items():
                rounds[policy].append(Times(*server.ask("decode")))
    finally:
        for server in servers.values():
            server.close()
    seconds = {p: statistics.median(x.step for x in taken) for p, taken in rounds.items()}
    host = {p: statistics.median(x.host for x in taken) for p, taken in rounds.items()}
    # The first of them warms up.
    alone = {p: statistics.median(taken[1:] or taken) for p, taken in first.items()}
    return {
        "length": job["length"],
        "step_ms": {policy: round(x * 1e3, 3) for policy, x in seconds.items()},
        "host_ms": {policy: round(x * 1e3, 3) for policy, x in host.items()},
        "output_tokens_per_second": {
            policy: round(job["requests"] / x, 1) for policy, x in seconds.items()
        },
        "razor_to_stock": round(seconds["stock"] / seconds["razor"], 2),
        "first_token_ms": {policy: round(x * 1e3, 1) for policy, x in alone.items()},
        "first_token_razor_to_stock": round(alone["razor"] / alone["stock"], 3),
        "rounds_ms": {p: [round(x.step * 1e3, 3) for x in taken] for p, taken in rounds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 4096, 16384])
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--profile", help="head profile, where none lies beside the weights")
    parser.add_argument("--steps", type=int, default=20, help="decode steps a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--first-rounds", type=int, default=3, help="times to first token")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-bytes", type=int, default=1024**3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        serve(args.model, json.loads(args.job))
        return
    import torch
    import vllm

    names = [
        "requests",
        "window",
        "profile",
        "steps",
        "rounds",
        "first_rounds",
        "dtype",
        "kv_bytes",
    ]
    job = {name: getattr(args, name) for name in names} | {"longest": max(args.lengths)}
    rows = [compare(args.model, {**job, "length": length}) for length in args.lengths]
    report = {
        "command": shlex.join(["python", "-m", "benchmarks.decode", *sys.argv[1:]]),
        "device": device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "job": job,
        "rows": rows,
    }
    for row in rows:
        print(
            f"{row['length']} tokens: step {row['step_ms']}, host {row['host_ms']}, "
            f"razor is {row['razor_to_stock']}x stock; first token {row['first_token_ms']}, "
            f"razor takes {row['first_token_razor_to_stock']}x"
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

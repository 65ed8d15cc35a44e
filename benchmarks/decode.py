"""How fast long contexts decode on a CPU: stock vLLM and razor with the same requests.

    python -m benchmarks.decode MODEL --output FILE [--lengths 512 16384] [--requests 4]

Each policy's engine has its own process, and the two take turns: each reads the prompts
once, then decodes in rounds, so that other work on the machine affects both alike.
`host` is a step's time outside the model's forward pass: scheduling, block tables,
metadata, sampling.
"""

import argparse
import json
import os
import random
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


def serve_rounds(model: str, job: dict[str, Any]) -> None:
    """One policy in this process: a line when ready, then one with medians for each line read."""
    from vllm import LLM, SamplingParams

    razor = {"window": job["window"]}
    if job["profile"]:
        razor["head_profile"] = job["profile"]
    total = job["steps"] * (job["rounds"] + 1)
    llm = LLM(
        model,
        max_model_len=max(job["length"], job["window"]) + total + 8,
        dtype=job["dtype"],
        kv_cache_memory_bytes=job["kv_bytes"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"razor": razor} if job["policy"] == "razor" else {},
    )
    engine: Any = llm.llm_engine
    draw = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=total, ignore_eos=True)
    for index in range(job["requests"]):
        tokens = [draw.randrange(5, 200) for _ in range(job["length"])]
        engine.add_request(str(index), {"prompt_token_ids": tokens}, params)
    core = engine.engine_core.engine_core
    forward = ForwardTimer(core.model_executor.driver_worker.worker.model_runner)
    running = core.scheduler.running
    while len(running) < job["requests"] or any(r.num_output_tokens < 2 for r in running):
        engine.step()
    print(_RESULT + "ready", flush=True)
    for _ in sys.stdin:
        steps, host = [], []
        for _ in range(job["steps"]):
            forward.seconds, begin = 0.0, time.perf_counter()
            engine.step()
            steps.append(time.perf_counter() - begin)
            host.append(steps[-1] - forward.seconds)
        medians = Times(statistics.median(steps), statistics.median(host))
        print(_RESULT + json.dumps(medians), flush=True)


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

    def read(self) -> str:
        """The next line that is ours.

        Raises:
            RuntimeError: the process ended.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(_RESULT):
                return line.removeprefix(_RESULT)
        raise RuntimeError(f"the engine ended with status {self.process.wait()}")

    def round(self) -> Times:
        """Medians of one round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Times(*json.loads(self.read()))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(model: str, job: dict[str, Any]) -> dict[str, Any]:
    """Both policies at one length: medians of the rounds, in turn."""
    servers = {policy: Server(model, {**job, "policy": policy}) for policy in POLICIES}
    try:
        for server in servers.values():
            server.read()
        rounds: dict[str, list[Times]] = {policy: [] for policy in POLICIES}
        for _ in tqdm(range(job["rounds"]), desc=f"{job['length']} tokens"):
            for policy, server in servers.items():
                rounds[policy].append(server.round())
    finally:
        for server in servers.values():
            server.close()
    seconds = {p: statistics.median(x.step for x in taken) for p, taken in rounds.items()}
    host = {p: statistics.median(x.host for x in taken) for p, taken in rounds.items()}
    return {
        "length": job["length"],
        "step_ms": {policy: round(x * 1e3, 3) for policy, x in seconds.items()},
        "host_ms": {policy: round(x * 1e3, 3) for policy, x in host.items()},
        "output_tokens_per_second": {
            policy: round(job["requests"] / x, 1) for policy, x in seconds.items()
        },
        "razor_to_stock": round(seconds["stock"] / seconds["razor"], 2),
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
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-bytes", type=int, default=1024**3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        serve_rounds(args.model, json.loads(args.job))
        return
    import torch
    import vllm

    names = ("requests", "window", "profile", "steps", "rounds", "dtype", "kv_bytes")
    job = {name: getattr(args, name) for name in names}
    rows = [compare(args.model, {**job, "length": length}) for length in args.lengths]
    report = {
        "command": " ".join(["python -m benchmarks.decode", *sys.argv[1:]]),
        "device": device(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "job": job,
        "rows": rows,
    }
    for row in rows:
        print(
            f"{row['length']} tokens: step {row['step_ms']}, host {row['host_ms']}, "
            f"razor is {row['razor_to_stock']}x stock"
        )
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

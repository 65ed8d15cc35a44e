"""What requests hold, how many are resident, and how fast they decode: full and razor.

    python benchmarks/residency.py MODEL [--length 4096] [--window 256] [--rounds 3]

Each policy runs in its own process with the same bytes of KV memory. They take turns for
some rounds, and the medians are reported. `stock` is vLLM without the plugin, `full` with
the plugin loaded but not used.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

POLICIES: dict[str, dict[str, Any]] = {
    "stock": {},
    "full": {"policy": "full"},
    "razor exact": {"prefill": "exact"},
    "razor windowed": {"prefill": "windowed"},
}
GENERATED = 64


def measure(model: str, job: dict[str, Any]) -> dict[str, Any]:
    """One policy in this process.

    Returns:
        held_bytes: KV memory of one request of `length` tokens, from the block pool.
        resident: most requests decoding at one time.
        output_tokens_per_second: of all requests, prefill included.
        decode_ms: median step of one resident request.
    """
    from vllm import LLM, SamplingParams

    razor = POLICIES[job["policy"]]
    if razor.get("prefill"):
        razor = {**razor, "window": job["window"]}
    llm = LLM(
        model,
        max_model_len=job["length"] + GENERATED,
        dtype=job["dtype"],
        kv_cache_memory_bytes=job["kv_bytes"],
        enable_prefix_caching=False,
        disable_log_stats=True,
        additional_config={"razor": razor} if razor else {},
    )
    engine: Any = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool, config = scheduler.kv_cache_manager.block_pool, scheduler.kv_cache_config
    page_bytes = config.kv_cache_tensors[0].size // config.num_blocks
    params = SamplingParams(temperature=0, max_tokens=GENERATED, ignore_eos=True)
    draw = random.Random(0)

    def add(count: int) -> None:
        for _ in range(count):
            tokens = [draw.randrange(5, 200) for _ in range(job["length"] - GENERATED // 2)]
            engine.add_request(str(draw.random()), {"prompt_token_ids": tokens}, params)

    add(1)
    held, steps = 0, []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        request = next(iter(scheduler.running), None)
        if request is not None and request.num_output_tokens > 1:
            steps.append(time.perf_counter() - begin)
            if request.num_tokens == job["length"]:
                held = (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()) * page_bytes
    add(job["requests"])
    resident, begin = 0, time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
        resident = max(resident, sum(r.num_output_tokens > 0 for r in scheduler.running))
    seconds = time.perf_counter() - begin
    return {
        "held_bytes": held,
        "resident": resident,
        "output_tokens_per_second": job["requests"] * GENERATED / seconds,
        "decode_ms": statistics.median(steps) * 1e3,
    }


def run(model: str, job: dict[str, Any]) -> dict[str, Any]:
    """One policy in a process of its own."""
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **({"VLLM_PLUGINS": ""} if job["policy"] == "stock" else {}),
    }
    env.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would overrule kv_bytes
    command = [sys.executable, __file__, model, "--job", json.dumps(job)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def device() -> str:
    """The machine and versions of the figures."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return platform.processor()


def table(results: dict[str, dict[str, float]]) -> str:
    """The medians, a row per policy."""
    lines = [
        "| policy | KV bytes a request | resident | decode step, 1 request | output tokens/s |",
        "|---|---|---|---|---|",
    ]
    for policy, row in results.items():
        share = row["held_bytes"] / results["stock"]["held_bytes"]
        lines.append(
            f"| {policy} | {row['held_bytes'] / 1024**2:.2f} MiB ({share:.0%}) "
            f"| {row['resident']:.0f} | {row['decode_ms']:.2f} ms "
            f"| {row['output_tokens_per_second']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--length", type=int, default=4096, help="tokens a request")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-bytes", type=int, default=24 * 1024**2)
    parser.add_argument("--output", type=Path, help="write the figures to a JSON file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(args.model, json.loads(args.job))))
        return
    names = ("length", "window", "requests", "dtype", "kv_bytes")
    job = {name: getattr(args, name) for name in names}
    runs: dict[str, list[dict[str, Any]]] = {policy: [] for policy in POLICIES}
    for policy in tqdm(list(POLICIES) * args.rounds, desc="policies x rounds"):
        runs[policy].append(run(args.model, {**job, "policy": policy}))
    medians = {
        policy: {key: statistics.median(r[key] for r in rows) for key in rows[0]}
        for policy, rows in runs.items()
    }
    print(table(medians))
    if args.output:
        import torch
        import vllm

        figures = {
            "command": shlex.join(["python", *sys.argv]),
            "device": device(),
            "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
            "job": job,
            "rounds": args.rounds,
            "medians": medians,
            "runs": runs,
        }
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

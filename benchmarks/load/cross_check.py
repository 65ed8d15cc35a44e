"""The same prompts through this load generator and through `vllm bench serve`.

    python -m benchmarks.load.cross_check MODEL [--policy full] [--rounds 3] [vLLM options]

Both send the same prompts, in the same order and with the same concurrency, to one server:
prefix caching off, all requests to `/v1/completions`. They take turns for some rounds, with
other prompts in each round, after a round that does not count. The medians over the rounds
are compared; the exit status is 1 if one differs by more than `--tolerance`.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.load.__main__ import (
    about,
    add_server_options,
    add_workload_options,
    rounded,
    server_options,
    workload_of,
)
from benchmarks.load.run import ROOT, run_load
from benchmarks.load.server import POLICIES, Server, end_of, serving, words_per_token
from benchmarks.load.summary import summarise
from benchmarks.load.workload import Workload

COMPARED = ("median_ttft_ms", "median_itl_ms", "output_throughput")
"""Our figures, and their names in the results of `vllm bench serve`."""


def ours(server: Server, workload: Workload, folder: Path) -> dict[str, float]:
    """The compared figures by this load generator.

    Raises:
        RuntimeError: a request failed.
    """
    summary = summarise(run_load(server, workload, folder, folder.name))
    if set(summary["requests"]) != {"done"}:
        raise RuntimeError(f"requests ended as {summary['requests']}, see {folder}")
    return {
        "median_ttft_ms": summary["ttft"]["p50"] * 1e3,
        "median_itl_ms": summary["gap"]["p50"] * 1e3,
        "output_throughput": summary["output_tokens_per_second"],
        "completed": summary["requests"]["done"],
        "total_output_tokens": summary["output_tokens"],
    }


def write_prompts(workload: Workload, path: Path) -> None:
    """The workload's prompts as a `custom` data set."""
    with path.open("w", encoding="utf-8") as file:
        for session in workload.draw():
            turn = session.turns[0]
            line = {"prompt": turn.text, "output_tokens": turn.max_tokens}
            print(json.dumps(line), file=file)


def bench_command(server: Server, workload: Workload, tokenizer: str, folder: Path) -> list[str]:
    """`vllm bench serve` with the same load.

    Args:
        tokenizer: folder or hub name of the model.
        folder: has the prompts, gets the results.
    """
    options = {
        "--backend": "openai",
        "--base-url": server.url,
        "--endpoint": "/v1/completions",
        "--model": server.model,
        "--tokenizer": tokenizer,
        "--dataset-name": "custom",
        "--dataset-path": str(folder / "prompts.jsonl"),
        "--custom-output-len": "-1",
        "--num-prompts": str(workload.sessions),
        "--max-concurrency": str(workload.users),
        "--percentile-metrics": "ttft,itl,e2el",
        "--temperature": "0",
        "--result-dir": str(folder),
        "--result-filename": "bench.json",
        # Its first prompt would be asked twice.
        "--ready-check-timeout-sec": "0",
    }
    flags = ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--save-result"]
    values = [part for option in options.items() for part in option]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", *values, *flags]


def theirs(server: Server, workload: Workload, tokenizer: str, folder: Path) -> dict[str, float]:
    """The compared figures by `vllm bench serve`.

    Raises:
        RuntimeError: it failed, or a request did.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(workload, folder / "prompts.jsonl")
    log = folder / "bench.log"
    with log.open("w", encoding="utf-8") as out:
        command = bench_command(server, workload, tokenizer, folder)
        done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise RuntimeError(f"vllm bench serve ended with {done.returncode}:\n{end_of(log)}")
    result = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    if result["completed"] != workload.sessions:
        raise RuntimeError(f"{result['completed']} of {workload.sessions} came to an end")
    return {name: result[name] for name in (*COMPARED, "completed", "total_output_tokens")}


def compare(rounds: Sequence[dict[str, dict[str, float]]], tolerance: float) -> dict[str, Any]:
    """Medians over the rounds, and the difference of ours from theirs, as a share of theirs."""
    compared: dict[str, Any] = {}
    for name in COMPARED:
        ours_, theirs_ = (
            statistics.median(one[side][name] for one in rounds) for side in ("ours", "bench")
        )
        off = ours_ / theirs_ - 1
        compared[name] = {
            "ours": ours_,
            "bench": theirs_,
            "difference": off,
            "within": abs(off) <= tolerance,
        }
    return compared


def text_table(compared: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = ["| | this load generator | vllm bench serve | difference |", "|---|---:|---:|---:|"]
    for name, row in compared.items():
        lines.append(
            f"| {name} | {row['ours']:,.2f} | {row['bench']:,.2f} | {row['difference']:+.1%} |"
        )
    return "\n".join(lines)


def measure(args: argparse.Namespace, options: Sequence[str]) -> dict[str, Any]:
    """All rounds on one server."""
    args.output.mkdir(parents=True, exist_ok=True)
    workload = replace(workload_of(args), chat_share=0.0, prefix_share=0.0)
    told = server_options(args.policy, args.kv_bytes, workload, options)
    told.append("--no-enable-prefix-caching")
    rounds = []
    with serving(args.model, args.policy, args.port, told, args.output / "server.log") as server:
        workload = replace(workload, words_per_token=words_per_token(server))
        # Not counted: what is compiled once per shape is compiled here.
        run_load(server, replace(workload, seed=workload.seed - 1), args.output / "first", "first")
        for index in range(args.rounds):
            one = replace(workload, seed=workload.seed + index)
            folder = args.output / f"round-{index}"
            print(f"round {index + 1} of {args.rounds}", file=sys.stderr, flush=True)
            rounds.append(
                {
                    "ours": ours(server, one, folder / "ours"),
                    "bench": theirs(server, one, args.model, folder / "bench"),
                }
            )
    return {
        **about(args, "benchmarks.load.cross_check"),
        "policy": args.policy,
        "server_options": told,
        "workload": asdict(workload),
        "tolerance": args.tolerance,
        "compared": compare(rounds, args.tolerance),
        "rounds": rounds,
    }


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the server's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.cross_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_options(parser, 128 * 1024**2)
    parser.set_defaults(output=Path("build/load-cross-check"))
    parser.add_argument("--policy", choices=list(POLICIES), default="full")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tolerance", type=float, default=0.1)
    defaults = Workload(
        sessions=32, users=4, prompt_tokens=(512, 1024), output_tokens=(128, 128), chat_share=0.0
    )
    add_workload_options(parser, defaults)
    return parser.parse_known_args(argv)


def main() -> None:
    args, options = parse()
    try:
        results = measure(args, options)
    except (ValueError, RuntimeError) as error:
        print(f"cross-check: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    text = json.dumps(rounded(results), indent=1)
    (args.output / "cross-check.json").write_text(text + "\n", encoding="utf-8")
    print(text_table(results["compared"]))
    if not all(row["within"] for row in results["compared"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Load tests: the same load on a server under each policy, one after the other.

    python -m benchmarks.load MODEL [--policies full razor] [--output build/load] [vLLM options]

Each policy gets a server of its own with the same model and the same bytes of KV memory,
and the same seeded sessions (see `--help` for their lengths and shares). The folder gets

    report.html   table and plots, one file
    report.json   the same figures
    overview.png  the main plots
    POLICY/       each request (records.jsonl), the server over time (samples.jsonl), logs

Options that are not listed go to the servers; those that begin with `--razor-` only to
servers under the razor policy.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.load import charts, page
from benchmarks.load.run import Measured, run_load
from benchmarks.load.server import POLICIES, serving, warm_up, words_per_token
from benchmarks.load.summary import curves, summarise
from benchmarks.load.workload import Workload
from benchmarks.residency import device

_PAIRS = ("prompt_tokens", "output_tokens", "turn_tokens", "turns")
_WHOLE = ("seed", "sessions", "users", "prefixes", "prefix_tokens")
_SHARES = ("chat_share", "prefix_share", "cancel_share", "invalid_share", "full_share")


def add_workload_options(parser: argparse.ArgumentParser, defaults: Workload) -> None:
    """An option for each field of `Workload`."""
    group = parser.add_argument_group("load, drawn from a seed")
    for name in _PAIRS:
        low, high = getattr(defaults, name)
        group.add_argument(
            _option(name), type=int, nargs=2, metavar=("LOW", "HIGH"), default=(low, high)
        )
    for name in _WHOLE:
        group.add_argument(_option(name), type=int, default=getattr(defaults, name))
    for name in _SHARES:
        group.add_argument(_option(name), type=float, default=getattr(defaults, name))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def workload_of(args: argparse.Namespace) -> Workload:
    """The workload that the options ask for.

    Raises:
        ValueError: a value outside what is accepted.
    """
    values: dict[str, Any] = {name: tuple(getattr(args, name)) for name in _PAIRS}
    values |= {name: getattr(args, name) for name in (*_WHOLE, *_SHARES)}
    return Workload(**values)


def add_server_options(parser: argparse.ArgumentParser, kv_bytes: int) -> None:
    """Options of the servers that are measured."""
    parser.add_argument("model", help="folder or hub name of the model")
    parser.add_argument("--kv-bytes", type=int, default=kv_bytes, help="KV memory of each server")
    parser.add_argument("--port", type=int, default=8160)
    parser.add_argument("--output", type=Path, default=Path("build/load"))


def server_options(
    policy: str, kv_bytes: int, workload: Workload, options: Sequence[str]
) -> list[str]:
    """vLLM options of one policy's server; the user's come last, and win."""
    own = ["--kv-cache-memory-bytes", str(kv_bytes)]
    own += ["--max-model-len", str(-(-workload.most_tokens // 1024) * 1024)]
    return own + for_policy(policy, options)


def for_policy(policy: str, options: Sequence[str]) -> list[str]:
    """Options without those of the razor policy, where it is not on."""
    if policy.startswith("razor"):
        return list(options)
    kept: list[str] = []
    skipping = False
    for option in options:
        if option.startswith("--"):
            skipping = option.startswith("--razor-")
        if not skipping:
            kept.append(option)
    return kept


def measure(
    policy: str, args: argparse.Namespace, workload: Workload, options: Sequence[str]
) -> Measured:
    """One policy's server under the load."""
    folder = args.output / policy
    folder.mkdir(parents=True, exist_ok=True)
    told = server_options(policy, args.kv_bytes, workload, options)
    print(f"{policy}: the server starts, log {folder / 'server.log'}", file=sys.stderr, flush=True)
    with serving(args.model, policy, args.port, told, folder / "server.log") as server:
        drawn = replace(workload, words_per_token=words_per_token(server))
        warm_up(server)
        return run_load(server, drawn, folder, policy, args.seconds)


def figures_of(measured: Measured, kv_bytes: int) -> dict[str, Any]:
    """What the report holds of one run; gaps only as a distribution."""
    rows = [{**asdict(record), "gaps": len(record.gaps)} for record in measured.records]
    return {
        "summary": summarise(measured),
        "kv_bytes": kv_bytes,
        "curves": curves(measured),
        "samples": [asdict(sample) for sample in measured.samples],
        "requests": rows,
    }


def about(args: argparse.Namespace, module: str) -> dict[str, Any]:
    """Command, device and versions."""
    import torch
    import vllm

    threads = os.environ.get("OMP_NUM_THREADS")
    set_before = [f"OMP_NUM_THREADS={threads}"] if threads else []
    return {
        "command": shlex.join([*set_before, "python", "-m", module, *sys.argv[1:]]),
        "device": device(),
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "model": args.model,
        "kv_bytes": args.kv_bytes,
    }


def rounded(value: Any) -> Any:
    """Numbers to six digits: more is not measured, and makes files large."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return value


def write_report(results: dict[str, Any], folder: Path, title: str) -> None:
    """report.json, report.html and overview.png."""
    text = json.dumps(rounded(results), indent=None, separators=(",", ":"))
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(page.page(results, title), encoding="utf-8")
    (folder / "overview.png").write_bytes(charts.overview(results["runs"]))


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the servers'."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_server_options(parser, 32 * 1024**2)
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=["full", "razor"])
    parser.add_argument(
        "--seconds", type=float, default=0, help="no session begins after these; 0: all of them do"
    )
    add_workload_options(parser, Workload())
    return parser.parse_known_args(argv)


def main() -> None:
    args, options = parse()
    results = {**about(args, "benchmarks.load"), "server_options": options}
    try:
        workload = workload_of(args)
        results["workload"] = asdict(workload)
        results["runs"] = {
            policy: figures_of(measure(policy, args, workload, options), args.kv_bytes)
            for policy in args.policies
        }
    except (ValueError, RuntimeError) as error:
        print(f"load: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    write_report(results, args.output, f"Load test: {' and '.join(args.policies)}")
    print(page.text_table(results))
    print(f"\n{args.output / 'report.html'}")


if __name__ == "__main__":
    main()

"""Soak: mixed load for a long time on a pool that is too small for it, and what must hold.

    python -m benchmarks.load.soak MODEL [--minutes 30] [--policy razor] [vLLM options]

Chats and completions of all lengths, shared prefixes, clients that leave in the middle of
a reply, before it or while they wait, requests that opt out of the policy, requests that
the server must refuse. At the end,

    errors      no request failed, except those that had to be refused, and all of these were
    log         no traceback in the server's log
    cancelled   clients did leave
    preempted   the pool was small enough: requests were preempted
    drained     no request is left in the server
    leaks       no page is held by anyone
    integrity   the server's own check of its pages ran, and found nothing, ever (razor)
    memory      the processes' resident memory does not grow from lap to lap
    alive       the server answers, and ends on SIGTERM

The load comes in laps, each with other sessions. After a lap the server becomes idle and is
checked. The exit status is 1 if one of these does not hold. The folder gets soak.json and
soak.html.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.load.__main__ import (
    about,
    add_server_options,
    add_workload_options,
    figures_of,
    rounded,
    server_options,
    workload_of,
)
from benchmarks.load.page import page
from benchmarks.load.run import Measured, run_load
from benchmarks.load.sampler import Sample, Sampler
from benchmarks.load.server import (
    POLICIES,
    Server,
    get,
    healthy,
    serving,
    warm_up,
    words_per_token,
)
from benchmarks.load.streaming import Record
from benchmarks.load.workload import Workload

DRAIN_SECONDS = 60
_MIB = 1024**2
_FAILED = ("error", "cut")

MIXED = Workload(
    sessions=0,
    users=16,
    prompt_tokens=(16, 1536),
    output_tokens=(8, 384),
    turn_tokens=(8, 256),
    turns=(1, 4),
    chat_share=0.6,
    prefix_share=0.3,
    prefixes=3,
    prefix_tokens=512,
    cancel_share=0.2,
    invalid_share=0.02,
    full_share=0.1,
)
"""A chat has several requests, and a session is left in one: a fifth of the sessions makes
a tenth of the requests."""

SMALL_BATCHES = ("--max-num-batched-tokens", "128", "--max-num-seqs", "32")
"""Of the server. On a CPU, vLLM's linear layers (oneDNN) keep a compiled primitive for each
number of tokens that a step has had, under any policy: up to 2,048 of them by default, some
hundreds of MiB, which would take an hour to fill. With 128 they are there after a lap, and
what grows then is something else."""


class Growth(NamedTuple):
    """Allowed growth of resident memory: a share of it, or bytes, whichever is more."""

    share: float = 0.02
    least: float = 48 * _MIB


class Finding(NamedTuple):
    """One of the things that must hold."""

    name: str
    holds: bool
    text: str


class Lap(NamedTuple):
    """One lap's load, and the server after it.

    idle: None where requests stayed in the server. checks: integrity checks made before.
    """

    measured: Measured
    idle: Sample | None
    checks: int


def wait_until_idle(sampler: Sampler, checks: int) -> Sample | None:
    """A sample of the server once no request is left in it; None where one stays.

    The engine cleans up, and checks its pages, a moment after the last reply: a sample
    that shows otherwise is taken again until the time is over, and then returned.

    Args:
        checks: integrity checks so far; another one is waited for, where the server makes any.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    while True:
        sample = sampler.sample()
        left = sample is None or sample.running + sample.waiting > 0
        late = time.monotonic() > deadline
        if sample is not None and not left:
            checked = sample.checks is None or sample.checks > checks
            if late or (sample.kv_usage == 0 and checked):
                return sample
        if late:
            return None
        time.sleep(0.5)


def run_laps(
    server: Server, workload: Workload, folder: Path, laps: int, seconds: float
) -> list[Lap]:
    """All laps on one server.

    Args:
        seconds: of one lap, after which no session begins; 0 where a lap is all its sessions.
    """
    start = time.monotonic()
    sampler = Sampler(
        lambda path: get(server.url + path), lambda: time.monotonic() - start, server.pid
    )
    done: list[Lap] = []
    for index in range(laps):
        before = sampler.sample()
        checks = (before.checks or 0) if before is not None else 0
        lap = replace(workload, seed=workload.seed + index)
        title = f"lap {index + 1} of {laps}"
        measured = run_load(server, lap, folder / f"lap-{index + 1}", title, seconds)
        done.append(Lap(measured, wait_until_idle(sampler, checks), checks))
    return done


def judge(laps: Sequence[Lap], policy: str, log: str, alive: bool, growth: Growth) -> list[Finding]:
    """All findings of a soak.

    Args:
        log: the server's. alive: whether it answered at the end.
    """
    tracebacks = log.count("Traceback")
    return [
        judge_errors(laps),
        Finding("log", tracebacks == 0, f"{tracebacks} tracebacks"),
        judge_cancelled(laps),
        judge_preempted(laps),
        judge_drained(laps),
        judge_leaks(laps),
        judge_integrity(laps, policy),
        judge_memory(laps, growth),
        Finding("alive", alive, "/health says so" if alive else "/health does not answer"),
    ]


def records_of(laps: Sequence[Lap]) -> list[Record]:
    return [record for lap in laps for record in lap.measured.records]


def judge_errors(laps: Sequence[Lap]) -> Finding:
    """What is refused had to be; everything else finishes, or its client left."""
    records = records_of(laps)
    wrong = [r for r in records if (r.outcome == "refused") != r.invalid or r.outcome in _FAILED]
    refused = sum(record.invalid for record in records)
    text = f"{len(records)} requests, {refused} to be refused, {len(wrong)} wrong"
    if wrong:
        text += f"; first: {wrong[0].outcome}, status {wrong[0].status}, {wrong[0].error}"
    return Finding("errors", not wrong, text)


def judge_cancelled(laps: Sequence[Lap]) -> Finding:
    records = records_of(laps)
    left = [record for record in records if record.outcome == "cancelled"]
    early = sum(record.ttft is None for record in left)
    text = f"{len(left)} of {len(records)} requests ({len(left) / len(records):.1%}), {early} "
    return Finding("cancelled", bool(left), text + "before the first token")


def judge_preempted(laps: Sequence[Lap]) -> Finding:
    count = int(sum(lap.measured.samples[-1].preemptions for lap in laps if lap.measured.samples))
    return Finding("preempted", count > 0, f"{count} preemptions")


def judge_drained(laps: Sequence[Lap]) -> Finding:
    stuck = [str(number) for number, lap in enumerate(laps, 1) if lap.idle is None]
    text = f"requests left after laps {', '.join(stuck)}" if stuck else "no request left"
    return Finding("drained", not stuck, text)


def judge_leaks(laps: Sequence[Lap]) -> Finding:
    """The engine's own count of pages, and each pool's where the server tells."""
    held = {
        number: lap.idle.kv_usage
        + sum(states.get("held", 0.0) for states in lap.idle.pools.values())
        for number, lap in enumerate(laps, 1)
        if lap.idle is not None
    }
    leaked = [str(number) for number, amount in held.items() if amount > 0]
    text = f"pages held after laps {', '.join(leaked)}" if leaked else "no page held after any lap"
    return Finding("leaks", not leaked and bool(held), text)


def judge_integrity(laps: Sequence[Lap], policy: str) -> Finding:
    """A check after each lap, none that found something; only the razor policy makes them."""
    if not policy.startswith("razor"):
        return Finding("integrity", True, f"the {policy} policy makes no checks")
    idle = [lap.idle for lap in laps if lap.idle is not None]
    checked = sum((lap.idle.checks or 0) > lap.checks for lap in laps if lap.idle is not None)
    found = max((sample.violations or 0 for sample in idle), default=0)
    text = f"{checked} of {len(laps)} laps checked, {found} violations"
    return Finding("integrity", checked == len(laps) and found == 0, text)


def judge_memory(laps: Sequence[Lap], growth: Growth) -> Finding:
    """Compare the idle server's resident memory: the last lap's and the first quarter's.

    Caches fill in the first laps (the prefix cache, the allocator's arenas); what still
    grows later grows with the requests.
    """
    sizes = [lap.idle.rss for lap in laps if lap.idle is not None and lap.idle.rss]
    if len(sizes) < 2:
        return Finding("memory", False, f"{len(sizes)} laps with a known size")
    base = statistics.median(sizes[: -(-len(sizes) // 4)])
    grown = sizes[-1] - base
    allowed = max(growth.share * base, growth.least)
    sizes_text = " ".join(f"{size / _MIB:.0f}" for size in sizes)
    text = f"{grown / _MIB:+.0f} MiB of {allowed / _MIB:.0f} allowed; MiB after laps: {sizes_text}"
    return Finding("memory", grown <= allowed, text)


def whole_run(laps: Sequence[Lap]) -> Measured:
    """All laps as one run, for the report; times and preemptions continue."""
    records: list[Record] = []
    samples: list[Sample] = []
    offset, preempted = 0.0, 0.0
    for lap in laps:
        records += [replace(r, start=r.start + offset) for r in lap.measured.records]
        samples += [
            replace(s, time=s.time + offset, preemptions=s.preemptions + preempted)
            for s in lap.measured.samples
        ]
        if samples:
            offset, preempted = samples[-1].time, samples[-1].preemptions
    return Measured(records, samples)


def soak(args: argparse.Namespace, workload: Workload, options: Sequence[str]) -> dict[str, Any]:
    """The whole soak: results with `findings`, `holds` and the report's figures.

    Raises:
        ValueError: neither time nor a number of sessions ends a lap.
        RuntimeError: the server or locust failed.
    """
    if not args.minutes and not workload.sessions:
        raise ValueError("minutes is 0 and sessions is 0; accepted is one of them at most")
    folder = args.output
    folder.mkdir(parents=True, exist_ok=True)
    told = server_options(args.policy, args.kv_bytes, workload, [*SMALL_BATCHES, *options])
    seconds, log = args.minutes * 60 / args.laps, folder / "server.log"
    with serving(args.model, args.policy, args.port, told, log) as server:
        # Only servers under the razor policy know what a session opts out of.
        share = workload.full_share if args.policy.startswith("razor") else 0.0
        drawn = replace(workload, words_per_token=words_per_token(server), full_share=share)
        warm_up(server)
        laps = run_laps(server, drawn, folder, args.laps, seconds)
        alive = healthy(server.url)
        # Before SIGTERM, at which vLLM logs a traceback of its own.
        text = log.read_text(encoding="utf-8", errors="replace")
    findings = judge(laps, args.policy, text, alive, Growth(least=args.growth_mib * _MIB))
    figures = figures_of(whole_run(laps), args.kv_bytes)
    # Thousands of requests: their figures are in the summary.
    del figures["requests"]
    return {
        **about(args, "benchmarks.load.soak"),
        "policy": args.policy,
        "server_options": told,
        "workload": asdict(drawn),
        "laps": args.laps,
        "lap_seconds": seconds,
        "holds": all(finding.holds for finding in findings),
        "findings": [finding._asdict() for finding in findings],
        "runs": {args.policy: figures},
    }


def thinned(results: dict[str, Any], most: int = 600) -> dict[str, Any]:
    """The results with at most so many samples, evenly."""
    runs = {}
    for policy, run in results["runs"].items():
        step = -(-len(run["samples"]) // most) or 1
        runs[policy] = {**run, "samples": run["samples"][::step]}
    return {**results, "runs": runs}


def text_table(findings: Sequence[dict[str, Any]]) -> str:
    """What held and what did not."""
    return "\n".join(
        f"{'holds' if finding['holds'] else 'FAILS':<6} {finding['name']:<10} {finding['text']}"
        for finding in findings
    )


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the server's."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_options(parser, 12 * _MIB)
    parser.set_defaults(output=Path("build/soak"))
    parser.add_argument("--policy", choices=list(POLICIES), default="razor")
    parser.add_argument(
        "--minutes",
        type=float,
        default=30,
        help="of load, all laps together; 0: each lap is --sessions, whatever time they take",
    )
    parser.add_argument("--laps", type=int, default=10)
    parser.add_argument(
        "--growth-mib",
        type=float,
        default=Growth().least / _MIB,
        help=f"resident memory may grow by so much, or by {Growth().share:.0%} of it",
    )
    add_workload_options(parser, MIXED)
    return parser.parse_known_args(argv)


def main() -> None:
    args, options = parse()
    try:
        results = soak(args, workload_of(args), options)
    except (ValueError, RuntimeError) as error:
        print(f"soak: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    results = thinned(results)
    text = json.dumps(rounded(results), separators=(",", ":"))
    (args.output / "soak.json").write_text(text + "\n", encoding="utf-8")
    (args.output / "soak.html").write_text(page(results, "Soak test"), encoding="utf-8")
    print(text_table(results["findings"]))
    sys.exit(0 if results["holds"] else 1)


if __name__ == "__main__":
    main()
